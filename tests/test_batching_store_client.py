"""The client of a remote store: nothing is lost while the store does not answer."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.core.supervisor import Restart, RestartPolicy, Supervisor
from flask_socketio_guard.delivery import batching_store_client as client_module
from flask_socketio_guard.delivery.batching_store_client import BatchingStoreClient
from flask_socketio_guard.delivery.memory import MemoryStore
from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.steps import (
    Acknowledge,
    Find,
    Finish,
    Join,
    Leave,
    Mark,
    Page,
    Put,
    Waiting,
)
from flask_socketio_guard.errors import DeliveryFormatError, DeliveryStoreError
from flask_socketio_guard.queue.reachability import Reachability
from flask_socketio_guard.states import DeliveryState
from tests.support import unit_support
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flask_socketio_guard.core.runtime import Runtime
    from flask_socketio_guard.delivery.steps import Step

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


class FarStore(MemoryStore):
    """Answers when it is up, and remembers its batches."""

    def __init__(self) -> None:
        super().__init__(
            max_messages=1000,
            max_size=10**7,
            retention=100.0,
            max_ended_size=10**6,
            max_dead_letters=10,
            max_dead_size=10**6,
            dead_retention=100.0,
        )
        self.is_up = True
        self.lost = 0  # answers that get lost
        self.batches: list[list[type]] = []
        self.threads: set[int] = set()
        self.batches_told = 0

    def apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
        if not self.is_up:
            raise DeliveryStoreError("away")
        self.batches.append([type(step) for step in steps])
        self.threads.add(threading.get_ident())
        results = super().apply(steps)
        if self.lost:
            self.lost -= 1
            raise DeliveryStoreError("lost")
        return results

    def told(self) -> None:
        self.batches_told += 1


class Running:
    """A store client whose task runs."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.store = FarStore()
        self.ended: list[Delivery] = []
        self.failures: list[BaseException] = []
        self.changes: list[bool] = []
        self.are_new: list[bool] = []
        self.unsure: list[bool] = []
        self.store_client = BatchingStoreClient(
            runtime,
            self.store,  # type: ignore[arg-type]
            on_end=self._end,
            on_failure=self.failures.append,
            on_unsure=lambda: self.unsure.append(True),
            server=Reachability(
                lambda: None, on_change=lambda *change: self.changes.append(change[0])
            ),
        )
        self.supervisor = Supervisor(runtime, on_failure=lambda *_: None, on_change=lambda *_: None)

    def _end(self, delivery: Delivery, is_new: bool) -> None:
        self.ended.append(delivery)
        self.are_new.append(is_new)

    def start(self) -> None:
        policy = RestartPolicy(
            restart=Restart.ALWAYS, first_delay=0.0, max_delay=1.0, max_restarts=None
        )
        self.supervisor.watch(
            "store-client",
            self.store_client.run,
            policy=policy,
            is_internal=True,
            wake=self.store_client.wake,
        )


@pytest.fixture
def running(runtime: Runtime, nothing_left_behind: None) -> Iterator[Running]:
    running = Running(runtime)
    yield running
    assert running.supervisor.stop(3.0, is_internal=True) == []


def message(number: int) -> Delivery:
    return Delivery(f"{number:032x}", "ann", "news", "[]", 60.0)


def test_a_message_is_stored_when_put_returns(running: Running) -> None:
    running.start()
    put = running.store_client.put(message(1))
    assert put.delivery is not None
    found = running.store.do(Find(message(1).id))
    assert found is not None
    assert (found.id, found.number) == (put.delivery.id, put.delivery.number)


def test_steps_are_done_in_order_and_many_at_a_time(running: Running) -> None:
    running.store.apply([])
    running.store_client.sent(message(1).id)
    running.store_client.returned(message(1).id)
    running.store_client.join("/,ann", "phone")
    running.store_client.leave("/,ann", "laptop")
    running.start()
    wait_for(running.runtime, lambda: not len(running.store_client))
    assert [Mark, Join, Leave] in running.store.batches


def test_the_store_hears_when_the_ends_of_a_batch_have_been_told(running: Running) -> None:
    told_before: list[int] = []
    running.store_client._on_end = lambda *_: told_before.append(running.store.batches_told)
    running.store.apply([Put(message(1))])
    running.store_client.acknowledged(message(1), "phone")
    running.start()
    wait_for(running.runtime, lambda: running.store.batches_told == 1)
    assert told_before == [0]


def test_while_the_store_is_away_put_raises_and_other_steps_are_kept(running: Running) -> None:
    running.start()
    running.store_client.put(message(1))
    running.store.is_up = False
    running.store_client.sent(message(1).id)
    running.store_client.acknowledged(message(1), "phone")
    with pytest.raises(DeliveryStoreError, match="away"):
        running.store_client.put(message(2))
    assert running.ended == []
    running.store.is_up = True
    wait_for(running.runtime, lambda: bool(running.ended))
    assert [(each.id, each.attempts, each.state) for each in running.ended] == [
        (message(1).id, 1, DeliveryState.DELIVERED)
    ]
    assert running.store.do(Find(message(2).id)) is None
    assert running.changes == [False, True]
    assert not running.store_client.is_refused


def test_messages_are_loaded_later(running: Running) -> None:
    running.start()
    running.store_client.put(message(1))
    found: list[Delivery] = []
    running.store_client.load("/,ann", 0, 10, 10**6, lambda page: found.extend(page.deliveries))
    wait_for(running.runtime, lambda: bool(found))
    assert [each.id for each in found] == [message(1).id]


def test_giving_up_and_leaving_report_what_has_ended(running: Running) -> None:
    running.start()
    running.store_client.put(message(1))
    running.store_client.put(message(2)._replace(requires_all=True))
    running.store_client.join("/,ann", "phone")
    running.store_client.join("/,ann", "laptop")
    running.store_client.acknowledged(message(2)._replace(requires_all=True), "phone")
    running.store_client.leave("/,ann", "laptop")
    running.store_client.give_up(message(1), DeliveryState.GONE)
    wait_for(running.runtime, lambda: len(running.ended) == 2)
    assert [each.state for each in running.ended] == [DeliveryState.DELIVERED, DeliveryState.GONE]
    assert running.store_client.end(message(1).id, DeliveryState.CANCELLED) is False


def test_a_message_that_is_sent_and_acknowledged_meanwhile_is_one_step(running: Running) -> None:
    running.store.do(Put(message(1)))
    running.store_client.sent(message(1).id)
    running.store_client.returned(message(1).id)
    running.store_client.sent(message(1).id)
    running.store_client.acknowledged(message(1), "phone")
    running.store.batches.clear()
    running.start()
    wait_for(running.runtime, lambda: bool(running.ended))
    assert running.store.batches == [[Acknowledge]]
    assert running.ended[0].attempts == 2


def test_a_message_that_other_devices_lack_is_still_marked_as_sent(running: Running) -> None:
    delivery = message(1)._replace(requires_all=True)
    running.store.apply([Put(delivery), Join("/,ann", "laptop")])
    running.store_client.sent(delivery.id)
    running.store_client.acknowledged(delivery, "phone")
    running.start()
    wait_for(running.runtime, lambda: not len(running.store_client))
    found = running.store_client.find(delivery.id)
    assert found is not None
    assert (found.state, found.attempts) == (DeliveryState.IN_FLIGHT, 1)


def test_marks_of_one_message_do_not_pile_up_while_the_store_is_away(running: Running) -> None:
    for _ in range(100):
        running.store_client.sent(message(1).id)
        running.store_client.returned(message(1).id)
    assert len(running.store_client) == 1


def test_a_step_that_cannot_be_done_affects_no_other(running: Running) -> None:
    running.store.do(Put(message(1)))
    loaded: list[object] = []
    running.store_client.load("/,bob", 0, 10, 10**6, loaded.append)
    running.store_client.leave("/,ann", "phone")
    running.store_client._add(client_module._Task(object()))  # type: ignore[arg-type]
    running.store_client.load("/,ann", 0, 10, 10**6, loaded.append)
    running.store_client.acknowledged(message(1), "phone")
    running.start()
    wait_for(running.runtime, lambda: bool(running.ended))
    assert len(loaded) == 2
    assert [type(failure) for failure in running.failures] == [TypeError]
    running.store_client.sent(message(1).id)
    running.store_client.join("/,ann", "phone")
    wait_for(running.runtime, lambda: not len(running.store_client))


def test_a_callback_that_raises_affects_no_other(running: Running) -> None:
    def fail(page: object) -> None:
        raise RuntimeError("mine")

    loaded: list[object] = []
    running.store_client.load("/,bob", 0, 10, 10**6, fail)
    running.store_client.load("/,ann", 0, 10, 10**6, loaded.append)
    running.start()
    wait_for(running.runtime, lambda: bool(loaded))
    assert [str(failure) for failure in running.failures] == ["mine"]


def test_a_message_whose_sender_got_an_error_is_not_stored_later(running: Running) -> None:
    """Callers do not queue up behind a store that is away."""
    running.store.is_up = False
    for number in range(300):
        running.store_client.join("/,ann", str(number))
    running.start()
    with pytest.raises(DeliveryStoreError, match="away"):
        running.store_client.put(message(1))
    running.store.is_up = True
    wait_for(running.runtime, lambda: not len(running.store_client))
    assert running.store.do(Find(message(1).id)) is None


def test_a_message_whose_sender_got_a_timeout_is_not_stored_later(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LONGEST_WAIT", 0.05)
    with pytest.raises(DeliveryStoreError, match="in time"):
        running.store_client.put(message(1))
    running.store_client.join("/,ann", "phone")
    running.start()
    wait_for(running.runtime, lambda: not len(running.store_client))
    assert running.store.do(Find(message(1).id)) is None


def test_queued_steps_are_flushed_at_the_end(running: Running) -> None:
    running.store.do(Put(message(1)))
    running.store_client.acknowledged(message(1), "phone")
    running.store_client.flush(5.0)
    assert [each.state for each in running.ended] == [DeliveryState.DELIVERED]
    running.store.is_up = False
    running.store_client.join("/,ann", "phone")
    running.store_client.flush(60.0)
    assert len(running.store_client) == 1, "it was tried once"


def test_all_messages_of_a_recipient_are_given_up_however_many(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "AT_A_TIME", 2)
    for number in range(5):
        running.store.do(Put(message(number)))
    running.store_client.fail_all("/,ann", DeliveryState.GONE)
    running.start()
    wait_for(running.runtime, lambda: len(running.ended) == 5)
    assert {each.state for each in running.ended} == {DeliveryState.GONE}


def test_a_message_that_others_ended_first_is_reported_as_such(running: Running) -> None:
    running.store.do(Put(message(1)))
    running.store.do(Finish(message(1).id, DeliveryState.CANCELLED))
    running.store_client.acknowledged(message(1), "phone")
    running.store_client.acknowledged(message(2), "phone")
    running.start()
    wait_for(running.runtime, lambda: len(running.ended) == 2)
    assert [(each.id, each.state) for each in running.ended] == [
        (message(1).id, DeliveryState.CANCELLED),
        (message(2).id, DeliveryState.PENDING),  # its end is not known
    ]
    assert running.are_new == [False, False]


def test_abandoned_steps_are_not_an_answer_of_the_store(running: Running) -> None:
    running.start()
    running.store.is_up = False
    for number in range(3):
        with pytest.raises(DeliveryStoreError, match="away"):
            running.store_client.put(message(number))
    running.runtime.sleep(0.1)
    assert running.changes == [False]
    assert running.store_client.is_refused


def test_a_lost_answer_is_not_reported_as_a_failure(running: Running) -> None:
    """A message that is stored already is not stored again."""
    running.start()
    running.store.lost = 1
    put = running.store_client.put(message(1))
    assert put.delivery is not None
    assert len(running.store) == 1
    assert running.unsure, "what ended by the steps whose answers were lost has to be looked up"


def test_the_store_is_asked_by_one_task_only(running: Running) -> None:
    """A socket of gevent belongs to one native thread, and calls come from others, too."""
    running.start()
    running.store_client.put(message(1))
    found: list[Any] = []

    def ask() -> None:
        found.append(running.store_client.find(message(1).id))
        found.append(running.store_client.end(message(1).id, DeliveryState.CANCELLED))
        found.append(running.store_client.dead_letters(5))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(running.runtime, lambda: len(found) == 3)
    thread.join(5.0)
    assert found[0].id == message(1).id
    assert found[1:] == [True, []]
    assert len(running.store.threads) == 1


def test_joining_and_leaving_while_the_store_is_away_is_no_step(running: Running) -> None:
    for _ in range(50):
        running.store_client.join("/,ann", "phone")
        running.store_client.load("/,ann", 0, 10, 10**6, lambda _: None)
        running.store_client.leave("/,ann", "phone")
    running.store.is_up = False
    running.start()
    wait_for(running.runtime, lambda: len(running.store_client) == 1)


def test_a_put_that_is_applied_too_late_is_looked_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LONGEST_WAIT", 0.05)
    running.store.do(Put(message(1)._replace(key="price")))
    apply = running.store.apply

    def apply_slowly(steps: Sequence[Step[Any]]) -> list[Any]:
        running.runtime.sleep(0.3)
        return apply(steps)

    monkeypatch.setattr(running.store, "apply", apply_slowly)
    running.start()
    with pytest.raises(DeliveryStoreError, match="in time"):
        running.store_client.put(message(2)._replace(key="price"))
    wait_for(running.runtime, lambda: bool(running.unsure))
    assert [each.id for each in running.ended] == [message(1).id]


def test_a_closed_client_raises_at_once(running: Running) -> None:
    running.store_client.flush(1.0)
    with pytest.raises(DeliveryStoreError, match="stopping"):
        running.store_client.find(message(1).id)


def test_each_attempt_is_marked(running: Running) -> None:
    running.start()
    running.store_client.put(message(1))
    for attempts in (1, 2):
        running.store_client.sent(message(1).id)
        wait_for(running.runtime, lambda: not len(running.store_client))
        found = running.store_client.find(message(1).id)
        assert found is not None
        assert found.attempts == attempts


def test_a_wait_that_timed_out_is_not_an_answer_of_the_store(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LONGEST_WAIT", 0.05)
    monkeypatch.setattr(client_module, "_PATIENCE", 1000)
    running.store.is_up = False
    running.start()
    with pytest.raises(DeliveryStoreError, match="in time"):
        running.store_client.put(message(1))
    wait_for(running.runtime, lambda: not len(running.store_client))
    running.runtime.sleep(0.05)
    assert running.changes == [False]


def test_an_error_of_a_step_is_raised_only_in_its_caller(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch with the others, which are not done again."""

    def fail(*_: object) -> None:
        raise DeliveryFormatError("cannot be read")

    monkeypatch.setitem(running.store._steps, Find, fail)
    monkeypatch.setitem(running.store._steps, Waiting, fail)
    told: list[BaseException] = []
    loaded: list[Page] = []

    def ask() -> None:
        try:
            running.store_client.find("bad")
        except DeliveryFormatError as exc:
            told.append(exc)

    tasks = [running.runtime.spawn(ask, name="ask")]
    puts = [
        running.runtime.spawn(partial(running.store_client.put, message(n)), name="put")
        for n in range(9)
    ]
    running.store_client.load("bad", 0, 10, 10**6, loaded.append)
    wait_for(running.runtime, lambda: len(running.store_client) == 11)
    running.start()
    for task in (*tasks, *puts):
        task.join(5.0)
    assert [str(each) for each in told] == ["cannot be read"]
    assert loaded == [Page([], 0, has_more=False)], "who comes next asks anew"
    assert len(running.store) == 9
    assert len(running.store.batches) == 1
    assert [type(each) for each in running.failures] == [DeliveryFormatError]
    assert running.unsure == []

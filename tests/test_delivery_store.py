"""The delivery stores: each does what the model of one does."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from flask_socketio_guard.delivery.memory import MemoryStore
from flask_socketio_guard.delivery.records import DEAD, ENDED, Delivery
from flask_socketio_guard.delivery.redis_store import RedisStore
from flask_socketio_guard.delivery.steps import (
    STEPS,
    Acknowledge,
    DeadLetters,
    Expire,
    FailAll,
    Find,
    Finish,
    Heartbeat,
    Join,
    Leave,
    Mark,
    Put,
    Stored,
    Waiting,
)
from flask_socketio_guard.delivery.store import Usage
from flask_socketio_guard.states import DeliveryState
from tests.support.scale import examples
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio_guard.delivery.steps import End, Step
    from tests.support.redis_server import RedisServer

MAX_MESSAGES = 8
RETENTION = 1_000_000.0
_NAMES = st.sampled_from(["ann", "bob"])
_DEVICES = st.sampled_from(["phone", "laptop"])
_KEYS = st.none() | st.sampled_from(["price", "place"])


@dataclass
class Known:
    """What the model knows of a message."""

    delivery: Delivery
    deadline: float
    state: DeliveryState = DeliveryState.PENDING
    attempts: int = 0
    acknowledged: set[str] = field(default_factory=set)
    by: list[str] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class StoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to a list, and compares."""

    make: ClassVar[Callable[[FakeClock], Any]]
    messages = Bundle("messages")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.store = type(self).make(self.clock)
        self.known: dict[str, Known] = {}
        self.devices: dict[str, set[str]] = {}
        self.dead: list[str] = []
        self.count = 0

    def teardown(self) -> None:
        self.store.close()

    def do(self, step: Step[Any]) -> Any:
        return self.store.apply([step])[0]

    # The model

    def open(self) -> list[Known]:
        return [known for known in self.known.values() if not known.has_ended]

    def end(self, known: Known, state: DeliveryState) -> None:
        known.state = state
        if state in DEAD:
            self.dead.append(known.delivery.id)

    def has_all(self, known: Known) -> bool:
        devices = self.devices.get(known.delivery.recipient, set())
        return bool(known.acknowledged) and devices <= known.acknowledged

    def same(self, found: Delivery | None, known: Known) -> None:
        assert found is not None
        assert (found.id, found.state, found.attempts) == (
            known.delivery.id,
            known.state,
            known.attempts,
        )
        assert (found.acknowledged_by, found.acknowledgements) == (tuple(known.by), len(known.by))

    # What happens to both

    @rule(
        target=messages,
        recipient=_NAMES,
        key=_KEYS,
        requires_all=st.booleans(),
        is_ordered=st.booleans(),
        ttl=st.sampled_from([100.0, 500.0, 3000.0]),
    )
    def put(self, **options: Any) -> str:
        self.count += 1
        id = f"{self.count:032x}"
        delivery = Delivery(id, event="news", body=f"[{self.count}]", **options)
        older = [
            known
            for known in self.open()
            if delivery.key is not None
            and known.delivery.key == delivery.key
            and known.delivery.recipient == delivery.recipient
        ]
        put = self.do(Put(delivery))
        if len(self.open()) - len(older) >= MAX_MESSAGES:
            assert put.delivery is None
            return id
        assert put.delivery is not None
        assert put.delivery.number > max(
            (known.delivery.number for known in self.known.values()), default=0
        )
        if older:
            self.end(older[0], DeliveryState.REPLACED)
            self.same(put.replaced, older[0])
        else:
            assert put.replaced is None
        self.known[id] = Known(put.delivery, self.clock.now + delivery.ttl)
        return id

    @rule(id=messages)
    def put_again(self, id: str) -> None:
        """As a sender does that has no answer from the store."""
        if id in self.known:
            known = self.known[id]
            put = self.do(Put(known.delivery))
            self.same(put.delivery, known)

    @rule(ids=st.lists(messages, max_size=3), attempts=st.integers(0, 2), is_sent=st.booleans())
    def mark(self, ids: list[str], attempts: int, *, is_sent: bool) -> None:
        self.store.apply([Mark(id, attempts, is_sent) for id in ids])
        for id in ids:
            if id in self.known and not self.known[id].has_ended:
                self.known[id].attempts += attempts
                state = DeliveryState.IN_FLIGHT if is_sent else DeliveryState.PENDING
                self.known[id].state = state

    @rule(id=messages, device=_DEVICES, attempts=st.integers(0, 2))
    def acknowledge(self, id: str, device: str, attempts: int) -> None:
        end = self.do(Acknowledge(id, device, attempts))
        known = self.known.get(id)
        if known is None or known.has_ended:
            self.had_ended(end, known)
            return
        known.attempts += attempts
        known.acknowledged.add(device)
        if known.delivery.requires_all and device not in known.by:
            known.by.append(device)
        if known.delivery.requires_all and not self.has_all(known):
            assert end is None
        else:
            self.end(known, DeliveryState.DELIVERED)
            assert end.is_new
            self.same(end.delivery, known)

    def had_ended(self, end: End, known: Known | None) -> None:
        assert not end.is_new
        if known is None:
            assert end.delivery is None
        else:
            self.same(end.delivery, known)

    @rule(
        ids=st.lists(messages, max_size=3, unique=True),
        state=st.sampled_from([DeliveryState.CANCELLED, DeliveryState.GONE, DeliveryState.REFUSED]),
    )
    def give_up(self, ids: list[str], state: DeliveryState) -> None:
        ends = self.store.apply([Finish(id, state) for id in ids])
        for id, end in zip(ids, ends, strict=True):
            known = self.known.get(id)
            if known is None or known.has_ended:
                self.had_ended(end, known)
                continue
            self.end(known, state)
            assert end.is_new
            self.same(end.delivery, known)
            assert end.delivery.body == (known.delivery.body if state in DEAD else "")

    @rule(recipient=_NAMES, limit=st.integers(1, 3))
    def fail_all(self, recipient: str, limit: int) -> None:
        ended = self.do(FailAll(f"/,{recipient}", DeliveryState.GONE, limit))
        wanted = sorted(
            (known for known in self.open() if known.delivery.recipient == recipient),
            key=lambda known: known.delivery.number,
        )[:limit]
        assert [delivery.id for delivery in ended] == [known.delivery.id for known in wanted]
        for delivery, known in zip(ended, wanted, strict=True):
            self.end(known, DeliveryState.GONE)
            self.same(delivery, known)
            assert (delivery.address, delivery.body) == (f"/,{recipient}", known.delivery.body)

    @rule(identity=_NAMES, device=_DEVICES)
    def join(self, identity: str, device: str) -> None:
        self.do(Join(f"/,{identity}", device))
        self.devices.setdefault(identity, set()).add(device)

    @rule(identity=_NAMES, device=_DEVICES)
    def leave(self, identity: str, device: str) -> None:
        ended = self.do(Leave(f"/,{identity}", device))
        was_here = device in self.devices.get(identity, set())
        self.devices.get(identity, set()).discard(device)
        wanted = [
            known
            for known in self.open()
            if was_here
            and known.delivery.recipient == identity
            and known.delivery.requires_all
            and self.has_all(known)
        ]
        assert sorted(delivery.id for delivery in ended) == sorted(
            known.delivery.id for known in wanted
        )
        for known in wanted:
            self.end(known, DeliveryState.DELIVERED)

    @rule(seconds=st.sampled_from([50.0, 300.0, 2000.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let the time of the store pass, too."""

    @rule(limit=st.integers(1, 4))
    def expire(self, limit: int) -> None:
        ended = self.store.do(Expire(limit))
        due = sorted(
            (known for known in self.open() if known.deadline <= self.clock.now),
            key=lambda known: (known.deadline, known.delivery.number),
        )
        assert [delivery.id for delivery in ended] == [known.delivery.id for known in due[:limit]]
        for known in due[:limit]:
            self.end(known, DeliveryState.EXPIRED)

    @rule(recipient=_NAMES, after=st.integers(0, 6), limit=st.integers(1, 5))
    def look_at_what_waits(self, recipient: str, after: int, limit: int) -> None:
        page = self.do(Waiting(f"/,{recipient}", after, limit, 10**6))
        wanted = sorted(
            known.delivery.number
            for known in self.open()
            if known.delivery.recipient == recipient and known.delivery.number > after
        )
        assert [delivery.number for delivery in page.deliveries] == wanted[:limit]
        assert page.last == (wanted[:limit] or [0])[-1]
        assert page.has_more == (len(wanted) >= limit)
        for delivery in page.deliveries:
            known = self.known[delivery.id]
            self.same(delivery, known)
            assert delivery.body == known.delivery.body
            left = max(0.0, known.deadline - self.clock.now)
            assert abs(delivery.ttl - left) < 40.0

    @invariant()
    def everything_is_found(self) -> None:
        ids = [*self.known, "0" * 32]
        *found, nothing = self.store.apply([Find(id) for id in ids])
        assert nothing is None
        for delivery, known in zip(found, self.known.values(), strict=True):
            self.same(delivery, known)

    @invariant()
    def the_dead_are_listed(self) -> None:
        letters = self.store.do(DeadLetters(5))
        assert [letter.delivery.id for letter in letters] == self.dead[::-1][:5]
        for letter in letters:
            self.same(letter.delivery, self.known[letter.delivery.id])


class MemoryMachine(StoreMachine):
    """In memory."""

    make = staticmethod(
        lambda clock: MemoryStore(
            max_messages=MAX_MESSAGES,
            max_size=1_000_000,
            retention=RETENTION,
            max_ended_size=1_000_000,
            max_dead_letters=1000,
            max_dead_size=1_000_000,
            dead_retention=RETENTION,
            clock=clock,
        )
    )


class RedisMachine(StoreMachine):
    """In a real Redis, whose clock is moved by the time that it takes for a jump."""

    server: ClassVar[RedisServer]

    @staticmethod
    def make(clock: FakeClock) -> RedisStore:
        del clock
        store = redis_store(RedisMachine.server.url)
        store._redis.flushall()
        return store

    def advance(self, seconds: float) -> None:
        self.store._redis.incrbyfloat(self.store._prefix + "jumped", -seconds)


def redis_store(url: str, host: str = "one", **options: Any) -> RedisStore:
    settings: dict[str, Any] = {
        "prefix": "test:",
        "timeout": 5.0,
        "lease": 1.0,
        "max_messages": MAX_MESSAGES,
        "max_size": 1_000_000,
        "retention": RETENTION,
        "max_ended_size": 1_000_000,
        "max_dead_letters": 1000,
        "max_dead_size": 1_000_000,
        "dead_retention": RETENTION,
    }
    return RedisStore(url, host=host, **(settings | options))


_SETTINGS = settings(
    deadline=None, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_store_in_memory_does_what_the_model_does() -> None:
    run_state_machine_as_test(
        MemoryMachine, settings=settings(_SETTINGS, max_examples=examples(100))
    )  # type: ignore[no-untyped-call]


@pytest.mark.timeout(120)
def test_a_store_in_redis_does_what_the_model_does(redis_server: RedisServer) -> None:
    RedisMachine.server = redis_server
    run_state_machine_as_test(RedisMachine, settings=settings(_SETTINGS, max_examples=examples(40)))  # type: ignore[no-untyped-call]


def small_store(clock: FakeClock, **options: Any) -> MemoryStore:
    bounds: dict[str, Any] = {
        "max_messages": 100,
        "max_size": 4000,
        "retention": 10.0,
        "max_ended_size": 1000,
        "max_dead_letters": 2,
        "max_dead_size": 10_000,
        "dead_retention": 10.0,
    }
    return MemoryStore(**(bounds | options), clock=clock)


def message(number: int, **options: Any) -> Delivery:
    return Delivery(f"{number:032x}", "ann", "news", "[]", 60.0, **options)


def put(store: MemoryStore, *numbers: int, **options: Any) -> list[Stored]:
    return store.apply([Put(message(number, **options)) for number in numbers])


def test_no_more_than_the_bound_is_kept() -> None:
    store = small_store(FakeClock())
    stored = [each.delivery is not None for each in put(store, *range(10))]
    assert stored == [True] * 4 + [False] * 6
    store.do(Finish(message(0).id, DeliveryState.CANCELLED))
    assert put(store, 10)[0].delivery is not None


def test_a_store_in_memory_says_how_full_it_is() -> None:
    store = small_store(FakeClock(), max_messages=2)
    assert store.usage == Usage(0, 0, 2, 4000)
    put(store, 1, 2)
    assert store.usage == Usage(2, 2 * message(1).size, 2, 4000)
    assert store.usage.fill == 1.0
    assert put(store, 3) == [Stored(None, full="messages")]
    store = small_store(FakeClock(), max_messages=2, max_size=1000)
    assert put(store, 1, 2)[1] == Stored(None, full="size")
    assert store.usage.fill == message(1).size / 1000
    store.do(Finish(message(1).id, DeliveryState.CANCELLED))
    assert store.usage.fill == 0.0


def test_a_message_that_replaces_another_needs_no_room_of_its_own() -> None:
    store = small_store(FakeClock(), max_messages=1)
    put(store, 1, key="price")
    assert put(store, 2)[0].delivery is None
    (newer,) = put(store, 3, key="price")
    assert newer.delivery is not None
    assert newer.replaced is not None
    assert newer.replaced.id == message(1).id


def test_receipts_and_dead_letters_are_forgotten_by_age_and_by_number() -> None:
    clock = FakeClock()
    store = small_store(clock)
    put(store, 0, 1, 2)
    ids = [message(number).id for number in range(3)]
    for id in ids:
        store.do(Finish(id, DeliveryState.EXPIRED))
    assert [store.do(Find(id)) is not None for id in ids] == [False, True, True]
    assert [letter.delivery.id for letter in store.do(DeadLetters(9))] == [ids[2], ids[1]]
    clock.now += 11.0
    assert [store.do(Find(id)) for id in ids] == [None, None, None]


def test_deadlines_of_ended_messages_do_not_pile_up() -> None:
    store = small_store(FakeClock(), max_size=10**9)
    for number in range(5000):
        put(store, number)
        store.do(Finish(message(number).id, DeliveryState.CANCELLED))
    assert len(store._deadlines) < 1200


def test_dead_letters_and_receipts_are_bounded_in_bytes_and_in_time() -> None:
    clock = FakeClock()
    store = small_store(clock, max_size=10**6, max_dead_letters=100, max_ended_size=4000)
    for number in range(30):
        store.do(Put(message(number)._replace(body="x" * 2000)))
        store.do(Finish(message(number).id, DeliveryState.REFUSED))
    letters = store.do(DeadLetters(100))
    assert [letter.delivery.id for letter in letters] == [message(n).id for n in (29, 28, 27)]
    assert sum(store.do(Find(message(n).id)) is not None for n in range(30)) == 9
    clock.now += 11.0
    assert store.do(DeadLetters(100)) == []
    sizes = (store._size, store._ended_size, store._dead_size)
    assert sizes == (0, 0, 0) or store.do(Find(message(29).id)) is None


def test_the_newest_devices_are_named_and_all_are_counted() -> None:
    store = small_store(FakeClock(), max_ended_size=10_000)
    store.do(Join("/,ann", "laptop"))
    store.do(Put(message(1, requires_all=True)))
    before = store.usage.size
    for number in [*range(70), 69, 60]:
        assert store.do(Acknowledge(message(1).id, f"phone-{number}", 1)) is None
    assert store.usage.size == before + 64 * 150
    store.do(Finish(message(1).id, DeliveryState.CANCELLED))
    found = store.do(Find(message(1).id))
    assert found is not None
    assert found.acknowledged_by == tuple(f"phone-{number}" for number in range(6, 70))
    assert found.acknowledgements == 70
    assert store.usage.size == 0
    assert store._ended_size > 64 * len("phone-10"), "names count"
    store._clock.now += 11.0
    assert store.do(Expire(1)) == []
    assert store._ended_size == 0


def test_an_object_that_is_not_a_step_is_an_error_of_its_own() -> None:
    store = small_store(FakeClock())
    stored, failure, found = store.apply(
        [Put(message(1)), Heartbeat(1, 0, has_moved=False), Find(message(1).id)]
    )
    assert stored.delivery == found._replace(ttl=stored.delivery.ttl)
    assert str(failure) == "an object of type Heartbeat is not a step of this store"
    with pytest.raises(TypeError, match="of type str is not a step"):
        store.do("find")  # type: ignore[arg-type]


def test_a_store_in_memory_has_every_step() -> None:
    assert set(small_store(FakeClock())._steps) == STEPS


def test_the_counted_size_is_what_a_process_needs() -> None:
    store = small_store(FakeClock(), max_messages=10**4, max_size=10**9)
    given = [
        Delivery(f"{number:032x}", f"user-{number}", "news", "x" * (number + 1), 60.0)
        for number in range(1000)
    ]
    bodies = sum(map(len, (each.body for each in given)))
    gc.collect()
    tracemalloc.start()
    try:
        for each in given:
            store.do(Put(each))
        needed = tracemalloc.get_traced_memory()[0] + bodies + 300 * len(given)
    finally:
        tracemalloc.stop()
    assert 0.8 * needed < store._size < 1.5 * needed

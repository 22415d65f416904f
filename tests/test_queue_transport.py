"""Any queue of python-socketio, through the two methods that all of them have."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from socketio import KombuManager, PubSubManager

from flask_socketio_guard import ListenerState
from flask_socketio_guard.errors import PublishError
from flask_socketio_guard.queue.transport import Probe, QueueMessage
from flask_socketio_guard.upstream.socketio.queue_transport import QueueTransport
from tests.support import unit_support, wait_until
from tests.support.cases import in_turn
from tests.support.unit_support import Bus, BusManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RedisServer
    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
NOISE = 1.5
"""Seconds that a busy machine may add to a figure before a test takes it for a failure."""


class ListManager(PubSubManager):  # type: ignore[misc]
    """Publishes into a list and listens to another."""

    def __init__(self, arrivals: list[Any]) -> None:
        super().__init__()
        self.arrivals = arrivals
        self.published: list[dict[str, Any]] = []
        self.fails_at: int | None = None

    def _publish(self, data: dict[str, Any]) -> None:
        if self.fails_at == len(self.published):
            raise ConnectionError("reset by peer")
        self.published.append(data)

    def _listen(self) -> Iterator[Any]:
        yield from self.arrivals


def transport_of(manager: Any) -> QueueTransport:
    return QueueTransport(manager, answer_timeout=0.2)


def test_messages_go_out_as_the_dicts_that_the_queue_expects() -> None:
    """With their sequence number, and the probe before them."""
    manager = ListManager([])
    publisher = transport_of(manager).publisher(lambda: True)
    batch = [QueueMessage(4, b'{"method": "emit", "n": 1}'), QueueMessage(5, b'{"n": 2}')]
    assert publisher.publish(batch, 9) is None
    probe, *sent = manager.published
    assert (probe["method"], probe["token"]) == ("guard_probe", 9)
    assert sent == [{"method": "emit", "n": 1, "guard_seq": 4}, {"n": 2, "guard_seq": 5}]
    publisher.close()


@pytest.mark.parametrize(("fails_at", "published"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_a_failure_tells_how_many_went_out(fails_at: int, published: int) -> None:
    """The probe, which goes first, is none of them."""
    manager = ListManager([])
    manager.fails_at = fails_at
    publisher = transport_of(manager).publisher(lambda: True)
    with pytest.raises(PublishError, match=r"^ConnectionError: reset by peer$") as caught:
        publisher.publish([QueueMessage(n, b"{}") for n in range(1, 4)], 1)
    assert caught.value.published == published
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_what_arrives_is_handed_over_as_it_came() -> None:
    arrivals = [{"method": "emit"}, b'{"method": "emit"}', '{"method": "emit"}', b"\xff", 5, None]
    subscription = transport_of(ListManager(arrivals)).subscribe()
    assert [subscription.read(1.0) for _ in arrivals] == [[item] for item in arrivals]
    subscription.close()


def test_a_probe_of_this_process_is_recognised_in_every_form() -> None:
    manager = ListManager([])
    transport = transport_of(manager)
    transport.publisher(lambda: True).publish([], 3)
    (probe,) = manager.published
    manager.arrivals += [probe, json.dumps(probe), json.dumps(probe).encode()]
    subscription = transport.subscribe()
    assert [subscription.read(1.0) for _ in range(3)] == [[Probe(3)]] * 3


@in_turn(
    "message",
    [
        {"method": "guard_probe", "transport": "another", "token": 3},
        {"method": "guard_probe"},
        "not json, but guard_probe",
        b'["guard_probe"]',
        '"guard_probe"',
        b"\xffguard_probe",
    ],
)
def test_what_only_looks_like_a_probe_is_none(message: Any) -> None:
    """Every process sees the probes of all, and what strangers write."""
    subscription = transport_of(ListManager([message])).subscribe()
    assert subscription.read(1.0) == [message]


@pytest.mark.parametrize("token", ["3", None, 1.5, [3]])
def test_a_probe_with_a_token_that_is_no_number_is_none(token: Any) -> None:
    manager = ListManager([])
    transport = transport_of(manager)
    transport.publisher(lambda: True).publish([], 3)
    forged = {**manager.published[0], "token": token}
    manager.arrivals.append(forged)
    assert transport.subscribe().read(1.0) == [forged]


def test_a_listening_generator_that_returns_is_an_error() -> None:
    """It never should; the supervisor starts a new one."""
    subscription = transport_of(ListManager([])).subscribe()
    with pytest.raises(RuntimeError, match=r"^the queue's listen\(\) returned$"):
        subscription.read(1.0)


def test_the_queue_answers_as_long_as_publishing_does_not_fail() -> None:
    """There is no way to ask, and a guess must not contradict what has been seen."""
    manager = ListManager([])
    transport = transport_of(manager)
    assert transport.check() is None
    publisher = transport.publisher(lambda: True)
    manager.fails_at = 0
    with pytest.raises(PublishError):
        publisher.publish([QueueMessage(1, b"{}")], None)
    failure = transport.check()
    assert failure is not None
    assert str(failure) == "ConnectionError: reset by peer"
    assert failure.__traceback__ is None  # it is kept, and would keep frames
    manager.fails_at = None
    publisher.publish([QueueMessage(1, b"{}")], None)
    assert transport.check() is None


def test_a_transport_is_named_after_its_queue(bus: Bus) -> None:
    assert transport_of(BusManager(bus)).name == "bus"


def test_the_queue_of_a_guarded_application_is_still_its_own(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """The guarded class has a ``_publish`` of its own, in front of it."""
    guarded = make_process()
    guarded.guard.emit("news", {"n": 1})
    assert guarded.guard.flush(5.0)
    (message,) = [data for data in bus.published if data["method"] == "emit"]
    assert message["data"] == [{"n": 1}]
    assert message["guard_seq"] == 1


def test_a_queue_class_may_extend_the_publishing_of_another(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    class Signing(BusManager):
        def _publish(self, data: dict[str, Any]) -> None:
            super()._publish({**data, "signed": True})

    guarded = make_process(options={"client_manager": Signing(bus)})
    guarded.guard.emit("news")
    assert guarded.guard.flush(5.0)
    assert all(data["signed"] for data in bus.published)


def test_a_queue_whose_listening_returns_is_listened_to_again(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    guarded = make_process()
    bus.is_to_return = True
    wait_until(lambda: guarded.inner.queue.listener and guarded.inner.queue.listener.restarts >= 1)
    bus.is_to_return = False
    wait_until(lambda: guarded.guard.listener_state is ListenerState.RUNNING)
    assert guarded.guard.counters["listener_restarts"] >= 1


def test_a_queue_that_is_down_keeps_messages_waiting_in_order(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    guarded = make_process()
    bus.is_down = True
    for number in range(20):
        guarded.guard.emit("news", number)
    wait_until(lambda: guarded.guard.listener_state is ListenerState.RECONNECTING)
    answer = guarded.app.test_client().get("/readyz")
    assert (answer.status_code, answer.json["status"]) == (200, "warn")
    bus.is_down = False
    assert guarded.guard.flush(5.0)
    sent = [data["data"][0] for data in bus.published if data["method"] == "emit"]
    assert sent == list(range(20))


class WaitingBus(Bus):
    """A queue that waits for its broker, as kombu does, and raises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_back = threading.Event()
        self.is_back.set()

    def publish(self, data: Any) -> None:
        self.is_back.wait(10)
        super().publish(data)


@pytest.fixture
def bus() -> Bus:
    """A queue between processes."""
    return WaitingBus()


def test_a_queue_that_waits_for_its_broker_is_found_out(
    make_process: Callable[..., Guarded], bus: WaitingBus, measured: Callable[[str, object], None]
) -> None:
    """Nothing fails and nothing comes back: the one sign is that publishing takes so long."""
    guarded = make_process()  # with the default intervals
    http = guarded.app.test_client()
    assert http.get("/readyz").json["status"] == "pass"
    bus.is_back.clear()
    began_at = time.monotonic()
    guarded.guard.emit("news", 1)
    wait_until(lambda: http.get("/readyz").json["status"] == "warn", timeout=10)
    seen_after = time.monotonic() - began_at
    measured("seen after", seen_after)
    assert seen_after < 3.0 + NOISE
    assert guarded.guard.listener_state is ListenerState.RECONNECTING
    bus.is_back.set()
    wait_until(lambda: http.get("/readyz").json["status"] == "pass")
    assert guarded.guard.flush(5.0)
    assert bus.methods() == ["emit"]


@pytest.fixture(params=["memory", "redis"])
def kombu_url(request: pytest.FixtureRequest) -> str:
    """Kombu over its in-memory transport, and over Redis."""
    if request.param == "memory":
        return "memory://"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def stop_kombu(kombu_url: str) -> Iterator[list[Guarded]]:
    """Applications that stop afterwards; a listener sees at its next message that it shall."""
    processes: list[Guarded] = []
    yield processes
    waker = KombuManager(kombu_url, write_only=True)
    for process in processes:
        stopping = threading.Thread(target=process.inner.stop, args=[5.0])
        stopping.start()
        while stopping.is_alive():
            waker._publish({"method": "wake up"})
            stopping.join(0.1)
    for manager in (waker, *(process.socketio.server.manager for process in processes)):
        manager.publisher_connection.release()


def test_kombu_carries_events_from_process_to_process(
    kombu_url: str, make_guarded: Callable[..., Guarded], stop_kombu: list[Guarded]
) -> None:
    """What python-socketio takes for everything that is not Redis, Kafka or ZeroMQ."""
    for _ in range(2):
        process = make_guarded(
            options={"client_manager": KombuManager(kombu_url)}, probe_interval=0.1
        )
        stop_kombu.append(process)
        process.inner.start()
    for process in stop_kombu:
        wait_until(
            lambda process=process: process.inner.listener_state() is ListenerState.RUNNING,
            timeout=10,
            message="the listener does not run",
        )
    source, target = stop_kombu
    target.socketio.on_event("any", print)
    client = target.polling()
    client.connect()
    source.guard.emit("news", {"n": 1})
    assert client.receive("42") == '42["news",{"n":1}]'

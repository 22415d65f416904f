"""``guard.deliver`` and what belongs to it, as an application uses them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from flask import request
from flask_socketio import SocketIO, join_room

from flask_socketio_guard import DeadLetter, DeliveryState, Receipt, Retry, SocketIOGuard
from flask_socketio_guard.delivery.memory import MemoryStore
from flask_socketio_guard.delivery.steps import Find
from flask_socketio_guard.errors import (
    ConfigError,
    DeliveryInvalid,
    DeliveryStoreFull,
    LoopQueueFull,
    RoomInvalid,
    UnknownDelivery,
)
from flask_socketio_guard.upstream.engineio.session_ids import new_session_id
from tests.support import unit_support, wait_until
from tests.support.cases import in_turn
from tests.support.unit_support import BusManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Bus, Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
guarded = unit_support.guarded
bus = unit_support.bus


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"to": ""}, ConfigError),
        ({"to": None}, ConfigError),
        ({"to": ["ann"]}, ConfigError),
        ({"to": "\ud800"}, DeliveryInvalid),
        ({"key": 5}, ConfigError),
        ({"key": ""}, ConfigError),
        ({"namespace": 5}, ConfigError),
        ({"namespace": ""}, ConfigError),
        ({"namespace": "chat"}, ConfigError),
        ({"ordered": "no"}, ConfigError),
        ({"with_id": 1}, ConfigError),
        ({"on_delivered": "f"}, ConfigError),
        ({"on_expired": 5}, ConfigError),
        ({"namespace": "/\udfff"}, DeliveryInvalid),
        ({"require": "some"}, ConfigError),
        ({"ttl": 0}, ConfigError),
        ({"ttl": float("inf")}, ConfigError),
        ({"retry": 5}, ConfigError),
    ],
)
def test_wrong_options_are_an_error_and_store_nothing(
    guarded: Guarded, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        guarded.guard.deliver("news", 1, **({"to": "ann"} | options))
    store = guarded.inner.delivery.store
    assert isinstance(store, MemoryStore)
    assert len(store) == 0


@pytest.mark.parametrize(
    "payload", [object(), b"raw", {1, 2}, float("nan"), float("inf"), "x" * 300_000]
)
def test_what_cannot_be_stored_is_an_error(guarded: Guarded, payload: object) -> None:
    with pytest.raises(DeliveryInvalid):
        guarded.guard.deliver("news", payload, to="ann")
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(DeliveryInvalid):
        guarded.guard.deliver("news", circular, to="ann")


@pytest.mark.parametrize("event", ["", 5, None, "\ud800", "connect", "disconnect"])
def test_an_event_needs_a_name(guarded: Guarded, event: Any) -> None:
    with pytest.raises((ConfigError, DeliveryInvalid)):
        guarded.guard.deliver(event, to="ann")


@in_turn(
    "delays",
    [
        (0, 1, 1),
        (1, 0, 1),
        (1, 2, 1),
        (1, 1, float("inf")),
        (float("nan"), 1, 1),
        ("1", 1, 1),
        (True, 1, 1),
        (1e-9, 1, 1),
    ],
)
def test_delays_that_make_no_sense_are_an_error(delays: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        Retry(*delays)


def test_a_receipt_has_the_state_and_cancels(guarded: Guarded) -> None:
    receipt = guarded.guard.deliver("news", ("a", {"b": 1}), to="ann")
    assert repr(receipt) == f"<Receipt {receipt.id}>"
    again = guarded.guard.receipt(receipt.id)
    assert (again.state, again.attempts) == ("pending", 0)
    assert again.wait(0.01) is DeliveryState.PENDING
    assert receipt.cancel()
    assert not again.cancel()
    assert again.wait() is DeliveryState.CANCELLED
    assert not guarded.inner.delivery.api._waiting
    with pytest.raises(UnknownDelivery):
        guarded.guard.receipt("no such id")


@pytest.mark.parametrize("timeout", ["x", float("nan"), -1])
def test_a_wait_needs_a_number_of_seconds(guarded: Guarded, timeout: Any) -> None:
    receipt = guarded.guard.deliver("news", to="ann")
    with pytest.raises(ConfigError):
        receipt.wait(timeout)
    assert receipt.wait(0) is DeliveryState.PENDING


@pytest.mark.parametrize("limit", [0, -1, "5", True, None])
def test_a_listing_needs_a_number(guarded: Guarded, limit: Any) -> None:
    with pytest.raises(ConfigError):
        guarded.guard.dead_letters(limit)


def test_what_is_delivered_is_not_shown_in_logs(guarded: Guarded) -> None:
    receipt = guarded.guard.deliver("news", "s3cret", to="ann", ttl=0.01)
    receipt.wait()
    (letter,) = guarded.guard.dead_letters()
    assert "s3cret" not in repr(letter)
    assert receipt.id in repr(letter)


def test_a_hook_that_is_not_callable_is_refused(guarded: Guarded) -> None:
    with pytest.raises(TypeError):
        guarded.guard.on_dead_letter(5)  # type: ignore[arg-type]


def test_a_room_is_asked_by_its_name(guarded: Guarded) -> None:
    for room in (None, 42):
        with pytest.raises(ConfigError):
            guarded.guard.broadcast_call("ready?", room=room)  # type: ignore[arg-type]


def test_messages_beyond_the_bound_are_refused(make_guarded: Callable[..., Guarded]) -> None:
    guarded = make_guarded(delivery_max_messages=2)
    for _ in range(2):
        guarded.guard.deliver("news", to="ann", on_delivered=print)
    with pytest.raises(DeliveryStoreFull, match="SOCKETIO_GUARD_DELIVERY_MAX_MESSAGES") as caught:
        guarded.guard.deliver("news", to="ann", on_delivered=print)
    assert caught.value.reason == "messages"
    assert len(guarded.inner.delivery.api._watches) == 2, "nobody waits for what is not stored"


def test_a_redis_without_memory_is_told_as_that(
    make_guarded: Callable[..., Guarded], make_redis: Any
) -> None:
    """No setting of the guard would help."""
    server = make_redis()
    guarded = make_guarded(delivery_store=server.url)
    guarded.guard.deliver("news", to="ann")
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(
        DeliveryStoreFull, match="Redis is out of memory: see its maxmemory"
    ) as caught:
        guarded.guard.deliver("news", to="ann")
    assert caught.value.reason == "memory"
    assert guarded.inner.delivery.checks()["deliveries:messages"].output == "memory"
    server.command("CONFIG", "SET", "maxmemory", "0")
    guarded.guard.deliver("news", to="ann")
    check = guarded.inner.delivery.checks()["deliveries:messages"]
    assert (str(check.status), check.value, check.output) == ("pass", 2, "")


def test_a_hook_gets_dead_letters_with_their_arguments(guarded: Guarded) -> None:
    told: list[DeadLetter] = []
    expired: list[Receipt] = []
    assert guarded.guard.on_dead_letter(told.append) is not None

    @guarded.guard.on_dead_letter
    def fail(letter: DeadLetter) -> None:
        raise RuntimeError("mine")

    guarded.guard.on_dead_letter(told.append)
    receipt = guarded.guard.deliver("news", {"a": 1}, to="ann", ttl=0.05, on_expired=expired.append)
    assert receipt.wait(5.0) is DeliveryState.EXPIRED
    wait_until(lambda: len(told) == 2 and bool(expired))
    assert told[0].delivery.arguments == [{"a": 1}]
    assert told[0].delivery.id == expired[0].id == receipt.id
    assert abs(told[0].died_at - time.time()) < 10.0
    assert guarded.guard.dead_letters()[0].delivery == told[0].delivery
    wait_until(lambda: guarded.guard.counters["callback_failures"] == 1)
    assert guarded.guard.counters["deliveries_dead"] == 1


def test_a_message_of_a_native_thread_that_cannot_be_handed_over_is_sent_all_the_same(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored already: an error would have the sender store it twice."""

    @guarded.socketio.on("connect")
    def connect() -> None:
        guarded.guard.identify(request.sid, "ann")  # type: ignore[attr-defined]

    def refuse(*_: object) -> None:
        raise LoopQueueFull("full")

    guarded.polling().connect()
    runtime = guarded.inner.runtime
    monkeypatch.setattr(runtime, "run_on_loop", refuse)
    receipt = guarded.guard.deliver("news", 1, to="ann")
    wait_until(lambda: receipt.state is DeliveryState.IN_FLIGHT)


def test_a_custom_store_is_used(make_guarded: Callable[..., Guarded]) -> None:
    stores: list[MemoryStore] = []

    def make_store() -> MemoryStore:
        store = MemoryStore(
            max_messages=5,
            max_size=10**6,
            retention=60.0,
            max_ended_size=10**6,
            max_dead_letters=5,
            max_dead_size=10**6,
            dead_retention=60.0,
        )
        stores.append(store)
        return store

    guarded = make_guarded(delivery_store=make_store)
    receipt = guarded.guard.deliver("news", 1, to="ann")
    (store,) = stores
    assert store.do(Find(receipt.id)) is not None


def test_a_custom_store_of_the_wrong_type_is_an_error(make_guarded: Callable[..., Guarded]) -> None:
    with pytest.raises(ConfigError, match="must return a DeliveryStore, not 5"):
        make_guarded(delivery_store=lambda: 5)


def test_a_queue_without_a_shared_store_is_warned_of_once(
    make_process: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    process = make_process()
    for _ in range(3):
        process.guard.deliver("news", 1, to="ann").cancel()
    warnings = [line for line in caplog.messages if "in the memory of this process" in line]
    assert len(warnings) == 1
    assert "SOCKETIO_GUARD_DELIVERY_STORE" in warnings[0]


def test_a_process_that_only_emits_needs_a_shared_store(
    nothing_left_behind: None, bus: Bus
) -> None:
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True), async_mode="threading")
    socketio.init_app(None)
    guard = SocketIOGuard(socketio=socketio)
    for attempt in (
        lambda: guard.deliver("news", 1, to="ann"),
        lambda: guard.receipt("5f"),
        guard.dead_letters,
    ):
        with pytest.raises(ConfigError, match="SOCKETIO_GUARD_DELIVERY_STORE"):
            attempt()
    guard.stop(2.0)


def test_messages_lost_with_the_memory_of_a_process_are_counted(
    make_guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    guarded = make_guarded()
    for _ in range(3):
        guarded.guard.deliver("news", 1, to="ann")
    guarded.guard.stop(2.0)
    assert "3 unacknowledged messages are lost" in caplog.text
    assert guarded.guard.counters["deliveries_abandoned"] == 3


@pytest.mark.parametrize("place", ["connect", "later", "thread"])
def test_a_client_gets_what_waits_for_its_identity(guarded: Guarded, place: str) -> None:
    guard = guarded.guard
    sids: list[str] = []

    @guarded.socketio.on("connect")
    def connect() -> None:
        sids.append(request.sid)  # type: ignore[attr-defined]
        if place == "connect":
            guard.identify(sids[0], "ann")

    receipt = guard.deliver("news", ("a", 2), to="ann")
    client = guarded.polling()
    client.connect()
    if place == "later":
        assert guard.identify(sids[0], "ann")
    elif place == "thread":
        thread = threading.Thread(target=guard.identify, args=[sids[0], "ann"])
        thread.start()
        thread.join()
    wait_until(lambda: receipt.state is DeliveryState.IN_FLIGHT)
    packet = client.receive("42")
    assert packet.endswith('["news","a",2]')
    client.send(f"43{packet[2 : packet.index('[')]}[]")
    assert receipt.wait(5.0) is DeliveryState.DELIVERED
    assert receipt.attempts == 1
    assert not guard.identify("no such sid", "ann")
    with pytest.raises(ConfigError):
        guard.identify(sids[0], "")
    with pytest.raises(DeliveryInvalid):
        guard.identify(sids[0], "\ud800")
    other = guarded.polling()
    other.connect()
    for foreign in (other.sid, new_session_id()):  # here, and in another process
        with pytest.raises(RoomInvalid):
            guard.identify(client.sid, foreign)
    assert guard.identify(client.sid, client.sid)


def test_a_room_with_a_name_that_is_no_text_does_no_harm(guarded: Guarded) -> None:
    @guarded.socketio.on("join")
    def join(room: str) -> None:
        join_room(room)

    client = guarded.polling()
    client.connect()
    client.call("join", "\ud800")
    receipt = guarded.guard.deliver("news", 1, to="ann")
    client.call("join", "ann")
    wait_until(lambda: receipt.state is DeliveryState.IN_FLIGHT)


def test_the_script_for_browsers_is_served(guarded: Guarded) -> None:
    with guarded.app.test_client().get("/socketio-guard/deliveries.js") as answer:
        assert answer.status_code == 200
        assert "javascript" in answer.content_type
        assert "function onDelivery(" in answer.text
        assert answer.cache_control.max_age == 3600


@pytest.mark.parametrize(("path", "status"), [("/js", 200), (None, 404)])
def test_the_script_may_be_elsewhere_or_nowhere(
    make_guarded: Callable[..., Guarded], path: str | None, status: int
) -> None:
    guarded = make_guarded(scripts_path=path)
    with guarded.app.test_client().get(f"{path or '/socketio-guard'}/deliveries.js") as answer:
        assert answer.status_code == status

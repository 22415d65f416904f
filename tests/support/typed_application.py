"""An application that is checked with ``mypy --strict``: what its author writes keeps its types.

A line with ``type: ignore`` is a mistake that must be found: mypy warns of those that are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import (
    BroadcastAnswers,
    DeadLetter,
    HandlerCall,
    ListenerState,
    Receipt,
    Retry,
    SendOutcome,
    SocketIOGuard,
    TaskHandle,
)
from flask_socketio_guard.errors import EventRejected

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial

    from typing_extensions import assert_type

    from flask_socketio_guard.delivery.records import Delivery
    from flask_socketio_guard.delivery.steps import (
        Acknowledge,
        DeadLetters,
        End,
        Expire,
        Find,
        Finish,
        Mark,
        Page,
        Put,
        Stored,
        Waiting,
    )
    from flask_socketio_guard.delivery.store import DeliveryStore
    from flask_socketio_guard.signals import Failure
    from flask_socketio_guard.states import DeliveryState

app = Flask(__name__)
socketio = SocketIO(app)
guard = SocketIOGuard(app, socketio, drain_window=5.0)


@guard.on("chat", ordered=True)
def chat(message: str) -> int:
    return len(message)


@guard.event
def greeting(name: str) -> str:
    return name


@guard.event("/chat", rate="20/second")
def elsewhere(name: str) -> str:
    return name


@guard.event(namespace="/chat", timeout=5.0, rate="1/second", rate_per="identity")
def named(name: str) -> str:
    return name


@guard.handshake("hello", timeout=3.0, schema=int)
def hello(version: int) -> bool:
    return version > 2


@guard.task
def once() -> None: ...


@guard.task(every=1.0, critical=True, restart="always")
def tick() -> int:
    return 1


@guard.before_event
def only_members(event: HandlerCall) -> None:
    if event.name == "secret":
        raise EventRejected("members only")


@guard.on_failure
def told(failure: Failure) -> str:
    return failure.error_id


@guard.on_dead_letter
def given_up(letter: DeadLetter) -> float:
    return letter.died_at


def work(number: int, text: str = "") -> list[int]:
    return [number]


def much_work(one: int, two: int, three: int, four: str) -> None: ...


def answered(answer: object) -> None: ...


def arrived(receipt: Receipt) -> None: ...


if TYPE_CHECKING:

    def types(last: Failure) -> None:
        """Each call keeps the types of what it is given, and says what it returns."""
        assert_type(chat("text"), int)
        assert_type(greeting("name"), str)
        assert_type(elsewhere(name="name"), str)
        assert_type(named("name"), str)
        assert_type(hello(version=3), bool)
        assert_type(guard.on_event("chat", chat, timeout=1.0), None)
        assert_type(once, Callable[[], None])
        assert_type(tick(), int)
        assert_type(only_members(event=HandlerCall("chat", "/", "sid", ())), None)
        assert_type(told(failure=last), str)
        assert_type(given_up(letter=guard.dead_letters()[0]), float)
        assert_type(guard.emit("news", {"a": 1}, to=["a", "b"], callback=answered), SendOutcome)
        assert_type(guard.send("text", True, "/chat", "room", skip_sid=["a"]), SendOutcome)
        assert_type(guard.call("question", to="sid", timeout=5.0), Any)
        assert_type(guard.call("question", 1, room="sid"), Any)
        assert_type(guard.broadcast_call("ready?", room="hall"), BroadcastAnswers)
        assert_type(guard.disconnect("sid"), bool)
        assert_type(guard.flush(1.0), bool)
        assert_type(
            guard.deliver(
                "bill", {}, to="ann", require="all", retry=Retry(5.0), on_expired=arrived
            ),
            Receipt,
        )
        assert_type(guard.receipt("id"), Receipt)
        assert_type(guard.dead_letters(10), list[DeadLetter])
        assert_type(guard.identify("sid", "ann"), bool)
        assert_type(guard.is_connected("sid"), bool)
        assert_type(guard.start_background_task(work, 1), TaskHandle)
        assert_type(guard.start_background_task(target=once), TaskHandle)
        assert_type(guard.start_background_task(work, 1, text="a"), TaskHandle)
        assert_type(guard.start_background_task(once, name="once"), TaskHandle)
        assert_type(guard.start_background_task(work, 1, restart="on-failure"), TaskHandle)
        assert_type(guard.start_background_task(work, 1, "a", critical=True), TaskHandle)
        assert_type(guard.start_background_task(much_work, 1, 2, 3, "4", name="much"), TaskHandle)
        assert_type(guard.start_background_task(partial(work, 1, text="a"), name="a"), TaskHandle)
        assert_type(guard.sleep(1), bool)
        assert_type(guard.drain(), bool)
        assert_type(guard.listener_state, ListenerState)
        assert_type(guard.counters, dict[str, int])

    def steps(store: DeliveryStore, delivery: Delivery) -> None:
        """A step of a delivery store says what it returns."""
        assert_type(store.do(Put(delivery)), Stored)
        assert_type(store.do(Acknowledge(delivery.id, "sid", 1)), End | None)
        assert_type(store.do(Finish(delivery.id, DeliveryState.CANCELLED)), End)
        assert_type(store.do(Waiting("/,ann", after=0, limit=10, max_size=1000)), Page)
        assert_type(store.do(Find(delivery.id)), Delivery | None)
        assert_type(store.do(DeadLetters(10)), list[DeadLetter])
        assert_type(store.do(Expire(limit=10)), list[Delivery])
        assert_type(store.apply([Find(delivery.id), Expire(10)]), list[Any])
        Mark(delivery.id, 1)  # type: ignore[call-arg]
        Finish(delivery.id, "cancelled")  # type: ignore[arg-type]
        store.do("find", delivery.id)  # type: ignore[call-arg, arg-type]

    def mistakes() -> None:
        """Each of these would fail when the application runs."""
        guard.on(5)  # type: ignore[arg-type]
        guard.on("chat", rate_per="room")  # type: ignore[arg-type]
        guard.on("chat", order=True)  # type: ignore[call-arg]
        guard.event("/chat", namespace="/chat")  # type: ignore[call-overload]
        guard.on_event("chat", handler=5)  # type: ignore[arg-type]
        guard.handshake("hello", timeout="3")  # type: ignore[arg-type]
        guard.task(work)  # type: ignore[type-var]
        guard.task(every="1")  # type: ignore[call-overload]
        guard.task(restart="sometimes")  # type: ignore[call-overload]
        guard.before_event(told)  # type: ignore[type-var]
        guard.on_failure(only_members)  # type: ignore[type-var]
        guard.on_dead_letter(told)  # type: ignore[type-var]
        guard.emit(5)  # type: ignore[arg-type]
        guard.emit("news", callback=5)  # type: ignore[arg-type]
        guard.emit("news", vlatile=True)  # type: ignore[call-arg]
        guard.send("text", brodcast=True)  # type: ignore[call-arg]
        guard.call("question")  # type: ignore[call-overload]
        guard.call("question", to="sid", timeout="5")  # type: ignore[call-overload]
        guard.deliver("bill")  # type: ignore[call-arg]
        guard.deliver("bill", to="ann", require="some")  # type: ignore[arg-type]
        guard.deliver("bill", to="ann", on_delivered=once)  # type: ignore[arg-type]
        guard.start_background_task(work)  # type: ignore[call-arg, arg-type]
        guard.start_background_task(work, "one")  # type: ignore[arg-type]
        guard.start_background_task(work, 1, 2)  # type: ignore[arg-type, call-arg]
        guard.start_background_task(work, 1, txt="a")  # type: ignore[call-arg]
        guard.start_background_task(work, "one", name="a")  # type: ignore[arg-type, call-arg]
        guard.start_background_task(work, 1, restart="maybe")  # type: ignore[call-arg]
        guard.start_background_task(much_work, 1, 2, 3, name="a")  # type: ignore[call-arg]

"""An application that is checked with ``mypy --strict``: what its author writes keeps its types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import Failure, HandlerCall, SocketIOGuard

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import assert_type

app = Flask(__name__)
socketio = SocketIO(app)
guard = SocketIOGuard(app, socketio)


@guard.on("chat", ordered=True)
def chat(message: str) -> int:
    return len(message)


@guard.event
def greeting(name: str) -> str:
    return name


@guard.event("/chat", rate="20/second")
def elsewhere(name: str) -> str:
    return name


@guard.event(namespace="/chat", timeout=5.0)
def named(name: str) -> str:
    return name


@guard.task
def once() -> None: ...


@guard.task(every=1.0, critical=True)
def tick() -> int:
    return 1


@guard.before_event
def only_members(event: HandlerCall) -> None: ...


@guard.on_failure
def told(failure: Failure) -> str:
    return failure.error_id


if TYPE_CHECKING:
    assert_type(chat("text"), int)
    assert_type(greeting("name"), str)
    assert_type(elsewhere("name"), str)
    assert_type(named("name"), str)
    assert_type(once, Callable[[], None])
    assert_type(tick(), int)
    assert_type(only_members, Callable[[HandlerCall], None])
    assert_type(told, Callable[[Failure], str])

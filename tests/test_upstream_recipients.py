"""Only ``None`` is everybody: an empty list is nobody, an empty text and a zero are rooms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask
import flask_socketio
import pytest
from flask import Flask
from flask_socketio import Namespace, SocketIO, emit, send
from socketio.exceptions import TimeoutError as CallTimeout

from tests.support import unit_support

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Bus, Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
guarded = unit_support.guarded
bus = unit_support.bus

NOBODY: list[Any] = [[], (), frozenset(), {}]
WAYS: dict[str, Callable[[Guarded, Any], object]] = {
    "guard.emit": lambda guarded, to: guarded.guard.emit("secret", to=to),
    "guard.emit, room": lambda guarded, to: guarded.guard.emit("secret", room=to),
    "guard.send": lambda guarded, to: guarded.guard.send("secret", to=to),
    "socketio.emit": lambda guarded, to: guarded.socketio.emit("secret", to=to),
    "socketio.emit, room": lambda guarded, to: guarded.socketio.emit("secret", room=to),
    "socketio.send": lambda guarded, to: guarded.socketio.send("secret", to=to),
    "server.emit": lambda guarded, to: guarded.socketio.server.emit("secret", to=to),
    "server.send": lambda guarded, to: guarded.socketio.server.send("secret", room=to),
    "manager.emit": lambda guarded, to: guarded.socketio.server.manager.emit(
        "secret", None, "/", to=to
    ),
    "ignore_queue": lambda guarded, to: guarded.socketio.emit("secret", to=to, ignore_queue=True),
    "namespace.emit": lambda guarded, to: _namespace(guarded).emit("secret", room=to),
    "namespace.send": lambda guarded, to: _namespace(guarded).send("secret", room=to),
}
IN_HANDLERS: dict[str, Callable[[Any], object]] = {
    "emit": lambda to: emit("secret", to=to),
    "emit, room": lambda to: emit("secret", room=to),
    "emit, broadcast": lambda to: emit("secret", to=to, broadcast=True),
    "flask_socketio.emit": lambda to: flask_socketio.emit("secret", to=to, include_self=True),
    "send": lambda to: send("secret", to=to),
    "send, json": lambda to: send({"secret": 1}, json=True, room=to, broadcast=True),
}


def _namespace(guarded: Guarded) -> Namespace:
    namespace = Namespace("/")
    namespace._set_socketio(guarded.socketio)
    return namespace


def connected(guarded: Guarded, *rooms: Any) -> Any:
    """Return a test client; the first of two is in *rooms*."""
    guarded.socketio.on_event("any", print)
    client = guarded.client()
    for room in rooms:
        guarded.socketio.server.enter_room(_sid(guarded, client), room)
    return client


def _sid(guarded: Guarded, client: Any) -> str:
    return str(guarded.socketio.server.manager.sid_from_eio_sid(client.eio_sid, "/"))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_list_is_nobody(guarded: Guarded, way: str) -> None:
    client = connected(guarded)
    for nobody in NOBODY:
        WAYS[way](guarded, nobody)
    assert client.get_received() == []
    WAYS[way](guarded, None)
    assert len(client.get_received()) == 1


@pytest.mark.parametrize("room", ["", 0, False])
@pytest.mark.parametrize("way", WAYS)
def test_an_empty_text_and_a_zero_are_rooms(guarded: Guarded, way: str, room: Any) -> None:
    inside, outside = connected(guarded, room), connected(guarded)
    WAYS[way](guarded, room)
    assert (len(inside.get_received()), outside.get_received()) == (1, [])


@pytest.mark.parametrize("way", IN_HANDLERS)
def test_in_a_handler_too(guarded: Guarded, way: str) -> None:
    """Where ``None`` is the client whose event it is."""
    inside, outside = connected(guarded, "", 0), connected(guarded)
    guarded.socketio.on_event("tell", lambda to: IN_HANDLERS[way](to) and None)
    for nobody in ([], {}):
        outside.emit("tell", nobody)
    assert inside.get_received() + outside.get_received() == []
    for room in ("", 0):
        outside.emit("tell", room)
        assert (len(inside.get_received()), outside.get_received()) == (1, [])
    outside.emit("tell", None)
    assert len(outside.get_received()) == 1


def test_an_application_without_the_guard_is_left_as_it_is(guarded: Guarded) -> None:
    """The functions of flask_socketio are those of all applications in the process."""
    app = Flask("unguarded")
    socketio = SocketIO(app, async_mode="threading")

    @socketio.on("tell")
    def tell(to: Any) -> None:
        emit("secret", to=to)
        emit("secret", room=to)

    client = socketio.test_client(app)
    client.emit("tell", [])
    assert len(client.get_received()) == 2
    assert emit.__doc__ == flask_socketio.emit.__doc__ != ""


def test_nobody_can_be_asked(guarded: Guarded) -> None:
    guarded.socketio.on_event("any", print)
    client = guarded.polling()
    client.connect()
    for ask in (guarded.guard.call, guarded.socketio.call, guarded.socketio.server.call):
        for nobody in ([], "", 0):
            with pytest.raises(CallTimeout):
                ask("question", to=nobody, timeout=1)
    guarded.socketio.emit("end")
    assert client.receive("42") == '42["end"]'


def test_over_the_queue_a_recipient_stays_what_it_is(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """A process without the guard takes it as it is, and raises for an empty list."""
    a, b = make_process(), make_process()
    clients = []
    for process in (a, b):
        process.socketio.on_event("enter", lambda room: flask_socketio.join_room(room))
        process.socketio.on_event("sid", lambda: flask.request.sid)  # type: ignore[attr-defined]
        client = process.polling()
        client.connect()
        clients.append(client)
    clients[1].call("enter", 0)
    clients[1].call("enter", "")
    for to in ([], 0, "", ()):
        a.socketio.emit("secret", to, to=to)
    a.socketio.emit("end")
    assert [clients[1].receive("42") for _ in range(3)] == [
        '42["secret",0]',
        '42["secret",""]',
        '42["end"]',
    ]
    assert clients[0].receive("42") == '42["end"]'
    assert [data["room"] for data in bus.published if data["method"] == "emit"] == [0, "", None]

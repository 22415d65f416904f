"""Whatever can be read of upstream's objects without the guard can be read with it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard.clients.fan_out import Batch
from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from tests.support import unit_support
from tests.support.unit_support import Bus, BusManager, PollingClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
bus = unit_support.bus

LEFT_OUT = {
    # Who takes packets out, or puts any in past the socket, is the writer's business.
    *("queue.all_tasks_done", "queue.get", "queue.get_nowait", "queue.join", "queue.mutex"),
    *("queue.not_empty", "queue.not_full", "queue.put_nowait", "queue.task_done"),
    *("queue.is_shutdown", "queue.shutdown"),  # of Python 3.13
    # The listener is the guard's: guard.listener_state says how it is.
    "manager.thread",
    # A class with dumps() and loads(), which is what upstream asks of a JSON module.
    "manager.json",
}
PLAIN = (bool, int, str, list, dict, set, tuple)


def parts(socketio: SocketIO, eio_sid: str) -> dict[str, Any]:
    server = socketio.server
    socket = server.eio.sockets[eio_sid]
    return {
        "socketio": socketio,
        "server": server,
        "eio": server.eio,
        "manager": server.manager,
        "socket": socket,
        "queue": socket.queue,
    }


def readable(socketio: SocketIO, eio_sid: str) -> dict[str, str]:
    """Return what kind of thing each public attribute is."""
    found = {}
    for part, owner in parts(socketio, eio_sid).items():
        for name in dir(owner):
            if name.startswith("_") or f"{part}.{name}" in LEFT_OUT:
                continue
            value = getattr(owner, name)
            is_plain = isinstance(value, PLAIN)
            found[f"{part}.{name}"] = (
                type(value).__name__ if is_plain else "callable" if callable(value) else "object"
            )
    return found


@pytest.mark.parametrize("has_queue", [False, True], ids=["alone", "queue"])
def test_every_public_attribute_is_there_and_of_its_kind(
    make_guarded: Callable[..., Guarded],
    make_process: Callable[..., Guarded],
    bus: Bus,
    has_queue: bool,
) -> None:
    guarded = make_process() if has_queue else make_guarded()
    app, socketio = Flask("stock"), SocketIO()
    silent: dict[str, Any] = {"client_manager": BusManager(Bus(), write_only=True)}
    socketio.init_app(app, async_mode="threading", **(silent if has_queue else {}))
    stock_client, client = PollingClient(app), guarded.polling()
    for which, each in ((socketio, stock_client), (guarded.socketio, client)):
        which.on_event("any", print)
        each.connect()
    stock = readable(socketio, stock_client.eio_sid)
    ours = readable(guarded.socketio, client.eio_sid)
    assert {name: kind for name, kind in stock.items() if ours.get(name) != kind} == {}
    assert len(stock) > 150


def test_what_waits_can_be_read(guarded_app: Guarded) -> None:
    client = guarded_app.polling()
    guarded_app.socketio.on_event("any", print)
    client.connect()
    found = parts(guarded_app.socketio, client.eio_sid)
    queue, manager = found["queue"], found["manager"]
    assert (queue.qsize(), queue.empty(), queue.full()) == (0, True, False)
    guarded_app.socketio.emit("question", callback=answer, to=client.sid)
    assert (queue.qsize(), queue.empty(), queue.unfinished_tasks) == (1, False, 1)
    (ack_id,) = manager.callbacks[client.sid]
    assert manager.callbacks == {client.sid: {ack_id: manager.callbacks[client.sid][ack_id]}}
    client.answer(client.question()[0], 1)
    assert manager.callbacks == {}
    assert found["socket"].last_ping is None


def answer(*_arguments: Any) -> None:
    """Take an answer."""


@pytest.fixture
def guarded_app(make_guarded: Callable[..., Guarded]) -> Guarded:
    """One application."""
    return make_guarded()


def test_a_broadcast_that_is_written_in_passing_is_logged_for_each_client(
    make_guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    """What goes to many is written as frames, past the queues, unless somebody logs packets."""
    logger = logging.getLogger("own")
    caplog.set_level(logging.INFO, "own")
    guarded = make_guarded(options={"engineio_logger": logger})
    guarded.socketio.on_event("any", print)
    client = guarded.polling()
    client.connect()
    socket = guarded.socketio.server.eio.sockets[client.eio_sid]
    socket._transport = SimpleNamespace(write_now=lambda _frames: True, wake=lambda: None)
    socket.write(Batch([ClientMessage.of_socketio('2["news"]')]))
    socket._transport = None
    assert caplog.messages[-1] == f'{client.eio_sid}: Sending packet MESSAGE data 2["news"]'

"""What applications plug into the classes underneath is called as without the guard, or refused."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections import Counter
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import pytest
import socketio as python_socketio
from engineio import Server as EngineServer
from flask import Flask, request
from flask_socketio import SocketIO
from socketio import Manager, PubSubManager, RedisManager, Server

from flask_socketio_guard import ListenerState, SocketIOGuard
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.upstream.redis.transport import RedisPublisher
from tests.support import unit_support, wait_until
from tests.support.unit_support import Bus, BusManager, PollingClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import RedisServer
    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
stop_guards = unit_support.stop_guards
make_process = unit_support.make_process
bus = unit_support.bus

MANAGERS = (
    *("_generate_ack_id", "_handle_callback", "_handle_close_room", "_handle_disconnect"),
    *("_handle_emit", "_handle_enter_room", "_handle_leave_room", "_publish", "_return_callback"),
    *("basic_close_room", "basic_disconnect", "basic_enter_room", "basic_leave_room"),
    *("can_disconnect", "close_room", "connect", "disconnect", "emit", "enter_room"),
    *("get_participants", "get_rooms", "initialize", "leave_room", "pre_connect"),
    *("pre_disconnect", "trigger_callback"),
)
SERVERS = (
    *("_get_event_handler", "_handle_ack", "_handle_connect", "_handle_disconnect"),
    *("_handle_eio_connect", "_handle_eio_disconnect", "_handle_eio_message"),
    *("_handle_event_internal", "_send_packet", "_send_eio_packet", "_trigger_event", "emit"),
    *("close_room", "disconnect", "enter_room", "get_environ", "leave_room", "rooms", "send"),
    *("start_background_task",),
)
ENGINES = (
    *("_get_socket", "_handle_connect", "_ok", "generate_id", "handle_request"),
    *("start_background_task",),
)
SOCKETIOS = ("_handle_event", "emit", "close_room", "send", "start_background_task")


def recording(base: type, names: tuple[str, ...], calls: Counter[str]) -> Any:
    """Return a class that counts the calls of *names* and does what *base* does."""

    def counting(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(super(recorder, self), name)(*args, **kwargs)

        # As in a class statement: the name of what is called on is in the code.
        code = method.__code__
        return FunctionType(
            code.replace(co_names=(*code.co_names, name)),
            globals(),
            name,
            None,
            method.__closure__,
        )

    methods = {name: counting(name) for name in names if hasattr(base, name)}
    recorder = type(f"Recording{base.__name__}", (base,), methods)
    recorder.__module__ = __name__
    return recorder


class Recorded:
    """An application all of whose parts count their calls."""

    def __init__(self, bus: Bus | None, *, is_guarded: bool) -> None:
        self.calls: dict[str, Counter[str]] = {
            name: Counter() for name in ("manager", "server", "engine", "socketio")
        }
        engine = recording(EngineServer, ENGINES, self.calls["engine"])
        server = recording(Server, SERVERS, self.calls["server"])
        server._engineio_server_class = lambda _self: engine
        base: Any = Manager if bus is None else BusManager
        manager = recording(base, MANAGERS, self.calls["manager"])
        self.app = Flask("recorded")
        self.socketio = recording(SocketIO, SOCKETIOS, self.calls["socketio"])()
        options = {"client_manager": manager() if bus is None else manager(bus)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(python_socketio, "Server", server)
            self.socketio.init_app(self.app, async_mode="threading", **options)
        if is_guarded:
            SocketIOGuard(self.app, self.socketio)
        self._add_handlers()

    def _add_handlers(self) -> None:
        socketio = self.socketio

        @socketio.on("do")
        def do(what: str, *args: Any) -> Any:
            sid = request.sid  # type: ignore[attr-defined]
            server = socketio.server
            if what == "ask":
                socketio.emit("question", to=sid, callback=lambda *_answer: None)
            elif what == "rooms":
                server.enter_room(sid, "room")
                server.enter_room(sid, "other")
                socketio.emit("news", to="room")
                socketio.send("news", to=["room", "other"])
                rooms = server.rooms(sid)
                server.leave_room(sid, "other")
                socketio.close_room("room")
                return len(rooms)
            elif what == "task":
                socketio.start_background_task(lambda: None).join()
            elif what == "disconnect":
                server.disconnect(sid)
            return list(args)

    def play(self, bus: Bus | None) -> None:
        """Have two clients do what clients do, and a stranger on the bus what strangers do."""
        first, second = PollingClient(self.app), PollingClient(self.app)
        first.connect()
        second.connect()
        assert first.call("do", "rooms") == [3]
        first.receive('42["news')
        first.receive('42["message')
        first.call("do", "task")
        first.send('42["do","ask"]')
        first.answer(first.question()[0])
        if bus is not None:
            self._play_on(bus, second)
        self.socketio.emit("end")
        second.receive('42["end"]')
        first.send('42["do","disconnect"]')
        first.receive("41")
        second.leave()
        wait_until(lambda: self.calls["manager"]["basic_disconnect"] >= 2)
        wait_until(lambda: not self.socketio.server.manager.rooms)

    def _play_on(self, bus: Bus, client: PollingClient) -> None:
        here = {"namespace": "/", "host_id": "stranger"}
        emit = {"method": "emit", "event": "news", "data": [1], "room": "far", "callback": None}
        room = {"sid": client.sid, "room": "far", **here}
        bus.send({"method": "enter_room", **room})
        bus.send({**emit, **here})
        client.receive('42["news",1]')
        bus.send({"method": "leave_room", **room})
        bus.send({"method": "close_room", **room})
        self.socketio.server.enter_room("not here", "room")
        self.socketio.server.disconnect("not here")


@pytest.mark.parametrize("has_queue", [False, True], ids=["alone", "queue"])
def test_every_method_that_is_called_without_the_guard_is_called(
    has_queue: bool, nothing_left_behind: None
) -> None:
    """By the same clients: whoever overrides one has it called."""
    seen = []
    for is_guarded in (False, True):
        bus = Bus() if has_queue else None
        recorded = Recorded(bus, is_guarded=is_guarded)
        recorded.play(bus)
        if bus is not None:
            stop_listening(recorded, bus)
        seen.append({part: set(calls) for part, calls in recorded.calls.items()})
    stock, guarded = seen
    assert {part: names - guarded[part] for part, names in stock.items()} == {
        part: set() for part in stock
    }
    assert len(stock["manager"]) > (20 if has_queue else 12)


# Refused, with class, method and mend


class NeverCalled(Manager):  # type: ignore[misc]
    def is_connected(self, sid: str, namespace: str) -> bool:
        return True


class Forgetful(Manager):  # type: ignore[misc]
    def basic_enter_room(self, *_args: Any, **_options: Any) -> None: ...


class Between(PubSubManager):  # type: ignore[misc]
    def emit(self, *args: Any, **options: Any) -> None:
        super().emit(*args, **options)


class Behind(RedisManager, Between):  # type: ignore[misc]
    pass


REFUSED = {
    NeverCalled: (
        "NeverCalled.is_connected would never be called, because the guard does not use it: "
        "remove is_connected(), or do not guard this SocketIO"
    ),
    Forgetful: (
        "Forgetful.basic_enter_room does not call super().basic_enter_room(), on which the guard "
        "relies: call it"
    ),
    Behind: (
        "Between.emit comes after a class of python-socketio in the bases of Behind, where the "
        "guard would bypass it: list Between first"
    ),
}


def guard_with(manager: Any = None, change: Callable[[SocketIO], object] = lambda _: None) -> None:
    app = Flask("refused")
    socketio = SocketIO(app, async_mode="threading", client_manager=manager)
    change(socketio)
    SocketIOGuard(app, socketio)


@pytest.mark.parametrize("manager", REFUSED, ids=lambda cls: cls.__name__)
def test_what_would_be_bypassed_is_refused(manager: type[Manager]) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[manager])):
        guard_with(manager())


def test_what_was_put_into_an_object_before_is_refused() -> None:
    """What it calls on is the unguarded method."""

    def count(socketio: SocketIO) -> None:
        trigger = socketio.server._trigger_event
        socketio.server._trigger_event = lambda *args: trigger(*args)

    message = (
        r"^_trigger_event of this Server was replaced by tests\.test_upstream_overrides\."
        r"test_what_was.*<lambda> before it was guarded: replace it after guard\.init_app\(\), or "
        r"override it in a subclass$"
    )
    with pytest.raises(ConfigError, match=message):
        guard_with(change=count)


def test_what_was_put_into_a_class_of_upstream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracing libraries do; wrapped such that it looks like the original."""
    for cls, name in ((Server, "_handle_eio_message"), (EngineServer, "handle_request")):
        stock = getattr(cls, name)
        traced = functools.wraps(stock)(lambda *args, stock=stock: stock(*args))
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, traced)
            message = rf"{cls.__name__}\.{name} was replaced by .*, which the guard would bypass"
            with pytest.raises(ConfigError, match=message):
                guard_with()


# Honoured


def test_the_test_client_may_be_made_before(nothing_left_behind: None) -> None:
    """It puts methods of its own into the server."""
    app = Flask("tested")
    socketio = SocketIO(app, async_mode="threading")
    socketio.on_event("echo", lambda value: value)
    client = socketio.test_client(app)
    SocketIOGuard(app, socketio)
    assert client.is_connected()


def test_a_manager_may_know_nothing_of_the_guard(make_guarded: Callable[..., Guarded]) -> None:
    """Neither its options nor what its emit returns."""
    calls = []

    class Plain(Manager):  # type: ignore[misc]
        def emit(
            self, event, data, namespace, room=None, skip_sid=None, callback=None, ignore_queue=0
        ):
            calls.append((event, room))
            super().emit(event, data, namespace, room, skip_sid, callback)

        def can_disconnect(self, sid, namespace):
            return sid in calls and super().can_disconnect(sid, namespace)

    guarded = make_guarded(options={"client_manager": Plain()})
    guarded.socketio.on_event("echo", lambda value: value)
    client = guarded.polling()
    client.connect()
    assert guarded.guard.emit("news", to=client.sid, strict=True) == "queued"
    assert client.receive("42") == '42["news"]'
    assert calls == [("news", client.sid)]
    guarded.guard.disconnect(client.sid)
    assert client.call("echo", 1) == [1]
    calls.append(client.sid)
    guarded.guard.disconnect(client.sid)
    client.receive("41")


def test_what_raises_in_place_of_the_guards_is_a_failure_of_the_handler(
    make_guarded: Callable[..., Guarded],
) -> None:
    guarded = make_guarded()
    guarded.socketio.on_event("echo", lambda value: value)
    client, other = guarded.polling(), guarded.polling()
    client.connect()
    server = guarded.socketio.server

    def raise_error(*_args: Any) -> None:
        raise LookupError("no such thing")

    server._trigger_event = raise_error
    (answer,) = client.call("echo", 1)
    assert answer["error"]["code"] == "internal_error"
    assert other.connect().startswith('44{"message":"Connection rejected by server"')
    client.leave()
    wait_until(lambda: guarded.guard.counters.get("handler_failures", 0) >= 3)
    wait_until(lambda: not server.manager.rooms)


class Signing(RedisManager):  # type: ignore[misc]
    def _publish(self, data: dict[str, Any]) -> None:
        super()._publish({**data, "signed": True})


class Own(RedisManager):  # type: ignore[misc]
    def _publish(self, data: dict[str, Any]) -> None:
        self._redis_connect()
        self.redis.publish(self.channel, self.json.dumps(data))


def test_who_extends_what_is_published_keeps_the_guards_connections(
    make_guarded: Callable[..., Guarded], redis_server: RedisServer
) -> None:
    processes = [
        make_guarded(options={"client_manager": Signing(redis_server.url)}) for _ in range(2)
    ]
    for process in processes:
        process.inner.start()
        listening = process.inner.listener_state
        wait_until(lambda listening=listening: listening() is ListenerState.RUNNING, timeout=10)
    a, b = processes
    b.socketio.on_event("any", print)
    seen: list[dict[str, Any]] = []
    handle = b.socketio.server.manager._handle_emit

    def look(message: dict[str, Any]) -> None:
        seen.append(message)
        handle(message)

    b.socketio.server.manager._handle_emit = look
    client = b.polling()
    client.connect()
    a.guard.emit("news")
    assert client.receive("42") == '42["news"]'
    assert seen[0]["signed"]
    assert a.inner.queue is not None
    assert isinstance(a.inner.queue.outbox._publisher, RedisPublisher)


class Discreet(BusManager):
    def _handle_emit(self, message: dict[str, Any]) -> None:
        if message["event"] != "secret":
            super()._handle_emit(message)


def test_who_handles_emits_otherwise_handles_those_of_its_own_process_too(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    guarded = make_process(options={"client_manager": Discreet(bus)})
    guarded.socketio.on_event("any", print)
    client = guarded.polling()
    client.connect()
    for event in ("secret", "news"):
        guarded.socketio.emit(event)
    assert client.receive("42") == '42["news"]'


def test_who_publishes_otherwise_has_a_queue_of_its_own(
    make_guarded: Callable[..., Guarded],
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And is told what that costs."""
    caplog.set_level("INFO", "flask_socketio_guard")
    guarded = make_guarded(options={"client_manager": Own(redis_server.url)})
    assert guarded.inner.queue is not None
    assert not isinstance(guarded.inner.queue.outbox._publisher, RedisPublisher)
    assert "the message queue is used through Own" in caplog.text


def stop_listening(recorded: Recorded, bus: Bus) -> None:
    bus.is_to_return = True
    guard = recorded.app.extensions.get("socketio_guard")
    if guard is None:
        with contextlib.suppress(AttributeError):
            logging.getLogger("socketio.server").disabled = True
            while recorded.socketio.server.manager.thread.is_alive():
                bus.send({"method": "wake up"})
                recorded.socketio.server.manager.thread.join(0.05)
        logging.getLogger("socketio.server").disabled = False
        return
    stopping = recorded.socketio.server.eio.start_background_task(guard.stop, 5.0)
    while stopping.is_alive():
        bus.send({"method": "wake up"})
        stopping.join(0.05)


def test_what_an_application_puts_on_an_instance_stays() -> None:
    app = Flask("own")
    socketio = SocketIO(async_mode="threading")
    sent: list[object] = []

    def tell(self: SocketIO, what: object) -> object:
        return what

    @functools.wraps(SocketIO.send)
    def send(self: SocketIO, data: object, **options: object) -> None:
        sent.append(data)

    socketio.tell = MethodType(tell, socketio)
    socketio.send = MethodType(send, socketio)
    socketio.init_app(app)
    SocketIOGuard(app, socketio)
    assert socketio.tell(1) == 1
    socketio.send("x")
    assert sent == ["x"]

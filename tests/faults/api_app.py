"""The application that calls what Flask-SocketIO and python-socketio offer, one call a step.

A step is a function of :class:`Steps`; it runs in a handler, in an HTTP request or in a background
task, and what it returns or raises is the answer. The environment says what the application is,
as for ``tests.faults.app``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import flask
import flask_socketio
import socketio as python_socketio
from flask import Flask, jsonify, request, session
from flask_socketio import Namespace

from tests.faults.app import Application

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CLASS = "/class"
API_APP = "tests.faults.api_app:create_app()"
_PATIENCE = 3  # seconds


class Clients:
    """The session ids of the clients: two of ``/`` and one of :data:`CLASS`."""

    def __init__(self, sids: dict[str, str]) -> None:
        self.a, self.b, self.c = sids["a"], sids["b"], sids["c"]
        self._names = {sid: name for name, sid in sids.items()}

    def named(self, rooms: Iterable[Any]) -> list[Any]:
        """Return rooms by name, in order."""
        return sorted(self._names.get(room, room) for room in rooms)


class Steps:
    """What is called; the name of a function says which of the places it may be called in."""

    def __init__(self, application: ApiApplication) -> None:
        self.app = application.app
        self.socketio = application.socketio
        self.server = application.socketio.server
        self.notes = application.notes

    def answered(self, ask: Callable[[Callable[..., None]], object]) -> Any:
        """Return what *ask* returns, and what the callback that it is given gets."""
        event, got = self.server.eio.create_event(), []

        def callback(*args: Any) -> None:
            sid = getattr(request, "sid", None) if flask.has_request_context() else "no request"
            got.append([list(args), sid])
            event.set()

        returned = ask(callback)
        event.wait(_PATIENCE)
        return returned, got

    # SocketIO

    def any_emit(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1)

    def any_emit_nothing(self, to: Clients) -> Any:
        return self.socketio.emit("news")

    def any_emit_several(self, to: Clients) -> Any:
        return self.socketio.emit("news", (1, [2], {"three": 3}), to=to.b)

    def any_emit_two_arguments(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, to.b)

    def any_emit_list(self, to: Clients) -> Any:
        return self.socketio.emit("news", [1, 2], room=to.b)

    def any_emit_bytes(self, to: Clients) -> Any:
        return self.socketio.emit("news", {"bytes": b"\0\1", "more": [b"x"]}, to=to.b)

    def any_emit_what_json_cannot_hold(self, to: Clients) -> Any:
        return self.socketio.emit("news", object(), to=to.b)

    def any_emit_namespace(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, namespace=CLASS)

    def any_emit_namespace_none(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, namespace=None)

    def any_emit_to_several(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, to=[to.a, to.b, to.a])

    def any_emit_to_nobody(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, to="nobody")

    def any_emit_skipping(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, skip_sid=to.a)

    def any_emit_skipping_several(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, skip_sid=[to.a, to.b])

    def any_emit_skipping_oneself(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, include_self=False)

    def any_emit_broadcast_keyword(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, broadcast=True)

    def any_emit_ignoring_the_queue(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, ignore_queue=True)

    def any_emit_unknown_keyword(self, to: Clients) -> Any:
        return self.socketio.emit("news", 1, nonsense=True)

    def any_emit_with_callback(self, to: Clients) -> Any:
        return self.answered(lambda done: self.socketio.emit("ask", 1, to=to.b, callback=done))

    def any_emit_with_callback_to_all(self, to: Clients) -> Any:
        return self.socketio.emit("ask", 1, callback=lambda *args: None)

    def any_call(self, to: Clients) -> Any:
        return self.socketio.call("ask", (1, 2), to=to.b)

    def any_call_without_recipient(self, to: Clients) -> Any:
        return self.socketio.call("ask", 1)

    def any_call_unanswered(self, to: Clients) -> Any:
        return self.socketio.call("ignore", 1, to=to.b, timeout=0.2)

    def any_send(self, to: Clients) -> Any:
        return self.socketio.send("text", to=to.b)

    def any_send_json(self, to: Clients) -> Any:
        return self.socketio.send({"a": 1}, json=True, namespace=CLASS)

    def any_send_skipping_oneself(self, to: Clients) -> Any:
        return self.socketio.send("text", include_self=False)

    def any_send_with_callback(self, to: Clients) -> Any:
        return self.answered(lambda done: self.socketio.send("text", to=to.b, callback=done))

    def any_close_room(self, to: Clients) -> Any:
        self.server.enter_room(to.a, "room")
        self.server.enter_room(to.b, "room")
        before = to.named(self.server.rooms(to.a))
        returned = self.socketio.close_room("room")
        return (
            returned,
            before,
            to.named(self.server.rooms(to.a)),
            self.socketio.emit("news", 1, to="room"),
        )

    def any_background_task(self, to: Clients) -> Any:
        got: list[Any] = []

        def task(*args: Any, **kwargs: Any) -> str:
            got.append([list(args), kwargs, flask.has_request_context(), flask.has_app_context()])
            return "returned"

        handle = self.socketio.start_background_task(task, 1, two=2)
        handle.join()
        return got, self.socketio.sleep(0), self.socketio.sleep(0.01)

    def any_background_task_of_the_server(self, to: Clients) -> Any:
        got: list[int] = []
        self.server.start_background_task(got.append, 1).join()
        return got, self.server.sleep(0.01)

    def any_attributes(self, to: Clients) -> Any:
        socketio = self.socketio
        return (
            socketio.async_mode,
            socketio.manage_session,
            socketio.server.async_mode,
            socketio.server_options.get("nothing"),
            sorted(self.app.extensions.keys() - {"socketio_guard"}),
            self.app.extensions["socketio"] is socketio,
            isinstance(socketio, flask_socketio.SocketIO),
            isinstance(socketio.server, python_socketio.Server),
            isinstance(socketio.server.manager, python_socketio.Manager),
            socketio.reason.CLIENT_DISCONNECT,
            sorted(socketio.server.handlers),
            sorted(socketio.server.namespace_handlers),
            sorted(socketio.exception_handlers),
        )

    def any_register_late(self, to: Clients) -> Any:
        """Also in every other way in which a handler can be."""
        socketio = self.socketio

        @socketio.on("late")
        def late(value: Any) -> Any:
            return ["late", value]

        @socketio.event
        def late_event(value: Any) -> Any:
            return ["event", value]

        @socketio.event(namespace=CLASS)
        def late_function(value: Any) -> Any:
            return ["function", value]

        socketio.on_event("late_on", lambda value: ["on_event", value])
        self.server.on("late_server", lambda sid, value: ["server", value])

        @self.server.event
        def late_server_event(sid: str, value: Any) -> Any:
            return ["server event", value]

        return late(1), late_event(1), late_function(1), late_server_event("x", 1)

    # Functions of the module

    def handler_emit(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1)

    def handler_emit_to_others(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, broadcast=True, include_self=False)

    def handler_emit_to_another(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, to=to.b), flask_socketio.emit("news", 2, room=to.b)

    def handler_emit_namespace(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, namespace=CLASS, broadcast=True)

    def handler_emit_skipping(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, broadcast=True, skip_sid=to.b, ignore_queue=True)

    def handler_emit_with_callback(self, to: Clients) -> Any:
        return self.answered(lambda done: flask_socketio.emit("ask", 1, callback=done))

    def handler_emit_two_arguments(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, 2)

    def handler_call(self, to: Clients) -> Any:
        return flask_socketio.call("ask", 1), flask_socketio.call("ask", 2, to=to.b, timeout=2)

    def handler_send(self, to: Clients) -> Any:
        return flask_socketio.send("text"), flask_socketio.send({"a": 1}, json=True, broadcast=True)

    def handler_send_with_callback(self, to: Clients) -> Any:
        return self.answered(lambda done: flask_socketio.send("text", to=to.b, callback=done))

    def handler_rooms(self, to: Clients) -> Any:
        joined = flask_socketio.join_room("one"), flask_socketio.join_room("one", sid=to.b)
        joined += (flask_socketio.join_room("two", sid=to.c, namespace=CLASS),)
        seen = to.named(flask_socketio.rooms()), to.named(flask_socketio.rooms(to.c, CLASS))
        flask_socketio.emit("news", 1, to="one")
        flask_socketio.emit("news", 2, to="one", include_self=False)
        left = flask_socketio.leave_room("one"), flask_socketio.leave_room("one", sid=to.b)
        flask_socketio.emit("news", 3, to="one")
        closed = flask_socketio.close_room("two", namespace=CLASS)
        return joined, seen, left, closed, to.named(flask_socketio.rooms(to.c, CLASS))

    def any_join_outside(self, to: Clients) -> Any:
        return flask_socketio.join_room("one", sid=to.a, namespace="/"), flask_socketio.leave_room(
            "one", to.a, "/"
        )

    def any_emit_outside(self, to: Clients) -> Any:
        return flask_socketio.emit("news", 1, to=to.b, namespace="/")

    def any_rooms_of_a_stranger(self, to: Clients) -> Any:
        return self.server.rooms("nobody")

    def any_join_of_a_stranger(self, to: Clients) -> Any:
        return self.server.enter_room("nobody", "room")

    def any_leave_of_a_stranger(self, to: Clients) -> Any:
        return self.server.leave_room("nobody", "room"), self.server.leave_room(
            to.a, "never joined"
        )

    # What a handler finds

    def handler_request(self, to: Clients) -> Any:
        found: Any = request
        return (
            found.sid == to.a,
            found.namespace,
            found.event["message"],
            list(found.event["args"])[:1],
            found.method,
            found.path,
            sorted(found.args),
            found.endpoint,
            found.url_rule is None,
            flask.url_for("page"),
            flask.current_app.name,
            found.environ["flask.app"] is self.app,
        )

    def handler_session(self, to: Clients) -> Any:
        session["seen"] = session.get("seen", 0) + 1
        session.modified = True
        return sorted(session.items()), type(session).__name__

    def any_page_session(self, to: Clients) -> Any:
        with self.app.test_client() as http:
            return http.get("/page").get_json()

    # python-socketio's server

    def any_server_emit(self, to: Clients) -> None:
        """What it returns differs: the guard's says what became of it."""
        self.server.emit("news", 1, to=to.b)
        self.server.emit("news", [2], room=to.b, skip_sid=to.a)
        self.server.send("text", to=to.b, namespace="/")

    def any_server_emit_positional(self, to: Clients) -> None:
        self.server.emit("news", 1, to.b, None, to.a, "/", None)
        self.server.send("text", to.b, None, None, "/", None)

    def any_server_callback(self, to: Clients) -> Any:
        return self.answered(
            lambda done: self.server.emit("ask", 1, to=to.b, callback=done) and None
        )

    def any_server_call(self, to: Clients) -> Any:
        return (
            self.server.call("ask", 1, to=to.b),
            self.server.call("ask", (), sid=to.b),
            self.server.call("ask", None, to=to.c, namespace=CLASS),
        )

    def any_server_session(self, to: Clients) -> Any:
        server = self.server
        before = server.get_session(to.b)
        server.save_session(to.b, {"name": "b"})
        with server.session(to.b) as opened:
            opened["more"] = 1
        after = server.get_session(to.b)
        server.save_session(to.b, {})
        return before, after, server.get_session(to.c, namespace=CLASS)

    def any_server_session_of_a_stranger(self, to: Clients) -> Any:
        return self.server.get_session("nobody")

    def any_server_facts(self, to: Clients) -> Any:
        server = self.server
        environ = server.get_environ(to.b)
        return (
            server.transport(to.b),
            server.transport(to.c, namespace=CLASS),
            environ["PATH_INFO"],
            environ["flask.app"] is self.app,
            server.get_environ("nobody"),
            server.is_asyncio_based(),
            server.manager.is_connected(to.b, "/"),
            server.manager.is_connected("nobody", "/"),
            sorted(server.manager.get_namespaces()),
            sorted(sid for sid, _ in server.manager.get_participants("/", None))
            == sorted([to.a, to.b]),
            to.named(server.manager.get_rooms(to.b, "/")),
            server.manager.sid_from_eio_sid(server.manager.eio_sid_from_sid(to.b, "/"), "/")
            == to.b,
            server.manager.eio_sid_from_sid(to.b, "/") in server.eio.sockets,
            server.manager.eio_sid_from_sid(to.b, "/") in server.environ,
            len(server.eio.sockets),
        )

    def any_server_facts_of_a_stranger(self, to: Clients) -> Any:
        return self.server.transport("nobody")

    def any_socket_facts(self, to: Clients) -> Any:
        """What people read of python-engineio's sockets, although nobody documents it."""
        socket = self.server.eio.sockets[self.server.manager.eio_sid_from_sid(to.b, "/")]
        eio = self.server.eio
        return (
            [socket.connected, socket.upgraded, socket.upgrading, socket.closed, socket.closing],
            socket.queue.qsize(),
            socket.queue.empty(),
            socket.queue.full(),
            socket.server is eio,
            socket.session,
            socket.sid in eio.sockets,
            eio.transport(socket.sid),
            eio.get_session(socket.sid) == socket.session,
            [eio.ping_interval, eio.ping_timeout, eio.max_http_buffer_size, eio.cookie],
            eio.is_asyncio_based(),
            type(eio.generate_id()).__name__,
            type(eio.create_queue()).__name__ != "",
            eio.get_queue_empty_exception().__name__,
        )

    def any_eio_send(self, to: Clients) -> Any:
        eio_sid = self.server.manager.eio_sid_from_sid(to.b, "/")
        return self.server.eio.send(eio_sid, '2["news","by Engine.IO"]')

    def any_eio_send_to_a_stranger(self, to: Clients) -> Any:
        return self.server.eio.send("nobody", "x")

    def any_server_disconnect_of_a_stranger(self, to: Clients) -> Any:
        return self.server.disconnect("nobody")

    def handler_disconnect_of_a_stranger(self, to: Clients) -> Any:
        disconnect = flask_socketio.disconnect
        return disconnect("nobody"), disconnect("nobody", namespace=CLASS, silent=True)

    def any_register_nonsense(self, to: Clients) -> Any:
        return [
            raised(lambda: self.socketio.on_namespace(object())),
            raised(lambda: self.server.register_namespace(object())),
            raised(lambda: self.socketio.on_error_default(1)),
            raised(lambda: self.socketio.on_error("/x")(1)),
        ]

    def any_class_methods(self, to: Clients) -> Any:
        """Those of a class-based namespace, called from wherever."""
        here = self.server.namespace_handlers[CLASS]
        here.emit("news", 1)
        here.emit("news", 2, room=to.c, include_self=True, callback=None)
        here.send("text")
        here.close_room("nowhere")
        here.enter_room(to.c, "there")
        rooms = to.named(here.rooms(to.c))
        here.leave_room(to.c, "there")
        here.save_session(to.c, {"name": "c"})
        with here.session(to.c) as opened:
            opened["more"] = 1
        answer = here.call("ask", 1, to=to.c)
        return rooms, here.get_session(to.c), answer, here.namespace, here.socketio is self.socketio


def raised(call: Callable[[], object]) -> str:
    """Say what *call* raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class ApiNamespace(Namespace):
    """A class-based namespace."""

    def on_connect(self, auth: Any) -> None:
        """Let everybody in."""

    def on_disconnect(self, reason: Any) -> None:
        """Do nothing."""

    def on_give(self, what: str) -> Any:
        """Answer with a value of that kind."""
        return VALUES[what]

    def on_fail(self) -> Any:
        """Raise; ``error`` answers."""
        raise LookupError("failed")

    def error(self, exc: Exception) -> Any:
        """Answer in place of a handler that raised."""
        return ["answered", type(exc).__name__]


VALUES: dict[str, Any] = {
    "nothing": None,
    "one": 1,
    "false": False,
    "empty": [],
    "list": [1, [2]],
    "tuple": (1, 2),
    "no tuple": (),
    "one tuple": (1,),
    "dict": {"a": None},
    "text": "ä\u2028",
    "bytes": b"\0\xff",
    "deep bytes": {"a": [b"x", {"b": b"y"}]},
}


class ApiApplication(Application):
    """One process of the application."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []
        self.steps = Steps(self)


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    application = ApiApplication()
    _add_handlers(application)
    _add_routes(application)
    return application.app


def _take(application: ApiApplication, name: str, sids: dict[str, str]) -> Any:
    """Take one step; return what it returned or raised, with session ids by their names."""
    try:
        result = repr(getattr(application.steps, name)(Clients(sids)))
    except Exception as error:
        result = f"raised {type(error).__name__}: {error}"
    result = re.sub("0x[0-9a-f]+", "0x", result).replace("GuardedServer", "Server")
    for client, sid in sids.items():
        result = result.replace(sid, client)
    return result


def _add_handlers(application: ApiApplication) -> None:
    socketio = application.socketio

    @socketio.on("connect")
    def connect(auth: Any = None) -> None:
        session["auth"] = auth

    @socketio.on("step")
    def step(name: str, sids: dict[str, str]) -> Any:
        return _take(application, name, sids)

    @socketio.on("give")
    def give(what: str) -> Any:
        return VALUES[what]

    @socketio.on("echo")
    def echo(*args: Any) -> Any:
        return args

    @socketio.on("fail")
    def fail() -> None:
        raise LookupError("failed")

    @socketio.on_error()
    def on_error(error: Exception) -> Any:
        return ["answered", type(error).__name__, request.event["message"]]  # type: ignore[attr-defined]

    @socketio.on("*", namespace="/any")
    def any_event(event: str, *args: Any) -> Any:
        return ["caught", event, list(args), request.event["message"]]  # type: ignore[attr-defined]

    @socketio.on("named", namespace="*")
    def in_any_namespace(*args: Any) -> Any:
        return ["somewhere", request.namespace, list(args)]  # type: ignore[attr-defined]

    socketio.on_namespace(ApiNamespace(CLASS))


def _add_routes(application: ApiApplication) -> None:
    app = application.app
    app.secret_key = "secret"

    @app.get("/")
    def index() -> str:
        return "here"

    @app.get("/page")
    def page() -> Any:
        session["visits"] = session.get("visits", 0) + 1
        return jsonify(dict(session))

    @app.post("/step")
    def step() -> Any:
        given = request.get_json()
        if not given["in_task"]:
            return jsonify(_take(application, given["name"], given["sids"]))
        found: list[Any] = []

        def task() -> None:
            with app.app_context():
                found.append(_take(application, given["name"], given["sids"]))

        application.socketio.start_background_task(task).join()
        return jsonify(found)

    @app.post("/fence")
    def fence() -> Any:
        for namespace in ("/", CLASS):
            application.socketio.emit("fence", request.get_json()["number"], namespace=namespace)
        return jsonify(True)

"""The application that stock and guarded processes run to be compared.

It does what programs tell it to, in events, in HTTP requests and in background tasks, and says
what it saw: of the request, the session, ``g``, the teardown functions, and why clients left.

The environment says what it is, as for ``tests.faults.app``.
"""

from __future__ import annotations

import base64
import functools
import importlib
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flask
import flask_socketio
from flask import Flask, Response, jsonify, request, session
from flask.sessions import SessionInterface, SessionMixin
from flask_socketio import ConnectionRefusedError as ConnectionRefused
from flask_socketio import Namespace
from werkzeug.datastructures import CallbackDict

from tests.faults.app import Application, _log_to_file

if TYPE_CHECKING:
    from collections.abc import Callable

SAMENESS_APP = "tests.faults.sameness_app:create_app()"
NAMESPACES = ("/", "/func", "/class")
"""Where clients are let in. The last has a class, the others have functions."""
REFUSING = "/refusing"
WAIT_TIMEOUT = 5.0
"""How long the application waits for what should happen at once, in seconds."""

_POLL_INTERVAL = 0.001
_CALL_TIMEOUT = 2.0
_VARYING = ("Host", "Cookie")
"""Headers whose values are not the same in two fleets."""


class StoredSession(CallbackDict[str, Any], SessionMixin):
    """A session that the server keeps."""

    def __init__(self, key: str, values: dict[str, Any]) -> None:
        def note(changed: StoredSession) -> None:
            changed.modified = True

        super().__init__(values, note)
        self.key = key
        self.modified = False


class StoredSessions(SessionInterface):
    """Keeps sessions in this process, and counts how often one is saved."""

    def __init__(self, application: SamenessApplication) -> None:
        self._application = application
        self._stored: dict[str, dict[str, Any]] = {}

    def open_session(self, app: Flask, request: flask.Request) -> StoredSession:
        key = request.cookies.get("key", "")
        return StoredSession(key, dict(self._stored.get(key, {})))

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        assert isinstance(session, StoredSession)
        if "play" in request.args:
            self._application.play.counts[f"saved:{session.modified}"] += 1
        if session.modified:
            self._stored[session.key] = dict(session)
            response.set_cookie("saved", "1")


@dataclass
class Play:
    """What was seen of the clients of one program.

    Attributes:
        counts: By what is counted.
        done: Events that were handled.
        departed: Disconnect handlers that have ended.
    """

    counts: Counter[str] = field(default_factory=Counter)
    done: int = 0
    departed: int = 0


class SamenessApplication(Application):
    """One process, and what it has seen of each program."""

    def __init__(self) -> None:
        super().__init__()
        self.plays: defaultdict[str, Play] = defaultdict(Play)
        if self.guard is not None:
            # There are three clients: each emit shall go the way of those to thousands.
            managers = importlib.import_module("flask_socketio_guard.upstream.socketio.managers")
            managers.LEAST_RECIPIENTS = 1
        self.app.secret_key = "sameness"
        if not self.socketio.manage_session:
            self.app.session_interface = StoredSessions(self)

    @property
    def play(self) -> Play:
        """The program of the client whose request or event this is."""
        return self.plays[request.args["play"]]

    def has_settled(self, play: Play, *, done: int, departed: int) -> bool:
        """Wait until so many events were handled, and so many clients have left."""
        deadline = time.monotonic() + WAIT_TIMEOUT
        while play.done < done or play.departed < departed:
            if time.monotonic() > deadline:
                return False
            self.socketio.sleep(_POLL_INTERVAL)
        return True

    def perform(self, actions: list[dict[str, Any]]) -> list[Any]:
        """Do one after the other; return what each returned or raised."""
        results = []
        for action in actions:
            do = getattr(self, f"do_{action['do']}")
            try:
                results.append(do(**{key: action[key] for key in action if key != "do"}))
            except Exception as error:
                results.append(f"raised {type(error).__name__}")
        return results

    def do_emit(
        self, name: str, args: list[Any], *, as_tuple: bool, in_context: bool, **options: Any
    ) -> None:
        values = [tuple(decode(args))] if as_tuple else decode(args)
        emit = flask_socketio.emit if in_context else self.socketio.emit
        emit(name, *values, **options)

    def do_emit_many(self, name: str, count: int, *, in_context: bool, **options: Any) -> None:
        """Emit more than fits into a queue, without a pause."""
        emit = flask_socketio.emit if in_context else self.socketio.emit
        for number in range(count):
            emit(name, number, **options)

    def do_send(self, args: list[Any], *, in_context: bool, **options: Any) -> None:
        (value,) = decode(args)
        send = flask_socketio.send if in_context else self.socketio.send
        send(value, json=not isinstance(value, str), **options)

    def do_ask(
        self, args: list[Any], *, count: int, is_answered: bool, in_context: bool, **options: Any
    ) -> list[Any]:
        """Emit with callbacks that emit again, and wait for them where somebody will answer."""
        answers: list[Any] = []
        have_come = threading.Semaphore(0)

        def callback(*values: Any) -> None:
            if flask.has_request_context():
                self.play.counts["callbacks"] += 1
                flask_socketio.emit("again", values)
            answers.extend(values)
            have_come.release()

        emit = flask_socketio.emit if in_context else self.socketio.emit
        for _ in range(count):
            emit("question", *decode(args), callback=callback, **options)
        if is_answered and not all(have_come.acquire(timeout=_CALL_TIMEOUT) for _ in range(count)):
            return ["no answer"]
        return encode(answers)

    def do_call(
        self, args: list[Any], *, is_answered: bool, in_context: bool, **options: Any
    ) -> Any:
        if not is_answered:
            return "not asked"
        call = flask_socketio.call if in_context else self.socketio.call
        return encode(call("question", *decode(args), timeout=_CALL_TIMEOUT, **options))

    def do_join(self, **options: Any) -> None:
        flask_socketio.join_room(**options)

    def do_leave(self, **options: Any) -> None:
        flask_socketio.leave_room(**options)

    def do_close_room(self, **options: Any) -> None:
        flask_socketio.close_room(**options)

    def do_rooms(self, **options: Any) -> list[str]:
        # A session id is sorted by what it is, not by its letters.
        return sorted(
            flask_socketio.rooms(**options), key=lambda room: (len(str(room)) == 20, str(room))
        )

    def do_disconnect(self, **options: Any) -> None:
        flask_socketio.disconnect(**options)

    def facts(self) -> dict[str, Any]:
        """Return what an event knows of the request with which its client came."""
        was_fresh = "seen" not in flask.g
        flask.g.seen = True
        headers = {name: value for name, value in request.headers if name not in _VARYING}
        event = request.event  # type: ignore[attr-defined]
        return {
            "args": {name: request.args.getlist(name) for name in request.args if name != "play"},
            "headers": dict(sorted(headers.items())),
            "cookies": sorted(request.cookies),
            "method": request.method,
            "path": request.path,
            "endpoint": request.endpoint,
            "rule": str(request.url_rule),
            "view_args": request.view_args,
            "routing": type(request.routing_exception).__name__,
            "address": request.remote_addr,
            "scheme": request.scheme,
            "sid": request.sid,  # type: ignore[attr-defined]
            "namespace": request.namespace,  # type: ignore[attr-defined]
            "event": event["message"],
            "event_args": len(event["args"]),
            "url_for": flask.url_for("index"),
            "app": flask.current_app.name,
            "g": was_fresh,
        }


def encode(value: Any) -> Any:
    """Return *value* so that JSON can carry it; see :func:`decode`."""
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(value: Any) -> Any:
    """Return what :func:`encode` was given; ``{"$large": [text, count]}`` is a long text."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if "$bytes" in value:
            return base64.b64decode(value["$bytes"])
        if "$large" in value:
            text, count = value["$large"]
            return text * count
        return {key: decode(item) for key, item in value.items()}
    return value


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    _log_to_file()
    application = SamenessApplication()
    handlers = _handlers(application)
    for namespace in NAMESPACES[:-1]:
        for name, handler in handlers.items():
            application.socketio.on_event(name, handler, namespace=namespace)
    _add_catch_all(application)
    _add_class(application, handlers)
    _add_refusal(application)
    _add_request_functions(application)
    _add_routes(application)
    return application.app


def _handlers(application: SamenessApplication) -> dict[str, Callable[..., Any]]:
    handlers = {**_connection_handlers(application), **_event_handlers(application)}
    return {
        name: handler if name in ("connect", "disconnect") else _counted(application, handler)
        for name, handler in handlers.items()
    }


def _counted(application: SamenessApplication, handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    def counted(*args: Any) -> Any:
        try:
            return handler(*args)
        finally:
            event = request.event["message"]  # type: ignore[attr-defined]
            application.play.counts[f"handled:{event}"] += 1
            application.play.done += 1

    return counted


def _connection_handlers(application: SamenessApplication) -> dict[str, Callable[..., Any]]:
    def connect(auth: Any = None) -> None:
        namespace = request.namespace  # type: ignore[attr-defined]
        application.play.counts[f"connect:{namespace}"] += 1
        session["entered"] = session.get("entered", 0) + 1
        if request.args.get("greeted"):
            flask_socketio.join_room("lobby")
            flask_socketio.emit("welcome", [auth, application.facts(), dict(session)])

    def disconnect(reason: Any) -> None:
        namespace = request.namespace  # type: ignore[attr-defined]
        play = application.play
        play.counts[f"disconnect:{namespace}:{reason}"] += 1
        play.counts[f"session at the end:{sorted(session.items())}"] += 1
        try:
            news = (request.args["play"], request.args["name"], str(reason))
            flask_socketio.emit("left", news, broadcast=True)
        finally:
            play.departed += 1

    return {"connect": connect, "disconnect": disconnect}


def _event_handlers(application: SamenessApplication) -> dict[str, Callable[..., Any]]:
    def run(actions: list[dict[str, Any]]) -> list[Any]:
        return application.perform(actions)

    def echo(*args: Any) -> Any:
        return args[0] if len(args) == 1 else args

    def nothing(*_args: Any) -> None:
        """Return nothing."""

    def facts(*_args: Any) -> dict[str, Any]:
        return application.facts()

    def remember(value: Any) -> dict[str, Any]:
        before = dict(session)
        session["value"] = value
        return before

    def recall() -> dict[str, Any]:
        return dict(session)

    def contexts(*_args: Any) -> list[Any]:
        """Do what Flask and its extensions do with the context of a request."""

        def known() -> list[Any]:
            return [
                request.sid,  # type: ignore[attr-defined]
                request.namespace,  # type: ignore[attr-defined]
                request.args.get("name"),
                session.get("entered"),
            ]

        copied = flask.copy_current_request_context(known)
        seen = [copied(), copied()]

        @flask.copy_current_request_context
        def work() -> None:
            seen.append(known())
            flask_socketio.emit("worked", len(seen))

        application.socketio.start_background_task(work).join()
        with application.app.test_request_context("/inner?name=inner"):
            seen.append([request.path, request.args["name"]])
        with application.app.app_context():
            seen.append(known())
        streamed = flask.stream_with_context(iter(["a", "b"]))
        return [*seen, [*streamed], known()]

    def later(*args: Any) -> str:
        """Have a task emit, once this has returned, what it was told of the client."""
        sid, namespace = request.sid, request.namespace  # type: ignore[attr-defined]
        has_ended = threading.Event()

        def work() -> None:
            application.socketio.emit("later", len(args), to=sid, namespace=namespace)
            has_ended.set()

        application.socketio.start_background_task(work)
        has_ended.wait(WAIT_TIMEOUT)
        return namespace

    def forbid(*_args: Any) -> None:
        flask.abort(403)

    def fail(*args: Any) -> None:
        raise RuntimeError(f"failed with {len(args)} arguments")

    @application.socketio.on_error_default
    def answer_error(error: Exception) -> Any:
        application.play.counts[f"error:{type(error).__name__}"] += 1
        return "an error", str(error)

    return {
        "run": run,
        "echo": echo,
        "nothing": nothing,
        "facts": facts,
        "remember": remember,
        "recall": recall,
        "fail": fail,
        "forbid": forbid,
        "contexts": contexts,
        "later": later,
    }


def _add_catch_all(application: SamenessApplication) -> None:
    def catch_all(event: str, *args: Any) -> Any:
        return {"caught": event, "count": len(args)}

    application.socketio.on_event("*", _counted(application, catch_all), namespace="/func")


def _add_class(application: SamenessApplication, handlers: dict[str, Callable[..., Any]]) -> None:
    def method(handler: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _namespace, *args: handler(*args)

    methods = {f"on_{name}": method(handler) for name, handler in handlers.items()}
    application.socketio.on_namespace(type("Class", (Namespace,), methods)(NAMESPACES[-1]))


def _add_refusal(application: SamenessApplication) -> None:
    @application.socketio.on("connect", namespace=REFUSING)
    def connect(auth: Any = None) -> bool:
        application.play.counts["refused"] += 1
        if auth:
            raise ConnectionRefused("not you", auth)
        return False


def _add_request_functions(application: SamenessApplication) -> None:
    app = application.app

    def event() -> Any:
        """Return the name of the event, ``None`` in an HTTP request."""
        known = getattr(request, "event", None)
        return known and str(known["message"])

    @app.before_request
    def before() -> None:
        if "play" in request.args:
            application.play.counts[f"before:{event()}"] += 1

    @app.after_request
    def after(response: Response) -> Response:
        if "play" in request.args:
            application.play.counts[f"after:{event()}"] += 1
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        if event():
            flask.g.event, flask.g.play = event(), application.play
            application.play.counts[f"teardown:{event()}:{type(error).__name__}"] += 1

    @app.teardown_appcontext
    def teardown_app(error: BaseException | None) -> None:
        # A disconnect handler that another handler brings about shares that one's application
        # context on stock; behind the guard it has its own, and nothing of another client's.
        if flask.g.get("event", "disconnect") != "disconnect":
            flask.g.play.counts[f"teardown app:{flask.g.event}:{type(error).__name__}"] += 1


def _add_routes(application: SamenessApplication) -> None:
    app, socketio = application.app, application.socketio

    @app.get("/")
    def index() -> str:
        return "here"

    @app.post("/run")
    def run() -> Response:
        """Perform actions in this request, or in a task of their own."""
        values = request.get_json()
        if values["in_request"]:
            return jsonify(application.perform(values["actions"]))
        results: list[Any] = []

        def perform() -> None:
            with app.app_context():
                results.extend(application.perform(values["actions"]))

        socketio.start_background_task(perform).join()
        return jsonify(results)

    @app.post("/settle")
    def settle() -> Response:
        """Wait for what is expected, then send each of some clients a fence."""
        values = request.get_json()
        play = application.plays[values["play"]]
        has_settled = application.has_settled(
            play, done=values["done"], departed=values["departed"]
        )
        for sid, namespace in values["fences"]:
            socketio.emit("fence", (values["play"], values["number"]), to=sid, namespace=namespace)
        return jsonify(has_settled)

    @app.get("/visit")
    def visit() -> Response:
        """Read and write the session as a page does."""
        session["visits"] = session.get("visits", 0) + 1
        return jsonify(dict(session))

    @app.post("/finish")
    def finish() -> Response:
        """Return what was counted of a program, and which of its clients are still known."""
        name = request.get_json()["play"]
        play = application.plays.pop(name, Play())
        manager, left = socketio.server.manager, []
        for namespace, rooms in dict(manager.rooms).items():
            for sid in dict(rooms.get(None, ())):
                environ = socketio.server.get_environ(sid, namespace=namespace) or {}
                if f"play={name}&" in environ.get("QUERY_STRING", ""):
                    left.append(sid)
        counts = dict(sorted(play.counts.items()))
        return jsonify(
            {"counts": counts, "done": play.done, "departed": play.departed, "left": left}
        )

"""The application in which the fault tests do their damage.

It is an ordinary Flask-SocketIO application. What makes it ordinary or guarded is the
environment alone:

``GUARD``
    ``1`` adds the guard. Anything else leaves the package out, not even imported.
``ASYNC_MODE``
    ``gevent`` (default) or ``threading``.
``REDIS_URL``
    The message queue; none if unset.
``QUEUE``
    ``returning`` takes a queue class of the application's own whose ``_listen`` can return.
``SOCKETIO_OPTIONS``, ``APP_CONFIG``
    JSON objects with arguments for ``SocketIO`` and settings for ``app.config``.
``ERROR_HANDLER``
    ``1`` registers an ``on_error_default`` handler.
``LOG_RECORDS``
    File to which each log record goes as one line of JSON.

The gevent worker of gunicorn has patched the standard library before it loads this module.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import redis
import socketio as python_socketio
from flask import Flask, Response, jsonify, request
from flask_socketio import SocketIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEALTH_TOKEN = "faults"
LISTENER_NAME = "socketio-guard:listener"
_NEVER = 3600.0


class UnheardOfError(BaseException):
    """What an application must not raise, and one day raises."""


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        error_id = getattr(record, "error_id", None)
        line = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "has_traceback": record.exc_info is not None and record.exc_info[0] is not None,
            "traceback": self.formatException(record.exc_info) if record.exc_info else "",
            "error_id": None if error_id is None else str(error_id),
        }
        return json.dumps(line)


class ReturningQueue(python_socketio.PubSubManager):  # type: ignore[misc]
    """A message queue as python-socketio's documentation lets applications write one.

    Its ``_listen`` returns when :attr:`is_to_return` is set and the next message has come.
    """

    def __init__(self, url: str, *, channel: str) -> None:
        super().__init__(channel=channel)
        self.is_to_return = False
        self._client = redis.Redis.from_url(url)

    def _publish(self, data: dict[str, Any]) -> None:
        self._client.publish(self.channel, json.dumps(data))

    def _listen(self) -> Iterator[bytes]:
        pubsub = self._client.pubsub(  # type: ignore[no-untyped-call]
            ignore_subscribe_messages=True
        )
        pubsub.subscribe(self.channel)
        try:
            for message in pubsub.listen():
                if self.is_to_return:
                    self.is_to_return = False
                    return
                yield message["data"]
        finally:
            pubsub.close()


class Application:
    """One process of the application and what it remembers for the tests."""

    def __init__(self) -> None:
        self.async_mode = os.environ.get("ASYNC_MODE", "gevent")
        self.runs: Counter[str] = Counter()
        self.outcomes: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.series: dict[str, dict[str, Any]] = {}
        self.guard: Any = None
        self.app = Flask(__name__)
        self.app.config["SOCKETIO_GUARD_HEALTH_DETAILS"] = HEALTH_TOKEN
        self.app.config.update(json.loads(os.environ.get("APP_CONFIG", "{}")))
        self.socketio = SocketIO(self.app, async_mode=self.async_mode, **self._queue_options())
        self.before_guard()
        if os.environ.get("GUARD") == "1":
            from flask_socketio_guard import SocketIOGuard

            self.guard = SocketIOGuard(self.app, self.socketio)

    def before_guard(self) -> None:
        """Do what an application does between Flask-SocketIO and the guard."""

    def _queue_options(self) -> dict[str, Any]:
        options: dict[str, Any] = json.loads(os.environ.get("SOCKETIO_OPTIONS", "{}"))
        url = os.environ.get("REDIS_URL")
        if url and os.environ.get("QUEUE") == "returning":
            options["client_manager"] = ReturningQueue(url, channel="flask-socketio")
        elif url:
            options["message_queue"] = url
        return options

    def misbehave(self, behaviour: str, *, sid: str = "") -> None:
        """Do what *behaviour* says: return, raise, take long or never end."""
        if behaviour == "sleep":
            self.socketio.sleep(8)
        elif behaviour == "sleep-long":
            self.socketio.sleep(30)
        elif behaviour == "hang":
            self.hang()
        elif behaviour == "call":
            self.ask(sid)
        elif behaviour != "return":
            raise _exception(behaviour)

    def hang(self) -> None:
        """Wait for what never comes."""
        self.socketio.server.eio.create_event().wait(_NEVER)

    def ask(self, sid: str) -> None:
        """Ask the client a question and wait for the answer."""
        try:
            self.outcomes["call"] = self.socketio.call("question", "again", to=sid, timeout=3)
        except python_socketio.exceptions.TimeoutError:
            self.outcomes["call"] = "timeout"

    def callback(self, behaviour: str, sid: str) -> Callable[..., None]:
        """Return an acknowledgement callback that behaves in that way."""

        def callback(*_args: Any) -> None:
            self.runs[f"callback:{behaviour}"] += 1
            self.misbehave(behaviour, sid=sid)
            self.runs[f"callback:{behaviour}:done"] += 1

        return callback

    def emit_series(self, name: str, *, count: int, rate: float, namespace: str) -> None:
        """Emit numbered events at a steady rate, and note how long the slowest took."""
        progress = self.series[name]
        began_at = time.monotonic()
        for number in range(count):
            delay = began_at + number / rate - time.monotonic()
            self.socketio.sleep(max(delay, 0))
            if progress["is_stopped"]:
                break
            emitted_at = time.monotonic()
            progress["emitted"] = number + 1
            self.socketio.emit(
                name, {"number": number, "emitted_at": emitted_at}, namespace=namespace
            )
            progress["slowest"] = max(progress["slowest"], time.monotonic() - emitted_at)
        progress["is_stopped"] = True

    def listener_greenlets(self) -> list[Any]:
        """Find the greenlet that listens to the queue, by what it is known as."""
        from gevent import Greenlet

        if self.guard is None:
            thread = getattr(self.socketio.server.manager, "thread", None)
            return [thread] if thread else []
        return [
            known
            for known in gc.get_objects()
            if isinstance(known, Greenlet) and not known.dead and known.name == LISTENER_NAME
        ]

    def tables(self) -> dict[str, int]:
        """Return how much python-socketio remembers of clients and callbacks."""
        manager = self.socketio.server.manager
        callbacks = dict(manager.callbacks)
        rooms = {name: dict(members) for name, members in dict(manager.rooms).items()}
        return {
            "callback_recipients": len(callbacks),
            "callback_entries": sum(
                1 for waiting in callbacks.values() for ack_id in list(waiting) if ack_id != 0
            ),
            "clients": sum(len(members.get(None, ())) for members in rooms.values()),
            "connecting": sum(len(waiting) for waiting in manager.pending_connect.values()),
            "environs": len(self.socketio.server.environ),
        }

    def state(self) -> dict[str, Any]:
        """Return all that the tests look at."""
        state = {
            "pid": os.getpid(),
            "runs": dict(self.runs),
            "outcomes": self.outcomes,
            "calls": self.calls,
            "series": self.series,
            "tables": self.tables(),
            "guard": None,
        }
        if self.guard is not None:
            state["guard"] = {
                "counters": dict(self.guard.counters),
                "waiting_callbacks": self.guard.waiting_callbacks,
                "listener": str(self.guard.listener_state),
            }
        return state


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    _log_to_file()
    application = Application()
    _add_handlers(application)
    _add_routes(application)
    _add_fault_routes(application)
    return application.app


def _log_to_file() -> None:
    path = os.environ.get("LOG_RECORDS")
    if path:
        handler = logging.FileHandler(path)
        handler.setFormatter(JsonLines())
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _exception(behaviour: str) -> BaseException:
    if behaviour == "Exception":
        return RuntimeError("a callback failed")
    if behaviour == "BaseException":
        return UnheardOfError("a callback failed badly")
    if behaviour.startswith("SystemExit"):
        return SystemExit(int(behaviour.removeprefix("SystemExit")))
    import gevent

    known: dict[str, BaseException] = {
        "GreenletExit": gevent.GreenletExit(),
        "Timeout": gevent.Timeout(1.0),
    }
    return known[behaviour]


def _add_handlers(application: Application) -> None:
    socketio = application.socketio
    runs = application.runs

    @socketio.on("connect")
    def connect(_auth: Any = None) -> None:
        fault = request.args.get("connect", "")
        runs[f"connect:{fault}"] += 1
        if fault == "raise":
            raise RuntimeError("connect failed: secret")
        if fault == "type-error":
            raise TypeError("connect failed: secret")

    @socketio.on("disconnect")
    def disconnect(_reason: Any = None) -> None:
        runs["disconnect"] += 1
        if request.args.get("disconnect") == "hang":
            application.hang()

    @socketio.on("echo")
    def echo(value: Any) -> Any:
        return value

    @socketio.on("pid")
    def pid() -> int:
        return os.getpid()

    @socketio.on("raise")
    def raise_error(*_args: Any) -> None:
        runs["raise"] += 1
        raise RuntimeError("handler failed: secret")

    @socketio.on("broadcast")
    def broadcast(number: int) -> int:
        socketio.emit("broadcast", {"pid": os.getpid(), "number": number})
        return os.getpid()

    @socketio.on("*", namespace="/any")
    def any_event(event: str, *args: Any) -> None:
        application.calls.append(
            {
                "sid": request.sid,  # type: ignore[attr-defined]
                "event": event,
                "args": args,
            }
        )

    @socketio.on("echo", namespace="/any")
    def echo_any(value: Any) -> Any:
        return value

    if os.environ.get("ERROR_HANDLER") == "1":

        @socketio.on_error_default
        def answer_error(_error: Exception) -> str:
            runs["error-handler"] += 1
            return "an answer from the error handler"


def _add_routes(application: Application) -> None:
    app = application.app
    numbers: dict[str, Iterator[int]] = {}

    @app.get("/")
    def index() -> str:
        return "here"

    @app.get("/state")
    def state() -> Response:
        return jsonify(application.state())

    @app.post("/emit")
    def emit() -> Response:
        values = request.get_json()
        event, count = values["event"], values.get("count", 1)
        counter = numbers.setdefault(event, itertools.count())
        errors = []
        for _ in range(count):
            number = next(counter)
            try:
                application.socketio.emit(event, {"number": number}, namespace="/")
            except Exception as error:
                errors.append({"number": number, "error": type(error).__name__})
        return jsonify({"errors": errors})

    @app.post("/series")
    def series() -> Response:
        values = request.get_json()
        name = values["name"]
        application.series[name] = {"emitted": 0, "slowest": 0.0, "is_stopped": False}
        application.socketio.start_background_task(
            application.emit_series,
            name,
            count=values["count"],
            rate=values["rate"],
            namespace=values.get("namespace", "/"),
        )
        return jsonify(name)

    @app.post("/series/stop")
    def stop_series() -> Response:
        progress = application.series[request.get_json()["name"]]
        progress["is_stopped"] = True
        return jsonify(progress)


def _add_fault_routes(application: Application) -> None:
    app, socketio = application.app, application.socketio

    @app.post("/ask")
    def ask() -> Response:
        values = request.get_json()
        to, behaviour = values["to"], values.get("behaviour", "return")
        for number in range(values.get("count", 1)):
            callback = application.callback(behaviour, to)
            socketio.emit("question", number, to=to, callback=callback)
        return jsonify(True)

    @app.post("/call")
    def call() -> Response:
        """Ask one client and wait for the answer, in a task of its own."""
        sid = request.get_json()["to"]

        def wait_for_answer() -> None:
            began_at = time.monotonic()
            try:
                outcome = socketio.call("question", 1, to=sid, timeout=10)
            except Exception as error:
                outcome = [kind.__name__ for kind in type(error).__mro__]
            application.outcomes[sid] = [outcome, time.monotonic() - began_at]

        socketio.start_background_task(wait_for_answer)
        return jsonify(True)

    @app.post("/disconnect")
    def disconnect_client() -> Response:
        socketio.server.disconnect(request.get_json()["sid"], namespace="/")
        return jsonify(True)

    @app.post("/listener/kill")
    def kill_listener() -> Response:
        found = application.listener_greenlets()
        for greenlet in found:
            greenlet.kill(block=False)
        return jsonify(len(found))

    @app.post("/listener/return")
    def end_listen() -> Response:
        socketio.server.manager.is_to_return = True
        return jsonify(True)

    @app.post("/emit-unserialisable")
    def emit_unserialisable() -> Response:
        namespace = request.get_json().get("namespace", "/")
        try:
            socketio.emit("unserialisable", {"tags": {"a", "set"}}, namespace=namespace)
        except TypeError as error:
            return jsonify({"error": "TypeError", "text": str(error)})
        return jsonify({"error": None})

    @app.post("/task")
    def start_task() -> Response:
        name = request.get_json()["name"]
        _start_task(application, name, functools.partial(_fail_twice, application, name))
        return jsonify(True)


def _start_task(application: Application, name: str, target: Callable[[], None]) -> None:
    if application.guard is None:
        application.socketio.start_background_task(target)
    else:
        application.guard.start_background_task(target, name=name, restart="on-failure")


def _fail_twice(application: Application, name: str) -> None:
    application.runs[f"task:{name}"] += 1
    if application.runs[f"task:{name}"] <= 2:
        raise RuntimeError("the task failed")
    application.hang()

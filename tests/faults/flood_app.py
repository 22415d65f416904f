"""The application of the fault tests, with what floods, slow clients and threads need.

It takes the same environment, and runs with and without the guard. Where an option exists with
the guard only, the handler is registered without it otherwise.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request
from flask_socketio import close_room, join_room, leave_room
from pydantic import BaseModel

from tests.faults.app import create_app as create_base_app

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio import SocketIO

_EMITS_PER_TURN = 16
_WAITS = (0.004, 0.0, 0.002)


class Move(BaseModel):
    """What the event ``move`` carries."""

    piece: str
    to: tuple[int, int]


class Gauge:
    """How many run at a time, and in which order they began and ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.most = 0
        self.began: list[Any] = []
        self.ended: list[Any] = []

    def enter(self, number: Any) -> None:
        """Note that one begins."""
        with self._lock:
            self.began.append(number)
            self._running += 1
            self.most = max(self.most, self._running)

    def leave(self, number: Any) -> None:
        """Note that one ends."""
        with self._lock:
            self.ended.append(number)
            self._running -= 1

    def reading(self) -> dict[str, Any]:
        """Return everything noted."""
        return {
            "running": self._running,
            "most": self.most,
            "began": self.began,
            "ended": self.ended,
        }


class FloodApplication:
    """What is added to the application."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.socketio: SocketIO = app.extensions["socketio"]
        self.guard: Any = app.extensions.get("socketio_guard")
        self.gauges: dict[str, Gauge] = {}
        self.progress: dict[str, dict[str, Any]] = {}

    def gauge(self, name: str) -> Gauge:
        """Return the gauge of that name."""
        return self.gauges.setdefault(name, Gauge())

    def on(self, event: str, **options: Any) -> Callable[..., Any]:
        """Register a handler, with the guard's options where there is a guard."""
        if self.guard is None:
            decorator: Callable[..., Any] = self.socketio.on(event)
        else:
            decorator = self.guard.on(event, **options)
        return decorator

    def emit(self, event: str, *args: Any, to: str, is_volatile: bool = False) -> str:
        """Emit an event to one client; return what the guard says became of it."""
        if self.guard is None:
            self.socketio.emit(event, *args, to=to)
            return "unknown"
        return str(self.guard.emit(event, *args, to=to, volatile=is_volatile))

    def tables(self) -> dict[str, int]:
        """Return how many entries of clients each table holds."""
        server = self.socketio.server
        manager = server.manager
        rooms = list(dict(manager.rooms).values())
        tables = {
            "eio.sockets": len(server.eio.sockets),
            "environ": len(server.environ),
            "binary packets": len(server._binary_packet),
            "rooms": sum(len(members) for room in rooms for members in dict(room).values()),
            "eio_to_sid": len(getattr(manager, "eio_to_sid", ())),
            "pending": sum(len(waiting) for waiting in manager.pending_connect.values()),
            "callbacks": len(manager.callbacks),
        }
        if self.guard is not None:
            tables["guard.connections"] = len(self.guard.connections)
        return tables

    def flood(self, sid: str, witness: str, count: int, size: int, is_volatile: bool) -> None:
        """Emit *count* large events to *sid* and as many small ones to *witness*."""
        progress = self.progress[sid]
        filling = "x" * size
        for number in range(count):
            outcome = self.emit("flood", (number, filling), to=sid, is_volatile=is_volatile)
            outcomes = progress["outcomes"]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            progress["emitted"] = number + 1
            self.socketio.emit("steady", number, to=witness)
            if number % _EMITS_PER_TURN == 0:
                self.socketio.sleep(0)
        progress["is_over"] = True


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    app = create_base_app()
    application = FloodApplication(app)
    _add_handlers(application)
    _add_routes(application)
    _add_thread_routes(application)
    return app


def freeze_the_loop(seconds: float) -> None:
    """Block the event loop, as code does that knows nothing of gevent."""
    from gevent import monkey

    monkey.get_original("time", "sleep")(seconds)


def compute_for(seconds: float) -> int:
    """Block the event loop by work."""
    deadline = time.monotonic() + seconds
    total = 0
    while time.monotonic() < deadline:
        total += sum(range(1000))
    return total


def _add_handlers(application: FloodApplication) -> None:
    socketio = application.socketio
    refused: Any = object()

    def gauged(name: str, number: Any, seconds: float) -> Any:
        gauge = application.gauge(name)
        gauge.enter(number)
        try:
            socketio.sleep(seconds)
        finally:
            gauge.leave(number)
        return number

    @application.on("slow")
    def slow(number: int, seconds: float) -> Any:
        return gauged("slow", number, seconds)

    @application.on("ordered", ordered=True)
    def ordered(number: int) -> Any:
        return gauged("ordered", number, _WAITS[number % len(_WAITS)])

    @application.on("asking")
    def asking(number: int) -> Any:
        """Ask the client that is waiting for an answer itself."""
        gauge = application.gauge("asking")
        gauge.enter(number)
        try:
            return (application.guard or socketio).call(
                "question",
                number,
                to=request.sid,  # type: ignore[attr-defined]
                timeout=10,
            )
        finally:
            gauge.leave(number)

    @application.on("rated", rate="20/second")
    def rated(number: int) -> Any:
        return gauged("rated", number, 0)

    @application.on("move", schema=Move)
    def move(payload: Any = refused) -> str:
        gauged("move", "?", 0)
        return payload.piece if isinstance(payload, Move) else type(payload).__name__

    @application.on("ignore")
    def ignore(*_args: Any) -> None:
        """Take anything."""


def _add_routes(application: FloodApplication) -> None:
    app, socketio = application.app, application.socketio

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    @app.get("/tables")
    def tables() -> Response:
        return jsonify(application.tables())

    @app.get("/gauge/<name>")
    def gauge(name: str) -> Response:
        return jsonify(application.gauge(name).reading())

    @app.post("/gauges/reset")
    def reset_gauges() -> Response:
        application.gauges.clear()
        return jsonify(True)

    @app.post("/flood")
    def flood() -> Response:
        values = request.get_json()
        application.progress[values["to"]] = {"emitted": 0, "outcomes": {}, "is_over": False}
        socketio.start_background_task(
            application.flood,
            values["to"],
            values["witness"],
            values["count"],
            values["size"],
            values.get("is_volatile", False),
        )
        return jsonify(True)

    @app.get("/flood/<sid>")
    def progress(sid: str) -> Response:
        return jsonify(application.progress[sid])


def _add_thread_routes(application: FloodApplication) -> None:
    app, socketio = application.app, application.socketio
    threads: dict[str, dict[str, Any]] = {}

    def run_in_native_thread(kind: str, target: Callable[[], object]) -> Response:
        import gevent
        from gevent import monkey

        threads[kind] = {"is_over": False, "error": ""}

        def run() -> None:
            try:
                with app.app_context():
                    target()
            except BaseException as error:
                threads[kind]["error"] = repr(error)
            threads[kind]["is_over"] = True

        if kind == "pool":
            gevent.get_hub().threadpool.spawn(run)
        else:
            # What threading would start after patching is a greenlet.
            monkey.get_original("_thread", "start_new_thread")(run, ())
        return jsonify(True)

    def pause(seconds: float) -> None:
        from gevent import monkey

        monkey.get_original("time", "sleep")(seconds)

    @app.get("/thread/<kind>")
    def thread(kind: str) -> Response:
        return jsonify(threads[kind])

    @app.post("/thread/emit")
    def emit_from_thread() -> Response:
        """Emit numbered events with the time, so many at a time, with pauses."""
        values = request.get_json()

        def emit() -> None:
            for number in range(values["count"]):
                if number % values["at_a_time"] == 0:
                    pause(values["pause"])
                socketio.emit("from-thread", (number, time.monotonic()), to=values["to"])

        return run_in_native_thread(values["kind"], emit)

    @app.post("/thread/rooms")
    def use_rooms_in_thread() -> Response:
        """Let each client into a room, speak there, close it, and disconnect the client."""
        values = request.get_json()

        def use(sid: str, room: str) -> None:
            join_room(room, sid=sid, namespace="/")
            socketio.emit("to-room", "joined", to=room)
            leave_room(room, sid=sid, namespace="/")
            socketio.emit("to-room", "nobody is there", to=room)
            join_room(room, sid=sid, namespace="/")
            socketio.emit("to-room", "joined again", to=room)
            close_room(room, namespace="/")
            socketio.emit("to-room", "nobody is there any more", to=room)
            socketio.emit("from-thread", ("good-bye", time.monotonic()), to=sid)
            socketio.server.disconnect(sid, namespace="/")

        def use_all() -> None:
            for number, sid in enumerate(values["sids"]):
                pause(values["pause"])
                use(sid, f"room {number}")

        return run_in_native_thread(values["kind"], use_all)

    @app.post("/freeze")
    def freeze() -> Response:
        began_at = time.time()
        freeze_the_loop(request.get_json()["seconds"])
        return jsonify({"began_at": began_at, "ended_at": time.time()})

    @app.post("/compute")
    def compute() -> Response:
        began_at = time.time()
        compute_for(request.get_json()["seconds"])
        return jsonify({"began_at": began_at, "ended_at": time.time()})

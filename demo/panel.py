"""The "Break it" panel: real faults, for a demo on the local machine only.

Every request is checked, because any web page can make a browser on this machine send requests
to the panel:

- The connection must come from a loopback address, and not through a proxy.
- ``Host`` must name this machine, which protects against DNS rebinding.
- A POST must carry JSON and a custom header. Browsers let a page of another origin send these only
  after a CORS preflight, which this application does not allow.
"""

from __future__ import annotations

import gc
import ipaddress
import itertools
import os
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gevent
from flask import Blueprint, Flask, abort, current_app, request
from flask_socketio import SocketIO, join_room
from greenlet import greenlet
from jinja2 import ChoiceLoader, FileSystemLoader, PrefixLoader

from demo.waiting import HEADER
from flask_socketio_guard.errors import DuplicateTask

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio_guard import SocketIOGuard

TEMPLATES = Path(__file__).parent / "templates"
PROXY_HEADERS = ("Forwarded", "Via", "X-Forwarded-", "X-Real-Ip")
STREAM_ROOM = "demo:stream"
STREAM_INTERVAL = 0.05
LISTENER_NAME = "socketio-guard:listener"
HANG_DURATION = 30.0
SLOW_DURATION = 0.1
POUR_EVENTS = 1600
POUR_EVENT_SIZE = 64 * 1024


class DemoFault(Exception):
    """The exception that the panel makes a handler raise."""


def init_app(app: Flask, socketio: SocketIO, guard: SocketIOGuard) -> None:
    """Register the faults, and a numbered stream of events that makes losses visible."""
    blueprint = Blueprint("faults", __name__, url_prefix="/demo", static_folder="static")
    blueprint.before_request(_refuse_strangers)
    blueprint.app_context_processor(_tell_template)
    # The demo's page extends that of the application.
    own = app.jinja_loader
    assert own is not None
    app.jinja_loader = ChoiceLoader(
        [FileSystemLoader(TEMPLATES), PrefixLoader({"application": own})]
    )
    numbers = itertools.count(1)

    def stream() -> None:
        while guard.sleep(STREAM_INTERVAL):
            beat = {"process": app.config["PROCESS"], "pid": os.getpid(), "n": next(numbers)}
            guard.emit("demo:beat", beat | {"at": time.time()}, to=STREAM_ROOM)

    # Registered with `socketio`, which serves *app* now. `guard` would register them with every
    # other application, too.
    @socketio.on("demo:watch")
    def watch() -> dict[str, Any]:
        _refuse_strangers()
        join_room(STREAM_ROOM)
        with suppress(DuplicateTask):  # already started for an earlier client
            guard.start_background_task(stream, name="demo:stream", restart="on-failure")
        return {"process": app.config["PROCESS"], "pid": os.getpid()}

    @socketio.on("demo:raise")
    def raise_in_handler() -> None:
        _refuse_strangers()
        raise DemoFault("the panel made this handler raise")

    slow_events = 0

    @socketio.on("demo:slow")
    def be_slow() -> dict[str, int]:
        """Take a while; answer how many of these events ran at the same time."""
        nonlocal slow_events
        _refuse_strangers()
        slow_events += 1
        running = slow_events
        socketio.sleep(SLOW_DURATION)
        slow_events -= 1
        return {"running": running}

    @socketio.on("demo:echo")
    def echo(words: object) -> object:
        _refuse_strangers()
        return words

    def sid_of_body() -> str:
        body = request.get_json()
        sid = body.get("sid") if isinstance(body, dict) else None
        if not isinstance(sid, str):
            abort(400, 'the body must name a client: {"sid": ...}')
        return sid

    def ask(callback: Callable[..., None]) -> dict[str, Any]:
        sid = sid_of_body()
        guard.emit("demo:question", to=sid, callback=callback)
        return {"asked": sid}

    @blueprint.get("/worker")
    def show_worker() -> dict[str, Any]:
        return {
            "process": app.config["PROCESS"],
            "pid": os.getpid(),
            "connections": len(guard.connections),
        }

    @blueprint.post("/callback-raises")
    def raise_in_callback() -> dict[str, Any]:
        def leave(*args: object) -> None:
            # SystemExit is not an Exception, so `except Exception` in the worker misses it.
            raise SystemExit(1)

        return ask(leave)

    @blueprint.post("/callback-hangs")
    def hang_in_callback() -> dict[str, Any]:
        return ask(lambda *args: time.sleep(HANG_DURATION))

    @blueprint.post("/kill-listener")
    def kill_listener() -> dict[str, Any]:
        return {"killed": _kill_greenlets(LISTENER_NAME)}

    @blueprint.post("/pour")
    def pour() -> dict[str, Any]:
        """Send a client far more than it can receive, and continue when it is gone."""
        sid = sid_of_body()
        outcomes: Counter[str] = Counter()
        for _ in range(POUR_EVENTS):
            outcomes[guard.emit("demo:pour", "x" * POUR_EVENT_SIZE, to=sid, ignore_queue=True)] += 1
            socketio.sleep(0)
        return {"bytes": POUR_EVENTS * POUR_EVENT_SIZE, "outcomes": outcomes}

    @blueprint.post("/stop-worker")
    def stop_worker() -> dict[str, Any]:
        """Stop this worker like a deployment does; its master starts another."""
        os.kill(os.getpid(), signal.SIGTERM)
        return {"stopping": os.getpid()}

    @blueprint.post("/broker/<any(stop, start):command>")
    def control_broker(command: str) -> dict[str, Any]:
        return {"broker": _tell_runner(command)}

    app.register_blueprint(blueprint)


def _tell_template() -> dict[str, Any]:
    """Return the variables of the page's template: whether to show the panel and its controls."""
    return {"has_panel": _is_local(), "has_broker_control": _has_broker_control()}


def _has_broker_control() -> bool:
    """Return whether the demo runner started the broker, and so can stop it."""
    return bool(current_app.config.get("BROKER_CONTROL"))


def _refuse_strangers() -> None:
    if not _is_local():
        abort(403, "only available on this machine")
    if request.method != "GET" and (HEADER not in request.headers or not request.is_json):
        abort(403, f"send JSON and the header {HEADER}")


def _is_local() -> bool:
    has_proxy = any(name.title().startswith(PROXY_HEADERS) for name, _ in request.headers)
    return not has_proxy and _is_loopback(request.remote_addr) and _is_loopback(_host())


def _host() -> str | None:
    return urlsplit(f"//{request.host}").hostname


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return False


def _kill_greenlets(name: str) -> int:
    """Kill the greenlets named *name*; only the garbage collector's list contains them."""
    found = [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), greenlet)
        and getattr(candidate, "name", None) == name
        and not candidate.dead
    ]
    for listener in found:
        gevent.kill(listener)
    return len(found)


def _tell_runner(command: str) -> str:
    """Ask the demo runner, which owns the broker, to execute *command*."""
    if not _has_broker_control():
        abort(409, "the demo runner did not start this broker, so it will not stop it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as runner:
        runner.settimeout(10)
        runner.connect(current_app.config["BROKER_CONTROL"])
        runner.sendall(command.encode() + b"\n")
        return runner.makefile().readline().strip()

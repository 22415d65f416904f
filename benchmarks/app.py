"""The application under measurement; the same code serves every column but Node's.

Environment variables:
    GUARD: ``1`` protects the application with the guard; ``0`` does not even import the package.
    BENCH_LIMITS: ``1`` gives the echo a rate, an order and a schema; needs the guard.
    BENCH_REDIS_URL: The message queue.
    BENCH_CHANNEL: Channel on that queue; each column has its own.
    BENCH_STORE: ``redis`` keeps acknowledged messages there.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from flask import Flask, request
from flask_socketio import SocketIO, emit, join_room
from gevent.event import Event
from gevent.lock import BoundedSemaphore

if TYPE_CHECKING:
    from flask_socketio_guard import SocketIOGuard

PAYLOAD = "x" * 100

_SENDERS = 64

app = Flask(__name__)
app.config["SECRET_KEY"] = "not a secret: loopback only"
socketio = SocketIO(
    app,
    async_mode="gevent",
    message_queue=os.environ["BENCH_REDIS_URL"],
    channel=os.environ["BENCH_CHANNEL"],
)
guard: SocketIOGuard | None = None
sids: list[str] = []
is_limited = os.environ.get("BENCH_LIMITS") == "1"
if is_limited:
    app.config["SOCKETIO_GUARD_EVENT_RATE"] = "100000/second"
if os.environ.get("BENCH_STORE") == "redis":
    app.config["SOCKETIO_GUARD_DELIVERY_STORE"] = os.environ["BENCH_REDIS_URL"]
if os.environ.get("GUARD") == "1":
    from flask_socketio_guard import SocketIOGuard

    guard = SocketIOGuard(app, socketio)


@app.get("/")
def index() -> str:
    """Tell the runner that the worker is up."""
    return "up"


@socketio.on("stats")
def stats(collect: bool) -> dict[str, Any]:
    """Return what the runner needs to know about this process.

    Args:
        collect: Run the garbage collector first.

    Returns:
        ``{"pid": int, "cpu": seconds of CPU so far, "runtime": "python", "guarded": bool,
        "limited": bool, "sessions": int}``
    """
    if collect:
        gc.collect()
    return {
        "pid": os.getpid(),
        "cpu": time.process_time(),
        "runtime": "python",
        "guarded": "flask_socketio_guard" in sys.modules,
        "limited": is_limited,
        "sessions": len(socketio.server.eio.sockets),
    }


def echo(text: str) -> str:
    """Acknowledge with the data received."""
    return text


if guard is not None and is_limited:
    guard.on("echo", ordered=True, schema=str)(echo)
else:
    socketio.on("echo")(echo)


@socketio.on("join")
def join(room: str) -> str:
    """Put the client into *room*."""
    join_room(room)
    return room


@socketio.on("publish")
def publish(number: int) -> None:
    """Send one event to every client."""
    emit("news", (number, PAYLOAD), broadcast=True)


@socketio.on("emit_many")
def emit_many(count: int) -> dict[str, float]:
    """Emit *count* events for a room that has no member in this process.

    Returns:
        Seconds: ``calls`` until the last call returned, ``published`` until the broker had every
        message, ``cpu`` of the whole process in that time.
    """
    cpu_before = time.process_time()
    started_at = time.perf_counter()
    for _ in range(count):
        socketio.emit("tick", PAYLOAD, to="elsewhere")
    called_at = time.perf_counter()
    if guard is not None and not guard.flush(30.0):
        raise RuntimeError("the outbox is not empty after 30 s")
    published_at = time.perf_counter()
    socketio.sleep(0.1)  # the listener reads back its own messages, whose CPU counts as well
    return {
        "calls": called_at - started_at,
        "published": published_at - started_at,
        "cpu": time.process_time() - cpu_before,
    }


@socketio.on("burst")
def burst(room: str, count: int) -> None:
    """Emit *count* numbered events to *room* as fast as possible."""
    for number in range(count):
        socketio.emit("tick", (number, 0, PAYLOAD), to=room)


@socketio.on("identify")
def identify(identity: str) -> bool:
    """Make the client a device of *identity*."""
    sids.append(request.sid)  # type: ignore[attr-defined]
    if guard is not None:
        guard.identify(sids[-1], identity)
    return True


@socketio.on("deliver_many")
def deliver_many(store: str, count: int, at_a_time: int) -> dict[str, float]:
    """Send *count* messages to the identified clients, several at a time.

    Args:
        store: Where messages are stored; if empty, events with a callback are sent instead.
        count: Number of messages.
        at_a_time: How many of them may be unacknowledged.

    Returns:
        Seconds: ``seconds`` until all were acknowledged, ``p50`` and ``p99`` of a single one,
        ``cpu``.
    """
    free = BoundedSemaphore(at_a_time)
    taken: list[float] = []
    is_done = Event()

    def acknowledged(sent_at: float, *_: object) -> None:
        taken.append(time.perf_counter() - sent_at)
        free.release()
        if len(taken) == count:
            is_done.set()

    def send(numbers: range) -> None:
        for number in numbers:
            free.acquire()
            heard = partial(acknowledged, time.perf_counter())
            recipient, payload = number % len(sids), (number, PAYLOAD)
            if store:
                assert guard is not None
                guard.deliver("tick", payload, to=f"user-{recipient}", on_delivered=heard)
            elif guard is not None:
                guard.emit("tick", payload, to=sids[recipient], callback=heard)
            else:
                socketio.emit("tick", payload, to=sids[recipient], callback=heard)

    cpu_before = time.process_time()
    started_at = time.perf_counter()
    senders = min(_SENDERS, at_a_time)
    for first in range(senders):
        socketio.start_background_task(send, range(first, count, senders))
    if not is_done.wait(60.0):
        raise RuntimeError(f"{len(taken)} of {count} were acknowledged")
    taken.sort()
    return {
        "seconds": time.perf_counter() - started_at,
        "p50": taken[count // 2],
        "p99": taken[int(count * 0.99) - 1],
        "cpu": time.process_time() - cpu_before,
    }


@socketio.on("weigh")
def weigh(count: int) -> float:
    """Return the bytes that each of *count* messages to an offline recipient takes."""
    assert guard is not None
    gc.collect()
    before = stored_bytes()
    receipts = []
    for number in range(count):
        receipts.append(guard.deliver("tick", (number, PAYLOAD), to=f"away-{number % 100}").id)
        if number % 100 == 0:
            socketio.sleep(0)
    size = (stored_bytes() - before) / count
    for id in receipts:
        guard.receipt(id).cancel()
    return size


def stored_bytes() -> int:
    """Return the memory of Redis if that is the store, else of this process."""
    if os.environ.get("BENCH_STORE") == "redis":
        with redis.Redis.from_url(os.environ["BENCH_REDIS_URL"]) as server:
            return int(server.info("memory")["used_memory"])
    return resident_bytes()


def resident_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@socketio.on("stream")
def stream(room: str, rate: float, count: int) -> None:
    """Emit *count* events to *room*, *rate* per second, each with the time of its emission.

    The times are those of the monotonic clock, which all processes of a machine share.
    """
    started_at = time.monotonic()
    for number in range(count):
        socketio.sleep(max(0.0, started_at + number / rate - time.monotonic()))
        socketio.emit("tick", (number, time.monotonic(), PAYLOAD), to=room)

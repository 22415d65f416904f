"""The faults that the check injects, one function each."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import socketio
from redis import Redis

from demo.clients import BareClient, Farewell
from demo.panel import HANG_DURATION
from demo.scene import Failed, Fault, Scene, Seen
from demo.waiting import fetch, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo.broker import Broker
    from demo.servers import Process

OUTAGE_DURATION = 3.0  # of a broker that is paused or stopped
RECOVERY_TIMEOUT = 20.0
CROWD = 20  # clients that vanish, or that are drained
SENDERS = 10  # clients that send the same invalid message
FLOOD = 2000  # events that one client sends at once
MAX_RUNNING = 64  # handlers of these that may run at the same time; the guard's default
ECHO_DURATION = 1.5  # seconds of measuring latency during a flood
SMALL_BUFFER = 16 * 1024
MIB = 1024 * 1024
MAX_GROWTH = 10 * MIB  # of a process that sends ten times as much to a client that does not read

# Invalid messages, with the WebSocket close codes (RFC 6455, section 7.4.1) they must lead to.
RUBBISH: dict[str | bytes, int] = {
    "hello": 1002,  # not an Engine.IO packet
    "4hello": 1002,  # not a Socket.IO packet
    "42[this is not JSON": 1002,
    "42" + 5000 * "[": 1002,
    '459999999999-["attachments"]': 1002,
    b"\xff\xfe": 1007,  # not UTF-8
    "4" + 2 * MIB * "x": 1009,
}
SLOW_CONSUMER = Farewell(1008, "slow consumer")
SERVICE_RESTART = 1012


# ---- handlers and callbacks ----


def raise_in_handler(scene: Scene) -> Seen:
    """Make a handler raise in both processes; its error must be acknowledged."""
    started = time.monotonic()
    for watcher in (scene.a, scene.b):
        try:
            answer = watcher.client.call("demo:raise", timeout=3)
        except socketio.exceptions.TimeoutError:
            raise Failed("the acknowledgement never came") from None
        if answer.get("error", {}).get("code") != "internal_error" or not answer["error"].get("id"):
            raise Failed(f"the acknowledgement was {answer}")
    return Seen(f"error acknowledged in {(time.monotonic() - started) / 2 * 1000:.0f} ms")


def raise_in_connect(scene: Scene) -> Seen:
    """Make the connect handler raise, by invalid data; the client must be refused."""
    refusals: list[Any] = []
    for watcher in (scene.a, scene.b):
        client = socketio.Client(reconnection=False)
        client.on("connect_error", refusals.append)
        try:
            client.connect(watcher.process.url, auth={"name": 42}, wait_timeout=3)
        except socketio.exceptions.ConnectionError:
            continue
        finally:
            client.disconnect()
        raise Failed("the client was accepted")
    codes = [
        refusal.get("data", {}).get("code") for refusal in refusals if isinstance(refusal, dict)
    ]
    if codes != ["internal_error"] * 2:
        raise Failed(f"the clients received {refusals or 'nothing'}")
    return Seen("clients refused")


def raise_in_callback(scene: Scene) -> Seen:
    """Make callbacks raise SystemExit, for clients of the same and of the other process."""
    pids = worker_pids(scene)
    ask_everybody(scene, "callback-raises")
    wait_until(lambda: worker_pids(scene) != pids, timeout=1.5)
    if worker_pids(scene) != pids:
        raise Failed("a worker ended")
    return Seen("SystemExit; same workers")


def hang_in_callback(scene: Scene) -> Seen:
    """Make callbacks hang, for clients of the same and of the other process."""
    ask_everybody(scene, "callback-hangs")
    return Seen(f"for {HANG_DURATION:.0f} s, in both processes")


# ---- listener and broker ----


def kill_listener(scene: Scene) -> Seen:
    """Kill the listener in both processes, one after the other."""
    for watcher in (scene.a, scene.b):
        killed = fetch(f"{watcher.process.url}/demo/kill-listener", {}).document.get("killed")
        if not killed:
            raise Failed(f"no listener found to kill: {killed}")
    return Seen("in both processes")


def drop_subscribers(scene: Scene) -> Seen:
    """Make the broker close every subscription."""
    with Redis.from_url(scene.demo.broker_url) as client:
        closed = client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    return Seen(f"{closed} subscriptions closed")


def pause_broker(scene: Scene) -> Seen:
    """Suspend the broker for `OUTAGE_DURATION` seconds; no event may be lost."""
    broker = own_broker(scene)
    broker.pause()
    down_at = time.time()
    time.sleep(OUTAGE_DURATION)
    broker.resume()
    return Seen("all that was sent meanwhile arrived", time.time(), down_at)


def restart_broker(scene: Scene) -> Seen:
    """Stop the broker, and restart it after `OUTAGE_DURATION` seconds; no event may be lost."""
    broker = own_broker(scene)
    broker.stop()
    down_at = time.time()
    time.sleep(OUTAGE_DURATION)
    broker.start()
    return Seen("all that was sent meanwhile arrived", time.time(), down_at)


# ---- clients ----


def vanish(scene: Scene) -> Seen:
    """Make clients fall silent; their ping timeout must end them without a descriptor leak."""
    process = scene.a.process

    def connections() -> int:
        return int(ask_worker(process)["connections"])

    worker = psutil.Process(ask_worker(process)["pid"])
    broker_port = urlsplit(scene.demo.broker_url).port or 6379

    def descriptors() -> int:
        # Not counting the broker's: a pool opens a connection whenever all others are in use.
        pooled = [
            connection
            for connection in worker.net_connections("tcp")
            if connection.raddr and connection.raddr.port == broker_port
        ]
        return worker.num_fds() - len(pooled)

    clients_before, descriptors_before = connections(), descriptors()
    with crowd(process, CROWD):
        silent_at = time.monotonic()
        if not wait_until(lambda: connections() <= clients_before, timeout=10):
            raise Failed(f"{connections() - clients_before} clients are still there")
        silence = time.monotonic() - silent_at
        if not wait_until(lambda: descriptors() <= descriptors_before, timeout=10):
            raise Failed(f"{descriptors() - descriptors_before} descriptors are still open")
    return Seen(f"gone after {silence:.1f} s of silence, and all their descriptors")


def flood(scene: Scene) -> Seen:
    """Flood a process with slow events; few may run at a time, and others must not wait."""
    with crowd(scene.a.process, 1) as (client,):
        for number in range(1, FLOOD + 1):
            client.send(f'42{number}["demo:slow"]')
        latencies = []
        until = time.monotonic() + ECHO_DURATION
        while (asked_at := time.monotonic()) < until:
            scene.a.client.call("demo:echo", "words", timeout=3)
            latencies.append(time.monotonic() - asked_at)
        answers = [client.read_acknowledgement() for _ in range(FLOOD)]
    at_a_time = max(answer.get("running", 0) for answer in answers)
    handled = sum("running" in answer for answer in answers)
    if at_a_time > MAX_RUNNING or handled != FLOOD:
        raise Failed(f"{at_a_time} ran at the same time; {handled} of {FLOOD} were handled")
    usual, worst = statistics.median(latencies) * 1000, max(latencies) * 1000
    others = f"others answered in {usual:.0f} ms, {worst:.0f} at worst"
    return Seen(f"{at_a_time} at a time, all handled; {others}")


def never_read(scene: Scene) -> Seen:
    """Send far too much to a client that never reads; it must be closed, and memory stay low."""
    process = scene.a.process
    worker = psutil.Process(ask_worker(process)["pid"])
    before = peak = worker.memory_info().rss
    with crowd(process, 1, receive_buffer=SMALL_BUFFER) as (client,), ThreadPoolExecutor() as pool:
        pouring = pool.submit(fetch, f"{process.url}/demo/pour", {"sid": client.sid}, timeout=20)
        while not pouring.done():
            peak = max(peak, worker.memory_info().rss)
            time.sleep(0.01)
        farewell = client.read_farewell()
    sent = pouring.result().document.get("bytes", 0)
    if farewell != SLOW_CONSUMER:
        raise Failed(f"the client was closed with {farewell}")
    grown = f"the process grew by {(peak - before) / MIB:.1f} MiB"
    if peak - before > MAX_GROWTH:
        raise Failed(grown)
    return Seen(f"{sent / MIB:.0f} MiB sent, {grown}; closed: {farewell.reason!r}")


def send_rubbish(scene: Scene) -> Seen:
    """Send invalid messages; the guard must close the sender and log only a few lines."""
    process = scene.a.process
    lines_before = count_lines(process)
    earned: Counter[int] = Counter()
    for rubbish, code in RUBBISH.items():
        with crowd(process, SENDERS) as clients:
            for client in clients:
                with suppress(OSError):  # closed before everything was sent
                    client.send(rubbish)
            codes = {client.read_farewell().code for client in clients}
        if codes != {code}:
            raise Failed(f"after {rubbish[:20]!r} clients were closed with {codes}, not {code}")
        earned[code] += len(clients)
    lines = count_lines(process) - lines_before
    codes_earned = ", ".join(map(str, earned))
    return Seen(f"{earned.total()} senders closed ({codes_earned}), {lines} log lines")


# ---- processes ----


def kill_worker(scene: Scene) -> Seen:
    """Kill the worker of A; gunicorn must replace it, and its client must reconnect."""
    pid = worker_pids(scene)[0]
    os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    if not wait_until(lambda: worker_pids(scene)[0] not in (0, pid), RECOVERY_TIMEOUT):
        raise Failed("gunicorn did not replace the worker")
    return Seen("replaced by gunicorn; its client reconnected", killed_at)


def drain(scene: Scene) -> Seen:
    """Stop B's gunicorn like a deployment and restart it; its clients must move to A."""
    process = scene.b.process
    with crowd(process, CROWD) as clients, ThreadPoolExecutor(CROWD) as pool:
        process.ask_to_stop()
        stopped_at = time.monotonic()
        moves = [pool.submit(move, client, scene.a.process) for client in clients]
        wait_until(lambda: not process.is_ready(), timeout=5)
        unready = time.monotonic() - stopped_at
        codes = {code.result() for code in moves}
        moved = time.monotonic() - stopped_at
        has_ended = wait_until(process.has_died, timeout=10)
        ended = time.monotonic() - stopped_at
    if not has_ended:
        raise Failed("the process did not end")
    process.start()
    process.wait_ready()
    if codes != {SERVICE_RESTART}:
        raise Failed(f"the clients were closed with {codes}")
    return Seen(
        f"unready in {unready * 1000:.0f} ms, {len(clients)} clients on A by {moved:.1f} s, "
        f"ended in {ended:.1f} s"
    )


def move(client: BareClient, elsewhere: Process) -> int:
    """Wait until *client* is closed, connect to *elsewhere*, and return the close code."""
    code = client.read_farewell().code
    BareClient(elsewhere).close()
    return code


@contextmanager
def crowd(
    process: Process, count: int, *, receive_buffer: int | None = None
) -> Iterator[list[BareClient]]:
    """Connect *count* clients, yield them, and close them at the end."""
    clients: list[BareClient] = []
    try:
        while len(clients) < count:
            clients.append(BareClient(process, receive_buffer=receive_buffer))
        yield clients
    finally:
        for client in clients:
            client.close()


def ask_worker(process: Process) -> dict[str, Any]:
    """Return ``{"process": str, "pid": int, "connections": int}`` of the worker of *process*."""
    answer = fetch(f"{process.url}/demo/worker")
    if answer.code != 200:
        raise Failed(f"process {process.name} answered {answer.code}")
    return answer.document


def count_lines(process: Process) -> int:
    """Return the number of lines in the log of *process*."""
    return len(process.log.read_bytes().splitlines())


def ask_everybody(scene: Scene, fault: str) -> None:
    """Make each process ask each of the two clients, with a callback that causes *fault*."""
    for watcher in (scene.a, scene.b):
        for sid in (scene.a.sid, scene.b.sid):
            answer = fetch(f"{watcher.process.url}/demo/{fault}", {"sid": sid})
            if answer.code != 200:
                raise Failed(f"process {watcher.process.name} answered {answer.code}")


def worker_pids(scene: Scene) -> list[int]:
    """Return the pid of each process's worker; 0 for a process that does not answer."""
    return [
        fetch(f"{process.url}/demo/worker").document.get("pid", 0)
        for process in scene.demo.processes
    ]


def own_broker(scene: Scene) -> Broker:
    """Return the broker that the demo started.

    Raises:
        Failed: ``REDIS_URL`` names another broker.
    """
    if scene.demo.broker is None:
        raise Failed("the broker is not the demo's own")
    return scene.demo.broker


FAULTS = (
    Fault("handler raises", raise_in_handler),
    Fault("connect handler raises", raise_in_connect),
    Fault("callback raises", raise_in_callback),
    Fault("callback hangs", hang_in_callback),
    Fault("listener killed", kill_listener),
    Fault("CLIENT KILL TYPE pubsub", drop_subscribers, needs_own_broker=True),
    Fault(f"broker paused {OUTAGE_DURATION:.0f} s", pause_broker, needs_own_broker=True),
    Fault(f"broker stopped {OUTAGE_DURATION:.0f} s", restart_broker, needs_own_broker=True),
    Fault(f"{CROWD} clients vanish", vanish),
    Fault(f"client sends {FLOOD:,} events", flood),
    Fault("client never reads", never_read),
    Fault("clients send rubbish", send_rubbish),
    Fault("worker of A killed (-9)", kill_worker),
    Fault("B stopped and restarted", drain),
)

"""Inject each fault into a running demo, and measure whether events keep flowing.

A numbered stream of events leaves each process without a pause. A real client on each of the two
processes, A and B, hears both streams: its own process's directly, the other's through the
broker. What the client on A heard of A's stream, but the client on B did not, was lost between
the processes.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import socketio
from redis import Redis

from example_app.faults import HANG_DURATION, STREAM_INTERVAL
from example_app.waiting import Answer, DemoError, fetch, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from example_app.broker import Broker
    from example_app.demo import Demo, Process

BASELINE_DURATION = 1.0  # of undisturbed flow before each fault
OUTAGE_DURATION = 3.0  # of a broker that is paused or stopped
SETTLE_DURATION = 2.0  # of watching on, once events flow again
RECOVERY_TIMEOUT = 20.0
IN_FLIGHT_TIMEOUT = 0.5  # younger events may still be on their way
SILENCE = 0.5  # a stream that pauses this long does not flow
POLL_INTERVAL = 0.1


class Beat(NamedTuple):
    """One event of a stream, as one client heard it. Instants are Unix time."""

    process: str
    pid: int
    number: int
    sent_at: float
    heard_at: float


class Seen(NamedTuple):
    """What injecting a fault showed.

    Attributes:
        note: For the last column.
        over_at: When the fault was over; by default, when its injection returned.
        down_at: Since when the broker was away, for a fault of the broker; what was sent from then
            until `over_at` must arrive.
    """

    note: str
    over_at: float | None = None
    down_at: float | None = None


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        name: What the table calls it.
        inject: Makes it happen, and returns once it has; raises `Failed` if the guard did not do
            what it must.
        needs_own_broker: It stops, pauses or disconnects the broker.
    """

    name: str
    inject: Callable[[Check], Seen]
    needs_own_broker: bool = False


class Failed(Exception):
    """The guard did not do what it must; the text says what."""


class Watcher:
    """A client that hears the streams, and reconnects by itself."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.beats: list[Beat] = []
        self.client = socketio.Client(reconnection_delay=0.2, reconnection_delay_max=1.0)
        self.client.on("connect", self._watch)
        self.client.on("demo:beat", self._hear)
        self.client.on("demo:question", lambda: "yes")
        self.client.connect(process.url, auth={"name": "Check"}, transports=["websocket"])

    @property
    def sid(self) -> str:
        """The session id, by which a process can ask this client something."""
        return str(self.client.get_sid())

    def close(self) -> None:
        """Disconnect for good."""
        self.client.shutdown()

    def _watch(self) -> None:
        self.client.emit("demo:watch")

    def _hear(self, beat: dict[str, Any]) -> None:
        self.beats.append(
            Beat(beat["process"], beat["pid"], beat["n"], beat["at"], heard_at=time.time())
        )


class HealthLog:
    """The worst health that either process showed, seen from outside."""

    RANK = ("pass", "warn", "fail", "none")

    def __init__(self, processes: Iterable[Process]) -> None:
        self._urls = [f"{process.url}/healthz" for process in processes]
        self._worst = "pass"
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def restart(self) -> None:
        """Forget what was seen."""
        self._worst = "pass"

    @property
    def worst(self) -> str:
        """The worst since `restart`; ``none`` when a process did not answer."""
        return self._worst

    def close(self) -> None:
        """Stop asking."""
        self._is_closing.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._is_closing.wait(POLL_INTERVAL):
            for url in self._urls:
                answer: Answer = fetch(url, timeout=1.0)
                self._worst = max(
                    self._worst, answer.document.get("status", "none"), key=self.RANK.index
                )


class Check:
    """The demo under test, with its two clients."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo
        self.a, self.b = (Watcher(process) for process in demo.processes)
        self.health = HealthLog(demo.processes)

    def close(self) -> None:
        """Disconnect the clients."""
        self.health.close()
        for watcher in (self.a, self.b):
            watcher.close()

    def directions(self) -> tuple[tuple[Watcher, Watcher], tuple[Watcher, Watcher]]:
        """Return sender and hearer: from A to B and from B to A."""
        return (self.a, self.b), (self.b, self.a)

    def has_crossed(self, since: float) -> bool:
        """Tell whether, both ways, an event sent after *since* came through the broker."""
        return all(
            any(beat.sent_at > since for beat in heard(hearer, sender))
            for sender, hearer in self.directions()
        )

    def run(self, fault: Fault) -> Row:
        """Inject *fault*, wait until events flow again, and count."""
        if not wait_until(lambda: self.has_crossed(time.time() - SILENCE), RECOVERY_TIMEOUT):
            note = "FAILED: no events before the fault"
            return Row(fault.name, 0, 0, None, self.health.worst, note)
        time.sleep(BASELINE_DURATION)
        self.health.restart()
        began_at = time.time()
        problem = ""
        try:
            seen = fault.inject(self)
        except Failed as failure:
            problem = str(failure)
            seen = Seen("")
        over_at = seen.over_at or time.time()

        flows = wait_until(lambda: self.has_crossed(over_at), RECOVERY_TIMEOUT)
        if (down_at := seen.down_at) is not None:
            wait_until(lambda: not self.missing(down_at, over_at), RECOVERY_TIMEOUT)
            if missing := self.missing(down_at, over_at):
                problem = f"{len(missing)} events sent meanwhile did not arrive"
        time.sleep(SETTLE_DURATION)  # not a wait for anything: the time in which a relapse shows
        until = time.time()
        if not (flows and self.has_crossed(until - SILENCE)):
            problem = problem or "events do not flow again"
        time.sleep(IN_FLIGHT_TIMEOUT)
        return self.count(fault, (began_at, over_at, until), problem, seen.note)

    def count(
        self, fault: Fault, instants: tuple[float, float, float], problem: str, note: str
    ) -> Row:
        """Make the row of *fault*, which began, was over and was watched until *instants*."""
        began_at, over_at, until = instants
        sent = self.sent(began_at, until)
        lost = self.missing(began_at, until)
        recovery = max(
            recovery_delay(heard(hearer, sender), over_at) for sender, hearer in self.directions()
        )
        disorder = sum(count_disorder(watcher.beats) for watcher in (self.a, self.b))
        for watcher in (self.a, self.b):
            watcher.beats.clear()
        if disorder:
            problem = problem or f"{disorder} events out of order or twice"
        return Row(
            fault.name,
            len(sent),
            len(sent) - len(lost),
            None if problem else max(0.0, recovery),
            self.health.worst,
            f"FAILED: {problem}" if problem else note,
        )

    def sent(self, since: float, until: float) -> set[tuple[str, int, int]]:
        """Return the events that left the processes between two instants.

        Numbers are consecutive, so those that nobody heard are known as well.
        """
        numbers: dict[tuple[str, int], list[int]] = {}
        for watcher in (self.a, self.b):
            for beat in tuple(watcher.beats):
                if since < beat.sent_at <= until:
                    numbers.setdefault((beat.process, beat.pid), []).append(beat.number)
        return {
            (process, pid, number)
            for (process, pid), known in numbers.items()
            for number in range(min(known), max(known) + 1)
        }

    def missing(self, since: float, until: float) -> set[tuple[str, int, int]]:
        """Return the events sent between two instants that the other process's client lacks."""
        crossed = {
            (beat.process, beat.pid, beat.number)
            for sender, hearer in self.directions()
            for beat in heard(hearer, sender)
        }
        return self.sent(since, until) - crossed


class Row(NamedTuple):
    """A line of the table; *recovery* is None when the fault was not survived."""

    fault: str
    sent: int
    received: int
    recovery: float | None
    health: str
    note: str

    def line(self) -> str:
        """Return the row as it is printed under `HEADING`."""
        recovery = "-" if self.recovery is None else f"{self.recovery:.2f}"
        lost = self.sent - self.received
        return (
            f"{self.fault:<34}{self.sent:>6}{self.received:>10}{lost:>6}{recovery:>12}"
            f"  {self.health:<7} {self.note}"
        )


def heard(hearer: Watcher, sender: Watcher) -> list[Beat]:
    """Return what *hearer* has heard of the stream of *sender*'s process."""
    return [beat for beat in tuple(hearer.beats) if beat.process == sender.process.name]


def recovery_delay(beats: list[Beat], over_at: float) -> float:
    """Return the seconds from *over_at* to when *beats* flowed for good.

    That is the first arrival of an event sent later, or the end of the last silence after it.
    """
    arrivals = sorted(beat.heard_at for beat in beats if beat.sent_at > over_at)
    if not arrivals:
        return RECOVERY_TIMEOUT
    flowing_at = arrivals[0]
    for earlier, later in itertools.pairwise(arrivals):
        if later - earlier > SILENCE:
            flowing_at = later
    return flowing_at - over_at


def count_disorder(beats: list[Beat]) -> int:
    """Count the events that came after a later one of the same stream, or came twice."""
    latest: dict[tuple[str, int], int] = {}
    disorder = 0
    for beat in beats:
        stream = (beat.process, beat.pid)
        disorder += beat.number <= latest.get(stream, 0)
        latest[stream] = max(beat.number, latest.get(stream, 0))
    return disorder


# ---- the faults ----


def raise_in_handler(check: Check) -> Seen:
    """Have a handler raise on both processes; the acknowledgement must say so."""
    started = time.monotonic()
    for watcher in (check.a, check.b):
        try:
            answer = watcher.client.call("demo:raise", timeout=3)
        except socketio.exceptions.TimeoutError:
            raise Failed("the acknowledgement never came") from None
        if answer.get("error", {}).get("code") != "internal_error" or not answer["error"].get("id"):
            raise Failed(f"the acknowledgement was {answer}")
    return Seen(f"error acknowledged in {(time.monotonic() - started) / 2 * 1000:.0f} ms")


def raise_in_connect(check: Check) -> Seen:
    """Connect with what the connect handler cannot digest; the client must be refused."""
    refusals: list[Any] = []
    for watcher in (check.a, check.b):
        client = socketio.Client(reconnection=False)
        client.on("connect_error", refusals.append)
        try:
            client.connect(watcher.process.url, auth={"name": 42}, wait_timeout=3)
        except socketio.exceptions.ConnectionError:
            continue
        finally:
            client.disconnect()
        raise Failed("the client was let in")
    codes = [
        refusal.get("data", {}).get("code") for refusal in refusals if isinstance(refusal, dict)
    ]
    if codes != ["internal_error"] * 2:
        raise Failed(f"the clients were told {refusals or 'nothing'}")
    return Seen("clients refused")


def raise_in_callback(check: Check) -> Seen:
    """Have callbacks raise SystemExit, for clients of the same and of the other process."""
    pids = worker_pids(check)
    ask_everybody(check, "callback-raises")
    wait_until(lambda: worker_pids(check) != pids, timeout=1.5)
    if worker_pids(check) != pids:
        raise Failed("a worker ended")
    return Seen("SystemExit; same workers")


def hang_in_callback(check: Check) -> Seen:
    """Have callbacks hang, for clients of the same and of the other process."""
    ask_everybody(check, "callback-hangs")
    return Seen(f"for {HANG_DURATION:.0f} s, in both processes")


def kill_listener(check: Check) -> Seen:
    """Kill the listener in both processes, one after the other."""
    for watcher in (check.a, check.b):
        killed = fetch(f"{watcher.process.url}/demo/kill-listener", {}).document.get("killed")
        if not killed:
            raise Failed(f"no listener found to kill: {killed}")
    return Seen("in both processes")


def drop_subscribers(check: Check) -> Seen:
    """Have the broker close every subscription."""
    with Redis.from_url(check.demo.broker_url) as client:
        closed = client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    return Seen(f"{closed} subscriptions closed")


def pause_broker(check: Check) -> Seen:
    """Suspend the broker for a while."""
    broker = own_broker(check)
    broker.pause()
    down_at = time.time()
    time.sleep(OUTAGE_DURATION)
    broker.resume()
    return Seen("all that was sent meanwhile arrived", time.time(), down_at)


def restart_broker(check: Check) -> Seen:
    """Stop the broker's process, and start it again after a while, on the same port."""
    broker = own_broker(check)
    broker.stop()
    down_at = time.time()
    time.sleep(OUTAGE_DURATION)
    broker.start()
    return Seen("all that was sent meanwhile arrived", time.time(), down_at)


def kill_worker(check: Check) -> Seen:
    """Kill the worker of A; gunicorn must replace it, and the client must come back."""
    pid = worker_pids(check)[0]
    os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    if not wait_until(lambda: worker_pids(check)[0] not in (0, pid), RECOVERY_TIMEOUT):
        raise Failed("gunicorn did not replace the worker")
    return Seen("replaced by gunicorn; its client reconnected", killed_at)


def ask_everybody(check: Check, fault: str) -> None:
    """Have each process ask each of the clients, with a callback that does *fault*."""
    for watcher in (check.a, check.b):
        for sid in (check.a.sid, check.b.sid):
            answer = fetch(f"{watcher.process.url}/demo/{fault}", {"sid": sid})
            if answer.code != 200:
                raise Failed(f"process {watcher.process.name} answered {answer.code}")


def worker_pids(check: Check) -> list[int]:
    """Return the pid of each process's worker, 0 for one that does not answer."""
    return [
        fetch(f"{process.url}/demo/worker").document.get("pid", 0)
        for process in check.demo.processes
    ]


def own_broker(check: Check) -> Broker:
    """Return the broker that the demo started."""
    if check.demo.broker is None:
        raise Failed("the broker is not the demo's own")
    return check.demo.broker


FAULTS = (
    Fault("handler raises", raise_in_handler),
    Fault("connect handler raises", raise_in_connect),
    Fault("callback raises", raise_in_callback),
    Fault("callback hangs", hang_in_callback),
    Fault("listener killed", kill_listener),
    Fault("CLIENT KILL TYPE pubsub", drop_subscribers, needs_own_broker=True),
    Fault(f"broker paused {OUTAGE_DURATION:.0f} s", pause_broker, needs_own_broker=True),
    Fault(f"broker stopped {OUTAGE_DURATION:.0f} s", restart_broker, needs_own_broker=True),
    Fault("worker of A killed (-9)", kill_worker),
)

HEADING = f"{'Fault':<34}{'sent':>6}{'received':>10}{'lost':>6}{'flowing':>12}  {'health':<7} seen"


def check(demo: Demo, say: Callable[[str], None]) -> int:
    """Run every fault; return 0 only if events flowed again after each.

    Args:
        demo: What to break.
        say: Prints a line.
    """
    a, b = (process.url for process in demo.processes)
    say(
        f"A is {a} and B is {b}. Each sends an event to the other every\n"
        f"{STREAM_INTERVAL * 1000:.0f} ms, while one fault after the other is injected. This takes "
        "about a minute.\n\n"
        "  sent, received, lost  events between A and B, from the fault on\n"
        "  flowing               seconds from the end of the fault until events flowed again\n"
        "  health                the worst that /healthz of A or B said (none: no answer)\n"
    )
    say(HEADING)
    rows = []
    checked = Check(demo)
    try:
        for fault in FAULTS:
            if fault.needs_own_broker and demo.broker is None:
                say(f"{fault.name:<34}  left out: the broker is not the demo's own")
                continue
            row = checked.run(fault)
            rows.append(row)
            say(row.line())
            demo.check_alive()
    finally:
        checked.close()
    failures = sum(row.recovery is None for row in rows)
    say(f"\n{len(rows) - failures} passed, {failures} failed")
    if not rows:
        raise DemoError("no fault could be injected")
    return 1 if failures else 0

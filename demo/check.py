"""Inject each fault into a running demo, and measure whether events keep flowing.

Each of the two processes, A and B, emits a continuous, numbered stream of events. A real client on
each of them receives both streams: that of its own process directly, the other one through the
broker. An event of A's stream that reached the client on A but not the client on B was lost
between the processes.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from demo.clients import CLIENT_ERRORS, Beat, Watcher
from demo.faults import FAULTS
from demo.panel import STREAM_INTERVAL
from demo.scene import Failed, Fault, Scene, Seen
from demo.waiting import Answer, DemoError, fetch, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from demo.runner import Demo
    from demo.servers import Process

# All in seconds.
BASELINE_DURATION = 0.3  # undisturbed flow before each fault
SETTLE_DURATION = 1.0  # observation after events flow again
RECOVERY_TIMEOUT = 20.0
IN_FLIGHT_TIMEOUT = 0.5  # younger events may still be in flight
SILENCE = 0.5  # a stream that pauses for this long is interrupted
POLL_INTERVAL = 0.1


class HealthLog:
    """Polls the health of both processes, and remembers the worst status."""

    RANK = ("pass", "warn", "fail", "none")

    def __init__(self, processes: Iterable[Process]) -> None:
        self._urls = [f"{process.url}/healthz" for process in processes]
        self._worst = "pass"
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def restart(self) -> None:
        """Forget the statuses so far."""
        self._worst = "pass"

    @property
    def worst(self) -> str:
        """The worst status since `restart`; ``none`` if a process did not answer."""
        return self._worst

    def close(self) -> None:
        """Stop polling."""
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
        self.a, self.b = (Watcher(process) for process in demo.processes)
        self.scene = Scene(demo, self.a, self.b)
        self.health = HealthLog(demo.processes)

    def close(self) -> None:
        """Disconnect the clients."""
        self.health.close()
        for watcher in (self.a, self.b):
            watcher.close()

    def directions(self) -> tuple[tuple[Watcher, Watcher], tuple[Watcher, Watcher]]:
        """Return the pairs of sender and receiver: A to B, and B to A."""
        return (self.a, self.b), (self.b, self.a)

    def has_crossed(self, since: float) -> bool:
        """Return whether, in both directions, an event sent after *since* came through."""
        return all(
            any(beat.sent_at > since for beat in heard(hearer, sender))
            for sender, hearer in self.directions()
        )

    def run(self, fault: Fault) -> Row:
        """Inject *fault*, wait until events flow again, and count the losses."""
        if not wait_until(lambda: self.has_crossed(time.time() - SILENCE), RECOVERY_TIMEOUT):
            note = "FAILED: no events before the fault"
            return Row(fault.name, 0, 0, None, self.health.worst, note)
        time.sleep(BASELINE_DURATION)
        self.health.restart()
        began_at = time.time()
        problem = ""
        try:
            seen = fault.inject(self.scene)
        except (Failed, *CLIENT_ERRORS) as failure:
            problem = str(failure) or type(failure).__name__
            seen = Seen("")
        over_at = seen.over_at or time.time()

        flows = wait_until(lambda: self.has_crossed(over_at), RECOVERY_TIMEOUT)
        if (down_at := seen.down_at) is not None:
            wait_until(lambda: not self.missing(down_at, over_at), RECOVERY_TIMEOUT)
            if missing := self.missing(down_at, over_at):
                problem = f"{len(missing)} events sent meanwhile did not arrive"
        time.sleep(SETTLE_DURATION)  # deliberately unconditional: time in which a relapse may show
        until = time.time()
        if not (flows and self.has_crossed(until - SILENCE)):
            problem = problem or "events do not flow again"
        time.sleep(IN_FLIGHT_TIMEOUT)
        return self.count(fault, (began_at, over_at, until), problem, seen.note)

    def count(
        self, fault: Fault, instants: tuple[float, float, float], problem: str, note: str
    ) -> Row:
        """Return the row of *fault*.

        Args:
            fault: The fault.
            instants: When it began, when it ended, and when its observation ended (Unix time).
            problem: Why the check failed; empty if it passed.
            note: Text for the last column.
        """
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
            problem = problem or f"{disorder} events out of order or duplicated"
        return Row(
            fault.name,
            len(sent),
            len(lost),
            None if problem else max(0.0, recovery),
            self.health.worst,
            f"FAILED: {problem}" if problem else note,
        )

    def sent(self, since: float, until: float) -> set[tuple[str, int, int]]:
        """Return the events that the processes sent between two instants.

        Their numbers are consecutive, so this includes events that no client received.
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
        """Return the events sent between two instants that did not reach the other process."""
        crossed = {
            (beat.process, beat.pid, beat.number)
            for sender, hearer in self.directions()
            for beat in heard(hearer, sender)
        }
        return self.sent(since, until) - crossed


class Row(NamedTuple):
    """A line of the table; *recovery* is in seconds, or ``None`` if the check failed."""

    fault: str
    sent: int
    lost: int
    recovery: float | None
    health: str
    note: str

    def line(self) -> str:
        """Format the row to match `HEADING`."""
        recovery = "-" if self.recovery is None else f"{self.recovery:.2f}"
        return (
            f"{self.fault:<29}{self.sent:>5}{self.lost:>6}{recovery:>9}"
            f"  {self.health:<6}  {self.note}"
        )


def heard(hearer: Watcher, sender: Watcher) -> list[Beat]:
    """Return the events of *sender*'s process that *hearer* has received."""
    return [beat for beat in tuple(hearer.beats) if beat.process == sender.process.name]


def recovery_delay(beats: list[Beat], over_at: float) -> float:
    """Return the seconds from *over_at* until *beats* flowed without interruption.

    That is until the first arrival of an event sent later, or until the end of the last silence.
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
    """Count the events that arrived after a later one of the same stream, or twice."""
    latest: dict[tuple[str, int], int] = {}
    disorder = 0
    for beat in beats:
        stream = (beat.process, beat.pid)
        disorder += beat.number <= latest.get(stream, 0)
        latest[stream] = max(beat.number, latest.get(stream, 0))
    return disorder


HEADING = f"{'Fault':<29}{'sent':>5}{'lost':>6}{'flowing':>9}  {'health':<6}  seen"


def check(demo: Demo, say: Callable[[str], None]) -> int:
    """Inject every fault; return 0 if the guard handled all of them, otherwise 1.

    Args:
        demo: The demo to break.
        say: Prints a line.
    """
    a, b = (process.url for process in demo.processes)
    say(
        f"A is {a} and B is {b}. Each sends an event to the other every\n"
        f"{STREAM_INTERVAL * 1000:.0f} ms, while one fault after another is injected. This takes "
        "about a minute.\n\n"
        "  sent     events between A and B, from the fault on\n"
        "  lost     events that did not arrive; a process that is down has no clients for them\n"
        "  flowing  seconds from the end of the fault until events flowed again\n"
        "  health   worst status of /healthz of A or B (none: no answer)\n"
    )
    say(HEADING)
    rows = []
    checked = Check(demo)
    try:
        for fault in FAULTS:
            if fault.needs_own_broker and demo.broker is None:
                say(f"{fault.name:<29}  skipped: the broker is not the demo's own")
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

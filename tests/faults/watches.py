"""What tests look at while a server is under attack: latency, memory, log lines and tables."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil
import requests

from tests.faults.connection_app import EVENTS
from tests.support import wait_until
from tests.support.raw_clients import RawWebSocket
from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from tests.support import GunicornServer

MIB = 1024 * 1024
FLOOD_APP = "tests.faults.flood_app:create_app()"
PLAIN_GEVENT_WORKER = ("--worker-class", "gevent")

_ASKERS = 5
_ASK_INTERVAL = 0.1
_SAMPLE_INTERVAL = 0.01
_JOIN_TIMEOUT = 3.0
_ERROR = re.compile(r"\[(ERROR|CRITICAL)\]|^(ERROR|CRITICAL) ")
_ACCESS = re.compile(r'"[A-Z]+ \S+ HTTP/1\.[01]" \d{3} ')


class Watch:
    """Something that looks again and again, in a thread of its own, until the block ends."""

    def __init__(self, interval: float, *looks: Callable[[], None]) -> None:
        self._interval = interval
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(look,), daemon=True)
            for look in looks or [self.look]
        ]

    def look(self) -> None:
        """Look once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Begin to look."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop looking."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)

    def _run(self, look: Callable[[], None]) -> None:
        while not self._is_over.wait(self._interval):
            look()


@dataclass(frozen=True)
class Observation:
    """One answer of a health address."""

    at: float
    path: str
    status: int
    listener: str


class HealthWatch(Watch):
    """Asks a server for its health at each of *paths*; no *path* waits for another.

    The status is 0 where no answer came in time.
    """

    def __init__(
        self, server: GunicornServer, *paths: str, interval: float = 0.05, timeout: float = 2.0
    ) -> None:
        super().__init__(interval, *(partial(self._ask, path) for path in paths))
        self._server = server
        self._timeout = timeout
        self._observations: list[Observation] = []

    def observations(self, path: str, *, since: float = 0.0) -> list[Observation]:
        """Return what *path* answered to requests sent after the instant *since*."""
        return [seen for seen in list(self._observations) if seen.path == path and seen.at >= since]

    def first(
        self, path: str, condition: Callable[[Observation], bool], *, since: float
    ) -> Observation | None:
        """Return the first answer of *path* for which *condition* holds."""
        return next(filter(condition, self.observations(path, since=since)), None)

    def _ask(self, path: str) -> None:
        at, status, listener = time.monotonic(), 0, ""
        with contextlib.suppress(requests.RequestException):
            answer = self._server.get(path, timeout=self._timeout)
            status = answer.status_code
            listener = str(answer.json().get("listener", ""))
        self._observations.append(Observation(at, path, status, listener))


class _Asker(Watch):
    """Asks for ``/ping`` at a steady rate, on one connection that is kept alive."""

    def __init__(self, server: GunicornServer, *, first_at: float) -> None:
        super().__init__(0.0)
        address = urlsplit(server.url)
        assert address.hostname is not None
        self._http = http.client.HTTPConnection(address.hostname, address.port, timeout=60.0)
        self.due_at = first_at
        self.answers: list[tuple[float, float]] = []
        self.errors: list[str] = []

    def look(self) -> None:
        """Ask once, when it is due."""
        if self._is_over.wait(max(self.due_at - time.monotonic(), 0.0)):
            return
        try:
            self._http.request("GET", "/ping")
            answer = self._http.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            if not self._is_over.is_set():
                self.errors.append(repr(error))
            self._http.close()
        else:
            self.answers.append((self.due_at, time.monotonic() - self.due_at))
        self.due_at += _ASK_INTERVAL

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop asking, also if the server does not answer."""
        self._is_over.set()
        sock = self._http.sock
        if sock is not None and error is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        super().__exit__(kind, error, traceback)
        self._http.close()


class HttpWatch:
    """Asks a server for ``/ping`` 50 times a second, on a few connections.

    A request that is late because the one before it was slow counts from the instant at which it
    was due: one stall of a second is not a few slow answers, but all that were due in that second.
    """

    def __init__(self, server: GunicornServer) -> None:
        now = time.monotonic()
        offset = _ASK_INTERVAL / _ASKERS
        self._askers = [_Asker(server, first_at=now + number * offset) for number in range(_ASKERS)]
        self._stack = contextlib.ExitStack()
        self._ended_at = float("inf")

    @property
    def errors(self) -> list[str]:
        """What requests failed with."""
        return [error for asker in self._askers for error in asker.errors]

    def __enter__(self) -> Self:
        """Begin to ask, and wait for a first few answers."""
        for asker in self._askers:
            self._stack.enter_context(asker)
        wait_until(
            lambda: all(len(asker.answers) > 1 for asker in self._askers),
            message="/ping is not answered",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop asking, also if the server does not answer."""
        self._ended_at = time.monotonic()
        self._stack.__exit__(kind, error, traceback)

    def latencies(self, *, since: float = 0.0) -> list[float]:
        """Return seconds for each request due after the instant *since*, slowest last.

        A request that waits for its answer counts with what it has waited so far.
        """
        found = []
        until = min(time.monotonic(), self._ended_at)
        for asker in self._askers:
            due_at = max(asker.due_at, since)
            found += [latency for was_due, latency in list(asker.answers) if was_due >= since]
            while due_at < until:
                found.append(until - due_at)
                due_at += _ASK_INTERVAL
        return sorted(found)

    def slowest(self, *, since: float = 0.0) -> float:
        """Return the longest time to an answer, in seconds."""
        return max(self.latencies(since=since), default=0.0)

    def p99(self, *, since: float = 0.0) -> float:
        """Return the time within which 99 of 100 requests were answered, in seconds."""
        return percentile(self.latencies(since=since), 0.99)


class EchoWatch(Watch):
    """A client of its own that asks for an echo again and again."""

    def __init__(self, server: GunicornServer, *, interval: float = 0.005) -> None:
        super().__init__(interval)
        self._client = RawWebSocket(server.port, timeout=60.0)
        self._asked_at: float | None = None
        self._latencies: list[float] = []
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        """Connect, and begin to ask."""
        self._client.open().join()
        return super().__enter__()

    def look(self) -> None:
        """Ask once."""
        number = len(self._latencies) + 1
        self._asked_at = time.monotonic()
        try:
            answer = self._client.call("echo", number, ack_id=number)
            if answer != [number]:
                self.errors.append(f"{answer} instead of {number}")
        except (OSError, AssertionError) as error:
            if not self._is_over.is_set():
                self.errors.append(repr(error))
            self._is_over.set()
        else:
            self._latencies.append(time.monotonic() - self._asked_at)
        self._asked_at = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop asking, also if the server does not answer."""
        self._is_over.set()
        if error is not None:
            self._client.hang_up()
        super().__exit__(kind, error, traceback)
        self._client.shut()

    def latencies(self) -> list[float]:
        """Return seconds for each answer, slowest last; one that is awaited counts, too."""
        asked_at = self._asked_at
        waiting = [] if asked_at is None else [time.monotonic() - asked_at]
        return sorted([*self._latencies, *waiting])

    def slowest(self) -> float:
        """Return the longest time to an answer, in seconds."""
        return max(self.latencies(), default=0.0)

    def p99(self) -> float:
        """Return the time within which 99 of 100 answers came, in seconds."""
        return percentile(self.latencies(), 0.99)


class MemoryWatch(Watch):
    """Samples the resident memory of a server's worker."""

    def __init__(self, server: GunicornServer) -> None:
        super().__init__(_SAMPLE_INTERVAL)
        (pid,) = server.worker_pids()
        self._process = psutil.Process(pid)
        self.before = self.now()
        self._most = self.before

    def now(self) -> int:
        """Return the resident bytes."""
        return int(self._process.memory_info().rss)

    def look(self) -> None:
        """Take one sample."""
        try:
            self._most = max(self._most, self.now())
        except psutil.NoSuchProcess:
            self._is_over.set()

    @property
    def growth(self) -> float:
        """By how much it has grown at the most, in MiB."""
        self.look()
        return (self._most - self.before) / MIB


class LogWatch:
    """Counts what a server writes from now on, to its log records and to its output.

    The access log does not count: it has its line for each request, friendly or not. What the
    application notes of its connections does not count, either.
    """

    def __init__(self, server: GunicornServer) -> None:
        self._server = server
        self._since = time.time()
        self._offset = len(server.log())

    def lines(self) -> list[str]:
        """Return the lines of the output and the messages of the records.

        A line that also is a record counts once.
        """
        records = self._server.records(since=self._since, matching=lambda it: it.logger != EVENTS)
        known = {record.message for record in records}
        output = self._server.log()[self._offset :].splitlines()
        lines = [line for line in output if line and line not in known] + [
            f"{record.level} {record.message}" for record in records
        ]
        return [line for line in lines if not _ACCESS.search(line)]

    def errors(self) -> list[str]:
        """Return the lines of level ERROR and above."""
        return [line for line in self.lines() if _ERROR.search(line)]

    def tracebacks(self) -> list[str]:
        """Return the last line of each traceback."""
        records = self._server.records(since=self._since, matching=lambda it: it.has_traceback)
        output = self._server.log()[self._offset :]
        return [record.traceback.splitlines()[-1] for record in records] + [
            line for line in output.splitlines() if line.startswith("Traceback")
        ]


def crowding() -> float:
    """Return by how much slower everything is because others use the machine, >= 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def percentile(ordered: list[float], share: float) -> float:
    """Return the value that *share* of the *ordered* values do not exceed."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def milliseconds(seconds: float) -> str:
    """Return a duration for the table of what was measured."""
    return f"{seconds * 1000:.1f} ms"


def tables(server: GunicornServer) -> dict[str, int]:
    """Return how much the server remembers of connections."""
    found: dict[str, int] = server.get("/tables").json()
    return found


def wait_for_empty_tables(server: GunicornServer, *, timeout: float = USUAL_TIMEOUT) -> None:
    """Wait until the server remembers nobody."""

    def left() -> dict[str, int]:
        return {name: count for name, count in tables(server).items() if count}

    try:
        wait_until(lambda: not left(), timeout=timeout, interval=0.05)
    except AssertionError:
        raise AssertionError(f"the tables are not empty: {left()}") from None

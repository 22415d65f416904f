"""Runs the soak: two guarded processes, the crowd, and what is measured meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from dataclasses import dataclass, field

import gevent
import psutil

from tests.soak.app import SOAK_APP
from tests.soak.crowd import Crowd, Ledger
from tests.support import DeadlineExceeded, GunicornServer, RedisServer, wait_until
from tests.support.servers import PROJECT_ROOT

MIB = 1024 * 1024
_SAMPLE_INTERVAL = 2.0
_LAST_EVENTS_TIMEOUT = 30.0
_EMPTY_TIMEOUT = 45.0
"""Longest wait until all who left are forgotten: longer than a ping timeout."""
_WARM_UP = 0.25
"""Share of the time after which memory must be flat."""
_SPARE_GREENLETS = 10
_SPARE_FILES = 10


@dataclass
class Process:
    """One server and its memory over time."""

    name: str
    server: GunicornServer
    worker: psutil.Process
    greenlets: int = 0
    files: int = 0
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds and MiB."""

    def sample(self) -> None:
        """Measure the resident memory once."""
        self.samples.append((time.monotonic(), self.worker.memory_info().rss / MIB))

    def inside(self) -> dict[str, object]:
        """Return what the process says of itself."""
        answer: dict[str, object] = self.server.get("/inside").json()
        return answer

    def tables(self) -> dict[str, int]:
        """Return what it still remembers, empty tables left out."""
        tables: dict[str, int] = self.server.get("/tables").json()
        return {name: count for name, count in tables.items() if count}


def growth(samples: list[tuple[float, float]], *, since: float) -> float:
    """Return by how many MiB memory has grown after the instant *since*, by a linear fit."""
    later = [(at, size) for at, size in samples if at >= since]
    if len(later) < 2:
        return 0.0
    middle = sum(at for at, _ in later) / len(later)
    mean = sum(size for _, size in later) / len(later)
    spread = sum((at - middle) ** 2 for at, _ in later)
    slope = sum((at - middle) * (size - mean) for at, size in later) / spread
    return slope * (later[-1][0] - later[0][0])


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._ledger = Ledger()
        self._redis = RedisServer()
        self._processes: list[Process] = []
        self._results: list[tuple[str, str, str, bool]] = []

    def run(self) -> bool:
        """Run it; return whether all is well."""
        try:
            self._start()
            crowd = Crowd(
                [process.server.port for process in self._processes],
                self._options.clients,
                self._ledger,
            )
            self._attend(crowd)
            self._finish(crowd)
            self._judge()
        finally:
            for process in self._processes:
                process.server.close()
            self._redis.close()
        return self._print()

    def _start(self) -> None:
        self._redis.start()
        for name in "AB":
            server = GunicornServer(
                SOAK_APP,
                env={
                    "GUARD": "1",
                    "REDIS_URL": self._redis.url,
                    "SOAK_PROCESS": name,
                    "APP_CONFIG": self._options.config,
                    "SOCKETIO_OPTIONS": json.dumps({"ping_interval": 5, "ping_timeout": 5}),
                    "SOCKETIO_GUARD_MAX_CONNECTIONS": str(4 * self._options.clients),
                },
                arguments=["--config", str(PROJECT_ROOT / "gunicorn.conf.py")],
            )
            server.start()
            (pid,) = server.worker_pids()
            process = Process(name, server, psutil.Process(pid))
            process.greenlets = int(str(process.inside()["greenlets"]))
            process.files = process.worker.num_fds()
            self._processes.append(process)

    def _attend(self, crowd: Crowd) -> None:
        """Let the crowd be there for as long as wished, and measure."""
        for process in self._processes:
            process.server.post("/streams/start")
        began_at = time.monotonic()
        ends_at = began_at + 60 * self._options.minutes
        arriving = gevent.spawn(crowd.arrive)
        next_line = began_at + 60
        while time.monotonic() < ends_at:
            gevent.sleep(_SAMPLE_INTERVAL)
            for process in self._processes:
                process.sample()
            if time.monotonic() >= next_line:
                self._report(crowd, began_at)
                next_line += 60
        arriving.get()

    def _report(self, crowd: Crowd, began_at: float) -> None:
        ledger = self._ledger
        memory = "  ".join(
            f"{process.name} {process.samples[-1][1]:.0f} MiB" for process in self._processes
        )
        say(
            f"{(time.monotonic() - began_at) / 60:5.1f} min  {crowd.present} clients  {memory}  "
            f"{ledger.counts['stream events']:,} events  {ledger.counts['answers']:,} answers  "
            f"{ledger.counts['upgrades']} upgrades  {ledger.counts['vanished']} vanished  "
            f"{ledger.lost} lost  {ledger.reordered} reordered  "
            f"{ledger.counts['problems']} problems"
        )

    def _finish(self, crowd: Crowd) -> None:
        """Stop the streams, wait for what is under way, and let all leave."""
        crowd.end_sending()
        streams: dict[str, int] = {}
        for process in self._processes:
            streams |= process.server.post("/streams/stop", timeout=60.0)
        with contextlib.suppress(DeadlineExceeded):
            wait_until(
                lambda: not crowd.missing(streams), timeout=_LAST_EVENTS_TIMEOUT, interval=0.2
            )
        for missing in crowd.missing(streams):
            self._ledger.note(missing)
            self._ledger.lost += 1
        for process in self._processes:
            process.sample()
            with contextlib.suppress(DeadlineExceeded):
                wait_until(lambda process=process: not unanswered(process), timeout=10.0)
        crowd.leave()
        for process in self._processes:
            with contextlib.suppress(DeadlineExceeded):
                wait_until(
                    lambda process=process: not process.tables(),
                    timeout=_EMPTY_TIMEOUT,
                    interval=0.5,
                )

    def _judge(self) -> None:
        ledger = self._ledger
        self._result("stream events lost", ledger.lost, "0", not ledger.lost)
        self._result("stream events reordered", ledger.reordered, "0", not ledger.reordered)
        problems = ledger.counts["problems"]
        self._result("problems that clients had", problems, "0", not problems)
        bound = self._options.growth
        for process in self._processes:
            name, server = process.name, process.server
            first, last = process.samples[0][0], process.samples[-1][0]
            grown = growth(process.samples, since=first + _WARM_UP * (last - first))
            self._result(
                f"{name}: memory grown after warm-up",
                f"{grown:+.1f} MiB of {process.samples[-1][1]:.0f}",
                f"< {bound:g} MiB",
                grown < bound,
            )
            open_questions = unanswered(process)
            self._result(f"{name}: questions not answered", open_questions, "0", not open_questions)
            tables = process.tables()
            self._result(f"{name}: tables", tables or "empty", "empty", not tables)
            self._judge_rest(process)
            bad = server.records(matching=lambda it: it.level in ("ERROR", "CRITICAL"))
            lines = [record.message for record in bad]
            lines += [line for line in server.log().splitlines() if line.startswith("Traceback")]
            self._result(f"{name}: errors logged", len(lines), "0", not lines)
            self._ledger.problems += [f"{name} logged: {line}" for line in lines[:10]]

    def _judge_rest(self, process: Process) -> None:
        inside = process.inside()
        greenlets = int(str(inside["greenlets"])) - process.greenlets
        is_few = greenlets <= _SPARE_GREENLETS
        self._result(
            f"{process.name}: greenlets left", f"{greenlets:+}", f"<= {_SPARE_GREENLETS}", is_few
        )
        files = process.worker.num_fds() - process.files
        is_few = files <= _SPARE_FILES
        self._result(f"{process.name}: files left open", f"{files:+}", f"<= {_SPARE_FILES}", is_few)

    def _result(self, what: str, seen: object, wanted: str, is_met: bool) -> None:
        self._results.append((what, str(seen), wanted, is_met))

    def _print(self) -> bool:
        for name, count in sorted(self._ledger.counts.items()):
            say(f"{name:32} {count:,}")
        say("")
        for what, seen, wanted, is_met in self._results:
            say(f"{'ok  ' if is_met else 'FAIL'}  {what:32} {seen:24} {wanted}")
        for problem in self._ledger.problems:
            say(f"      {problem}")
        return all(is_met for *_, is_met in self._results)


def unanswered(process: Process) -> int:
    """Return how many of the process's questions have had no answer."""
    answers = process.server.get("/answers").json()
    return int(answers["asked"] - answers["answered"])


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the soak, and exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--growth", type=float, default=10.0, help="allowed growth in MiB")
    parser.add_argument("--config", default="{}", help="settings of the guard, a JSON object")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(0 if Soak(options).run() else 1)

"""The cost of each byte from a hostile client, and its effect on other clients.

Each attack has a fresh server. Meanwhile another client asks for an echo every 5 ms, whether or not
the last one was answered, so that a blocked server shows in its percentiles.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from benchmarks.attacks import ATTACKS, MAILBOX, Attack
from benchmarks.bench import Bench, check, no_garbage_collection
from benchmarks.client import Client, Loop, WrongAnswerError, connect, reply_frame, request_frame
from benchmarks.report import GUARDED, STOCK, percentile, rows_text
from benchmarks.servers import BENCHMARKS, Server, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.bench import Plan
    from benchmarks.report import Column, Metric, Results

COLUMNS = [STOCK, GUARDED]
BOUND = 10.0  # ms: the p99 of others beside an attack

_INTERVAL = 0.005
_PRIORITY = -19
_ATTACKER_PRIORITY = -10
_WARM_UP = 0.3
_ANSWER_TIMEOUT = 5.0
_SETTLE_TIME = 0.1
_SETTLED = 0.1  # share of a core below which a server is at rest
_SETTLE_TIMEOUT = 5.0
_LEAST = 0.001  # seconds; lower bound of every subtraction
_TICKS = os.sysconf("SC_CLK_TCK")
_WAITING = 400
_WAITING_SIZE = 100_000
_MIB = 1 << 20


class Prober:
    """A well-behaved client that asks on a schedule and measures how long each answer takes.

    Time in which the server or this process could not run, because other programs or a hypervisor
    had its core, is not the server's fault: the longer of both is subtracted.

    Args:
        loop: Serves the client.
        client: Connected.
        processes: The server and this one.

    Attributes:
        failure: Why it received no answer, if it did not.
        latencies: Latencies of the answers so far, in seconds.
    """

    def __init__(self, loop: Loop, client: Client, processes: list[Process]) -> None:
        self._loop = loop
        self._client = client
        self._processes = processes
        self.failure = ""
        self._number = 0
        self._asked: dict[bytes, tuple[float, list[float]]] = {}  # when, and time lost by then
        self.latencies: list[float] = []
        client.on_data = self._on_data

    def ask(self, seconds: float) -> None:
        """Ask on schedule for that many seconds."""
        until = time.perf_counter() + seconds
        due_at = time.perf_counter()
        with self._noting_the_end():
            while due_at < until and not self.failure:
                self._ask()
                due_at = max(due_at + _INTERVAL, time.perf_counter())
                self._loop.rest(due_at - time.perf_counter())

    def wait(self) -> list[float]:
        """Wait for the answers, for at most 5 s.

        Returns:
            Their latencies in seconds, infinite if there was no answer, or the server has
            disconnected the client.
        """
        give_up_at = time.perf_counter() + _ANSWER_TIMEOUT
        with self._noting_the_end():
            while self._asked and not self.failure and time.perf_counter() < give_up_at:
                self._loop.rest(0.01)
        if self._asked and not self.failure:
            self.failure = f"no answer after {_ANSWER_TIMEOUT:.0f} s"
        found = self.latencies + [math.inf] * len(self._asked)
        self.latencies = []
        return found

    @contextlib.contextmanager
    def _noting_the_end(self) -> Iterator[None]:
        try:
            yield
        except WrongAnswerError as exc:
            self.failure = str(exc)

    def _ask(self) -> None:
        self._number += 1
        self._asked[reply_frame(b"43%d[%d]" % (self._number, self._number))] = (
            time.perf_counter(),
            self._lost,
        )
        self._client.send_frame(request_frame(b'42%d["probe",%d]' % (self._number, self._number)))

    def _on_data(self, data: bytes) -> bool:
        asked = self._asked.pop(data, None)
        if asked is None:
            return False
        asked_at, before = asked
        taken = time.perf_counter() - asked_at
        lost = max(now - then for now, then in zip(self._lost, before, strict=True))
        self.latencies.append(max(min(taken, _LEAST), taken - lost))
        return True

    @property
    def _lost(self) -> list[float]:
        return [process.lost() for process in self._processes]


class Usage(NamedTuple):
    """The resources a server has used: seconds of CPU, peak memory in bytes, bytes of log."""

    cpu: float
    memory: int
    logged: int


class Process:
    """Measures the resources that the server's worker has used."""

    def __init__(self, pid: int, core: int | None) -> None:
        self._process = psutil.Process(pid)
        self._directory = Path("/proc") / str(pid)
        self._schedstat = str(self._directory / "task" / str(pid) / "schedstat")
        self._core = b"cpu" if core is None else b"cpu%d" % core

    @property
    def cpu(self) -> float:
        """Seconds of CPU, user and system."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def lost(self) -> float:
        """Return the seconds for which its main thread was ready to run but did not get its core.

        Source:
            Linux, Documentation/scheduler/sched-stats.rst: the second number of
            ``/proc/pid/task/tid/schedstat`` is the time spent waiting on a run queue. proc(5),
            ``/proc/stat``: the eighth number of a core is the time that a hypervisor took.
        """
        with open(self._schedstat, "rb") as schedstat:
            waited = int(schedstat.read().split()[1]) / 1e9
        with open("/proc/stat", "rb") as stat:
            stolen = next(int(line.split()[8]) for line in stat if line.split()[0] == self._core)
        return waited + stolen / _TICKS

    def forget_peak(self) -> None:
        """Reset the peak of the memory to the current resident size.

        Source:
            proc(5), ``/proc/pid/clear_refs``, value 5.
        """
        (self._directory / "clear_refs").write_text("5")

    def usage(self, server: Server) -> Usage:
        """Return the resources it has used, with the bytes that *server* has logged."""
        return Usage(self.cpu, self._peak(), server.logged)

    def _peak(self) -> int:
        for line in (self._directory / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise WrongAnswerError("the system does not tell the peak of a process")


class AttackProcess:
    """One of the attacks, ready to begin."""

    def __init__(self, name: str, port: int, seconds: float) -> None:
        self._name = name
        command = [sys.executable, "-m", "benchmarks.attacks", name, str(port), str(seconds)]
        self._process = subprocess.Popen(
            command,
            cwd=BENCHMARKS.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the scheduler shares a core among sessions
        )
        with contextlib.suppress(OSError):
            _set_priority(self._process.pid, _ATTACKER_PRIORITY)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise WrongAnswerError(f"{name}: the attacker did not start")

    def begin(self) -> None:
        """Start the attack."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Return the attacker's report.

        Raises:
            WrongAnswerError: It failed, or sent nothing.
        """
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise WrongAnswerError(f"the attack {self._name!r} failed")
        answer: dict[str, Any] = json.loads(output)
        return answer

    def stop(self) -> None:
        """Kill the attacker."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class Row(NamedTuple):
    """One attack on one column.

    Attributes:
        sent: Bytes that the server read from the attacker during the attack. All figures per
            byte refer to these, and to that time.
        units: Events, requests or connects that the attacker has sent, read or not.
        out: Bytes out per byte in.
        cost: Microseconds of the server's CPU per kB in, without that of the probes.
        rest: Seconds from the end of the attack until the server was at rest; infinite if that
            took more than 5 s.
        memory: Peak growth of the server's resident memory, during the attack or later, in MiB.
        held: Growth until the end of the attack, per byte in.
        logged: Bytes logged per byte in.
        p50: Median latency of the other client, in ms; infinite without an answer within 5 s.
        p99: 99th percentile of these latencies.
        runs: Handlers that began; NaN if the server no longer answered.
    """

    sent: float
    units: float
    out: float
    cost: float
    rest: float
    memory: float
    held: float
    logged: float
    p50: float
    p99: float
    runs: float


@contextlib.contextmanager
def _preferred(results: Results) -> Iterator[None]:
    """Give processes that are started in the body a higher priority, if that is allowed."""
    own = os.getpid()
    try:
        _set_priority(own, _PRIORITY)
    except OSError:
        results.notes.append("without the right to a higher priority: others' latency is noisy")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _set_priority(own, 0)


def _set_priority(pid: int, nice: int) -> None:
    """Set the priority of a process within its session, and that of the session.

    Source:
        sched(7), "The autogroup feature".
    """
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    autogroup = Path("/proc") / str(pid) / "autogroup"
    if autogroup.exists():
        autogroup.write_text(str(nice))


def run(bench: Bench) -> None:
    """Measure each attack on stock and guarded."""
    with _preferred(bench.results):
        for name, attack in ATTACKS.items():
            if name in bench.plan.attacks or name == "nothing":  # whose cost is subtracted
                _run(bench, name, attack)


def _run(bench: Bench, name: str, attack: Attack) -> None:
    columns = [GUARDED] if attack.is_guard_only else COLUMNS
    environ = {"BENCH_COMPRESSION": "1" if attack.needs_compression else "0"}
    servers = {
        column: bench.server(
            column, f"abuse-{name}", application="benchmarks.abuse_app:app", environ=environ
        )
        for column in columns
    }
    with contextlib.suppress(OSError):
        for server in servers.values():
            _set_priority(server.pid, _PRIORITY)  # it has its own session
    with running(list(servers.values())):
        for column, server in servers.items():
            row, told = _measure(bench, name, attack, column, server)
            server.kill()  # it may have minutes of work left
            for what, value in row._asdict().items():
                bench.results.add(f"abuse {name}:{what}", column, value)
            bench.results.told[name, column.name] = told
            sys.stderr.write(
                f"{name}, {column.name}: {row.sent / 1e6:.3g} MB in, {row.out:.3g} out per byte, "
                f"{row.units:.0f} units, {row.cost:.3g} us per kB, at rest after {row.rest:.2f} s, "
                f"{row.memory:+.0f} MiB, "
                f"p50 {row.p50:.2f}, p99 {row.p99:.2f} ms, {row.runs:.0f} runs {told}\n"
            )


def _measure(
    bench: Bench, name: str, attack: Attack, column: Column, server: Server
) -> tuple[Row, dict[str, int]]:
    seconds = bench.plan.abuse_seconds
    client = connect(bench.loop, server.port, 1)[0]
    stats = client.call("stats", False)
    check(column, server, stats)
    if attack.needs_mailbox and not client.call("fill", MAILBOX, _WAITING, _WAITING_SIZE):
        raise WrongAnswerError(f"{name}: no mailbox")
    process = Process(stats["pid"], server.core)
    own = Process(os.getpid(), bench.cores.load)
    prober = Prober(bench.loop, client, [process, own])
    attacker = AttackProcess(name, server.port, seconds)
    try:
        prober.ask(_WARM_UP)
        prober.wait()
        with no_garbage_collection():
            process.forget_peak()
            before = process.usage(server)
            attacker.begin()
            prober.ask(seconds)
            answered = len(prober.latencies)
            after = process.usage(server)
            ended_at = time.perf_counter()
            latencies = prober.wait()
            rest = math.inf if prober.failure else _settle(bench.loop, process) - ended_at
        found = attacker.result()
    finally:
        attacker.stop()
    memory = max(0, process.usage(server).memory - before.memory)
    runs = math.nan
    if prober.failure:
        client.abandon()
        found["told"][f"others: {prober.failure}"] = 1
    else:
        runs = client.call("stats", False)["runs"].get(attack.proof, 0)
        client.close()
        if attack.proof and column is STOCK and not runs:
            raise WrongAnswerError(f"{name}: the attack does not reach {attack.proof!r}")
    sent = found["sent"]
    cpu = after.cpu - before.cpu
    bench.results.add(f"abuse {name}:cpu per probe", column, cpu / max(1, answered))
    cpu -= answered * bench.results.median("abuse nothing:cpu per probe", column)
    return Row(
        sent=sent,
        units=found["units"],
        out=found["received"] / sent,
        cost=max(0.0, cpu) * 1e6 / (sent / 1000),
        rest=max(0.0, rest),
        memory=memory / _MIB,
        held=max(0, after.memory - before.memory) / sent,
        logged=(after.logged - before.logged) / sent,
        p50=1000 * percentile(latencies, 50),
        p99=1000 * percentile(latencies, 99),
        runs=runs,
    ), found["told"]


def _settle(loop: Loop, process: Process) -> float:
    """Return the time until the server was at rest; infinity if that takes more than 5 s."""
    give_up_at = time.perf_counter() + _SETTLE_TIMEOUT
    before = process.cpu
    while (began_at := time.perf_counter()) < give_up_at:
        loop.rest(_SETTLE_TIME)
        used, before = process.cpu - before, process.cpu
        if used <= _SETTLED * _SETTLE_TIME:
            return began_at
    return math.inf


def metrics(_plan: Plan) -> list[Metric]:
    """Return no rows: :func:`text` prints a different kind of table."""
    return []


def text(results: Results) -> str:
    """Return the table as Markdown, and the attacks that affect other clients."""
    head = ["attack", "MB in", "bytes out per byte in", "CPU per kB in, us", "at rest after, s"]
    head += [
        "memory, MiB",
        "memory per byte in",
        "log per byte in",
        "others' p50, ms",
        "others' p99, ms",
        "told",
    ]
    table = [head, ["---", *["---:"] * 9, "---"]]
    slow, count = [], 0
    for name, attack in ATTACKS.items():
        rows = [_median(results, name, column) for column in COLUMNS]
        guarded = rows[-1]
        if guarded is None:
            continue
        shown = _SHOWN[-2:] if name == "nothing" else _SHOWN
        cells = [
            [_number(value, show) for value in (row and getattr(row, what) for row in rows)]
            for what, show in shown
        ]
        cells = [["", ""]] * (len(_SHOWN) - len(shown)) + cells
        told = results.told[name, GUARDED.name]
        table.append(
            [attack.title, *(" / ".join(pair).strip(" /") for pair in cells), _told_text(told)]
        )
        if name == "nothing":
            continue
        count += 1
        if guarded.p99 >= BOUND:
            slow.append(f"{attack.title} ({guarded.p99:.3g} ms)")
    verdict = f"Others' p99 is below {BOUND:.0f} ms beside {count - len(slow)} of {count} attacks"
    if slow:
        verdict += f"; not beside {', '.join(slow)}"
    return f"Each cell: stock / guarded.\n\n{rows_text(table)}\n{verdict}.\n\n"


def _median(results: Results, name: str, column: Column) -> Row | None:
    if not results.samples[f"abuse {name}:sent"][column.name]:
        return None
    return Row(*(results.median(f"abuse {name}:{what}", column) for what in Row._fields))


def _number(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return show(value) if math.isfinite(value) else "none"


def _told_text(told: dict[str, int]) -> str:
    """Return the answers that the server gave most often."""
    ordered = sorted(told, key=lambda what: -told[what])
    return ", ".join(f"{what} ({told[what]:,})" if told[what] > 1 else what for what in ordered[:2])


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


_SHOWN: list[tuple[str, Callable[[float], str]]] = [
    ("sent", lambda value: _factor(value / 1e6)),
    ("out", _factor),
    ("cost", _factor),
    ("rest", lambda value: f"{value:.1f}"),
    ("memory", lambda value: f"{value:,.0f}"),
    ("held", _factor),
    ("logged", _factor),
    ("p50", _factor),
    ("p99", _factor),
]

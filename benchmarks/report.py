"""The samples, and the report on them: ratios with their spread, as Markdown."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SATURATED = 0.9  # share of its core from which a process counts as busy all the time
DISTRIBUTIONS = (
    "Flask-SocketIO-Guard",
    "Flask",
    "Flask-SocketIO",
    "python-socketio",
    "python-engineio",
    "gevent",
    "gevent-websocket",
    "websockets",
    "gunicorn",
    "redis",
    "hiredis",
    "limits",
    "pydantic",
)


@dataclass(frozen=True)
class Column:
    """One variant of the server.

    Attributes:
        name: Name in the report and in the JSON file.
        is_guarded: Whether the application has the guard.
        is_limited: Whether its echo also has a rate, an order and a schema.
        is_node: Whether it is Node's Socket.IO instead of Flask-SocketIO.
        store: Where acknowledged messages are kept, ``"memory"`` or ``"redis"``; empty if
            events are merely emitted.
        is_alone: Whether it has no message queue.
    """

    name: str
    is_guarded: bool
    is_limited: bool = False
    is_node: bool = False
    store: str = ""
    is_alone: bool = False


STOCK = Column("stock", is_guarded=False)
GUARDED = Column("guarded", is_guarded=True)
CONTROL = Column("stock again", is_guarded=False)
NODE = Column("node", is_guarded=False, is_node=True)
LIMITED = Column("with limits", is_guarded=True, is_limited=True)
GUARDED_CONTROL = Column("guarded again", is_guarded=True)


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        key: ``<case>:<what>``, as in the JSON file.
        title: Title in the report.
        unit: Unit of the values.
        is_less_better: Whether smaller values are better.
        target: Worst acceptable ratio guarded / stock; None if any is.
        node_target: The same for guarded / node.
        bounds: Other targets: worst acceptable ratio of a column and its reference, or value of a
            column.
    """

    key: str
    title: str
    unit: str
    is_less_better: bool = False
    target: float | None = None
    node_target: float | None = None
    bounds: tuple[tuple[Column, Column | None, float], ...] = ()

    @property
    def targets(self) -> str:
        """The targets as shown in the report; empty if there are none."""
        sign = "<=" if self.is_less_better else ">="
        bounds = ((self.target, ""), (self.node_target, " x node"))
        return ", ".join(f"{sign} {bound:.1f}{of}" for bound, of in bounds if bound is not None)


class Results:
    """The samples, by metric and column: one list for each round, in the order of the slices.

    Attributes:
        round: Number of the current round, from 0.
        notes: Further remarks for the reader.
        told: The server's answers to an attacker and how often each was given, by attack and
            column.
    """

    def __init__(self) -> None:
        self.round = 0
        self.notes: list[str] = []
        self.told: dict[tuple[str, str], dict[str, int]] = {}
        self.samples: defaultdict[str, defaultdict[str, list[list[float]]]] = defaultdict(
            lambda: defaultdict(list)
        )

    def add(self, key: str, column: Column, value: float) -> None:
        """Keep one sample of the metric *key*."""
        rounds = self.samples[key][column.name]
        if len(rounds) == self.round:
            rounds.append([])
        rounds[self.round].append(value)

    def median(self, key: str, column: Column) -> float:
        """Return the median of all samples."""
        return statistics.median(itertools.chain(*self.samples[key][column.name]))

    def medians(self, key: str, column: Column) -> list[float]:
        """Return the median of each round."""
        columns: dict[str, list[list[float]]] = self.samples.get(key, {})
        return [statistics.median(samples) for samples in columns.get(column.name, [])]

    def ratios(self, key: str, column: Column, reference: Column) -> list[float]:
        """Return *column* / *reference* for each round that has both: the median over its slices.

        Slices are short and their pairs adjacent in time, so that both sides of most pairs find
        the machine in the same state; the median drops the pairs that do not.
        """
        columns: dict[str, list[list[float]]] = self.samples.get(key, {})
        column_rounds = columns.get(column.name, [])
        reference_rounds = columns.get(reference.name, [])
        if not column_rounds or not reference_rounds:
            return []
        return [
            statistics.median(value / base for value, base in zip(*pair, strict=True))
            for pair in zip(column_rounds, reference_rounds, strict=True)
        ]


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that at least *percent* % of *values* do not exceed.

    Source:
        The nearest-rank definition.
    """
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def machine() -> dict[str, Any]:
    """Return the facts that the numbers depend on: processor, cores, load, Python and packages.

    The caller adds the versions of Redis and of Node's packages.
    """
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "redis": "",
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "node versions": {},
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def header(facts: dict[str, Any]) -> str:
    """Return *facts* of :func:`machine`, with the versions added since, as Markdown."""
    paragraphs = [
        f"{facts['cpu']}, {facts['cores']} cores (load average before: {facts['load average']}), "
        f"{facts['system']}, Python {facts['python']}, Redis {facts['redis']}"
    ]
    paragraphs += [
        ", ".join(f"{name} {version}" for name, version in facts[versions].items())
        for versions in ("versions", "node versions")
        if facts[versions]
    ]
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs)


def table(
    results: Results,
    metrics: list[Metric],
    columns: list[Column],
    comparisons: list[tuple[Column, Column]],
) -> str:
    """Return the rows of *metrics* as a Markdown table: medians, then ratios as min-median-max.

    Args:
        results: The samples.
        metrics: The rows; those without a sample are left out.
        columns: The variants.
        comparisons: The ratios, each of the one column to the other; those of columns that are
            not there are left out.
    """
    comparisons = [pair for pair in comparisons if set(pair) <= set(columns)]
    has_targets = (GUARDED, STOCK) in comparisons
    head = ["metric", "unit", "better", *(column.name for column in columns)]
    head += [f"{column.name} / {reference.name}" for column, reference in comparisons]
    rules = ["---"] * 3 + ["---:"] * (len(head) - 3)
    if has_targets:
        head.append("target")
        rules.append("---")
    rows = [head, rules]
    for metric in metrics:
        if metric.key not in results.samples:
            continue
        row = [metric.title, metric.unit, "less" if metric.is_less_better else "more"]
        row += [
            _number(results.median(metric.key, column))
            if results.samples[metric.key][column.name]
            else ""
            for column in columns
        ]
        for pair in comparisons:
            ratios = results.ratios(metric.key, *pair)
            row.append(spread_text(ratios) if ratios else "")
        if has_targets:
            row.append(metric.targets)
        rows.append(row)
    return rows_text(rows)


def rows_text(rows: list[list[str]]) -> str:
    """Return *rows*, of which the second is the separator line, as a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def busy_table(results: Results) -> str:
    """Return which share of which core each process had, as Markdown."""
    head = ["case", "column", "server", "idle", "load generator"]
    rows = [head, ["---"] * 2 + ["---:"] * 3]
    for case, column, shares in _watched(results):
        rows.append([case, column, *(f"{share:.0%}" for share in shares)])
    return rows_text(rows)


def unsaturated(results: Results) -> list[str]:
    """List the cases in which servers did not use all of their core, so that rates are too low.

    With one event in flight a server always waits, so that case is left out.
    """
    causes: dict[str, dict[str, list[str]]] = {}  # columns by case, by cause
    columns: dict[str, int] = {}
    for case, column, (busy, idle, load) in _watched(results):
        columns[case] = columns.get(case, 0) + 1
        if busy >= SATURATED or case.endswith("x1"):
            continue
        if load >= SATURATED:
            cause = "the load generator was the limit"
        elif idle >= 1 - SATURATED:
            cause = "the server waited"
        else:
            cause = "other programs used its core (repeat the run on an idle machine)"
        causes.setdefault(cause, {}).setdefault(case, []).append(column)
    return [
        f"not saturated, {cause}: "
        + ", ".join(
            case if len(them) == columns[case] else f"{case} {' and '.join(them)}"
            for case, them in cases.items()
        )
        for cause, cases in causes.items()
    ]


def _watched(results: Results) -> Iterator[tuple[str, str, tuple[float, float, float]]]:
    """Yield case, column and shares: server and idle of the server's core, load of its own."""
    for key in results.samples:
        case, _, what = key.partition(":")
        if what == "busy":
            for column in results.samples[key]:
                busy, idle, load = (
                    statistics.median(itertools.chain(*results.samples[f"{case}:{what}"][column]))
                    for what in ("busy", "idle", "load")
                )
                # The system counts idle time in ticks of 10 ms: never more than the server left.
                yield case, column, (busy, min(idle, max(0.0, 1 - busy)), load)


def size_text(size: int) -> str:
    """Format *size* bytes with a unit."""
    return f"{size} B" if size < 1000 else f"{size // 1000} kB"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio_text(ratio: float) -> str:
    """Format *ratio* with two decimals, or three if it is small."""
    return f"{ratio:.3f}" if ratio < 0.2 else f"{ratio:.2f}"


def spread_text(ratios: list[float]) -> str:
    """Format the lowest, median and highest of *ratios*; a single ratio alone."""
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    if len(ratios) == 1:
        return f"**{ratio_text(middle)}**"
    return f"{ratio_text(low)} - **{ratio_text(middle)}** - {ratio_text(high)}"

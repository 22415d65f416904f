"""What was measured, and how it is told: ratios with their spread, as Markdown."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "Flask-SocketIO-Guard",
    "Flask",
    "Flask-SocketIO",
    "python-socketio",
    "python-engineio",
    "gevent",
    "gevent-websocket",
    "gunicorn",
    "redis",
)


@dataclass(frozen=True)
class Column:
    """One variant of the server."""

    name: str
    is_guarded: bool


STOCK = Column("stock", is_guarded=False)
GUARDED = Column("guarded", is_guarded=True)
CONTROL = Column("stock again", is_guarded=False)


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        key: ``<scenario>:<what>``, as in the JSON file.
        title: For people.
        unit: Of the values.
        target: What the ratio guarded / stock should be, for people; empty where none was set.
    """

    key: str
    title: str
    unit: str
    target: str = ""


def echo_metrics(clients: int) -> list[Metric]:
    """Return the rows of echo with *clients* clients."""
    key = f"echo-{clients}"
    title = f"echo with ack, {clients} client{'s' if clients > 1 else ''}"
    return [
        Metric(f"{key}:rate", title, "events/s", ">= 0.97"),
        Metric(f"{key}:p50", f"{title}, p50", "ms"),
        Metric(f"{key}:p99", f"{title}, p99", "ms"),
        Metric(f"{key}:cpu", f"{title}, server CPU", "s per 10,000 events"),
    ]


def broadcast_metrics(clients: int) -> list[Metric]:
    """Return the rows of a broadcast to *clients* clients."""
    title = f"broadcast to {clients}"
    return [
        Metric("broadcast:rate", title, "deliveries/s", ">= 1.0"),
        Metric("broadcast:cpu", f"{title}, server CPU", "us per delivery"),
    ]


def emit_metrics() -> list[Metric]:
    """Return the rows of ``emit()`` with a queue and nobody here to receive."""
    title = "emit() with Redis, nobody local"
    return [
        Metric("emit:call", f"{title}, the call", "us", "<= 0.33"),
        Metric("emit:cpu", f"{title}, server CPU", "us per event"),
        Metric("emit:rate", f"{title}, until published", "events/s"),
    ]


def cross_metrics(rate: float, burst: int) -> list[Metric]:
    """Return the rows of events from process A to a client on process B."""
    return [
        Metric("cross:p50", f"A to B at {rate:.0f}/s, p50", "ms"),
        Metric("cross:p99", f"A to B at {rate:.0f}/s, p99", "ms", "<= 1.0"),
        Metric("cross:rate", f"A to B, burst of {burst:,}, all received", "messages/s"),
        Metric("cross:cpu", "A to B, burst, CPU of A and B", "us per message"),
    ]


def memory_metrics(clients: int) -> list[Metric]:
    """Return the row of memory for each of *clients* idle connections."""
    return [Metric("memory:rss", f"memory, {clients:,} idle clients", "KiB per client", "<= 1.05")]


class Results:
    """The samples, by metric and column: one list for each round, in the order of the slices.

    Attributes:
        round: Number of the round under way, from 0.
    """

    def __init__(self) -> None:
        self.round = 0
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

    def ratios(self, key: str, column: Column) -> list[float]:
        """Return *column* / stock for each round: the median over its slices.

        Slices are short and their pairs adjacent in time, so that both sides of most pairs meet
        the machine in the same mood; the median drops the pairs that do not.
        """
        stock_rounds = self.samples[key][STOCK.name]
        column_rounds = self.samples[key][column.name]
        return [
            statistics.median(value / stock for value, stock in zip(*pair, strict=True))
            for pair in zip(column_rounds, stock_rounds, strict=True)
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
    """Return what the numbers depend on: processor, cores, load, Python and packages."""
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
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def header(facts: dict[str, Any]) -> str:
    """Return *facts* of :func:`machine` as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores (load average before: {facts['load average']}), "
        f"{facts['system']}, Python {facts['python']}\n\n{versions}\n"
    )


def table(results: Results, metrics: list[Metric], columns: list[Column]) -> str:
    """Return the rows of *metrics* as a Markdown table: medians, then ratios as min-median-max."""
    head = ["metric", "unit", *(column.name for column in columns)]
    head += [f"{column.name} / stock" for column in columns if column is not STOCK]
    head.append("target")
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 3) + ["---"]]
    for metric in metrics:
        if metric.key not in results.samples:
            continue
        row = [metric.title, metric.unit]
        row += [_number(results.median(metric.key, column)) for column in columns]
        row += [
            _spread(results.ratios(metric.key, column)) for column in columns if column is not STOCK
        ]
        row.append(metric.target if GUARDED in columns else "")
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def busy_line(results: Results, columns: list[Column]) -> str:
    """Return how much of its core each server had, where it was to have all of it.

    A server far below 100 % waited: for the load generator, or for other programs on its core.
    """
    parts = []
    for key in results.samples:
        if key.endswith(":busy"):
            shares = (f"{results.median(key, column):.0%}" for column in columns)
            parts.append(f"{key.removesuffix(':busy')} {' / '.join(shares)}")
    return f"Server's share of its core ({' / '.join(c.name for c in columns)}): " + ", ".join(
        parts
    )


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _spread(ratios: list[float]) -> str:
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"{low:.2f} - **{middle:.2f}** - {high:.2f}"

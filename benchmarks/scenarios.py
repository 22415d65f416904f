"""All measurements, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benchmarks import abuse, broadcast, connections, delivery, echo, message_queue
from benchmarks.report import GUARDED, GUARDED_CONTROL, LIMITED

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench import Bench, Plan
    from benchmarks.report import Column, Metric, Results


class Table(NamedTuple):
    """The columns of a table, and the (column, reference) pairs that it compares."""

    columns: list[Column]
    comparisons: list[tuple[Column, Column]]


class Scenario(NamedTuple):
    """One measurement.

    Attributes:
        run: Measures all columns side by side, slice by slice, once.
        metrics: Returns its rows.
        table: Columns and (column, reference) pairs of a separate table, which compares
            guarded with guarded; ``None`` for the main table.
        text: Prints a different kind of table. Such a scenario runs only if it is named.
    """

    run: Callable[[Bench], None]
    metrics: Callable[[Plan], list[Metric]]
    table: Table | None = None
    text: Callable[[Results], str] | None = None


SCENARIOS = {
    "echo": Scenario(echo.run, echo.metrics),
    "broadcast": Scenario(broadcast.run, broadcast.metrics),
    "emit": Scenario(message_queue.run_emit, message_queue.emit_metrics),
    "cross": Scenario(message_queue.run_cross, message_queue.cross_metrics),
    "connects": Scenario(connections.run_connects, connections.connects_metrics),
    "memory": Scenario(connections.run_memory, connections.memory_metrics),
    "limits": Scenario(
        echo.run_limits,
        echo.limits_metrics,
        Table(echo.LIMITS_COLUMNS, [(LIMITED, GUARDED), (GUARDED_CONTROL, GUARDED)]),
    ),
    "delivery": Scenario(
        delivery.run, delivery.metrics, Table(delivery.COLUMNS, delivery.COMPARISONS)
    ),
    "abuse": Scenario(abuse.run, abuse.metrics, Table(abuse.COLUMNS, []), abuse.text),
}

"""All measurements, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benchmarks import broadcast, connections, echo, message_queue

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench import Bench, Plan
    from benchmarks.report import Metric


class Scenario(NamedTuple):
    """One measurement.

    Attributes:
        run: Measures all columns side by side, slice by slice, once.
        metrics: Returns its rows.
        is_of_guard: Whether it compares guarded with guarded, in a table of its own.
    """

    run: Callable[[Bench], None]
    metrics: Callable[[Plan], list[Metric]]
    is_of_guard: bool = False


SCENARIOS = {
    "echo": Scenario(echo.run, echo.metrics),
    "broadcast": Scenario(broadcast.run, broadcast.metrics),
    "emit": Scenario(message_queue.run_emit, message_queue.emit_metrics),
    "cross": Scenario(message_queue.run_cross, message_queue.cross_metrics),
    "connects": Scenario(connections.run_connects, connections.connects_metrics),
    "memory": Scenario(connections.run_memory, connections.memory_metrics),
    "limits": Scenario(echo.run_limits, echo.limits_metrics, is_of_guard=True),
}

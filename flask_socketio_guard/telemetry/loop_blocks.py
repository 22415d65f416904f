"""Turns the reports of the event loop's monitor into records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..core.component import Component, Watch
from .records import LoopBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Runtime
    from .records import Telemetry

MAX_PLACES: Final = 1000
"""Most places that are remembered as reported."""


class LoopMonitoring(Component):
    """Reports code that blocks the event loop.

    Args:
        runtime: Provides the monitor of its event loop.
        threshold: In seconds; ``None`` disables the monitor.
        telemetry: Receives the records.
    """

    def __init__(self, runtime: Runtime, threshold: float | None, telemetry: Telemetry) -> None:
        self._runtime = runtime
        self._threshold = threshold
        self._reports = LoopBlockReports(telemetry)
        self._stop_watching: Callable[[], None] | None = None

    def serve(self, watch: Watch) -> None:
        """Start the monitor, in a native thread of its own."""
        del watch
        if self._threshold is not None:
            reports = self._reports
            self._stop_watching = self._runtime.watch_loop(
                self._threshold, reports.blocked, reports.unblocked
            )

    def stop(self, timeout: float) -> None:
        """Stop the monitor."""
        del timeout
        self.abandon()

    def abandon(self) -> None:
        """Stop the monitor; also called in a forked child."""
        if self._stop_watching is not None:
            self._stop_watching()


class LoopBlockReports:
    """Receives the reports of :meth:`~..core.runtime.Runtime.watch_loop`.

    The first block at a place is recorded twice: while it lasts, with the stack, because
    the process may never recover; and afterwards, with its duration. Further blocks
    there are recorded only afterwards.

    Args:
        telemetry: Receives the records.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._places: dict[str, None] = {}  # in the order in which they were first met
        self._stacks: dict[str, str] = {}

    def blocked(self, place: str, stack: str) -> None:
        """Record a block while it lasts; called in a native thread.

        Neither this method nor a subscriber may wait for the event loop.
        """
        self._stacks[place] = stack
        if place in self._places:
            return
        while len(self._places) >= MAX_PLACES:
            del self._places[next(iter(self._places))]
        self._places[place] = None
        self._telemetry.send(LoopBlock(place, stack))

    def unblocked(self, place: str, seconds: float) -> None:
        """Record a block that is over; called on the event loop."""
        stack = self._stacks.pop(place, "")
        self._telemetry.send(LoopBlock(place, stack, seconds))

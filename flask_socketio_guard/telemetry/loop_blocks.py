"""Turns what the monitor of the event loop says into signals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..core.component import Component, Watch
from .records import LoopBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Runtime
    from .records import Telemetry

MAX_PLACES: Final = 1000
"""Places of which it is known that they have been told of."""


class LoopMonitoring(Component):
    """Tells of what keeps the event loop from running.

    Args:
        runtime: Watches its loop.
        threshold: In seconds; ``None`` watches nothing.
        telemetry: Is told.
    """

    def __init__(self, runtime: Runtime, threshold: float | None, telemetry: Telemetry) -> None:
        self._runtime = runtime
        self._threshold = threshold
        self._reports = LoopBlockReports(telemetry)
        self._stop_watching: Callable[[], None] | None = None

    def serve(self, watch: Watch) -> None:
        """Start to watch, in a native thread of its own."""
        del watch
        if self._threshold is not None:
            reports = self._reports
            self._stop_watching = self._runtime.watch_loop(
                self._threshold, reports.blocked, reports.unblocked
            )

    def stop(self, timeout: float) -> None:
        """Stop watching."""
        del timeout
        self.abandon()

    def abandon(self) -> None:
        """Stop watching, in a forked child too."""
        if self._stop_watching is not None:
            self._stop_watching()


class LoopBlockReports:
    """Receives what :meth:`~..core.runtime.Runtime.watch_loop` finds.

    The first block at a place is told twice: while it lasts, with the stack, so
    that a process that never comes back has said why; and with its length
    afterwards. Further ones only afterwards.

    Args:
        telemetry: Is told.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._places: dict[str, None] = {}  # in the order in which they were first met
        self._stacks: dict[str, str] = {}

    def blocked(self, place: str, stack: str) -> None:
        """Tell of a block, while it lasts; called in a native thread.

        Nothing here may wait for the event loop, and subscribers must not either.
        """
        self._stacks[place] = stack
        if place in self._places:
            return
        while len(self._places) >= MAX_PLACES:
            del self._places[next(iter(self._places))]
        self._places[place] = None
        self._telemetry.send(LoopBlock(place, stack))

    def unblocked(self, place: str, seconds: float) -> None:
        """Tell of a block that is over; called on the event loop."""
        stack = self._stacks.pop(place, "")
        self._telemetry.send(LoopBlock(place, stack, seconds))

"""Calls scheduled for later: many deadlines in one task."""

from __future__ import annotations

import heapq
import itertools
from _thread import RLock
from typing import TYPE_CHECKING

from .component import Component, Watch
from .runtime import Flag, Runtime, clock
from .supervisor import is_stopping

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_SLEEP = 5.0  # seconds; bounds the delay if a wake-up is missed
_MIN_STALE = 1000


class Deadline:
    """A scheduled call; ``target`` is ``None`` once it was called or cancelled."""

    __slots__ = ("_owner", "at", "target")

    def __init__(self, owner: Deadlines, at: float, target: Callable[[], object]) -> None:
        self._owner = owner
        self.at = at
        self.target: Callable[[], object] | None = target

    def cancel(self) -> None:
        """Cancel the call if it has not begun; idempotent."""
        self._owner.cancel(self)


class Deadlines(Component):
    """Calls functions at their deadlines, all of them in one task.

    A deadline is cheap: heartbeats for ten thousand clients are ten thousand heap entries, not
    ten thousand greenlets. The functions must not wait. Safe for threads and greenlets.

    Args:
        runtime: For the task's sleep.
        on_failure: Called with the exception that a function raised.
    """

    def __init__(self, runtime: Runtime, *, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        # Not gevent's, which costs a dozen calls: no holder of this lock ever waits.
        self._lock = RLock()
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Deadline]] = []
        self._stale = 0
        self._wakes_at = 0.0
        self._changed: Flag = runtime.flag()

    def __len__(self) -> int:
        return len(self._heap) - self._stale

    def call_later(self, delay: float, target: Callable[[], object]) -> Deadline:
        """Call *target* once, after *delay* seconds."""
        deadline = Deadline(self, clock() + delay, target)
        with self._lock:
            heapq.heappush(self._heap, (deadline.at, next(self._numbers), deadline))
            is_next = deadline.at < self._wakes_at
        if is_next:
            self._changed.set()
        return deadline

    def serve(self, watch: Watch) -> None:
        """Start the task that makes the calls."""
        watch("socketio-guard:deadlines", self.run, self.wake)

    def run(self) -> None:
        """Make the calls that are due until the task is asked to stop."""
        while True:
            self._changed.clear()
            if is_stopping():
                return
            self._call_due()
            now = clock()
            with self._lock:
                wait = self._heap[0][0] - now if self._heap else _LONGEST_SLEEP
                wait = min(max(wait, 0.0), _LONGEST_SLEEP)
                self._wakes_at = now + wait
            self._changed.wait(wait)

    def wake(self) -> None:
        """Wake the task, so that it notices at once that it should stop."""
        self._changed.set()

    def cancel(self, deadline: Deadline) -> None:
        """Cancel *deadline*; once most heap entries are cancelled, the heap is compacted."""
        with self._lock:
            if deadline.target is None:
                return
            deadline.target = None
            self._stale += 1
            if self._stale > _MIN_STALE and self._stale > len(self._heap) // 2:
                self._heap = [entry for entry in self._heap if entry[2].target is not None]
                heapq.heapify(self._heap)
                self._stale = 0

    def _call_due(self) -> None:
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > clock():
                    return
                deadline = heapq.heappop(self._heap)[2]
                target, deadline.target = deadline.target, None
                if target is None:
                    self._stale -= 1
                    continue
            try:
                target()
            except BaseException as exc:  # noqa: BLE001 - must not stop the other deadlines
                self._on_failure(exc)

"""Calls that are due later: many deadlines, one task."""

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

_LONGEST_SLEEP = 5.0  # bounds how long a task that missed a wake-up sleeps on, in seconds
_MIN_STALE = 1000


class Deadline:
    """A call that is due later, or was."""

    __slots__ = ("_owner", "at", "target")

    def __init__(self, owner: Deadlines, at: float, target: Callable[[], object]) -> None:
        self._owner = owner
        self.at = at
        self.target: Callable[[], object] | None = target

    def cancel(self) -> None:
        """Make sure that the call is not begun any more; idempotent."""
        self._owner.cancel(self)


class Deadlines(Component):
    """Calls functions when they are due, all of them in one task.

    For what must cost little: a heartbeat for each of ten thousand clients is
    ten thousand entries of a heap here, not as many greenlets. What is called
    must not wait. Safe for threads and greenlets.

    Args:
        runtime: For the task's sleep.
        on_failure: Called with what a function raised.
    """

    def __init__(self, runtime: Runtime, *, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        # Not gevent's, which costs a dozen calls: nobody waits while holding it.
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
        """Start to call what is due."""
        watch("socketio-guard:deadlines", self.run, self.wake)

    def run(self) -> None:
        """Call what is due until the task is asked to stop."""
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
        """Let the task look at once whether it shall stop."""
        self._changed.set()

    def cancel(self, deadline: Deadline) -> None:
        """Make an entry void; when most are, they are thrown out."""
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
            except BaseException as exc:  # noqa: BLE001 - the other deadlines go on
                self._on_failure(exc)

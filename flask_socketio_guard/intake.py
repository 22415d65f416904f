"""Work on its way to handlers: so much at a time, some of it in order."""

from __future__ import annotations

import heapq
import itertools
from _thread import RLock
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import TooManyInFlight
from .signals import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

_STARTS_PER_TURN = 16


class IntakeBounds(NamedTuple):
    """How much of one client's is taken in.

    Attributes:
        max_running: Events whose handlers run at a time, >= 1.
        max_waiting: Events that wait for one of these to end, >= 0.
        max_waiting_bytes: Bytes that these may have, >= 1.
    """

    max_running: int
    max_waiting: int
    max_waiting_bytes: int


class _Job(NamedTuple):
    number: int
    run: Callable[[], object]
    lose: Callable[[], object]
    size: int
    lane: Hashable


class Intake:
    """Runs the events of one client.

    The client's packets are read on while its events wait: an answer that a
    running handler waits for may be among them.

    Args:
        bounds: How many run and wait.
        spawn: Runs a function in a task of its own.
        spawn_later: The same, but in a later turn of the event loop.
        lock: Held for the moments in which the books are changed.
    """

    __slots__ = (
        "_bounds",
        "_bytes",
        "_lanes",
        "_lock",
        "_numbers",
        "_spawn",
        "_spawn_later",
        "_waiting",
        "running",
        "waiting",
    )

    def __init__(
        self,
        bounds: IntakeBounds,
        *,
        spawn: Callable[[Callable[[], object]], object],
        spawn_later: Callable[[Callable[[], object]], object],
        lock: AbstractContextManager[Any],
    ) -> None:
        self._bounds = bounds
        self._spawn = spawn
        self._spawn_later = spawn_later
        self._lock = lock
        self._numbers = itertools.count()
        # Those that may run next, by arrival: of each lane one at the most.
        self._waiting: list[_Job] = []
        # Those behind another of their lane; a lane is here while one of its runs or is ready.
        self._lanes: dict[Hashable, deque[_Job]] = {}
        self._bytes = 0
        self.running = 0
        """Events whose handlers run."""
        self.waiting = 0
        """Events that wait."""

    def submit(
        self,
        run: Callable[[], object],
        *,
        size: int,
        lane: Hashable = None,
        lose: Callable[[], object],
    ) -> None:
        """Call *run* in a task, now or when its turn comes.

        Args:
            run: Must not raise.
            size: Bytes that it holds.
            lane: Events of the same lane run one after another, in order;
                ``None`` is no lane.
            lose: Called instead of *run* when the client leaves before its turn.

        Raises:
            TooManyInFlight: It can neither run nor wait.
        """
        bounds = self._bounds
        with self._lock:
            is_lane_busy = lane is not None and lane in self._lanes
            may_run = self.running < bounds.max_running and not is_lane_busy
            if not may_run:
                is_over = self.waiting and self._bytes + size > bounds.max_waiting_bytes
                if self.waiting >= bounds.max_waiting or is_over:
                    raise TooManyInFlight
                job = _Job(next(self._numbers), run, lose, size, lane)
                self.waiting += 1
                self._bytes += size
                if is_lane_busy:
                    self._lanes[lane].append(job)
                else:
                    heapq.heappush(self._waiting, job)
            else:
                self.running += 1
            if lane is not None and not is_lane_busy:
                self._lanes[lane] = deque()
        if may_run:
            self._spawn(partial(self._work, run, lane))

    def close(self) -> None:
        """Drop what waits: the client is gone."""
        with self._lock:
            jobs = list(self._waiting)
            for job in list(jobs):
                if job.lane is not None:
                    jobs += self._lanes.pop(job.lane)
            for lane in self._lanes.values():
                jobs += lane
                lane.clear()
            self._waiting.clear()
            self.waiting = self._bytes = 0
        for job in sorted(jobs):
            job.lose()

    def _work(self, run: Callable[[], object], lane: Hashable) -> None:
        try:
            run()
        finally:  # also when the task was killed: those that wait are not to wait for ever
            job = self._ended(lane)
            if job is not None:
                # Not at once: between two of its events others have their turn.
                self._spawn_later(partial(self._work, job.run, job.lane))

    def _ended(self, lane: Hashable) -> _Job | None:
        """Return the event to run after one of *lane* has ended: the oldest that may."""
        with self._lock:
            if lane is not None:
                behind = self._lanes.get(lane)
                if behind:
                    job = behind.popleft()
                    heapq.heappush(self._waiting, job)
                elif behind is not None:
                    del self._lanes[lane]
            if not self._waiting:
                self.running -= 1
                return None
            job = heapq.heappop(self._waiting)
            self.waiting -= 1
            self._bytes -= job.size
            return job


class Starter:
    """Starts tasks, a few in each turn of the event loop.

    A thousand clients may leave in one instant; were a thousand disconnect handlers
    begun in one go, nobody else would have a turn before the last.

    Args:
        spawn_later: Calls a function in a task, in a later turn of the event loop.
    """

    def __init__(self, spawn_later: Callable[[Callable[[], object]], object]) -> None:
        self._spawn_later = spawn_later
        self._lock = RLock()  # not gevent's: nobody waits while holding it
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_scheduled = False

    def start(self, spawn: Callable[[], object]) -> None:
        """Call *spawn*, which starts a task, soon and in the order of the calls."""
        with self._lock:
            self._waiting.append(spawn)
            is_first, self._is_scheduled = not self._is_scheduled, True
        if is_first:
            self._spawn_later(self._start_some)

    def _start_some(self) -> None:
        for _ in range(_STARTS_PER_TURN):
            with self._lock:
                if not self._waiting:
                    self._is_scheduled = False
                    return
                spawn = self._waiting.popleft()
            try:
                spawn()
            except Exception:  # noqa: BLE001 - a process may be out of threads; the others go on
                logger.exception("a task could not be started")
        self._spawn_later(self._start_some)

"""Short tasks of the guard, such as those in which disconnect handlers run."""

from __future__ import annotations

import logging
from _thread import RLock
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .runtime import Runtime

_STARTS_PER_TURN = 16
_logger = logging.getLogger("flask_socketio_guard")


def start_or_call(
    instead: Callable[[], object], complaint: str, spawn: Callable[..., object], *arguments: object
) -> None:
    """Start a task, or fall back to a call if the process cannot start another thread.

    Args:
        instead: Called in the caller's thread if no task can be started; must not raise.
        complaint: Logged in that case.
        spawn: Called with *arguments* to start the task.
        arguments: For *spawn*.
    """
    try:
        spawn(*arguments)
    except Exception:
        _logger.exception(complaint)
        instead()


class SpawnThrottle:
    """Throttles the start of tasks: a few in each iteration of the event loop.

    A thousand clients may disconnect in one instant. If their disconnect handlers all started
    at once, nothing else would run before the last of them.

    Args:
        spawn_later: Calls a function in a task, in a later iteration of the event loop.
    """

    def __init__(self, spawn_later: Callable[[Callable[[], object]], object]) -> None:
        self._spawn_later = spawn_later
        self._lock = RLock()  # not gevent's: no holder ever waits
        self._waiting: deque[tuple[Callable[[], object], Callable[[], object]]] = deque()
        self._is_scheduled = False

    def start(self, spawn: Callable[[], object], instead: Callable[[], object]) -> None:
        """Call *spawn*, which starts a task, soon and in the order of the calls.

        Args:
            spawn: Starts the task.
            instead: Does the task's work if no task can be started; must not raise.
        """
        with self._lock:
            self._waiting.append((spawn, instead))
            is_first, self._is_scheduled = not self._is_scheduled, True
        if is_first:
            self._schedule()

    def _schedule(self) -> None:
        # In a task, because the caller may hold locks.
        start_or_call(
            self._unschedule, "a task could not be started", self._spawn_later, self._start_some
        )

    def _unschedule(self) -> None:
        with self._lock:
            self._is_scheduled = False  # the next call tries again

    def _start_some(self) -> None:
        for _ in range(_STARTS_PER_TURN):
            with self._lock:
                if not self._waiting:
                    self._is_scheduled = False
                    return
                spawn, instead = self._waiting.popleft()
            start_or_call(
                instead, "a task could not be started; it runs where others are started", spawn
            )
        self._schedule()


class Jobs:
    """Runs each function in a task of its own, and counts those that are still running.

    Args:
        runtime: For the tasks.
        recording: Wraps a function in one that records the exceptions it raises.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        recording: Callable[[Callable[[], object]], Callable[[], object]],
    ) -> None:
        self._runtime = runtime
        self._recording = recording
        self._throttle = SpawnThrottle(partial(runtime.call_later, 0.0))
        self._lock = RLock()  # not gevent's: no holder ever waits
        self._running = 0

    @property
    def running(self) -> int:
        """The number of functions that have not returned."""
        return self._running

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* soon in a task of its own, and record what it raises."""
        run = self._recording(target)
        spawn = partial(
            self._runtime.spawn, run, name=f"socketio-guard:{name}", on_exit=self._ended
        )

        def run_here() -> None:
            run()
            self._ended(None)

        with self._lock:
            self._running += 1
        self._throttle.start(spawn, run_here)

    def _ended(self, _exc: BaseException | None) -> None:
        with self._lock:
            self._running -= 1

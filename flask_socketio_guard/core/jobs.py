"""Short tasks of the guard's own, such as those that disconnect handlers run in."""

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
    """Start a task; a process may be out of threads, and nothing is lost by that.

    Args:
        instead: Called, here, if none can be started; never raises.
        complaint: What the log says then.
        spawn: Starts it, called with *arguments*.
        arguments: For *spawn*.
    """
    try:
        spawn(*arguments)
    except Exception:
        _logger.exception(complaint)
        instead()


class SpawnThrottle:
    """Starts tasks, a few in each turn of the event loop.

    A thousand clients may leave in one instant; were a thousand disconnect handlers
    begun in one go, nobody else would have a turn before the last.

    Args:
        spawn_later: Calls a function in a task, in a later turn of the event loop.
    """

    def __init__(self, spawn_later: Callable[[Callable[[], object]], object]) -> None:
        self._spawn_later = spawn_later
        self._lock = RLock()  # not gevent's: nobody waits while holding it
        self._waiting: deque[tuple[Callable[[], object], Callable[[], object]]] = deque()
        self._is_scheduled = False

    def start(self, spawn: Callable[[], object], instead: Callable[[], object]) -> None:
        """Call *spawn*, which starts a task, soon and in the order of the calls.

        Args:
            spawn: Starts it.
            instead: Does what the task is for, if none can be started; never raises.
        """
        with self._lock:
            self._waiting.append((spawn, instead))
            is_first, self._is_scheduled = not self._is_scheduled, True
        if is_first:
            self._schedule()

    def _schedule(self) -> None:
        # Not called here: whoever calls may hold locks.
        start_or_call(
            self._unschedule, "a task could not be started", self._spawn_later, self._start_some
        )

    def _unschedule(self) -> None:
        with self._lock:
            self._is_scheduled = False  # whoever comes next tries again

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
    """Runs functions in tasks of their own, and knows how many of them have not ended.

    Args:
        runtime: For the tasks.
        recording: Returns a function that does the same and records what it raises.
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
        self._lock = RLock()  # not gevent's: nobody waits while holding it
        self._running = 0

    @property
    def running(self) -> int:
        """How many have not ended."""
        return self._running

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own, soon, and record what it raises."""
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

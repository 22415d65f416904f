"""Greenlets and the event loop: jobs, a pool of greenlets, timers, and calls from threads."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

with contextlib.suppress(ImportError):  # comes with the extra "gunicorn"; threads do not need it
    import gevent

from ..errors import LoopQueueFull
from .runtime_native import TIME_SLICE, clock, get_ident

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

MAX_LOOP_QUEUE: Final = 10_000
"""The number of calls from other native threads that may wait for the event loop."""

HAND_OVER: Final = "socketio-guard:hand-over"
"""Name of the task in which calls from other threads run."""

NEXT_TURN: Final = 1e-6
"""Seconds; a timer, however short, fires in a later iteration of the loop."""

_ALL = sys.maxsize
_MADE_AHEAD = 256  # greenlets; none reuses the address of any of the last 256 that ended
_logger = logging.getLogger("flask_socketio_guard")


class GreenletJob:
    """A :class:`Job` in a greenlet.

    Any code may kill the greenlet at any time, even before its first step, so its end is
    reported by gevent and not by its own code.
    """

    def __init__(
        self,
        target: Callable[[], object],
        name: str,
        on_exit: Callable[[BaseException | None], None] | None,
    ) -> None:
        self.name = name
        self.exception: BaseException | None = None
        self._target = target
        self._on_exit = on_exit
        self._greenlet = gevent.Greenlet(self._run)
        self._greenlet.name = name
        if on_exit is not None:
            self._greenlet.link(self._exited)
        self._greenlet.start()

    def _run(self) -> None:
        # gevent prints an exception that leaves a greenlet to stderr, past logging, and lets
        # SystemExit end the process: none may leave.
        try:
            self._target()
        except BaseException as exc:  # noqa: BLE001 - handed to on_exit
            self.exception = exc

    def _exited(self, greenlet: gevent.Greenlet) -> None:
        if self.exception is None and isinstance(greenlet.value, gevent.GreenletExit):
            self.exception = greenlet.value
        if self._on_exit is not None:
            self._on_exit(self.exception)

    def is_alive(self) -> bool:
        return not self._greenlet.ready()

    def join(self, timeout: float | None = None) -> bool:
        self._greenlet.join(timeout)
        return not self.is_alive()

    def kill(self) -> None:
        self._greenlet.kill(block=False)


class GreenletPool:
    """Starts a greenlet for each of many short tasks, a few at a time.

    Each task has a greenlet and an empty context of its own, as with ``gevent.spawn``, so it
    shares neither identity nor local state with another. The ``threading.get_ident()`` of a
    greenlet is its address, which a new greenlet would reuse from the one that just ended;
    the next greenlets are therefore created well ahead.

    Owners are scheduled round-robin: a thousand events of one client do not delay the first event
    of another.
    """

    def __init__(self) -> None:
        # Most owners have one task, so only those with more need a deque.
        self._tasks: dict[Hashable, Callable[[], object] | deque[Callable[[], object]]] = {}
        self._turns: deque[Hashable] = deque()  # the owners of these tasks
        self._next: deque[gevent.Greenlet] = deque()
        self._hub: object = None
        self._is_due = False

    @property
    def is_behind(self) -> bool:
        """Whether some tasks have not begun."""
        return bool(self._tasks)

    def add(self, target: Callable[[], object], owner: Hashable) -> None:
        """Call *target* in one of the loop's next iterations, after earlier ones of *owner*."""
        own = self._tasks.get(owner)
        if own is None:
            self._tasks[owner] = target
            self._turns.append(owner)
        elif isinstance(own, deque):
            own.append(target)
        else:
            self._tasks[owner] = deque((own, target))
        if not self._is_due:
            self._is_due = True
            gevent.get_hub().loop.run_callback(self._run)

    def start(self, target: Callable[[], object]) -> gevent.Greenlet:
        """Return a new greenlet that will call *target*, as ``gevent.spawn`` does."""
        greenlet = self._make(target)
        if not self._has_started(greenlet):
            gevent.get_hub().loop.run_callback(greenlet.switch)
        return greenlet

    def _make(self, target: Callable[[], object]) -> gevent.Greenlet:
        greenlets, hub = self._next, gevent.get_hub()
        if hub is not self._hub:  # a greenlet belongs to one hub
            self._hub = hub
            greenlets.clear()
            greenlets.extend(gevent.Greenlet() for _ in range(_MADE_AHEAD))
        greenlet = None
        while greenlet is None or greenlet.dead:  # other code may have killed all greenlets
            greenlets.append(gevent.Greenlet())
            greenlet = greenlets.popleft()
        greenlet._run = target
        greenlet.spawn_tree_locals = {}  # not those of the greenlet that created it
        return greenlet

    def _has_started(self, greenlet: gevent.Greenlet) -> bool:
        try:
            greenlet.start()
        except Exception:  # from a spawn callback that waits: in the loop, nothing may wait
            _logger.exception("a spawn callback of gevent failed; the task runs all the same")
            return False
        return True

    def _run(self) -> None:
        """Run one task of each owner, then the remaining ones."""
        self._run_some(clock() + TIME_SLICE, len(self._tasks))

    def _run_some(self, until: float, count: int) -> None:
        # Runs in the loop itself: a greenlet that waits or ends switches back to here.
        tasks, turns = self._tasks, self._turns
        is_time_left = True
        try:
            while turns and count and is_time_left:
                count -= 1
                owner = turns.popleft()
                target = tasks.pop(owner)
                if isinstance(target, deque):
                    own, target = target, target.popleft()
                    if own:
                        tasks[owner] = own
                        turns.append(owner)
                greenlet = self._make(target)
                self._has_started(greenlet)
                greenlet.switch()
                is_time_left = not turns or clock() < until
        finally:
            self._is_due = bool(turns)
            if self._is_due and not count:  # the answers of the first ones are sent before
                gevent.get_hub().loop.run_callback(self._run_some, until, _ALL)
            elif self._is_due:  # the loop polls sockets before the timer fires
                LoopTimer(NEXT_TURN, self._run)


class LoopInbox:
    """Queue of the calls that other threads hand over to an event loop.

    Of all functions of libev and libuv, other threads may call only the one that wakes an
    async watcher. (``run_callback_threadsafe`` also changes a reference count, which a
    running loop changes, too, without a lock.) gevent's locks are avoided; appending to a
    deque is atomic.
    """

    def __init__(self, runtime: object) -> None:
        self.ident: int = get_ident()
        self._targets: deque[Callable[[], object]] = deque()
        self._drainer: GreenletJob | None = None
        loop = gevent.get_hub().loop
        # Does not keep the loop alive: whether a process that waits for nothing but its
        # threads has more to do is unknown here.
        self._waker = loop.async_(ref=False)
        self._waker.start(self._wake)
        # The loop keeps a started watcher alive, and the watcher keeps this object alive.
        weakref.finalize(runtime, call_in, loop, self._close).atexit = False

    def add(self, target: Callable[[], object]) -> None:
        if len(self._targets) >= MAX_LOOP_QUEUE:
            raise LoopQueueFull(f"{MAX_LOOP_QUEUE} calls wait for the event loop")
        self._targets.append(target)
        self._waker.send()

    def _wake(self, _exc: BaseException | None = None) -> None:
        """Start a drain unless one is running; called only on the loop's own thread."""
        is_draining = self._drainer is not None and self._drainer.is_alive()
        if self._targets and not is_draining:
            self._drainer = GreenletJob(self._drain, HAND_OVER, self._wake)

    def _drain(self) -> None:
        began_at = clock()
        while self._targets:
            target = self._targets.popleft()
            with contextlib.suppress(BaseException):  # the targets behind it must still be called
                contextvars.Context().run(target)
            if clock() - began_at > TIME_SLICE:
                gevent.sleep(0)
                began_at = clock()

    def _close(self) -> None:
        self._wake()
        self._waker.close()


def call_in(loop: Any, target: Callable[[], object]) -> None:
    """Make *loop* call *target*, unless the loop has been destroyed."""
    with contextlib.suppress(Exception):
        loop.run_callback_threadsafe(target)


class LoopTimer:
    """Makes the loop itself call *target*, which must neither wait nor raise.

    ``gevent.spawn_later`` calls the spawn callbacks of other code in the loop: if one of them
    raises there, the task never starts, and nothing reports it.
    """

    def __init__(self, delay: float, target: Callable[[], object]) -> None:
        self._timer = gevent.get_hub().loop.timer(max(delay, NEXT_TURN))
        self._timer.start(self._due, target)

    def _due(self, target: Callable[[], object]) -> None:
        self._timer.close()
        target()

    def cancel(self) -> None:
        self._timer.close()

"""Concurrency: the same few verbs over gevent and over threads.

This is the only module that names gevent.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import importlib
import inspect
import logging
import os
import sys
import time
import weakref
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

try:
    import gevent
    import gevent.event
    import gevent.socket
    from gevent.baseserver import BaseServer
    from gevent.monkey import get_original
except ImportError:  # it comes with the extra "gunicorn"; threads need none

    def get_original(module: str, name: str) -> Any:
        """Return what nobody has patched."""
        return getattr(importlib.import_module(module), name)


from ..errors import ConfigError, HandlerTimeout, LoopQueueFull
from .loop_monitor import LoopMonitor
from .threads import ThreadRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import FrameType

T = TypeVar("T")

TIME_SLICE: Final = 0.002
"""Seconds of one piece of work after the other before everybody else has a turn.

Others wait for two or three of them. With 1 ms, ten thousand events of one client take 5 to 10 %
more CPU: each iteration of the loop costs 20 to 60 us, and sends what was answered in it.
"""

MAX_LOOP_QUEUE: Final = 10_000
"""Calls of other native threads that may wait for the event loop."""

GEVENT_MODES: Final = ("gevent", "gevent_uwsgi")
"""Modes of Flask-SocketIO that have gevent's event loop; the second one is uWSGI's."""

_HAND_OVER = "socketio-guard:hand-over"
_NEXT_TURN = 1e-6  # seconds; any timer is due in a later turn
_MORE_TURNS = 64  # that one waits for tasks which have not begun
_ALL = sys.maxsize
_MADE_AHEAD = 256  # greenlets; a new one has no address of any of so many that ended before

_nowhere: tuple[Any, Any] | None = None
_logger = logging.getLogger("flask_socketio_guard")

# Those of the standard library, in a patched process too.
_get_ident = get_original("_thread", "get_ident")
_start_new_thread = get_original("_thread", "start_new_thread")
_native_socketpair = get_original("socket", "socketpair")
_native_sleep = get_original("time", "sleep")


class Flag(Protocol):
    """A flag that can be waited for; as :class:`threading.Event`."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


class Job(Protocol):
    """A piece of code that runs on its own.

    Attributes:
        name: For people who look at stacks.
        exception: What ended it, or ``None``. Never raised anywhere.
    """

    name: str
    exception: BaseException | None

    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> bool: ...
    def kill(self) -> None: ...


class Runtime(Protocol):
    """What the rest of the package needs of an asynchronous model."""

    can_kill: bool
    """Whether :meth:`Job.kill` ends a job that does not cooperate."""

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job: ...
    def start(self, target: Callable[[], object], owner: Hashable = None) -> object: ...
    def call_later(self, delay: float, target: Callable[[], object]) -> Timer: ...
    def flag(self) -> Flag: ...
    def sleep(self, seconds: float) -> None: ...
    def yield_control(self) -> None: ...
    def loop_iteration(self) -> float: ...
    def can_wait(self) -> bool: ...
    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T: ...
    def call_apart(self, target: Callable[[], T], context: contextvars.Context) -> T: ...
    def call_soon(self, target: Callable[[], object]) -> None: ...
    def bind_loop(self) -> None: ...
    def forsake_servers(self) -> None: ...
    def on_loop(self) -> bool: ...
    def call_soon_threadsafe(self, target: Callable[[], object]) -> None: ...
    def watch_loop(
        self,
        threshold: float,
        on_block: Callable[[str, str], None],
        on_unblock: Callable[[str, float], None],
    ) -> Callable[[], None]: ...


class _GreenletJob:
    """A :class:`Job` in a greenlet.

    The greenlet may be killed by anyone at any instant, before its first step
    too, so its end is learned from gevent and not from its own code.
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
        # gevent prints what leaves a greenlet to stderr, past logging, and lets
        # SystemExit end the process: nothing may leave.
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


class GeventRuntime:
    """Greenlets. A killed or timed-out greenlet is interrupted where it waits."""

    can_kill = True

    def __init__(self) -> None:
        self._home: _LoopInbox | None = None
        self._home_ident: int | None = None
        self._starter = _GreenletPool()

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job:
        return _GreenletJob(target, name, on_exit)

    def start(self, target: Callable[[], object], owner: Hashable = None) -> None:
        """Call *target*, which must not raise, in a task; see :class:`_GreenletPool`.

        Args:
            target: Runs in an empty context.
            owner: Whose it is. Owners take turns, whatever the number of their tasks.
        """
        self._starter.add(target, target if owner is None else owner)

    def call_apart(self, target: Callable[[], T], context: contextvars.Context) -> T:
        """Call *target* in a greenlet of its own, in *context*, and wait for it.

        What ends the caller meanwhile, such as a kill, ends *target* in its place.
        """
        outcomes: list[T] = []
        error: BaseException | None = None

        def run() -> None:
            nonlocal error
            try:
                outcomes.append(context.run(target))
            except BaseException as exc:  # noqa: BLE001 - raised below
                error = exc

        greenlet = self._starter.start(run)
        while not greenlet.ready():
            try:
                greenlet.join()
            except BaseException as exc:  # noqa: BLE001 - as if the caller had run it
                error = exc
                greenlet.kill(exc, block=False)
        if outcomes:
            return outcomes[0]
        assert error is not None
        try:
            raise error
        finally:
            error = None  # its traceback holds this frame

    def call_later(self, delay: float, target: Callable[[], object]) -> Timer:
        """Call *target*, which must not raise, in a task after *delay* seconds."""
        return _LoopTimer(delay, partial(self._starter.start, target))

    def flag(self) -> Flag:
        event: Flag = gevent.event.Event()
        return event

    def sleep(self, seconds: float) -> None:
        gevent.sleep(seconds)

    def yield_control(self) -> None:
        """Let everybody else have a turn: who waits for a socket, and tasks that have not begun.

        ``gevent.sleep(0)`` is not enough for that: the loop looks at sockets only
        after a thousand calls that were ready before.

        Source:
            gevent, ``loop._run_callbacks``: the count of callbacks in one go.
        """
        gevent.sleep(_NEXT_TURN)
        for _ in range(_MORE_TURNS):
            if not self._starter.is_behind:
                break
            # Whoever reads on now puts more in front of what others send.
            gevent.sleep(_NEXT_TURN)

    def loop_iteration(self) -> float:
        """Return a number that is another one in each turn of the event loop."""
        now: float = gevent.get_hub().loop.now()
        return now

    def can_wait(self) -> bool:
        """Say whether the caller may wait: the event loop itself may not."""
        return gevent.getcurrent() is not gevent.get_hub()

    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T:
        """Call *target*, and interrupt it at its next wait once *seconds* have passed.

        Raises:
            HandlerTimeout: It took longer.
        """
        timer = gevent.Timeout.start_new(seconds)
        try:
            return target()
        except gevent.Timeout as exc:
            if exc is not timer:
                raise
            raise HandlerTimeout(seconds) from None
        finally:
            timer.close()

    def call_soon(self, target: Callable[[], object]) -> None:
        """Call *target* in the loop's next turn, in the order of the calls.

        The loop itself calls it, so it must not wait. What it raised would go to
        gevent, which prints it to stderr past logging, and ends the process for a
        ``SystemExit``: it must raise nothing. From another native thread it is
        handed over as by :meth:`call_soon_threadsafe`.
        """
        if self.on_loop():
            gevent.get_hub().loop.run_callback(target)
        else:
            self.call_soon_threadsafe(target)

    def bind_loop(self) -> None:
        """Make the calling native thread, with its event loop, the home of this runtime.

        Idempotent there. In another thread, that becomes home for what is handed
        over from then on. A forked process needs a new runtime.
        """
        if self._home is None or not self.on_loop():
            self._home = _LoopInbox(self)
            self._home_ident = self._home.ident

    def forsake_servers(self) -> None:
        """Have no part, in a forked child, of the servers of its parent and their connections.

        Their greenlets are in the child, too, and would accept connections, take requests
        off those of the parent, and answer them, as soon as the child waits for anything.
        """
        pywsgi = sys.modules.get("gevent.pywsgi")
        handlers = () if pywsgi is None else (pywsgi.WSGIHandler,)
        gc.unfreeze()  # what is frozen is not among the objects that are found
        for each in gc.get_objects():
            kind = type(each)  # isinstance() asks proxies, which may not like that
            if issubclass(kind, handlers):
                silence(vars(each).get("socket"))
            elif issubclass(kind, BaseServer):
                each.stop_accepting()
                for greenlet in each.pool or ():
                    # See gevent.baseserver: _handle_and_close_when_done(handle, close, arguments)
                    for argument in getattr(greenlet, "args", ()):
                        if isinstance(argument, tuple):
                            silence(argument[0])

    def on_loop(self) -> bool:
        """Say whether the caller is in the native thread of :meth:`settle`; before it: yes."""
        ident = self._home_ident
        return ident is None or _get_ident() == ident

    def call_soon_threadsafe(self, target: Callable[[], object]) -> None:
        """Let a task at home call *target*, after all that was handed over before.

        Returns at once; safe in any native thread. *target* may wait, and keeps
        those behind it waiting then. It runs in an empty context. What it raises
        is told to nobody. Before :meth:`settle` every target gets a task of its
        own in the calling thread.

        Raises:
            LoopQueueFull: :data:`MAX_LOOP_QUEUE` targets wait.
        """
        if self._home is None:
            self.spawn(target, name=_HAND_OVER)
        else:
            self._home.add(target)

    def watch_loop(
        self,
        threshold: float,
        on_block: Callable[[str, str], None],
        on_unblock: Callable[[str, float], None],
    ) -> Callable[[], None]:
        """Tell when the event loop of the calling thread does not run for *threshold* seconds.

        A native thread that does not keep the process alive asks the loop, which
        answers in its next turn; see :class:`~.loop_monitor.LoopMonitor`. That
        costs 0.2 to 0.3 % of a core in an idle process (21 questions a second at a
        threshold of 0.4 s), and nothing that can be measured under load.

        This is not gevent's own monitor thread, although an application may use
        that beside it. gevent's counts greenlet switches with a trace function,
        measured as 0.6 us (a third) more for each switch and 6 to 12 % more for an
        echo over a socket pair; trace functions must be removed in the reverse
        order of their installing; what the loop itself calls is not seen; and
        each finding is printed to stderr.

        Args:
            threshold: In seconds, > 0.
            on_block: Called with place (``file:line in function``) and stack, as
                text, while the loop still hangs, and so in the native thread: it
                must not count on the loop.
            on_unblock: Called with place and length in seconds in a task.

        Returns:
            A function that ends the watch; callable in any thread.
        """
        loop = gevent.get_hub().loop
        waker = loop.async_(ref=False)

        def unblocked(place: str, seconds: float) -> None:
            self.spawn(lambda: on_unblock(place, seconds), name="socketio-guard:loop")

        monitor = LoopMonitor(
            threshold,
            ask=waker.send,
            thread_ident=_get_ident(),
            on_block=on_block,
            on_unblock=unblocked,
            sleep=_native_sleep,
        )
        waker.start(monitor.answer)
        _start_new_thread(monitor.run, ())

        def stop() -> None:
            monitor.stop()
            _call_in(loop, waker.close)

        return stop


class _GreenletPool:
    """Starts a greenlet for each of many short tasks, some at a time.

    Each has a greenlet and an empty context of its own, as from ``gevent.spawn``: nothing that code
    knows a task by, or leaves with it, is another's. The ``threading.get_ident()`` of a greenlet
    is its address, and a new one is made where the last one ended; so those that are next have
    been made long before.

    Owners take turns: a thousand events of one client are not in front of the first one of another.
    """

    def __init__(self) -> None:
        self._tasks: OrderedDict[Hashable, deque[Callable[[], object]]] = OrderedDict()
        self._next: deque[gevent.Greenlet] = deque()
        self._hub: object = None
        self._is_due = False

    @property
    def is_behind(self) -> bool:
        """Whether tasks have not begun."""
        return bool(self._tasks)

    def add(self, target: Callable[[], object], owner: Hashable) -> None:
        """Have *target* called in one of the loop's next turns, after what *owner* has there."""
        tasks = self._tasks.get(owner)
        if tasks is None:
            self._tasks[owner] = deque((target,))
        else:
            tasks.append(target)
        if not self._is_due:
            self._is_due = True
            gevent.get_hub().loop.run_callback(self._run)

    def start(self, target: Callable[[], object]) -> gevent.Greenlet:
        """Return a new greenlet that is to call *target*, like one of ``gevent.spawn``."""
        greenlet = self._make(target)
        if not self._has_started(greenlet):
            gevent.get_hub().loop.run_callback(greenlet.switch)
        return greenlet

    def _make(self, target: Callable[[], object]) -> gevent.Greenlet:
        greenlets, hub = self._next, gevent.get_hub()
        if hub is not self._hub:  # they belong to one
            self._hub = hub
            greenlets.clear()
            greenlets.extend(gevent.Greenlet() for _ in range(_MADE_AHEAD))
        greenlet = None
        while greenlet is None or greenlet.dead:  # somebody may have killed all that there are
            greenlets.append(gevent.Greenlet())
            greenlet = greenlets.popleft()
        greenlet._run = target
        greenlet.spawn_tree_locals = {}  # not those of whoever made it
        return greenlet

    def _has_started(self, greenlet: gevent.Greenlet) -> bool:
        try:
            greenlet.start()
        except Exception:  # of a spawn callback: the loop may call it, where nothing may wait
            _logger.exception("a spawn callback of gevent failed; the task runs all the same")
            return False
        return True

    def _run(self) -> None:
        """Run one task of each owner, then those of owners who have more."""
        until = clock() + TIME_SLICE
        self._run_some(until, len(self._tasks))

    def _run_some(self, until: float, count: int) -> None:
        # In the loop itself: a greenlet that waits or ends comes back here.
        tasks = self._tasks
        try:
            while tasks and count and clock() < until:
                count -= 1
                owner, own = tasks.popitem(last=False)
                target = own.popleft()
                if own:
                    tasks[owner] = own
                greenlet = self._make(target)
                self._has_started(greenlet)
                greenlet.switch()
        finally:
            self._is_due = bool(tasks)
            if self._is_due and not count:  # what the first have answered is sent before
                gevent.get_hub().loop.run_callback(self._run_some, until, _ALL)
            elif self._is_due:  # sockets are looked at before a timer is due
                _LoopTimer(_NEXT_TURN, self._run)


class _LoopInbox:
    """What other threads hand over to the event loop of one.

    Of all functions of libev and libuv only the one that wakes an asynchronous
    watcher may be called by other threads. (``run_callback_threadsafe`` counts
    references besides, which a running loop does too, without holding a lock.)
    Locks of gevent are avoided; appending to a deque is atomic.
    """

    def __init__(self, runtime: GeventRuntime) -> None:
        self.ident: int = _get_ident()
        self._targets: deque[Callable[[], object]] = deque()
        self._drainer: _GreenletJob | None = None
        loop = gevent.get_hub().loop
        # Does not keep the loop going: what else could still happen in a process
        # that waits for nothing but its threads is not known here.
        self._waker = loop.async_(ref=False)
        self._waker.start(self._wake)
        # A started watcher is kept by its loop, and keeps this.
        weakref.finalize(runtime, _call_in, loop, self._close).atexit = False

    def add(self, target: Callable[[], object]) -> None:
        if len(self._targets) >= MAX_LOOP_QUEUE:
            raise LoopQueueFull(f"{MAX_LOOP_QUEUE} calls wait for the event loop")
        self._targets.append(target)
        self._waker.send()

    def _wake(self, _exc: BaseException | None = None) -> None:
        """Start draining unless that is under way; only at home."""
        is_draining = self._drainer is not None and self._drainer.is_alive()
        if self._targets and not is_draining:
            self._drainer = _GreenletJob(self._drain, _HAND_OVER, self._wake)

    def _drain(self) -> None:
        began_at = clock()
        while self._targets:
            target = self._targets.popleft()
            with contextlib.suppress(BaseException):  # told to nobody; the next are to be called
                contextvars.Context().run(target)
            if clock() - began_at > TIME_SLICE:
                gevent.sleep(0)
                began_at = clock()

    def _close(self) -> None:
        self._wake()
        self._waker.close()


def _call_in(loop: Any, target: Callable[[], object]) -> None:
    """Let *loop* call *target*, unless it has been destroyed."""
    with contextlib.suppress(Exception):
        loop.run_callback_threadsafe(target)


class _LoopTimer:
    """Has the loop itself call *target*, which must neither wait nor raise.

    Unlike ``gevent.spawn_later``, which calls the spawn callbacks of others, and does so in the
    loop: what one of them raises there leaves the task without a start, and untold.
    """

    def __init__(self, delay: float, target: Callable[[], object]) -> None:
        self._timer = gevent.get_hub().loop.timer(max(delay, _NEXT_TURN))
        self._timer.start(self._due, target)

    def _due(self, target: Callable[[], object]) -> None:
        self._timer.close()
        target()

    def cancel(self) -> None:
        self._timer.close()


def runtime_for(async_mode: str, *, is_write_only: bool) -> Runtime:
    """Choose the runtime for a ``SocketIO`` of *async_mode*.

    A write-only process (a Celery worker, a script) has ``async_mode`` gevent as
    soon as gevent can be imported, patched or not; its sockets are those of the
    standard library then, and it needs threads.

    Raises:
        ConfigError: The mode has neither gevent's event loop nor threads.
    """
    if is_write_only:
        return GeventRuntime() if is_patched() else ThreadRuntime()
    if async_mode in GEVENT_MODES:
        return GeventRuntime()
    if async_mode == "threading":
        return ThreadRuntime()
    if async_mode == "eventlet":
        raise ConfigError(
            "eventlet is installed, and Flask-SocketIO takes it where async_mode is not named; the "
            'guard does not support it: name async_mode="gevent" or async_mode="threading"'
        )
    raise ConfigError(
        f"async_mode {async_mode!r} is not supported: "
        'create SocketIO with async_mode="gevent" or async_mode="threading"'
    )


def silence(sock: Any) -> None:
    """Let a socket that is shared with a parent process lead nowhere; safe for what is none.

    Nothing comes from it, and what is sent to it is lost. Who waits for it goes on
    waiting; were it closed, they would wake with an error, and tell of it.
    """
    global _nowhere
    if _nowhere is None:
        _nowhere = _native_socketpair()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = sock.fileno()
        if number >= 0:
            os.dup2(_nowhere[0].fileno(), number)


def gevent_socket(fd: int) -> Any:
    """Return a socket of gevent's for a descriptor, which belongs to it then."""
    return gevent.socket.socket(fileno=fd)


def is_patched() -> bool:
    """Say whether gevent has patched the sockets of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


clock = time.monotonic
"""Returns seconds that never go back; for intervals and deadlines."""


def is_about_to_exec() -> bool:
    """Say whether this is a forked child in which ``subprocess`` will start a program."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("subprocess", "gevent.subprocess"):
            return True
        frame = frame.f_back
    return False

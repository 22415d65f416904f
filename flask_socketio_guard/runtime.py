"""Concurrency: the same few verbs over gevent and over threads.

This is the only module that names gevent.
"""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

import gevent
import gevent.event
from gevent import monkey

from .errors import ConfigError, HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Event(Protocol):
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
    def call_later(self, delay: float, target: Callable[[], object]) -> Timer: ...
    def event(self) -> Event: ...
    def sleep(self, seconds: float) -> None: ...
    def can_wait(self) -> bool: ...
    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T: ...


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

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job:
        return _GreenletJob(target, name, on_exit)

    def call_later(self, delay: float, target: Callable[[], object]) -> Timer:
        return _GreenletTimer(delay, target)

    def event(self) -> Event:
        event: Event = gevent.event.Event()
        return event

    def sleep(self, seconds: float) -> None:
        gevent.sleep(seconds)

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


class _GreenletTimer:
    def __init__(self, delay: float, target: Callable[[], object]) -> None:
        self._greenlet = gevent.spawn_later(delay, target)

    def cancel(self) -> None:
        self._greenlet.kill(block=False)


class _ThreadJob:
    """A :class:`Job` in a daemon thread, which cannot be killed."""

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
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as exc:  # noqa: BLE001 - handed to on_exit
            self.exception = exc
        if self._on_exit is not None:
            self._on_exit(self.exception)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self.is_alive()

    def kill(self) -> None:
        """Do nothing: a thread ends when its code does."""


class ThreadRuntime:
    """Threads of the standard library. Nothing can be interrupted from outside."""

    can_kill = False

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job:
        return _ThreadJob(target, name, on_exit)

    def call_later(self, delay: float, target: Callable[[], object]) -> Timer:
        timer = threading.Timer(delay, target)
        timer.daemon = True
        timer.start()
        return timer

    def event(self) -> Event:
        return threading.Event()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def can_wait(self) -> bool:
        """Say whether the caller may wait: a thread always may."""
        return True

    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T:
        """Call *target* in a thread of its own and wait for *seconds* at the most.

        A thread cannot be interrupted: when the time is up the caller goes on,
        the target runs to its end unheard, and what it returns or raises is lost.

        Raises:
            HandlerTimeout: It took longer.
        """
        answer: list[T] = []
        context = contextvars.copy_context()
        job = _ThreadJob(lambda: answer.append(context.run(target)), "socketio-guard:handler", None)
        if not job.join(seconds):
            raise HandlerTimeout(seconds)
        if job.exception is not None:
            raise job.exception
        return answer[0]


def runtime_for(async_mode: str, *, is_write_only: bool) -> Runtime:
    """Choose the runtime for a ``SocketIO`` of *async_mode*.

    A write-only process (a Celery worker, a script) has ``async_mode`` gevent as
    soon as gevent can be imported, patched or not; its sockets are those of the
    standard library then, and it needs threads.

    Raises:
        ConfigError: The mode is neither gevent nor threading.
    """
    if is_write_only:
        return GeventRuntime() if is_patched() else ThreadRuntime()
    if async_mode == "gevent":
        return GeventRuntime()
    if async_mode == "threading":
        return ThreadRuntime()
    raise ConfigError(
        f"async_mode {async_mode!r} is not supported: "
        'create SocketIO with async_mode="gevent" or async_mode="threading"'
    )


def is_patched() -> bool:
    """Say whether gevent has patched the sockets of this process."""
    return bool(monkey.is_module_patched("socket"))


def clock() -> float:
    """Return seconds that never go back; for intervals and deadlines."""
    return time.monotonic()

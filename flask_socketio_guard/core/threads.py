"""The runtime over threads of the standard library."""

from __future__ import annotations

import contextvars
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ..errors import HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")


class ThreadJob:
    """A job in a daemon thread, in an empty context; it cannot be killed."""

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
        # Some builds of Python start a thread in a copy of its creator's context.
        run = partial(contextvars.Context().run, self._run)
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as exc:  # noqa: BLE001 - handed to on_exit
            self.exception = exc
        if self._on_exit is not None:
            self._on_exit(self.exception)

    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most *timeout* seconds; a job that joins itself does not wait."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self.is_alive()

    def kill(self) -> None:
        """Do nothing: a thread cannot be killed."""


class ThreadRuntime:
    """Runs tasks in threads of the standard library. A thread cannot be interrupted."""

    can_kill = False

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> ThreadJob:
        """Start *target* in a daemon thread."""
        return ThreadJob(target, name, on_exit)

    def start(self, target: Callable[[], object], owner: Hashable = None) -> ThreadJob:
        """Start *target*, which must not raise, in a daemon thread, in an empty context."""
        del owner  # the kernel shares the CPU
        return ThreadJob(target, "socketio-guard:event", None)

    def call_apart(self, target: Callable[[], T], context: contextvars.Context) -> T:
        """Call *target* in a thread of its own, in *context*, and wait for it."""
        answer: list[T] = []
        job = ThreadJob(lambda: answer.append(context.run(target)), "socketio-guard:handler", None)
        job.join()
        if job.exception is not None:
            raise job.exception
        return answer[0]

    def call_later(self, delay: float, target: Callable[[], object]) -> threading.Timer:
        """Call *target* in a daemon thread, in an empty context, after *delay* seconds."""
        timer = threading.Timer(delay, contextvars.Context().run, (target,))
        timer.daemon = True
        timer.start()
        return timer

    def flag(self) -> threading.Event:
        """Return a new flag."""
        return threading.Event()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread."""
        time.sleep(seconds)

    def yield_control(self) -> None:
        """Let another thread run."""
        time.sleep(0)

    def loop_iteration(self) -> float:
        """Return a number that differs for each call: there is no event loop."""
        return time.monotonic()

    def can_wait(self) -> bool:
        """Return ``True``: a thread may always wait."""
        return True

    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T:
        """Call *target* in a thread of its own and wait for it, at most *seconds*.

        A thread cannot be interrupted: after the timeout the caller continues, the target runs
        to its end, and what it returns or raises is lost.

        Raises:
            HandlerTimeout: *target* did not return in time.
        """
        answer: list[T] = []
        context = contextvars.copy_context()
        job = ThreadJob(lambda: answer.append(context.run(target)), "socketio-guard:handler", None)
        if not job.join(seconds):
            raise HandlerTimeout(seconds)
        if job.exception is not None:
            raise job.exception
        return answer[0]

    def call_soon(self, target: Callable[[], object]) -> None:
        """Call *target* now: there is no event loop."""
        target()

    def bind_loop(self) -> None:
        """Do nothing: there is no event loop."""

    def forsake_servers(self) -> None:
        """Do nothing: a fork does not copy the threads of a server."""

    def on_loop(self) -> bool:
        """Return ``True``: any thread will do."""
        return True

    def call_soon_threadsafe(self, target: Callable[[], object]) -> None:
        """Call *target* now; what it raises reaches the caller."""
        target()

    def run_on_loop(self, target: Callable[..., object], *arguments: object) -> None:
        """Call *target* with *arguments* now; what it raises reaches the caller."""
        target(*arguments)

    def watch_loop(
        self,
        threshold: float,
        on_block: Callable[[str, str], None],
        on_unblock: Callable[[str, float], None],
    ) -> Callable[[], None]:
        """Do nothing: there is no event loop."""
        del threshold, on_block, on_unblock
        return lambda: None

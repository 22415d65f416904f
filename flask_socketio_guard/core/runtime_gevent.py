"""The runtime over gevent: greenlets and an event loop."""

from __future__ import annotations

import contextlib
import gc
import sys
from functools import partial
from typing import TYPE_CHECKING, TypeVar

with contextlib.suppress(ImportError):  # comes with the extra "gunicorn"; threads do not need it
    import gevent
    import gevent.event
    from gevent.baseserver import BaseServer

from ..errors import HandlerTimeout
from .loop_monitor import LoopMonitor
from .runtime_greenlets import (
    HAND_OVER,
    NEXT_TURN,
    GreenletJob,
    GreenletPool,
    LoopInbox,
    LoopTimer,
    call_in,
)
from .runtime_native import get_ident, native_sleep, silence, start_new_thread

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Hashable

    from .runtime_protocols import Flag, Job, Timer

T = TypeVar("T")

_MORE_TURNS = 64  # loop iterations to wait, at most, for tasks that have not begun


class GeventRuntime:
    """Runs tasks in greenlets. A killed or timed-out greenlet is interrupted where it waits."""

    can_kill = True

    def __init__(self) -> None:
        self._inbox: LoopInbox | None = None
        self._loop_ident: int | None = None
        self._starter = GreenletPool()

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job:
        return GreenletJob(target, name, on_exit)

    def start(self, target: Callable[[], object], owner: Hashable = None) -> None:
        """Call *target*, which must not raise, in a task; see :class:`GreenletPool`.

        Args:
            target: Runs in an empty context.
            owner: Scheduled round-robin with the others, however many tasks it has.
        """
        self._starter.add(target, target if owner is None else owner)

    def call_apart(self, target: Callable[[], T], context: contextvars.Context) -> T:
        """Call *target* in a greenlet of its own, in *context*, and wait for it.

        An exception raised in the caller meanwhile, such as a kill, is raised in *target* instead.
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
            except BaseException as exc:  # noqa: BLE001 - as if the caller ran the target itself
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
        return LoopTimer(delay, partial(self._starter.start, target))

    def flag(self) -> Flag:
        event: Flag = gevent.event.Event()
        return event

    def sleep(self, seconds: float) -> None:
        gevent.sleep(seconds)

    def yield_control(self) -> None:
        """Let everything else run: greenlets that wait for sockets, and tasks not yet begun.

        ``gevent.sleep(0)`` is not enough: the loop polls sockets only after up to a
        thousand callbacks that were ready before.

        Source:
            gevent, ``loop._run_callbacks``: the number of callbacks in one batch.
        """
        gevent.sleep(NEXT_TURN)
        for _ in range(_MORE_TURNS):
            if not self._starter.is_behind:
                break
            # A caller that read on now would queue still more work ahead of the others.
            gevent.sleep(NEXT_TURN)

    def loop_iteration(self) -> float:
        """Return a number that changes with each iteration of the event loop."""
        now: float = gevent.get_hub().loop.now()
        return now

    def can_wait(self) -> bool:
        """Return whether the caller may wait: the event loop itself may not."""
        return gevent.getcurrent() is not gevent.get_hub()

    def call_with_timeout(self, target: Callable[[], T], seconds: float) -> T:
        """Call *target*, and interrupt it at its next wait after *seconds*.

        Raises:
            HandlerTimeout: *target* was interrupted.
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
        """Call *target* in the loop's next iteration, in the order of the calls.

        The loop itself calls it, so it must neither wait nor raise: gevent would print the
        exception to stderr, past logging, and end the process for a ``SystemExit``. From
        another native thread, this is :meth:`call_soon_threadsafe`.
        """
        if self.on_loop():
            gevent.get_hub().loop.run_callback(target)
        else:
            self.call_soon_threadsafe(target)

    def bind_loop(self) -> None:
        """Bind this runtime to the calling native thread and its event loop.

        Idempotent in the same thread. A call in another thread binds the runtime to that one;
        calls handed over later go there. A forked process needs a new runtime.
        """
        if self._inbox is None or not self.on_loop():
            self._inbox = LoopInbox(self)
            self._loop_ident = self._inbox.ident

    def forsake_servers(self) -> None:
        """Detach a forked child from its parent's servers and their connections.

        Their greenlets exist in the child, too. As soon as it waits for anything, they would
        accept connections and answer requests on those of the parent.
        """
        pywsgi = sys.modules.get("gevent.pywsgi")
        handlers = () if pywsgi is None else (pywsgi.WSGIHandler,)
        gc.unfreeze()  # get_objects() does not return frozen objects
        for each in gc.get_objects():
            kind = type(each)  # isinstance() would evaluate proxies, which may raise
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
        """Return whether the caller is in the bound thread; true before :meth:`bind_loop`."""
        ident = self._loop_ident
        return ident is None or get_ident() == ident

    def call_soon_threadsafe(self, target: Callable[[], object]) -> None:
        """Call *target* in a task on the event loop, in the order of the calls.

        Returns at once; safe in any native thread. *target* may wait, but delays the
        targets behind it. It runs in an empty context, and its exceptions are ignored.
        Before :meth:`bind_loop`, each target gets a task of its own in the calling thread.

        Raises:
            LoopQueueFull: :data:`~.runtime_greenlets.MAX_LOOP_QUEUE` targets are waiting.
        """
        if self._inbox is None:
            self.spawn(target, name=HAND_OVER)
        else:
            self._inbox.add(target)

    def run_on_loop(self, target: Callable[..., object], *arguments: object) -> None:
        """Call *target* with *arguments*: now if the caller is on the loop, else soon, there.

        Raises:
            LoopQueueFull: See :meth:`call_soon_threadsafe`.
        """
        ident = self._loop_ident  # on_loop() inlined: saves a call on a hot path
        if ident is None or get_ident() == ident:
            target(*arguments)
        else:
            self.call_soon_threadsafe(partial(target, *arguments))

    def watch_loop(
        self,
        threshold: float,
        on_block: Callable[[str, str], None],
        on_unblock: Callable[[str, float], None],
    ) -> Callable[[], None]:
        """Report when the event loop of the calling thread is blocked for *threshold* seconds.

        A native daemon thread pings the loop, which answers in its next iteration; see
        :class:`~.loop_monitor.LoopMonitor`. This costs 0.2 to 0.3 % of a core in an idle
        process (21 pings a second at a threshold of 0.4 s), and nothing measurable under load.

        gevent's own monitor thread is not used, though an application may run it as well. It
        counts greenlet switches with a trace function, which was measured to cost 0.6 us (a
        third) more for each switch and 6 to 12 % more for an echo over a socket pair. Trace
        functions must be removed in the reverse order of their installation, callbacks that
        the loop itself makes are not seen, and each finding is printed to stderr.

        Args:
            threshold: In seconds, > 0.
            on_block: Called with place (``file:line in function``) and stack, as
                text, while the loop is still blocked, and therefore in the native
                thread: it must not depend on the loop.
            on_unblock: Called with place and length in seconds, in a task.

        Returns:
            A function that stops the monitor; callable in any thread.
        """
        loop = gevent.get_hub().loop
        waker = loop.async_(ref=False)

        def unblocked(place: str, seconds: float) -> None:
            self.spawn(lambda: on_unblock(place, seconds), name="socketio-guard:loop")

        monitor = LoopMonitor(
            threshold,
            ask=waker.send,
            thread_ident=get_ident(),
            on_block=on_block,
            on_unblock=unblocked,
            sleep=native_sleep,
        )
        waker.start(monitor.answer)
        start_new_thread(monitor.run, ())

        def stop() -> None:
            monitor.stop()
            call_in(loop, waker.close)

        return stop

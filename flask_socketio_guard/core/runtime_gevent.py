"""The verbs of ``runtime`` over gevent: greenlets, and an event loop."""

from __future__ import annotations

import contextlib
import gc
import sys
from functools import partial
from typing import TYPE_CHECKING, TypeVar

with contextlib.suppress(ImportError):  # it comes with the extra "gunicorn"; threads need none
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

_MORE_TURNS = 64  # that one waits for tasks which have not begun


class GeventRuntime:
    """Greenlets. A killed or timed-out greenlet is interrupted where it waits."""

    can_kill = True

    def __init__(self) -> None:
        self._home: LoopInbox | None = None
        self._home_ident: int | None = None
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
        return LoopTimer(delay, partial(self._starter.start, target))

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
        gevent.sleep(NEXT_TURN)
        for _ in range(_MORE_TURNS):
            if not self._starter.is_behind:
                break
            # Whoever reads on now puts more in front of what others send.
            gevent.sleep(NEXT_TURN)

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
            self._home = LoopInbox(self)
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
        return ident is None or get_ident() == ident

    def call_soon_threadsafe(self, target: Callable[[], object]) -> None:
        """Let a task at home call *target*, after all that was handed over before.

        Returns at once; safe in any native thread. *target* may wait, and keeps
        those behind it waiting then. It runs in an empty context. What it raises
        is told to nobody. Before :meth:`settle` every target gets a task of its
        own in the calling thread.

        Raises:
            LoopQueueFull: :data:`~.runtime_greenlets.MAX_LOOP_QUEUE` targets wait.
        """
        if self._home is None:
            self.spawn(target, name=HAND_OVER)
        else:
            self._home.add(target)

    def run_on_loop(self, target: Callable[..., object], *arguments: object) -> None:
        """Call *target* with *arguments*: now where the caller is on the loop, else there, soon.

        Raises:
            LoopQueueFull: See :meth:`call_soon_threadsafe`.
        """
        ident = self._home_ident  # as on_loop(), which would be a call more
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

"""Acknowledgement callbacks and their timeouts."""

from __future__ import annotations

import heapq
import itertools
import secrets
from _thread import RLock
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..checks import require_plain, require_seconds
from ..core.component import Component, Watch
from ..core.runtime import Flag, Runtime, clock
from ..core.supervisor import is_stopping
from ..events.acknowledgements import AckCallback
from .dispatch import arriving

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ..events.acknowledgements import Awaiting
    from .handlers import HandlerGuard


def ack_callback(
    in_present_request: Callable[[Callable[..., object]], Callable[..., object]],
    function: Callable[..., object],
    timeout: float | None,
    on_timeout: Callable[[], object] | None,
) -> AckCallback:
    """Return *function* as a callback that runs in the current request context, if any.

    Args:
        in_present_request: Binds a function to the current request context.
        function: Called with the values that the client passes to its acknowledgement.
        timeout: Seconds to wait; ``None`` uses the configured default.
        on_timeout: Called when no acknowledgement will come.

    Raises:
        ConfigError: *timeout* is out of range, or a function is a coroutine function.
    """
    if timeout is not None:
        require_seconds("callback_timeout", timeout)
    require_plain("the callback", function)
    bound = in_present_request(function)
    if on_timeout is None:
        return AckCallback(bound, timeout)
    require_plain("on_timeout", on_timeout)
    expired = in_present_request(on_timeout)
    return AckCallback(bound, timeout, lambda _reason: expired())


class CallbackRunner:
    """Calls functions of the application, each in a task of its own.

    Args:
        runtime: Starts the tasks.
        handlers: Records the exceptions that the functions raise.
        context: Returns the context to enter around each call.
    """

    def __init__(
        self,
        runtime: Runtime,
        handlers: HandlerGuard,
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._runtime = runtime
        self._handlers = handlers
        self._context = context

    def __call__(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """Start a task that calls *function*; return without waiting for it."""

        def call() -> object:
            with self._context():
                return function(*arguments)

        name = getattr(function, "__qualname__", type(function).__qualname__)
        arrival = arriving.get()
        if arrival is not None:
            arrival.is_taken = True
        run = partial(self._handlers.run_callback, call, name=name, arrival=arrival)
        if self._runtime.on_loop():
            self._runtime.start(run)
        else:
            self._runtime.spawn(run, name="socketio-guard:callback")


@dataclass(slots=True)
class _Waiting:
    recipient: object
    callback: Awaiting
    timeout: float
    deadline: float


class CallbackTable(Component):
    """The pending acknowledgement callbacks of one application.

    Ids are unique in the process and never reused, and an answer counts only
    if it comes from the recipient that was asked, so no client can trigger
    another client's callback. The first id is random because a JavaScript
    client may send a late answer over its next connection, to another process;
    there it must not match a pending id. Safe for threads and greenlets.

    Args:
        runtime: Provides the flag that the sweeper sleeps on.
        timeout: Default timeout in seconds.
        run: ``run(function, arguments)`` calls a function of the application in
            a task of its own and catches every exception.
        on_lost: Called as ``on_lost(reason, recipient)`` for each callback that
            is dropped.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        timeout: float,
        run: Callable[[Callable[..., object], tuple[object, ...]], None],
        on_lost: Callable[[str, object], None],
    ) -> None:
        self._timeout = timeout
        self._run = run
        self._on_lost = on_lost
        self._ids = itertools.count(1 + secrets.randbelow(_LARGEST_FIRST_ID))
        # Not gevent's lock, which costs a dozen calls: no greenlet switches while holding this one.
        self._lock = RLock()
        self._waiting: dict[int, _Waiting] = {}
        # One queue per timeout. Within a queue deadlines only grow, so the sweeper needs to look
        # at its head only, and an answered callback is removed at once.
        self._queues: dict[float, dict[int, _Waiting]] = {}
        # Heap of (deadline of a queue's head, timeout). An entry may be too early, because its
        # callback has been answered since; expire() corrects it.
        self._heads: list[tuple[float, float]] = []
        self._planned: set[float] = set()  # timeouts that are in the heap
        self._by_recipient: dict[object, set[int]] = {}
        self._added: Flag = runtime.flag()

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, watch: Watch) -> None:
        """Start the sweeper, which drops expired callbacks."""
        watch("socketio-guard:callbacks", self.sweep, self.wake)

    def stop(self, timeout: float) -> None:
        """Drop all pending callbacks with the reason ``"stopped"``."""
        del timeout
        self.lose_all("stopped")

    def gauges(self) -> dict[str, int]:
        """Return the number of pending callbacks."""
        return {"callbacks:waiting": len(self)}

    def waiting(self) -> list[tuple[object, int, Callable[..., object]]]:
        """Return recipient, id and function of each pending callback."""
        with self._lock:
            entries = list(self._waiting.items())
        return [(entry.recipient, id, entry.callback.function) for id, entry in entries]

    def add(self, recipient: object, callback: Awaiting) -> int:
        """Register *callback* and return the id that its answer will carry.

        Args:
            recipient: Session id, room or list of rooms that is asked.
            callback: The callback with its timeout.
        """
        timeout = self._timeout if callback.timeout is None else callback.timeout
        entry = _Waiting(recipient, callback, timeout, clock() + timeout)
        with self._lock:
            ack_id = next(self._ids)
            self._waiting[ack_id] = entry
            self._queues.setdefault(timeout, {})[ack_id] = entry
            is_next = timeout not in self._planned and self._plan(entry)
            if isinstance(recipient, str):
                self._by_recipient.setdefault(recipient, set()).add(ack_id)
        if is_next:
            self._added.set()
        return ack_id

    def resolve(self, ack_id: object, recipient: object, arguments: tuple[object, ...]) -> bool:
        """Pass the answer of *recipient* to its callback.

        Returns:
            Whether such a callback was pending; ``False`` for an id that a client made up.
        """
        entry = self._take(ack_id, recipient)
        if entry is None:
            return False
        if entry.callback.is_inline:
            entry.callback.function(*arguments)
        else:
            self._run(entry.callback.function, arguments)
        return True

    def lose(self, ack_id: object, recipient: object, reason: str) -> bool:
        """Drop one callback because no answer will come."""
        entry = self._take(ack_id, recipient)
        if entry is not None:
            self._lost(entry, reason)
        return entry is not None

    def discard(self, ack_id: int, recipient: object) -> None:
        """Drop one callback whose event was never sent."""
        self._take(ack_id, recipient)

    def lose_recipient(self, recipient: str, reason: str) -> None:
        """Drop all callbacks that wait for *recipient*."""
        for ack_id in list(self._by_recipient.get(recipient, ())):
            self.lose(ack_id, recipient, reason)

    def is_owed_by(self, recipient: str) -> bool:
        """Return whether a callback is pending for *recipient*."""
        return recipient in self._by_recipient

    def lose_all(self, reason: str) -> None:
        """Drop every callback."""
        for ack_id, entry in list(self._waiting.items()):
            self.lose(ack_id, entry.recipient, reason)

    def expire(self) -> float | None:
        """Drop the callbacks whose deadline has passed.

        Returns:
            Seconds until the next deadline, or ``None`` if no callback is pending.
        """
        now = clock()
        due: dict[int, _Waiting] = {}
        next_deadline: float | None = None
        heads = self._heads
        with self._lock:
            while heads:
                planned, timeout = heads[0]
                deadline = None
                for ack_id, entry in self._queues.get(timeout, _EMPTY).items():
                    if entry.deadline > now:
                        deadline = entry.deadline
                        break
                    due[ack_id] = entry
                if deadline is None:
                    heapq.heappop(heads)
                    self._planned.discard(timeout)
                elif deadline > planned:
                    heapq.heapreplace(heads, (deadline, timeout))
                else:
                    next_deadline = deadline
                    break
        for ack_id, entry in due.items():
            self.lose(ack_id, entry.recipient, "expired")
        return None if next_deadline is None else max(0.0, next_deadline - clock())

    def sweep(self) -> None:
        """Drop each callback when it expires, until the task is asked to stop."""
        while not is_stopping():
            self._added.clear()
            wait = self.expire()
            self._added.wait(_LONGEST_SLEEP if wait is None else min(wait, _LONGEST_SLEEP))

    def wake(self) -> None:
        """Make the sweeper check at once whether it was asked to stop."""
        self._added.set()

    def _plan(self, entry: _Waiting) -> bool:
        """Put the queue of *entry* on the heap; return whether it is due next."""
        if len(self._heads) > 2 * len(self._queues) + _MIN_STALE:
            # Most queues on the heap are empty by now: drop those.
            self._planned.intersection_update(self._queues)
            self._heads = [head for head in self._heads if head[1] in self._planned]
            heapq.heapify(self._heads)
        heapq.heappush(self._heads, (entry.deadline, entry.timeout))
        self._planned.add(entry.timeout)
        return self._heads[0][1] == entry.timeout

    def _take(self, ack_id: object, recipient: object) -> _Waiting | None:
        if not isinstance(ack_id, int):
            return None
        with self._lock:
            entry = self._waiting.get(ack_id)
            if entry is None or entry.recipient != recipient:
                return None
            del self._waiting[ack_id]
            queue = self._queues[entry.timeout]
            del queue[ack_id]
            if not queue:
                del self._queues[entry.timeout]
            if isinstance(recipient, str):
                ids = self._by_recipient[recipient]
                ids.discard(ack_id)
                if not ids:
                    del self._by_recipient[recipient]
            return entry

    def _lost(self, entry: _Waiting, reason: str) -> None:
        callback = entry.callback
        if not callback.is_inline:
            self._on_lost(reason, entry.recipient)
        if callback.on_lost is None:
            return
        if callback.is_inline:
            callback.on_lost(reason)
        else:
            self._run(callback.on_lost, (reason,))


_LARGEST_FIRST_ID = 2**40  # leaves room below 2**53, the largest safe integer in JavaScript
_MIN_STALE = 1000
_EMPTY: dict[int, _Waiting] = {}
_LONGEST_SLEEP = 5.0  # seconds; bounds the delay if the sweeper misses a wake-up

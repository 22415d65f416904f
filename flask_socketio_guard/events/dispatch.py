"""Dispatch of a client's events to handlers, with bounded concurrency and ordering by key."""

from __future__ import annotations

import heapq
import itertools
import sys
from _thread import RLock
from collections import deque
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ..core.forks import renew_after_fork
from ..core.jobs import start_or_call
from ..errors import OutputTooLarge
from .shape import HEAD, is_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

    _Spawn = Callable[[Callable[[], object]], object]
    """Runs a function in a task of its own."""

CHARGED_BYTES: Final = 16 * 1024
"""Messages smaller than this, in bytes, are not charged: the send queues bound their number."""

_EVENT_BYTES: Final = 1024
_VALUE_BYTES: Final = 80
_SMALL: Final = 16 * 1024  # characters; for running events up to this size an estimate will do
_NO_MARKS: Final = bytes(each for each in range(256) if each not in b",[{:")
_NO_TASK: Final = "no task could be started for an event, which runs here"
_BYTES_PER_BYTE: Final = 8  # in a packet that is not JSON, each byte may encode a value


class Owner(Protocol):
    """The connection that an event or acknowledgement was received on."""

    def expect(self) -> None:
        """Count one more that was received and has not begun."""

    def begun(self) -> None:
        """Count one less: it has begun, or never will."""


class Arrival:
    """An event or acknowledgement that was received, until its handler or callback begins.

    Args:
        owner: The connection that it came on, which stays open until then.

    Attributes:
        is_taken: Whether a task is responsible for calling :meth:`begin`.
        output: Bytes of large messages that it has caused to be sent and that are still queued.
    """

    __slots__ = ("_is_begun", "is_taken", "output", "owner")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.output = 0
        self.is_taken = False
        self._is_begun = False
        owner.expect()

    def charge(self, size: int, bound: int) -> Charge:
        """Count *size* bytes of output until the returned charge is garbage collected.

        Raises:
            OutputTooLarge: The total would exceed *bound* bytes.
        """
        if self.output + size > bound:
            raise OutputTooLarge
        return Charge(self, size)

    def begin(self) -> None:
        """Note that it has begun, or never will; idempotent."""
        if not self._is_begun:
            self._is_begun = True
            self.owner.begun()


class Charge:
    """Bytes of output that count against an event as long as this object lives."""

    __slots__ = ("_arrival", "_size")

    def __init__(self, arrival: Arrival, size: int) -> None:
        self._arrival = arrival
        self._size = size
        with _charging:
            arrival.output += size

    def __del__(self) -> None:
        with _charging:
            self._arrival.output -= self._size


_charging = RLock()
renew_after_fork(sys.modules[__name__], _charging=RLock)


arriving: ContextVar[Arrival | None] = ContextVar("socketio_guard_arrival", default=None)
"""The event or acknowledgement that the current task handles."""


class Work(Protocol):
    """An event of a client."""

    @property
    def owner(self) -> object:
        """The session it belongs to: the key for :meth:`EventDispatcher.release` and ``drop``."""

    @property
    def ordering_key(self) -> Hashable:
        """Events with the same key run one after another, in order; ``None`` means unordered."""

    @property
    def is_early(self) -> bool:
        """Whether its owner's connect handler has not accepted it yet."""

    def run(self) -> object:
        """Run its handler; never raises."""

    def lose(self) -> object:
        """Note that its handler will not run."""


class DispatchBounds(NamedTuple):
    """Limits on the events of one client that run or wait.

    Attributes:
        max_running: Events whose handlers run at the same time, >= 1.
        max_waiting_bytes: Memory of waiting events, in bytes, >= 1. Once it is reached, the
            reader should apply backpressure and read no further packet.
        max_running_bytes: Memory of running events, in bytes, >= 1. A single event may exceed it
            if it runs alone.
    """

    max_running: int
    max_waiting_bytes: int
    max_running_bytes: int


class _Entry(NamedTuple):
    number: int
    work: Any
    size: int


def memory_of(message: str | bytes) -> int:
    """Estimate how many bytes of memory an event occupies while it waits or runs.

    That is much more than its size on the wire: each event has a fixed cost, and an empty list,
    two characters of JSON, takes 56 bytes of memory.

    Args:
        message: The packet that carries the event.
    """
    if not isinstance(message, str):
        return _EVENT_BYTES + _BYTES_PER_BYTE * len(message)
    if len(message) <= _SMALL:
        values = message.count(",") + message.count("[") + message.count("{") + message.count(":")
    elif not is_flat(message) or any(message.find(mark, HEAD) >= 0 for mark in ",:"):
        values = len(message.encode("utf-8", "surrogatepass").translate(None, _NO_MARKS))
    else:  # a single long string
        values = HEAD
    width = 1 if message.isascii() else 4
    return _EVENT_BYTES + width * len(message) + _VALUE_BYTES * values


class EventDispatcher:
    """Runs the events of one client.

    It never rejects an event. For backpressure, the reader of the client's packets checks
    :attr:`is_full` after each packet and pauses.

    Args:
        bounds: Limits on running and waiting events.
        spawn: Runs a function in a task of its own.
        spawn_later: The same, but in a later iteration of the event loop.
        lock: Guards the queues and counters; never held while a handler runs.
    """

    __slots__ = (
        "_behind_by_key",
        "_bounds",
        "_early",
        "_is_due",
        "_lock",
        "_numbers",
        "_spawn",
        "_spawn_later",
        "_waiting",
        "is_full",
        "on_room",
        "running",
        "running_size",
        "size",
        "waiting",
    )

    def __init__(
        self,
        bounds: DispatchBounds,
        *,
        spawn: _Spawn,
        spawn_later: _Spawn,
        lock: AbstractContextManager[Any],
    ) -> None:
        self._bounds = bounds
        self._spawn = spawn
        self._spawn_later = spawn_later
        self._lock = lock
        self._numbers = itertools.count()
        # Heap, by arrival, of the events that may run next: at most one per ordering key.
        self._waiting: list[_Entry] = []
        # Events that wait for an earlier one with the same key. A key is present while one of its
        # events runs or is in the heap.
        self._behind_by_key: dict[Hashable, deque[_Entry]] = {}
        # Events of owners whose connect handler has not accepted them yet.
        self._early: dict[object, deque[_Entry]] = {}
        # Whether a call of _start_waiting runs or is scheduled; there is one at a time.
        self._is_due = False
        self.running = 0
        """Number of events whose handlers run."""
        self.running_size = 0
        """Estimated memory of the running events, in bytes."""
        self.waiting = 0
        """Number of events that wait."""
        self.size = 0
        """Estimated memory of the waiting events, in bytes."""
        self.is_full = False
        """Whether the reader should pause."""
        self.on_room: Callable[[], object] | None = None
        """Called when fewer events wait than before; set by a reader that has paused."""

    def submit(
        self, work: Work, message: str | bytes, *, more_bytes: int = 0, is_early: bool = False
    ) -> None:
        """Run *work* in a task, now or as soon as the limits and its ordering key allow.

        Args:
            work: An event.
            message: The packet that carries it, from which its memory is estimated.
            more_bytes: Size of its attachments in bytes.
            is_early: Whether its owner may not be accepted yet; if so, the event is held until
                :meth:`release`.
        """
        ordering_key = work.ordering_key
        size = len(message)
        # A small event that runs is counted with its least size, which is cheap to compute.
        size = _EVENT_BYTES + size if size <= _SMALL else memory_of(message)
        size += more_bytes
        with self._lock:
            if (is_early and work.is_early) or (self._early and work.owner in self._early):
                entry = self._entered(work, memory_of(message) + more_bytes)
                self._early.setdefault(work.owner, deque()).append(entry)
                return
            # Events that are about to start must not be overtaken.
            may_run = not self._waiting and not self._is_due and self._has_begun(ordering_key, size)
            if not may_run:
                self._queue(self._entered(work, memory_of(message) + more_bytes))
        if may_run:
            self._start(work, size)

    def release(self, owner: object) -> None:
        """Run, in order, the events that were held until *owner* was accepted."""
        with self._lock:
            for entry in self._early.pop(owner, ()):
                self._queue(entry)
            is_first, self._is_due = not self._is_due, True
        if is_first:
            self._start_waiting()

    def drop(self, owner: object) -> None:
        """Discard the waiting events of *owner* and call their ``lose``, in order of arrival."""
        with self._lock:
            lost = list(self._early.pop(owner, ()))
            for ordering_key, behind in list(self._behind_by_key.items()):
                kept = deque(entry for entry in behind if entry.work.owner != owner)
                if len(kept) != len(behind):
                    lost += [entry for entry in behind if entry.work.owner == owner]
                    self._behind_by_key[ordering_key] = kept
            ready = [entry for entry in self._waiting if entry.work.owner == owner]
            self._waiting = [entry for entry in self._waiting if entry.work.owner != owner]
            heapq.heapify(self._waiting)
            for entry in ready:
                if entry.work.ordering_key is not None:
                    self._advance(entry.work.ordering_key)
            lost += ready
            for entry in lost:
                self._left(entry)
        for entry in sorted(lost):
            entry.work.lose()
        self._notify_room()

    def _has_begun(self, ordering_key: Hashable, size: int) -> bool:
        """Count an event as running and mark its ordering key as busy, if it may run now."""
        if not self._has_room_for(size):
            return False
        if ordering_key is not None and ordering_key in self._behind_by_key:
            return False
        self.running += 1
        self.running_size += size
        if ordering_key is not None:
            self._behind_by_key[ordering_key] = deque()
        return True

    def _has_room_for(self, size: int) -> bool:
        running, bounds = self.running, self._bounds
        return not running or (
            running < bounds.max_running and self.running_size + size <= bounds.max_running_bytes
        )

    def _entered(self, work: Work, size: int) -> _Entry:
        entry = _Entry(next(self._numbers), work, size)
        self.waiting += 1
        self.size += entry.size
        self.is_full = self.size >= self._bounds.max_waiting_bytes
        return entry

    def _left(self, entry: _Entry) -> None:
        self.waiting -= 1
        self.size -= entry.size
        self.is_full = self.size >= self._bounds.max_waiting_bytes

    def _queue(self, entry: _Entry) -> None:
        ordering_key = entry.work.ordering_key
        if ordering_key is not None and ordering_key in self._behind_by_key:
            self._behind_by_key[ordering_key].append(entry)
            return
        if ordering_key is not None:
            self._behind_by_key[ordering_key] = deque()
        heapq.heappush(self._waiting, entry)

    def _advance(self, ordering_key: Hashable) -> None:
        """Make the next event of *ordering_key* ready, after the one before it has ended."""
        behind = self._behind_by_key[ordering_key]
        if behind:
            heapq.heappush(self._waiting, behind.popleft())
        else:
            del self._behind_by_key[ordering_key]

    def _notify_room(self) -> None:
        on_room = self.on_room
        if on_room is not None:
            on_room()

    def _start(self, work: Work, size: int) -> None:
        target = partial(self._work, work, size)
        start_or_call(target, _NO_TASK, self._spawn, target)

    def _work(self, work: Work, size: int) -> None:
        try:
            work.run()
        finally:  # even if the task was killed: otherwise the waiting events would never start
            self._ended(work.ordering_key, size)

    def _ended(self, ordering_key: Hashable, size: int) -> None:
        """Count an event as ended and schedule the start of those that wait."""
        with self._lock:
            self.running -= 1
            self.running_size -= size
            if ordering_key is not None:
                self._advance(ordering_key)
            if not self._waiting or self._is_due:
                return
            self._is_due = True
        # Not at once: other clients' tasks run between two events of this client.
        start_or_call(self._start_waiting, _NO_TASK, self._spawn_later, self._start_waiting)

    def _start_waiting(self) -> None:
        """Start waiting events in order of arrival, as far as the limits allow."""
        while True:
            with self._lock:
                if not self._waiting or not self._has_room_for(self._waiting[0].size):
                    self._is_due = False
                    break
                entry = heapq.heappop(self._waiting)
                self._left(entry)
                self.running += 1
                self.running_size += entry.size
            self._start(entry.work, entry.size)
        self._notify_room()

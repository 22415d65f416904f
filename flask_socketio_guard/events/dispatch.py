"""Events on their way to handlers: a bounded number at a time, some of them in order."""

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
"""Of messages that are smaller, so many wait as send queues take."""

_EVENT_BYTES: Final = 1024
_VALUE_BYTES: Final = 80
_SMALL: Final = 16 * 1024  # characters: of such so many run that their memory matters little
_NO_MARKS: Final = bytes(each for each in range(256) if each not in b",[{:")
_NO_TASK: Final = "no task could be started for an event, which runs here"
_BYTES_PER_BYTE: Final = 8  # of a packet that is not JSON: there a byte may be a value


class Owner(Protocol):
    """The connection that something was received on."""

    def expect(self) -> None:
        """Note that something was received which has not begun."""

    def begun(self) -> None:
        """Note that it has begun, or never will."""


class Arrival:
    """Something that a client sent, until its handler or callback begins.

    Args:
        owner: The connection that it came on, which does not end before.

    Attributes:
        is_taken: Whether a task will begin it.
        output: Bytes of what it has caused to be sent, large messages only, that are still here.
    """

    __slots__ = ("_is_begun", "is_taken", "output", "owner")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.output = 0
        self.is_taken = False
        self._is_begun = False
        owner.expect()

    def charge(self, size: int, bound: int) -> Charge:
        """Count *size* bytes that are sent because of it, until the charge is gone.

        Raises:
            OutputTooLarge: With them there would be more than *bound* at a time.
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
    """Bytes that count for an event as long as this object lives."""

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
"""What the present task acts on."""


class Work(Protocol):
    """An event of a client."""

    @property
    def owner(self) -> object:
        """What it is held, released and lost with."""

    @property
    def ordering_key(self) -> Hashable:
        """Events with the same ordering key run one after another, in order; ``None`` is none."""

    @property
    def is_early(self) -> bool:
        """Whether its owner is not let in yet."""

    def run(self) -> object:
        """Run its handler; never raises."""

    def lose(self) -> object:
        """Note that its handler will not run."""


class DispatchBounds(NamedTuple):
    """How much of one client is in progress or waits.

    Attributes:
        max_running: Events whose handlers run at a time, >= 1.
        max_waiting_bytes: Memory of those that wait for their turn at which nothing more should
            be read, >= 1.
        max_running_bytes: Memory of those that run at a time, >= 1; one alone may have more.
    """

    max_running: int
    max_waiting_bytes: int
    max_running_bytes: int


class _Entry(NamedTuple):
    number: int
    work: Any
    size: int


def memory_of(message: str | bytes) -> int:
    """Return about how many bytes an event holds while it waits or runs.

    That is much more than it has on the wire: there is a fixed cost for each event, and an empty
    list, two characters of JSON, is 56 bytes of memory.

    Args:
        message: Its packet.
    """
    if not isinstance(message, str):
        return _EVENT_BYTES + _BYTES_PER_BYTE * len(message)
    if len(message) <= _SMALL:
        values = message.count(",") + message.count("[") + message.count("{") + message.count(":")
    elif not is_flat(message) or any(message.find(mark, HEAD) >= 0 for mark in ",:"):
        values = len(message.encode("utf-8", "surrogatepass").translate(None, _NO_MARKS))
    else:  # one long text
        values = HEAD
    width = 1 if message.isascii() else 4
    return _EVENT_BYTES + width * len(message) + _VALUE_BYTES * values


class EventDispatcher:
    """Runs the events of one client.

    It accepts everything that is submitted: the reader of the client's packets checks
    :attr:`is_full` between two of them.

    Args:
        bounds: How many run and wait.
        spawn: Runs a function in a task of its own.
        spawn_later: The same, but in a later turn of the event loop.
        lock: Held for the moments in which the books are changed.
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
        # Those that may run next, by arrival: of each ordering key one at the most.
        self._waiting: list[_Entry] = []
        # Those behind another; a key is here while one of its events runs or is ready.
        self._behind_by_key: dict[Hashable, deque[_Entry]] = {}
        # Those of owners that are not let in yet.
        self._early: dict[object, deque[_Entry]] = {}
        # Somebody starts what waits, or is about to: nobody else does.
        self._is_due = False
        self.running = 0
        """Events whose handlers run."""
        self.running_size = 0
        """Bytes of memory that these hold."""
        self.waiting = 0
        """Events that wait."""
        self.size = 0
        """Bytes of memory that these hold."""
        self.is_full = False
        """Whether nothing more should be read for now."""
        self.on_room: Callable[[], object] | None = None
        """Called when less waits than before; set by a reader that has paused."""

    def submit(
        self, work: Work, message: str | bytes, *, more_bytes: int = 0, is_early: bool = False
    ) -> None:
        """Run *work* in a task, now or when its turn comes.

        Args:
            work: An event.
            message: Its packet, by which its size is known.
            more_bytes: Of its attachments.
            is_early: Whether to look if its owner is let in; it waits for that then.
        """
        ordering_key = work.ordering_key
        size = len(message)
        # Of small ones that run, what they have at least will do.
        size = _EVENT_BYTES + size if size <= _SMALL else memory_of(message)
        size += more_bytes
        with self._lock:
            if (is_early and work.is_early) or (self._early and work.owner in self._early):
                entry = self._entered(work, memory_of(message) + more_bytes)
                self._early.setdefault(work.owner, deque()).append(entry)
                return
            # Nothing overtakes what is about to start.
            may_run = not self._waiting and not self._is_due and self._has_begun(ordering_key, size)
            if not may_run:
                self._queue(self._entered(work, memory_of(message) + more_bytes))
        if may_run:
            self._start(work, size)

    def release(self, owner: object) -> None:
        """Run what came before *owner* was let in, in order."""
        with self._lock:
            for entry in self._early.pop(owner, ()):
                self._queue(entry)
            is_first, self._is_due = not self._is_due, True
        if is_first:
            self._start_waiting()

    def drop(self, owner: object) -> None:
        """Lose what waits of *owner*."""
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
        self._tell_of_room()

    def _has_begun(self, ordering_key: Hashable, size: int) -> bool:
        """Count one more that runs, if it may; its ordering key is busy from then on."""
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
        """Let the next of *ordering_key* be ready: the one before has ended."""
        behind = self._behind_by_key[ordering_key]
        if behind:
            heapq.heappush(self._waiting, behind.popleft())
        else:
            del self._behind_by_key[ordering_key]

    def _tell_of_room(self) -> None:
        on_room = self.on_room
        if on_room is not None:
            on_room()

    def _start(self, work: Work, size: int) -> None:
        target = partial(self._work, work, size)
        start_or_call(target, _NO_TASK, self._spawn, target)

    def _work(self, work: Work, size: int) -> None:
        try:
            work.run()
        finally:  # also when the task was killed: those that wait are not to wait for ever
            self._ended(work.ordering_key, size)

    def _ended(self, ordering_key: Hashable, size: int) -> None:
        """Have what waits started after an event with *ordering_key* has ended."""
        with self._lock:
            self.running -= 1
            self.running_size -= size
            if ordering_key is not None:
                self._advance(ordering_key)
            if not self._waiting or self._is_due:
                return
            self._is_due = True
        # Not at once: between two of its events others have their turn.
        start_or_call(self._start_waiting, _NO_TASK, self._spawn_later, self._start_waiting)

    def _start_waiting(self) -> None:
        """Start what waits, as far as it may run, in the order in which it came."""
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
        self._tell_of_room()

"""What waits to be sent to one client: a bounded queue, and who gets to write when."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from ..core.runtime import TIME_SLICE, clock
from ..errors import ConnectionClosed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..core.runtime import Flag, Runtime

SHARED_OVERFLOW: Final = 2
"""Times the bounds at which an emitter waits for a client that is not its own."""

BROADCAST_OVERFLOW: Final = 8
"""Times the bounds at which it waits for one of many, who share the memory of a message."""

OVERFLOW: Final = 16
"""Times the bounds up to which a client gets what cannot wait, while it makes progress."""

_BEHIND_TIMEOUTS = 2
"""Timeouts in which a client that is behind takes as much as may wait for it, or is too slow for
emitters that have others to serve."""

_SLOWEST_DOWNLOAD: Final = 32 * 1024
"""Bytes per second at which an answer to a polling request is thought to be still under way."""


class SendOutcome(str, Enum):
    """What became of a message to a client."""

    QUEUED = "queued"
    """It waits for the client's socket, or is on its way."""
    DROPPED_CLOSED = "dropped_closed"
    """The client is gone."""
    DROPPED_SLOW = "dropped_slow"
    """The client makes no progress, and the message was not kept for it."""
    HANDED_TO_QUEUE = "handed_to_queue"
    """The client is not here; the other processes were told."""

    def __str__(self) -> str:
        return self.value


def require_sent(outcome: SendOutcome) -> SendOutcome:
    """Return *outcome*, if there is anybody to whom the message is on its way.

    Raises:
        ConnectionClosed: It was dropped.
    """
    if outcome in (SendOutcome.DROPPED_CLOSED, SendOutcome.DROPPED_SLOW):
        raise ConnectionClosed(f"the event was not sent: {outcome}")
    return outcome


class SlowConsumer(Enum):
    """What happens to a client whose queue is full and who makes no progress."""

    DISCONNECT = "disconnect"
    DROP_OLDEST = "drop_oldest"
    DROP_VOLATILE = "drop_volatile"


class Outgoing(Protocol):
    """A message as the queue sees it."""

    @property
    def size(self) -> int:
        """Bytes on the wire."""

    @property
    def is_event(self) -> bool:
        """Whether it is an event that nobody waits for, and may be dropped."""

    @property
    def is_volatile(self) -> bool:
        """Whether it is worth nothing later."""


class SendQueue:
    """A bounded first-in first-out queue in front of one client.

    Not locked: a writer and many that put are on one event loop, or hold the
    lock of the socket.

    A full queue alone does not make a client slow: it may have been sent much in one
    turn. Slow is a client that makes no progress for a time; see :meth:`is_slow`.

    A message is taken whole or not at all, and one that is larger than the
    bound passes when nothing else waits. What was taken to be written does not
    count any more: a client that reads a large message is not slow. Memory for
    one client is the bound, what is being written, and one message.

    Args:
        max_packets: Messages that may wait, >= 1.
        max_bytes: Bytes that may wait, >= 1.
        policy: What gives way when it is full.
    """

    __slots__ = (
        "_behind_since",
        "_behind_taken",
        "_items",
        "_max_bytes",
        "_max_packets",
        "_policy",
        "_progress_at",
        "_taken",
        "_waiting_since",
        "room",
        "size",
    )

    def __init__(self, *, max_packets: int, max_bytes: int, policy: SlowConsumer) -> None:
        self._max_packets = max_packets
        self._max_bytes = max_bytes
        self._policy = policy
        self._items: deque[Outgoing] = deque()
        self._progress_at = self._waiting_since = clock()
        self._behind_since: float | None = None
        self._behind_taken = 0
        self._taken = 0  # bytes, and a share of them for each message
        self.size = 0
        """Bytes that wait."""
        self.room: Flag | None = None
        """Set whenever the client has taken something; by an emitter that waits for that."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Outgoing]:
        return iter(list(self._items))

    # As of a queue of the standard library, for those who look into one.

    def qsize(self) -> int:
        """Return how many messages wait."""
        return len(self._items)

    def empty(self) -> bool:
        """Say whether none waits."""
        return not self._items

    def full(self) -> bool:
        """Say whether a bound is reached."""
        return self.is_full

    @property
    def maxsize(self) -> int:
        """How many messages may wait."""
        return self._max_packets

    @property
    def unfinished_tasks(self) -> int:
        """How many messages wait."""
        return len(self._items)

    @property
    def queue(self) -> deque[Outgoing]:
        """What waits, in a copy."""
        return self._items.copy()

    @property
    def is_full(self) -> bool:
        """Whether a bound is reached."""
        return self.is_over(1)

    @property
    def is_filling(self) -> bool:
        """Whether half of a bound is reached."""
        return 2 * self.size >= self._max_bytes or 2 * len(self._items) >= self._max_packets

    def is_over(self, times: int) -> bool:
        """Whether *times* a bound is reached."""
        return self.size >= times * self._max_bytes or len(self._items) >= times * self._max_packets

    def is_slow(self, timeout: float, *, is_shared: bool) -> bool:
        """Whether the client of this full queue is slow.

        Args:
            timeout: Seconds without progress that make it so.
            is_shared: Whether an emitter asks that has others to serve: those wait for no
                client that takes just enough to count as alive, and is behind all the time.
        """
        now = clock()
        if self._behind_since is None:
            self._behind_since, self._behind_taken = now, self._taken
        elif is_shared and now - self._behind_since >= _BEHIND_TIMEOUTS * timeout:
            if self._taken - self._behind_taken < self._max_bytes:
                return True
            self._behind_since, self._behind_taken = now, self._taken
        # Who was idle before has made no progress, for there was nothing to take.
        return now - max(self._progress_at, self._waiting_since) >= timeout

    def progressed(self) -> None:
        """Note that the client has taken a part of what is being written."""
        self._progress_at = clock()

    def downloads(self, size: int) -> None:
        """Note that *size* bytes were taken in one go, of which nobody sees how they get on."""
        self._progress_at = clock() + size / _SLOWEST_DOWNLOAD

    def wake(self) -> None:
        """Wake those who wait for room."""
        if self.room is not None:
            self.room.set()

    def offer(self, item: Outgoing) -> bool:
        """Append *item*, unless a bound is reached.

        Returns:
            Whether there was room.
        """
        items = self._items
        if self.size >= self._max_bytes or len(items) >= self._max_packets:
            return False
        if not items:
            self._waiting_since = clock()
        items.append(item)
        self.size += item.size
        return True

    def put(self, item: Outgoing) -> None:
        """Append *item*, whatever the bounds; for who has looked at :attr:`is_full`."""
        if not self._items:
            self._waiting_since = clock()
        self._items.append(item)
        self.size += item.size

    def make_room(self) -> int | None:
        """Drop waiting messages by the policy until no bound is reached.

        Returns:
            How many were dropped, or ``None`` if that would not make room: then
            nothing was.
        """
        if self._policy is SlowConsumer.DISCONNECT:
            return None
        is_volatile_only = self._policy is SlowConsumer.DROP_VOLATILE
        kept: deque[Outgoing] = deque()
        size, count = self.size, len(self._items)
        for item in self._items:
            is_full = size >= self._max_bytes or count >= self._max_packets
            if is_full and item.is_event and (item.is_volatile or not is_volatile_only):
                size -= item.size
                count -= 1
            else:
                kept.append(item)
        if size >= self._max_bytes or count >= self._max_packets:
            return None
        dropped = len(self._items) - count
        self._items = kept
        self.size = size
        return dropped

    def take(self, max_bytes: int) -> list[Outgoing]:
        """Take the oldest messages to write them: at least one, if any, up to *max_bytes*."""
        items = self._items
        self._progress_at = clock()
        before = self.size
        if len(items) == 1:
            self.size = 0
            batch = [items.popleft()]
        else:
            batch = []
            size = 0
            while items and (not batch or size + items[0].size <= max_bytes):
                item = items.popleft()
                size += item.size
                batch.append(item)
            self.size -= size
        if self._behind_since is not None:
            share = self._max_bytes // self._max_packets
            self._taken += max(before - self.size, len(batch) * share)
            if not self.is_filling:
                self._behind_since = None
        if self.room is not None:
            self.room.set()
        return batch

    def clear(self) -> int:
        """Drop everything that waits.

        Returns:
            How many events that were.
        """
        count = sum(item.is_event for item in self._items)
        self._items.clear()
        self.size = 0
        self.wake()
        return count


class Writer(Protocol):
    """Something with output that waits."""

    def flush(self) -> None:
        """Write without waiting what can be written; never raises."""


class WriteBatcher:
    """Lets many connections write in one go, once in each turn of the event loop.

    Args:
        runtime: Its event loop.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._due: deque[Writer] = deque()
        self._is_scheduled = False

    def add(self, writer: Writer) -> None:
        """Have *writer* flushed in the next turn; at home only."""
        self._due.append(writer)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._runtime.call_soon(self._flush)

    def _flush(self) -> None:
        due = self._due
        until = clock() + TIME_SLICE
        try:
            for _ in range(len(due)):
                due.popleft().flush()
                if clock() >= until:
                    break
        finally:
            self._is_scheduled = bool(due)
            if due:
                # A timer: sockets are looked at before it is due.
                self._runtime.call_later(0.0, self._flush)

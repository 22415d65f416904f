"""Outgoing messages of one client: a bounded queue, and the batching of writes."""

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
"""Multiple of the bounds at which an emitter waits for a client other than its own."""

BROADCAST_OVERFLOW: Final = 8
"""The same for a broadcast, whose recipients share the memory of a message."""

OVERFLOW: Final = 16
"""Multiple of the bounds up to which messages that cannot wait are queued for a client that makes
progress."""

_BEHIND_TIMEOUTS = 2
"""Number of timeouts within which a client that is behind must take *max_bytes*. A slower one
counts as slow for emitters that have other clients to serve."""

_SLOWEST_DOWNLOAD: Final = 32 * 1024
"""Bytes per second; assumed minimum rate of a client that downloads the response to a poll."""


class SendOutcome(str, Enum):
    """The outcome of sending a message to a client."""

    QUEUED = "queued"
    """The message is in the client's send queue, or on the wire."""
    DROPPED_CLOSED = "dropped_closed"
    """The client is gone."""
    DROPPED_SLOW = "dropped_slow"
    """The client does not keep up: the message was volatile, or the client was disconnected."""
    HANDED_TO_QUEUE = "handed_to_queue"
    """The client is not in this process; the message went to the message queue."""

    def __str__(self) -> str:
        return self.value


def require_sent(outcome: SendOutcome) -> SendOutcome:
    """Return *outcome* unless the message was dropped.

    Raises:
        ConnectionClosed: The message was dropped.
    """
    if outcome in (SendOutcome.DROPPED_CLOSED, SendOutcome.DROPPED_SLOW):
        raise ConnectionClosed(f"the event was not sent: {outcome}")
    return outcome


class SlowConsumer(Enum):
    """The policy for a client whose queue is full and that makes no progress."""

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
        """Whether it is an event without acknowledgement, which may be dropped."""

    @property
    def is_volatile(self) -> bool:
        """Whether it was emitted as volatile, so that a late delivery is worthless."""


class SendQueue:
    """A bounded FIFO queue of the messages to one client.

    Not locked: the writer and the emitters run on one event loop, or hold the lock of
    the socket.

    A full queue alone does not make a client slow, because much may have been sent to it
    at once. A client is slow if it makes no progress for some time; see :meth:`is_slow`.

    A message is queued whole or not at all; one that is larger than the bound is
    queued if the queue is empty. Messages taken to be written no longer count: a client
    that is reading a large message is not slow. The memory for one client is limited to
    the bound, the messages being written, and one message more.

    Args:
        max_packets: Most messages in the queue, >= 1.
        max_bytes: Most bytes in the queue, >= 1.
        policy: Which messages may be dropped when the queue is full.
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
        self._taken = 0  # bytes; a small message counts as max_bytes / max_packets
        self.size = 0
        """Bytes in the queue."""
        self.room: Flag | None = None
        """Set whenever messages are taken; created by an emitter that waits for room."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Outgoing]:
        return iter(list(self._items))

    # The read interface of queue.Queue, which python-engineio uses, for code that inspects it.

    def qsize(self) -> int:
        """Return the number of messages in the queue."""
        return len(self._items)

    def empty(self) -> bool:
        """Return whether the queue is empty."""
        return not self._items

    def full(self) -> bool:
        """Return whether a bound is reached."""
        return self.is_full

    @property
    def maxsize(self) -> int:
        """The bound in messages."""
        return self._max_packets

    @property
    def unfinished_tasks(self) -> int:
        """The number of messages in the queue."""
        return len(self._items)

    @property
    def queue(self) -> deque[Outgoing]:
        """A copy of the messages in the queue."""
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
        """Return whether *times* a bound is reached."""
        return self.size >= times * self._max_bytes or len(self._items) >= times * self._max_packets

    def is_slow(self, timeout: float, *, is_shared: bool) -> bool:
        """Return whether the client of this full queue is slow.

        Args:
            timeout: Seconds without progress after which a client is slow.
            is_shared: Whether the emitter has other clients to serve. It then need not wait
                for a client that makes some progress but never catches up.
        """
        now = clock()
        if self._behind_since is None:
            self._behind_since, self._behind_taken = now, self._taken
        elif is_shared and now - self._behind_since >= _BEHIND_TIMEOUTS * timeout:
            if self._taken - self._behind_taken < self._max_bytes:
                return True
            self._behind_since, self._behind_taken = now, self._taken
        # An idle client made no progress because there was nothing to take.
        return now - max(self._progress_at, self._waiting_since) >= timeout

    def progressed(self) -> None:
        """Record that the client has read a part of the data being written."""
        self._progress_at = clock()

    def downloads(self, size: int) -> None:
        """Record the start of a download of *size* bytes whose progress cannot be observed."""
        self._progress_at = clock() + size / _SLOWEST_DOWNLOAD

    def wake(self) -> None:
        """Wake the emitters that wait for room."""
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
        """Append *item* regardless of the bounds, which the caller has checked."""
        if not self._items:
            self._waiting_since = clock()
        self._items.append(item)
        self.size += item.size

    def make_room(self) -> int | None:
        """Drop queued messages, oldest first, as the policy allows, until no bound is reached.

        Returns:
            The number of dropped messages; ``None`` if dropping cannot make room, in
            which case nothing is dropped.
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
        """Remove and return the oldest messages: up to *max_bytes*, but at least one if any."""
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
        """Drop all messages.

        Returns:
            The number of events among them.
        """
        count = sum(item.is_event for item in self._items)
        self._items.clear()
        self.size = 0
        self.wake()
        return count


class Writer(Protocol):
    """Something with pending output."""

    def flush(self) -> None:
        """Write as much as is possible without blocking; never raises."""


class WriteBatcher:
    """Flushes many connections together, once in each iteration of the event loop.

    Args:
        runtime: Of that event loop.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._due: deque[Writer] = deque()
        self._is_scheduled = False

    def add(self, writer: Writer) -> None:
        """Flush *writer* in the next iteration; callable on the event loop's thread only."""
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
                # A timer: the loop polls its sockets before it fires.
                self._runtime.call_later(0.0, self._flush)

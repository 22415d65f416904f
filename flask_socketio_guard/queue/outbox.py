"""Messages to other processes: a bounded queue and the task that publishes it.

``emit`` only appends to the queue. One writer passes batches to the publisher and
keeps what the broker has not acknowledged, which preserves messages and their order
across an outage.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from ..backoff import Backoff
from ..core.runtime import Flag, Runtime, clock
from ..core.supervisor import is_stopping, sleep
from ..errors import OutboxFull, PublishError, PublishRefused
from .reachability import PERMISSION
from .transport import Publisher, QueueMessage

if TYPE_CHECKING:
    from collections.abc import Callable

    from .reachability import Reachability

BATCH_MESSAGES: Final = 512
"""Largest number of messages published in one batch."""

_BATCH_BYTES = 128 * 1024  # fits into the socket buffers: a batch never blocks when half sent
_GATE_POLL_INTERVAL = 0.05  # seconds
_YIELD_MESSAGES = 256  # a loop that emits yields to the writer after this many messages
_SILENCE_TIMEOUT = 0.5  # seconds without an acknowledgement after which emit stops waiting for room
_ROOM_POLL_INTERVAL = 0.005  # seconds
_REFUSED = 10  # number of failures at which the backoff has reached its cap
_SETTLE_POLL_INTERVAL = 0.02  # seconds
_WRITER_SLEEP = 5.0  # seconds


class Outbox:
    """A bounded first-in first-out queue in front of the broker.

    :meth:`put` may be called from any thread or greenlet, and never waits for a broker that is
    unreachable or silent.

    Args:
        runtime: Provides flags and sleep.
        publisher: Used by :meth:`write` only.
        broker: Receives reports of answers and lost connections.
        max_messages: Largest number of queued messages, >= 1.
        max_bytes: Largest size of queued messages in bytes, >= 1.
        batch_messages: Largest number of messages published in one batch, >= 1.
        is_dropping_oldest: Whether a full outbox drops its oldest messages instead of refusing
            the newest.
        reconnect_max_delay: Cap of the delay between attempts, in seconds.
        resubscribe_timeout: Longest wait for the other subscribers after an outage, in seconds.
        is_listening: Returns whether this process receives the channel's messages.
        on_lost: Called as ``on_lost(count, reason, detail)``.
        on_trouble: Called with the broker's error message when it refuses to publish messages,
            which stay queued, and with an empty string when it publishes them again.
        on_probe: Called as ``on_probe(token)`` once the broker has accepted a probe.
    """

    def __init__(
        self,
        runtime: Runtime,
        publisher: Publisher,
        broker: Reachability,
        *,
        max_messages: int,
        max_bytes: int,
        batch_messages: int = BATCH_MESSAGES,
        is_dropping_oldest: bool,
        reconnect_max_delay: float,
        resubscribe_timeout: float,
        is_listening: Callable[[], bool],
        on_lost: Callable[[int, str, str], None],
        on_trouble: Callable[[str], None],
        on_probe: Callable[[int], None],
    ) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self._runtime = runtime
        self._publisher = publisher
        self._broker = broker
        self._is_dropping_oldest = is_dropping_oldest
        self._backoff = Backoff(reconnect_max_delay)
        self._resubscribe_timeout = resubscribe_timeout
        self._is_listening = is_listening
        self._on_lost = on_lost
        self._on_trouble = on_trouble
        self._on_probe = on_probe
        self._lock = threading.Lock()
        self._waiting: deque[QueueMessage] = deque()
        self._in_flight: deque[QueueMessage] = deque()
        self._bytes = 0
        self._sequence = 0
        self._probe: int | None = None
        self._is_closed = False
        self.trouble = ""
        """Category of the error while the broker refuses to publish; empty otherwise."""
        self._yield_at = _YIELD_MESSAGES
        self._acknowledged_at = clock()
        # At most half of a small outbox, because messages in flight cannot be dropped.
        self._batch_messages = max(1, min(batch_messages, max_messages // 2))
        self._batch_bytes = max(1, min(_BATCH_BYTES, max_bytes // 2))
        self._work: Flag = runtime.flag()
        self._empty: Flag = runtime.flag()
        self._empty.set()
        self._usual_subscribers = 0
        self._gate_deadline: float | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    @property
    def size(self) -> int:
        """Size of the queued messages in bytes."""
        return self._bytes

    @property
    def subscribers(self) -> int | None:
        """Number of processes that received the last message; ``None`` if unknown."""
        return self._usual_subscribers or None

    @property
    def fill(self) -> float:
        """Fill level, normally 0 to 1: the larger of the ratios of messages and of bytes."""
        return max(len(self) / self.max_messages, self._bytes / self.max_bytes)

    def put(self, payload: bytes) -> None:
        """Append one message.

        Backpressure: a caller that emits faster than a healthy broker accepts messages yields
        to the writer now and then, and waits for room in a full outbox as long as the writer
        makes progress. It never waits for a broker that is unreachable or silent.

        After :meth:`close`, the message is dropped and counted. While the broker refuses to
        publish, a full outbox drops its oldest messages: an emit must not fail then, because it
        still reaches the clients of this process.

        Raises:
            OutboxFull: The outbox is full and the new message is refused.
        """
        size = len(payload)
        if len(self._waiting) >= self._yield_at or self._is_full(size):
            self._yield_to_writer(size)
        dropped = 0
        with self._lock:
            is_refused = self._is_closed
            if self._is_full(size):
                dropped = self._make_room(size)
                is_refused = is_refused or self._is_full(size)
            if not is_refused:
                self._sequence += 1
                self._waiting.append(QueueMessage(self._sequence, payload))
                self._bytes += size
                if self._empty.is_set():
                    self._empty.clear()
                    self._acknowledged_at = clock()  # silence counts from the first message on
        if dropped or is_refused:
            self._on_lost(dropped + is_refused, "exit" if self._is_closed else "overflow", "")
        if is_refused and not self._is_closed and not self.trouble:
            raise OutboxFull(messages=len(self), size=self._bytes)
        if not self._work.is_set():
            self._work.set()

    def _yield_to_writer(self, size: int) -> None:
        """Let the writer run, and wait for room as long as it makes progress."""
        if not self._is_usable() or not self._runtime.can_wait():
            return
        if self._is_silent() and not self._is_full(size):
            return  # if full, yield once more: maybe it was this process that was blocked
        self._yield_at = len(self._waiting) + _YIELD_MESSAGES
        self._runtime.yield_control()
        while self._is_full(size) and self._is_progressing():
            self._runtime.sleep(_ROOM_POLL_INTERVAL)

    def _is_progressing(self) -> bool:
        return self._is_usable() and not self._is_silent()

    def _is_usable(self) -> bool:
        return self._broker.is_reachable and not self._is_closed and not self.trouble

    def _is_silent(self) -> bool:
        return clock() - self._acknowledged_at > _SILENCE_TIMEOUT

    def _is_full(self, size: int) -> bool:
        # A message larger than max_bytes is accepted if the outbox is empty.
        waiting = len(self._waiting) + len(self._in_flight)
        return waiting >= self.max_messages or (waiting > 0 and self._bytes + size > self.max_bytes)

    def _make_room(self, size: int) -> int:
        dropped = 0
        if not (self._is_dropping_oldest or self.trouble) or size > self.max_bytes:
            return dropped
        while self._waiting and self._is_full(size):
            self._bytes -= len(self._waiting.popleft().payload)
            dropped += 1
        return dropped

    def close(self) -> None:
        """Drop and count the queued messages; later messages are dropped as well."""
        with self._lock:
            self._is_closed = True
            dropped = len(self)
            self._waiting.clear()
            self._in_flight.clear()
            self._bytes = 0
            self._empty.set()
        if dropped:
            self._on_lost(dropped, "exit", "")

    def put_probe(self, token: int) -> None:
        """Publish a probe with the next batch, ahead of the queued messages.

        Replaces a probe that has not been published yet.
        """
        self._probe = token
        self._work.set()

    def flush(self, timeout: float) -> bool:
        """Wait up to *timeout* seconds until the broker has acknowledged all messages.

        Returns:
            Whether it has.
        """
        return self._empty.wait(timeout)

    def settle(self, timeout: float) -> bool:
        """Like :meth:`flush`, but give up when the broker is unreachable or refuses messages."""
        deadline = clock() + timeout
        while not self._empty.is_set():
            remaining = deadline - clock()
            if remaining <= 0 or not self._broker.is_reachable or self.trouble:
                return False
            self._empty.wait(min(remaining, _SETTLE_POLL_INTERVAL))
        return True

    def abandon(self) -> None:
        """Discard the queue in a forked child, without counting: the messages are the parent's."""
        # Without the lock: the thread that held it may not exist in the child.
        self._is_closed = True
        self._waiting.clear()
        self._in_flight.clear()
        self._publisher.close()

    def wake(self) -> None:
        """Make the writer check at once whether it was asked to stop."""
        self._work.set()

    def write(self) -> None:
        """Publish queued messages until the task is asked to stop."""
        failures = 0
        try:
            while not is_stopping():
                if self._probe is None and not len(self):
                    self._work.wait(_WRITER_SLEEP)
                    self._work.clear()
                    continue
                try:
                    self._publish_once()
                    failures = 0
                except PublishError as exc:
                    if exc.category == PERMISSION:
                        self._refused(exc)
                        continue
                    self._connection_lost(exc, failures)
                    failures += 1
        finally:
            self._publisher.close()

    def _publish_once(self) -> None:
        probe, self._probe = self._probe, None
        batch = self._next_batch() if self._gate_deadline is None else []
        subscribers = None
        try:
            subscribers = self._publisher.publish(batch, probe)
        except PublishError as exc:
            if exc.refused:
                self._on_lost(exc.refused, "refused", str(exc))
            if not isinstance(exc, PublishRefused):
                self._acknowledged(exc.published + exc.refused)
                if self._probe is None:
                    self._probe = probe
                raise
        self._broker.report_answer()
        if batch and self.trouble:
            self.trouble = ""
            self._on_trouble("")
        self._acknowledged(len(batch))
        if probe is not None:
            self._on_probe(probe)
        self._count_subscribers(subscribers)

    def _next_batch(self) -> list[QueueMessage]:
        size = 0
        with self._lock:
            while (
                self._waiting
                and len(self._in_flight) < self._batch_messages
                and size < self._batch_bytes
            ):
                message = self._waiting.popleft()
                size += len(message.payload)
                self._in_flight.append(message)
            return list(self._in_flight)

    def _acknowledged(self, count: int) -> None:
        if count:
            self._acknowledged_at = clock()
        with self._lock:
            for _ in range(min(count, len(self._in_flight))):
                self._bytes -= len(self._in_flight.popleft().payload)
            # Messages without an acknowledgement return to the front of the queue.
            self._waiting.extendleft(reversed(self._in_flight))
            self._in_flight.clear()
            if not self._waiting:
                self._yield_at = _YIELD_MESSAGES
                self._empty.set()

    def _refused(self, exc: PublishError) -> None:
        """Keep the messages and retry: this process lacks the permission to publish."""
        if not self.trouble:
            self.trouble = exc.category
            self._on_trouble(str(exc))
        sleep(self._runtime, self._backoff.delay(_REFUSED))

    def _connection_lost(self, exc: PublishError, failures: int) -> None:
        # Pub/sub loses what is published before the other processes have subscribed again, so
        # the gate stays closed until they have.
        self._gate_deadline = float("inf")
        if failures == 0:
            return  # the connection may have broken while idle, long ago: reconnect at once
        self._broker.report_lost(str(exc), exc.category)
        sleep(self._runtime, self._backoff.delay(failures - 1))

    def _count_subscribers(self, subscribers: int | None) -> None:
        if self._gate_deadline is None:
            if subscribers is not None:
                self._usual_subscribers = subscribers
            return
        if self._gate_deadline == float("inf"):
            self._gate_deadline = clock() + self._resubscribe_timeout
        are_back = self._is_listening() and (
            subscribers is None or subscribers >= self._usual_subscribers
        )
        if are_back or clock() >= self._gate_deadline:
            self._gate_deadline = None
        else:
            sleep(self._runtime, _GATE_POLL_INTERVAL)

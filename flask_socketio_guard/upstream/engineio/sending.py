"""The sending side of a guarded socket: a bounded queue, and backpressure when it is full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import flask
from engineio.exceptions import EngineIOError
from websockets.frames import CloseCode

from ...clients.send_queue import BROADCAST_OVERFLOW, OVERFLOW, SHARED_OVERFLOW, SendOutcome
from ...telemetry.records import SendLoss
from .outgoing import ClientMessage
from .violations import ProtocolViolation

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from engineio.socket import Socket as _Socket

    from ...clients.fan_out import Batch
    from ...core.runtime import Flag
else:
    from engineio.socket import Socket as _Socket

_ROOM_INTERVAL = 1.0  # seconds between two checks whether a slow client makes progress


class Sending(_Socket):
    """The sending side of a guarded socket."""

    _poll: Flag | None

    def put(
        self, message: ClientMessage, *, may_wait: bool = False, is_own: bool = False
    ) -> SendOutcome:
        """Queue *message* for the client.

        Args:
            message: Queued as a whole or not at all.
            may_wait: Whether to wait for room while the client makes progress, if the caller
                is in a task that can block.
            is_own: Whether to wait as long as a handler of this client would.

        Returns:
            Whether the message was queued, or why it was dropped.
        """
        if self._fan_out is not None and self._fan_out.is_busy:
            self._fan_out.settle(self)
        return self._enqueue(message, may_wait=may_wait, is_own=is_own)

    def write(self, batch: Batch) -> None:
        """Write a batch of broadcasts, or queue them behind earlier messages; never blocks."""
        transport = self._transport
        if transport is None or not transport.write_now(batch.frames):
            for message in batch.messages:
                self._enqueue(message)

    def wait_until_not_behind(self) -> None:
        """Block a task that broadcasts faster than the client reads, while it makes progress."""
        if self._guard.runtime.can_wait():
            self._make_room(BROADCAST_OVERFLOW, is_waiting=True, unsent=0)
            self.server.behind.discard(self)

    def _enqueue(
        self, message: ClientMessage, *, may_wait: bool = False, is_own: bool = False
    ) -> SendOutcome:
        if self.closed:
            return SendOutcome.DROPPED_CLOSED
        if message.is_volatile and self._is_behind():
            self._guard.telemetry.send(SendLoss(1, "volatile"))
            return SendOutcome.DROPPED_SLOW
        # Replies are bounded too: a client may send requests and never read the replies.
        with self._lock:
            is_taken = self.queue.offer(message)
        if not is_taken:
            dropped = self._make_room_for_one(may_wait=may_wait, is_own=is_own)
            if dropped is not None:
                return dropped
            with self._lock:
                self.queue.put(message)
        if self._transport is not None:
            self._transport.wake()
        elif (poll := self._poll) is not None:  # another thread may set it to None
            poll.set()
        return SendOutcome.QUEUED

    def _make_room_for_one(self, *, may_wait: bool, is_own: bool) -> SendOutcome | None:
        """Make room for one message in the full queue; see :meth:`_make_room`.

        A handler of the client itself waits as long as the client makes progress, since that
        delays no other client. An emitter that serves other clients as well starts to wait
        later, and for a bounded time. A caller that cannot wait may exceed the bound, up to a
        larger one.
        """
        if self._transport is not None:
            self._transport.flush()  # the writer may just not have been scheduled yet
        if not self.queue.is_full:
            return None
        if not may_wait or not self._guard.runtime.can_wait():
            dropped = self._make_room(OVERFLOW, is_waiting=False)
            if self.queue.is_over(BROADCAST_OVERFLOW):
                self.server.behind.add(self)
            return dropped
        is_own = is_own or _current_environ() is self._environ
        return self._make_room(1 if is_own else SHARED_OVERFLOW, is_waiting=True, is_own=is_own)

    def _make_room(
        self, overflow: int, *, is_waiting: bool, is_own: bool = False, unsent: int = 1
    ) -> SendOutcome | None:
        """Ensure that the queue can accept more messages.

        Args:
            overflow: Factor by which the queue may exceed its bounds.
            is_waiting: Whether to wait when that limit is reached.
            is_own: Whether the emitter serves only this client.
            unsent: Messages to count as lost, besides the queued ones, if the client is
                disconnected.

        Returns:
            ``None`` if there is room, otherwise why the messages are dropped. The session is
            then closed.
        """
        queue, timeout = self.queue, self._guard.config.slow_consumer_timeout
        while not self.closed:
            with self._lock:
                if not queue.is_full:
                    return None
                # A client with a waiting poll is not slow: the poll is only not scheduled yet.
                is_slow = self._poll is None and queue.is_slow(timeout, is_shared=not is_own)
                is_over = queue.is_over(overflow)
            if is_slow or (is_over and not is_waiting):
                return self._give_up(unsent)
            if not is_over:
                return None
            with self._lock:
                # Made only when a caller waits, because the writer sets it after each write.
                room = queue.room = queue.room or self._guard.flag()
            room.clear()
            if queue.is_over(overflow):
                room.wait(min(_ROOM_INTERVAL, timeout / 4))
        return SendOutcome.DROPPED_CLOSED

    def _give_up(self, unsent: int) -> SendOutcome | None:
        """Apply the slow consumer policy: drop events or disconnect; see :meth:`_make_room`."""
        with self._lock:
            dropped = self.queue.make_room() if self.queue.is_full else 0
        if dropped is not None:
            if dropped:
                self._guard.telemetry.send(SendLoss(dropped, "slow"))
            return None
        with self._lock:
            lost = self.queue.clear()
        self._guard.telemetry.send(SendLoss(lost + unsent, "slow"))
        self.close(
            reason=self.server.reason.TRANSPORT_ERROR,
            code=CloseCode.POLICY_VIOLATION,
            text="slow consumer",
        )
        return SendOutcome.DROPPED_SLOW

    def _is_behind(self) -> bool:
        return self._transport.is_stuck if self._transport is not None else self.queue.is_filling

    def send(self, pkt: Any) -> None:
        """Queue one Engine.IO packet, like upstream's ``send``."""
        self.put(ClientMessage.of_engineio(pkt))

    def poll(self) -> list[Any]:
        """Wait for packets to return in the response to a polling request."""
        if self._room is not None:
            self._is_heard = True  # its pong is held up behind the request that is not read
        if not self.queue and not self.closed:
            if self._poll is not None:
                # Source: Engine.IO protocol v4, "a client sends no second GET while one waits".
                raise ProtocolViolation("payload", "two polling requests at a time")
            poll = self._poll = self._guard.flag()
            try:
                if not self.queue and not self.closed:
                    poll.wait(self.server.ping_interval + self.server.ping_timeout)
            finally:
                self._poll = None
        with self._lock:
            messages = cast(
                "list[ClientMessage]", self.queue.take(self.server.max_http_buffer_size)
            )
            self.queue.downloads(sum(message.size for message in messages))
        if not messages and self.closed:
            raise EngineIOError("the session is closed")
        return [packet for message in messages for packet in message.packets()]


def _current_environ() -> WSGIEnvironment | None:
    """Return the WSGI environ of the connection or request that the caller serves, if any."""
    return flask.request.environ if flask.has_request_context() else None

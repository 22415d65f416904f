"""Acknowledged delivery: at least once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..checks import require_text
from ..delivery.records import DeadLetter
from ..delivery.request import Requirement, delivery_request
from .guards import Capability

if TYPE_CHECKING:
    from ..delivery.component import Deliveries as Component
    from ..delivery.receipts import Receipt
    from ..delivery.records import Retry

DeadLetterT = TypeVar("DeadLetterT", bound=Callable[[DeadLetter], object])


class Deliveries(Capability):
    """Sends events with acknowledged delivery."""

    def deliver(
        self,
        event: str,
        *args: Any,
        to: str,
        ttl: float | None = None,
        retry: Retry | None = None,
        key: str | None = None,
        ordered: bool = False,
        require: Requirement = "any",
        with_id: bool = False,
        namespace: str | None = None,
        on_delivered: Callable[[Receipt], object] | None = None,
        on_expired: Callable[[Receipt], object] | None = None,
    ) -> Receipt:
        """Send an event with acknowledged delivery, at least once.

        The message is stored until its recipient acknowledges it, which may connect later, and
        is sent again if no acknowledgement arrives. The client acknowledges it like any event: a
        JavaScript handler calls its last argument, a python-socketio handler returns. A client
        that acknowledges with an object that has a key ``error`` rejects the message.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments. JSON only.
            to: A session id, a room, or an identity (:meth:`identify`).
            ttl: Time to live in seconds, > 0, after which the message expires; ``None``
                uses ``SOCKETIO_GUARD_DELIVERY_TTL``.
            retry: When to send it again; ``None``: after
                ``SOCKETIO_GUARD_DELIVERY_ACK_TIMEOUT`` seconds, then with increasing delays.
            key: Replaces the pending message with the same key to the same recipient.
            ordered: Whether the message waits until earlier ordered messages to the same
                recipient have ended.
            require: ``"any"``: one acknowledgement is enough. ``"all"``: every device that
                an identity has at the time of sending must acknowledge.
            with_id: Whether to append the argument ``{"delivery_id": str, "attempt": int}``,
                with which a client can detect a redelivery.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.
            on_delivered: Called with the receipt, in a task of its own, in this process.
            on_expired: The same, when the message becomes a dead letter: it has expired, its
                recipient is gone, or it was rejected.

        Returns:
            A receipt with ``id``, ``state``, ``attempts``, ``wait(timeout)`` and ``cancel()``.

        Raises:
            ConfigError: An option is out of range; or this process only emits and has no store
                that it shares with other processes.
            DeliveryInvalid: The message cannot be encoded as JSON in UTF-8, or is too large.
            DeliveryStoreFull: Too many messages are pending, or Redis is out of memory.
            DeliveryStoreError: The store does not answer; it may have stored the message
                nevertheless.
        """
        request = delivery_request(
            event,
            args,
            to=to,
            ttl=ttl,
            retry=retry,
            key=key,
            ordered=ordered,
            require=require,
            with_id=with_id,
            namespace=namespace,
            on_delivered=on_delivered,
            on_expired=on_expired,
        )
        return self._delivery().deliver(request)

    def receipt(self, id: str) -> Receipt:
        """Return the receipt of a message by its id.

        Raises:
            ConfigError: This process only emits and has no store that it shares with other
                processes.
            UnknownDelivery: There is no such message, or it ended too long ago.
            DeliveryStoreError: The store does not answer.
        """
        return self._delivery().api.receipt(id)

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return the latest messages that were not delivered, newest first.

        Args:
            limit: Largest number of messages to return, >= 1.

        Raises:
            ConfigError: *limit* is out of range; or see :meth:`receipt`.
            DeliveryStoreError: The store does not answer.
        """
        return self._delivery().dead_letters(limit)

    def identify(self, sid: str, identity: str) -> bool:
        """Set the identity of a client until it disconnects; usually in the connect handler.

        Messages that are pending for *identity* are sent to the client.

        Args:
            sid: Session id of a client of this process.
            identity: The application's name for a person or device, such as a user id.

        Returns:
            Whether the client is connected to this process.

        Raises:
            ConfigError: *identity* is not a non-empty string.
            RoomInvalid: *identity* is the session id of another client.
        """
        require_text("identity", identity)
        return self._guards.current().identify(sid, identity)

    def on_dead_letter(self, hook: DeadLetterT) -> DeadLetterT:
        """Call *hook* for every message of :meth:`deliver` that was not delivered.

        The hook receives a :class:`.DeadLetter` and runs in a task of its own, in the process
        that has given up the message. With a store in Redis it is called at least once: if that
        process dies, another one calls it, perhaps again, so it should be idempotent.
        :meth:`dead_letters` lists all of them.

        Raises:
            TypeError: *hook* is not callable.
        """
        if not callable(hook):
            raise TypeError(f"a hook must be callable, not {hook!r}")
        self._guards.registry.on_dead_letter.append(hook)
        return hook

    def _delivery(self) -> Component:
        guard = self._guards.current()
        guard.delivery.require_store()
        guard.lifecycle.start()
        return guard.delivery

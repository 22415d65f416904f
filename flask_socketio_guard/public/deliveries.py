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
        """Send an event at least once, until it is acknowledged.

        It is kept while its recipient is away, and sent again where no acknowledgement
        comes. The client acknowledges as any event: a handler in JavaScript calls its last
        argument, one of python-socketio returns. One that answers with an object that has a
        key ``error`` refuses the message.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments. JSON only.
            to: A session id, a room, or an identity (:meth:`identify`).
            ttl: Time to live: seconds after which it is given up, > 0; ``None`` takes
                ``SOCKETIO_GUARD_DELIVERY_TTL``.
            retry: When it is sent again; ``None``: after
                ``SOCKETIO_GUARD_DELIVERY_ACK_TIMEOUT`` seconds, and then ever less often.
            key: Replaces the message with the same key to the same recipient, if that has
                not ended.
            ordered: Whether it waits for the ordered ones to the recipient before it.
            require: ``"any"``: one acknowledgement will do. ``"all"``: each of the devices
                that an identity has by then must acknowledge it.
            with_id: Whether the last argument is ``{"delivery_id": str, "attempt": int}``, by
                which a client knows a message that it has had before.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            on_delivered: Called with the receipt, in a task of its own, in this process.
            on_expired: The same, when the message becomes a dead letter: it has expired, is
                gone or was refused.

        Returns:
            A receipt with ``id``, ``state``, ``attempts``, ``wait(timeout)`` and ``cancel()``.

        Raises:
            ConfigError: An option is out of range; or the process only emits, and has no store
                that it shares with others.
            DeliveryInvalid: JSON or UTF-8 cannot hold it, or it is too large.
            DeliveryStoreFull: Too many messages wait.
            DeliveryStoreError: The store does not answer; the message may be stored all the
                same.
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
            ConfigError: This process only emits, and has no store that it shares with others.
            UnknownDelivery: There is no such message, or it ended too long ago.
            DeliveryStoreError: The store does not answer.
        """
        return self._delivery().api.receipt(id)

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return the newest messages that did not arrive, newest first.

        Args:
            limit: How many at most, >= 1.

        Raises:
            ConfigError: *limit* is no such number; or see :meth:`receipt`.
            DeliveryStoreError: The store does not answer.
        """
        return self._delivery().dead_letters(limit)

    def identify(self, sid: str, identity: str) -> bool:
        """Say whose device a client is, until it leaves; usually in the connect handler.

        Whatever waits for *identity* is sent to it.

        Args:
            sid: Session id of a client of this process.
            identity: The application's own name for a person or device, such as a user id.

        Returns:
            Whether the client is here.

        Raises:
            ConfigError: *identity* is no text.
            RoomInvalid: It is the session id of another client.
        """
        require_text("identity", identity)
        return self._guards.current().identify(sid, identity)

    def on_dead_letter(self, hook: DeadLetterT) -> DeadLetterT:
        """Call *hook* for every message of :meth:`deliver` that did not arrive.

        It gets a :class:`.DeadLetter`, in a task of its own, in the process that has given the
        message up; at most once, as that process may end. All are listed by
        :meth:`dead_letters`.

        Raises:
            TypeError: *hook* cannot be called.
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

"""The receipt that the sender of a message gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..checks import require_seconds
from ..errors import UnknownDelivery

if TYPE_CHECKING:
    from ..states import DeliveryState
    from .records import Delivery


class ReceiptSource(Protocol):
    """What a receipt asks."""

    def find(self, id: str) -> Delivery | None: ...
    def wait(self, id: str, timeout: float | None) -> None: ...
    def cancel(self, id: str) -> bool: ...


class Receipt:
    """The state of one message of acknowledged delivery, for its sender.

    Attributes:
        id: Of the message; :meth:`SocketIOGuard.receipt` makes a receipt of it again.
    """

    __slots__ = ("_source", "id")

    def __init__(self, source: ReceiptSource, id: str) -> None:
        self._source = source
        self.id = id

    def __repr__(self) -> str:
        return f"<Receipt {self.id}>"

    @property
    def state(self) -> DeliveryState:
        """State of the message: ``"pending"``, ``"in_flight"``, or how it ended.

        Raises:
            UnknownDelivery: It ended too long ago, or the store was emptied.
            DeliveryStoreError: The store, which is asked each time, does not answer.
        """
        return self._find().state

    @property
    def attempts(self) -> int:
        """How often it was sent.

        Raises:
            UnknownDelivery: See :attr:`state`.
        """
        return self._find().attempts

    @property
    def acknowledged_by(self) -> tuple[str, ...]:
        """Session ids of the devices that have acknowledged it, if it requires all.

        The newest come last; of more than 64 the oldest are left out. A device that the store no
        longer counts is among them, too: it has the message.

        Raises:
            UnknownDelivery: See :attr:`state`.
        """
        return self._find().acknowledged_by

    @property
    def acknowledgements(self) -> int:
        """How many devices have acknowledged it, if it requires all.

        Raises:
            UnknownDelivery: See :attr:`state`.
        """
        return self._find().acknowledgements

    def wait(self, timeout: float | None = None) -> DeliveryState:
        """Wait until the message has ended.

        Args:
            timeout: Longest wait in seconds, >= 0; ``None``: until the message ends.

        Returns:
            Its state then.

        Raises:
            ConfigError: *timeout* is not such a number.
            UnknownDelivery: See :attr:`state`.
        """
        if timeout:
            require_seconds("timeout", timeout)
        self._source.wait(self.id, timeout)
        return self.state

    def cancel(self) -> bool:
        """Cancel the message.

        Returns:
            Whether it had not ended before. A recipient may have received it all the same.
        """
        return self._source.cancel(self.id)

    def _find(self) -> Delivery:
        delivery = self._source.find(self.id)
        if delivery is None:
            raise UnknownDelivery(self.id)
        return delivery

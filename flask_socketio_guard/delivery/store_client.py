"""Between the dispatcher, which never waits, and the store, which may be far away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..states import DeliveryState
    from .records import DeadLetter, Delivery
    from .store import DeliveryStore, End, Page, Put


AT_A_TIME: Final = 1000
"""Messages that are given up in one go."""


class StoreClient(ABC):
    """Takes to the store what happens to messages, and tells of those that have ended.

    Only :meth:`put`, :meth:`find`, :meth:`dead_letters` and :meth:`end` may wait; they raise
    :class:`~flask_socketio_guard.errors.DeliveryStoreError` if the store does not answer.

    Args:
        on_end: Called with each message that has ended, and whether it has just now, by this
            process.
    """

    def __init__(self, on_end: Callable[[Delivery, bool], None]) -> None:
        self._on_end = on_end

    @abstractmethod
    def _ask(self, kind: str, *arguments: Any) -> Any:
        """Have a step done, and return what it returns."""

    @abstractmethod
    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        """Give a message up, without waiting for the store."""

    @abstractmethod
    def fail_all(self, address: str, state: DeliveryState) -> None:
        """Give up all that waits for a recipient."""

    @abstractmethod
    def sent(self, id: str) -> None:
        """Note that a message was sent."""

    @abstractmethod
    def returned(self, id: str) -> None:
        """Note that nobody has a message at present."""

    @abstractmethod
    def acknowledged(self, delivery: Delivery, device: str) -> None:
        """Note that a device has acknowledged a message."""

    @abstractmethod
    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        """Call *then* with messages that wait for a recipient; see :class:`~.store.Step`."""

    @abstractmethod
    def join(self, address: str, device: str) -> None:
        """Note that an identity has a device."""

    @abstractmethod
    def leave(self, address: str, device: str) -> None:
        """Note that a device is gone."""

    def put(self, delivery: Delivery) -> Put:
        """Store a message, and wait until it is; see :class:`~.store.Put`."""
        put: Put = self._ask("put", delivery)
        if put.replaced is not None:
            self._on_end(put.replaced, True)
        return put

    def find(self, id: str) -> Delivery | None:
        """Return a message by its id."""
        found: Delivery | None = self._ask("find", id)
        return found

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return the newest dead letters, newest first."""
        letters: list[DeadLetter] = self._ask("dead_letters", limit)
        return letters

    def end(self, id: str, state: DeliveryState) -> bool:
        """Give a message up; say whether it had not ended before."""
        end: End = self._ask("finish", id, state)
        if end.delivery is not None:
            self._on_end(end.delivery, end.is_new)
        return end.is_new

    def _over(self, delivery: Delivery, end: End | None) -> None:
        if end is not None:
            self._on_end(end.delivery or delivery, end.is_new)

    def _tell(self, ended: list[Delivery]) -> None:
        for delivery in ended:
            self._on_end(delivery, True)


class DirectStoreClient(StoreClient):
    """In front of a store in this process's own memory: everything is done at once.

    Args:
        store: Whose methods never wait.
        on_end: See :class:`StoreClient`.
    """

    def __init__(self, store: DeliveryStore, *, on_end: Callable[[Delivery, bool], None]) -> None:
        super().__init__(on_end)
        self._do: Callable[..., Any] = store.do
        self._sent: dict[str, int] = {}  # attempts that the store has not been told of

    def _ask(self, kind: str, *arguments: Any) -> Any:
        if kind != "put" and self._sent:
            for id in list(self._sent):
                attempts = self._sent.pop(id, 0)
                if attempts:
                    self._do("mark", id, attempts, True)
        return self._do(kind, *arguments)

    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        """Give a message up, without waiting for the store."""
        self.end(delivery.id, state)

    def fail_all(self, address: str, state: DeliveryState) -> None:
        """Give up all that waits for a recipient."""
        while ended := self._ask("fail_all", address, state, AT_A_TIME):
            self._tell(ended)

    def sent(self, id: str) -> None:
        """Note that a message was sent."""
        # Most are acknowledged before anybody asks.
        self._sent[id] = self._sent.get(id, 0) + 1

    def returned(self, id: str) -> None:
        """Note that nobody has a message at present."""
        self._do("mark", id, self._sent.pop(id, 0), False)

    def acknowledged(self, delivery: Delivery, device: str) -> None:
        """Note that a device has acknowledged a message."""
        attempts = self._sent.pop(delivery.id, 0)
        if attempts and delivery.requires_all:
            self._do("mark", delivery.id, attempts, True)
            attempts = 0
        end: End | None = self._do("acknowledge", delivery.id, device, attempts)
        self._over(delivery, end)

    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        """Call *then* with messages that wait for a recipient."""
        then(self._ask("waiting", address, after, limit, max_size))

    def join(self, address: str, device: str) -> None:
        """Note that an identity has a device."""
        self._ask("join", address, device)

    def leave(self, address: str, device: str) -> None:
        """Note that a device is gone."""
        self._tell(self._ask("leave", address, device))

    def expire(self) -> None:
        """Give up what has expired."""
        while expired := self._ask("expire", AT_A_TIME):
            self._tell(expired)

"""Between the dispatcher, which never waits, and the store, which may be far away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, TypeVar

from .steps import (
    Acknowledge,
    DeadLetters,
    Expire,
    FailAll,
    Find,
    Finish,
    Join,
    Leave,
    Mark,
    Put,
    Waiting,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..states import DeliveryState
    from .records import DeadLetter, Delivery
    from .steps import Page, Step, Stored
    from .store import DeliveryStore

_T = TypeVar("_T")

AT_A_TIME: Final = 1000
"""Messages that one step ends at most."""


class StoreClient(ABC):
    """Records in the store what happens to messages, and reports those that have ended.

    Only :meth:`put`, :meth:`find`, :meth:`dead_letters` and :meth:`end` may wait; they raise
    :class:`~flask_socketio_guard.errors.DeliveryStoreError` if the store does not answer.

    Args:
        on_end: Called with each message that has ended, and whether this process has ended it,
            just now.
    """

    def __init__(self, on_end: Callable[[Delivery, bool], None]) -> None:
        self._on_end = on_end

    @abstractmethod
    def _ask(self, step: Step[_T]) -> _T:
        """Have a step done; return its result."""

    @abstractmethod
    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        """End a message in *state*, without waiting for the store."""

    @abstractmethod
    def fail_all(self, address: str, state: DeliveryState) -> None:
        """End all messages that wait for a recipient."""

    @abstractmethod
    def sent(self, id: str) -> None:
        """Note that a message was sent."""

    @abstractmethod
    def returned(self, id: str) -> None:
        """Note that no client has a message at present."""

    @abstractmethod
    def acknowledged(self, delivery: Delivery, device: str) -> None:
        """Note that a device has acknowledged a message."""

    @abstractmethod
    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        """Call *then* with messages that wait for a recipient; see :class:`~.steps.Waiting`."""

    @abstractmethod
    def join(self, address: str, device: str) -> None:
        """Note that an identity has a device."""

    @abstractmethod
    def leave(self, address: str, device: str) -> None:
        """Note that a device is gone."""

    def put(self, delivery: Delivery) -> Stored:
        """Store a message, and wait until it is stored."""
        stored = self._ask(Put(delivery))
        if stored.replaced is not None:
            self._on_end(stored.replaced, True)
        return stored

    def find(self, id: str) -> Delivery | None:
        """Return a message by its id."""
        return self._ask(Find(id))

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return the newest dead letters, newest first."""
        return self._ask(DeadLetters(limit))

    def end(self, id: str, state: DeliveryState) -> bool:
        """End a message in *state*; return whether it had not ended before."""
        end = self._ask(Finish(id, state))
        if end.delivery is not None:
            self._on_end(end.delivery, end.is_new)
        return end.is_new

    def _tell(self, ended: list[Delivery]) -> None:
        for delivery in ended:
            self._on_end(delivery, True)


class DirectStoreClient(StoreClient):
    """In front of a store in the memory of this process: each step is done at once.

    Args:
        store: Its methods never wait.
        on_end: See :class:`StoreClient`.
    """

    def __init__(self, store: DeliveryStore, *, on_end: Callable[[Delivery, bool], None]) -> None:
        super().__init__(on_end)
        self._do = store.do
        self._sent: dict[str, int] = {}  # attempts by message id that the store does not know of

    def _ask(self, step: Step[_T]) -> _T:
        if self._sent:
            for id in list(self._sent):
                attempts = self._sent.pop(id, 0)
                if attempts:
                    self._do(Mark(id, attempts, is_in_flight=True))
        return self._do(step)

    def put(self, delivery: Delivery) -> Stored:
        """Store a message."""
        stored = self._do(Put(delivery))  # which shows the attempts of no other message
        if stored.replaced is not None:
            self._on_end(stored.replaced, True)
        return stored

    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        """End a message in *state*, without waiting for the store."""
        self.end(delivery.id, state)

    def fail_all(self, address: str, state: DeliveryState) -> None:
        """End all messages that wait for a recipient."""
        while ended := self._ask(FailAll(address, state, AT_A_TIME)):
            self._tell(ended)

    def sent(self, id: str) -> None:
        """Note that a message was sent."""
        # Most messages are acknowledged before anything asks for their attempts.
        self._sent[id] = self._sent.get(id, 0) + 1

    def returned(self, id: str) -> None:
        """Note that no client has a message at present."""
        self._do(Mark(id, self._sent.pop(id, 0), is_in_flight=False))

    def acknowledged(self, delivery: Delivery, device: str) -> None:
        """Note that a device has acknowledged a message."""
        attempts = self._sent.pop(delivery.id, 0)
        if attempts and delivery.requires_all:
            self._do(Mark(delivery.id, attempts, is_in_flight=True))
            attempts = 0
        end = self._do(Acknowledge(delivery.id, device, attempts))
        if end is not None:
            self._on_end(end.delivery or delivery, end.is_new)

    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        """Call *then* with messages that wait for a recipient."""
        then(self._ask(Waiting(address, after, limit, max_size)))

    def join(self, address: str, device: str) -> None:
        """Note that an identity has a device."""
        self._ask(Join(address, device))

    def leave(self, address: str, device: str) -> None:
        """Note that a device is gone."""
        self._tell(self._ask(Leave(address, device)))

    def expire(self) -> None:
        """End the messages whose time to live is over."""
        while expired := self._ask(Expire(AT_A_TIME)):
            self._tell(expired)

"""The interface of a store of acknowledged delivery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .records import Delivery


class Put(NamedTuple):
    """What became of a message that was to be stored.

    Attributes:
        delivery: It, with its number; ``None`` if the store is full.
        replaced: The message whose place it took, if any.
    """

    delivery: Delivery | None
    replaced: Delivery | None = None


class End(NamedTuple):
    """That a message has ended.

    Attributes:
        delivery: It, as it ended; ``None`` if nothing is known of it any more.
        is_new: Whether it ended by this step.
    """

    delivery: Delivery | None
    is_new: bool


class Page(NamedTuple):
    """Some of the messages that wait for a recipient.

    Attributes:
        deliveries: By number; without those that this version cannot read.
        last: Number of the last one that was looked at; 0 if there was none.
        has_more: Whether there may be others behind it.
    """

    deliveries: list[Delivery]
    last: int
    has_more: bool


class Changes(NamedTuple):
    """What other processes have done.

    Attributes:
        stored: Addresses for which there are new messages.
        ended: Messages that have ended.
    """

    stored: list[str]
    ended: list[Delivery]


class Step(NamedTuple):
    """One thing to be done by a store, wholly or not at all.

    An *address* is that of a recipient in a namespace, :func:`~.records.address_of`.

    ====================================== ============================================
    kind and arguments                     what it does and returns
    ====================================== ============================================
    ``put``, delivery                      Stores it, unless it is stored: :class:`Put`.
    ``mark``, id, attempts, is_in_flight   Notes that it was sent so many times more, and
                                           whether somebody has it now: ``None``.
    ``acknowledge``, id, device, attempts  Adds to the attempts, notes that a device has
                                           it: :class:`End`; ``None`` if others lack it.
    ``finish``, id, state                  Ends it, unless it had ended: :class:`End`.
    ``fail_all``, address, state, limit     Ends those that wait there: a list of them.
    ``waiting``, address, after, limit,    Those that have not ended, by number, from
    max_size                               the first above *after* on, of *max_size*
                                           bytes, about, or one of any: :class:`Page`.
    ``find``, id                           Returns the message, an ended one too, for
                                           as long as it is kept.
    ``dead_letters``, limit                Returns the newest :class:`~.records.DeadLetter`,
                                           newest first: a list.
    ``expire``, limit                      Ends those whose deadline has passed, the
                                           earliest first: a list of them.
    ``join``, address, device              Notes that an identity has a device: ``None``.
    ``leave``, address, device             Notes that a device is gone; returns a list of
                                           the messages that all others have acknowledged.
    ====================================== ============================================

    A message that requires all is acknowledged once at least one device has done so, and
    every device that its recipient has by then. What ends as one of
    :data:`~.records.DEAD` becomes a dead letter, and is returned with its body.
    """

    kind: str
    arguments: tuple[Any, ...]


class DeliveryStore(ABC):
    """Keeps messages until they are acknowledged or given up.

    An end is final: whoever comes second is told that nothing changed. Safe for threads and
    greenlets.

    Every method may raise :class:`~flask_socketio_guard.errors.DeliveryStoreError` if the store
    does not answer; then it is not known which steps were done, and all of them may be tried
    again. A method does not do
    so by itself: what ends by a step whose answer is lost has to be looked up.
    """

    is_shared: bool = False
    """Whether other processes use it too; then it is a :class:`SharedStore`."""

    @abstractmethod
    def apply(self, steps: Sequence[Step]) -> list[Any]:
        """Do *steps* in order; return what each returns, or the exception that it raises.

        An error belongs to its own step: the others are done all the same.
        """

    def do(self, kind: str, *arguments: Any) -> Any:
        """Do one step; return what it returns."""
        result = self.apply([Step(kind, arguments)])[0]
        if isinstance(result, Exception):
            raise result
        return result

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; idempotent."""


class SharedStore(DeliveryStore):
    """A store that several processes use."""

    is_shared = True

    @abstractmethod
    def changes(self, timeout: float) -> Changes | None:
        """Wait for what others do.

        Each call goes on where the last one stopped.

        Returns:
            ``None`` if some of it has been missed: then everything is to be looked up.
        """

    @abstractmethod
    def heartbeat(self) -> bool:
        """Say that this process lives; return whether others may have thought otherwise.

        Then its devices have to join again.
        """

    @abstractmethod
    def lead(self) -> bool:
        """Say whether this process is the one that gives up what has expired, for now."""

    @abstractmethod
    def reap_dead_processes(self) -> list[Delivery]:
        """Forget the devices of processes that are no more; return what has ended by that."""

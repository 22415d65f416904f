"""The interface of a store of acknowledged delivery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .records import Delivery
    from .steps import Step

_T = TypeVar("_T")


class Changes(NamedTuple):
    """What other processes have done, and what this one has done without getting the answer.

    Attributes:
        stored: Addresses for which other processes stored messages.
        ended: Messages that other processes have ended.
        own_ended: Messages that this process has ended by steps whose answers were lost.
    """

    stored: list[str]
    ended: list[Delivery]
    own_ended: Sequence[Delivery] = ()


class Usage(NamedTuple):
    """What the messages in a store take that have not ended.

    Attributes:
        messages: Their number.
        size: Their bytes.
        max_messages: Beyond which the store takes no more, >= 1.
        max_size: Bytes beyond which the store takes no more, >= 1.
        is_out_of_memory: Whether the server of the store has no memory left for another one.
    """

    messages: int
    size: int
    max_messages: int
    max_size: int
    is_out_of_memory: bool = False

    @property
    def fill(self) -> float:
        """The fuller of the two, relative to its bound."""
        return max(self.messages / self.max_messages, self.size / self.max_size)


class DeliveryStore(ABC):
    """Keeps messages until they are acknowledged or given up.

    An end is final: a second end of a message changes nothing, and its result says so. Safe for
    threads and greenlets.

    Every method may raise :class:`~flask_socketio_guard.errors.DeliveryStoreError` if the store
    does not answer; then it is not known which steps were done, and all of them may be tried
    again. A method does not retry by itself: the end of a message by a step whose answer is lost
    has to be looked up.
    """

    is_shared: bool = False
    """Whether several processes use it; then it is a :class:`SharedStore`."""

    @abstractmethod
    def apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
        """Do *steps* in order; return what each returns, or the exception that it raises.

        An error belongs to its own step, the others are done all the same: a
        ``UnicodeEncodeError`` to one with a text that the store cannot represent, a ``TypeError``
        to an object that is not one of :data:`~.steps.STEPS`.
        """

    def do(self, step: Step[_T]) -> _T:
        """Do one step; return what it returns."""
        result: _T = self.apply([step])[0]
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def usage(self) -> Usage | None:
        """What the messages take, as last known, without any I/O; ``None`` if it is not known."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close connections; idempotent."""


class SharedStore(DeliveryStore):
    """A store that several processes use."""

    is_shared = True

    @abstractmethod
    def changes(self, timeout: float) -> Changes | None:
        """Wait for what other processes do, for at most *timeout* seconds.

        Each call continues where the last one stopped, and means that what the last one returned
        has been told.

        Returns:
            ``None`` if changes have been missed: then everything has to be looked up.
        """

    @abstractmethod
    def heartbeat(self) -> bool:
        """Renew the heartbeat of this process.

        Returns:
            Whether others may have taken it for dead: then its devices have to join again.
        """

    @abstractmethod
    def lead(self) -> bool:
        """Take or renew the lease; return whether this process is the one that expires messages."""

    def has_expired(self) -> bool:
        """Return whether a message may have expired; the leader asks several times a second.

        A store that can answer this for less than :class:`~.steps.Expire` costs should.
        """
        return True

    @abstractmethod
    def reap_dead_processes(self) -> Iterable[Delivery]:
        """Forget dead processes and their devices; yield the messages that have ended.

        These are the messages that have ended because a device is gone, and those that a dead
        process has ended and may not have told. A message counts as told when the next one is
        asked for.
        """

    def told(self) -> None:
        """Note that the calling task has told all ends that :meth:`apply` has returned to it."""

"""Records of the message queue: the listener, the broker and the outbox."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...states import ListenerState
from ..printable import without_secrets
from .base import NOTHING, Entry, Fold, Record, in_brackets, safe, signals

if TYPE_CHECKING:
    from collections.abc import Mapping

_OUTAGE_BURST = 5  # outages in one fold interval that are each worth their two lines


@dataclass(frozen=True)
class ListenerChange(Record):
    """The listener moved from *old* to *new*."""

    signal = signals.signal("listener-changed")
    counters = ("listener_stalls",)

    old: ListenerState
    new: ListenerState
    reason: str

    @property
    def level(self) -> int:
        """An error where it is stalled, and a warning where that is over."""
        if self.new is ListenerState.STALLED:
            return logging.ERROR
        if self.old is ListenerState.STALLED:
            return logging.WARNING
        if ListenerState.RECONNECTING in (self.old, self.new):
            return logging.DEBUG  # the broker's going and coming has lines of its own
        return logging.INFO

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one where it has stalled."""
        return {"listener_stalls": 1} if self.new is ListenerState.STALLED else NOTHING

    def entry(self) -> Entry:
        """Return a line with both states; not folded, for the last must be what is true now."""
        reason = safe(without_secrets(self.reason))
        return Entry(
            "message-queue listener: %s, was %s%s",
            (self.new, self.old, f": {reason}" if reason else ""),
            extra={"state": str(self.new), "reason": reason},
        )


listener_changed = ListenerChange.signal
"""A :class:`ListenerChange`."""


@dataclass(frozen=True)
class BrokerChange(Record):
    """A server stopped answering, or answers again: the message queue, or a store.

    Attributes:
        is_reachable: The state from now on.
        reason: The driver's words when it went away.
        duration: Seconds it was away, when it came back.
        is_refusing: Whether it will not have this process, and waiting does not mend that.
    """

    signal = signals.signal("broker-changed")
    server: ClassVar[str] = "the message queue"

    is_reachable: bool
    reason: str = ""
    duration: float = 0.0
    is_refusing: bool = False

    @property
    def level(self) -> int:
        """An error where somebody has to mend it."""
        is_refused = self.is_refusing and not self.is_reachable
        return logging.ERROR if is_refused else logging.WARNING

    def entry(self) -> Entry:
        """Return a line; not folded before it flutters: the last must be what is true now."""
        server = self.server
        if self.is_reachable:
            return Entry(
                f"{server} answers again after %.2f s",
                (self.duration,),
                Fold((server, True), f"{server} answers again", burst=_OUTAGE_BURST),
                {"duration": self.duration},
            )
        did = "refuses this process" if self.is_refusing else "does not answer"
        reason = safe(without_secrets(self.reason))
        return Entry(
            f"{server} {did}: %s",
            (reason,),
            Fold((server, did), f"{server} {did}", burst=_OUTAGE_BURST),
            {"reason": reason},
        )


broker_changed = BrokerChange.signal
"""A :class:`BrokerChange`: the message queue went away or came back."""


@dataclass(frozen=True)
class OutboxLoss(Record):
    """Messages to other processes were dropped.

    Attributes:
        count: How many.
        reason: ``"overflow"``, ``"refused"`` (by the broker) or ``"exit"``.
        detail: The broker's words, where there are any.
    """

    signal = signals.signal("outbox-lost")
    counters = ("outbox_dropped",)
    level = logging.ERROR

    count: int
    reason: str
    detail: str = ""

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return how many messages."""
        return {"outbox_dropped": self.count}

    def entry(self) -> Entry:
        """Return a line with number and reason."""
        repeated = f"message(s) to other processes dropped: {self.reason}"
        return Entry(
            "%d message(s) to other processes dropped: %s%s",
            (self.count, self.reason, in_brackets(self.detail)),
            Fold(("outbox", self.reason), repeated, self.count),
            {"count": self.count, "reason": self.reason},
        )


outbox_lost = OutboxLoss.signal
"""An :class:`OutboxLoss`: messages to other processes were dropped."""


@dataclass(frozen=True)
class Repetition(Record):
    """A message of another process came a second time, and was acted on once.

    Attributes:
        host_id: Name of that process on the message queue.
        sequence: Its number among the messages of that process.
    """

    signal = signals.signal("message-repeated")
    counters = ("messages_repeated",)
    level = logging.INFO

    host_id: str
    sequence: int

    def entry(self) -> Entry:
        """Return a line with number and process."""
        host_id = safe(self.host_id)
        return Entry(
            "a message of another process came again and was dropped: number %d of %s",
            (self.sequence, host_id),
            Fold(("repeated",), "messages of other processes came again and were dropped"),
            {"sequence": self.sequence, "host_id": host_id},
        )


message_repeated = Repetition.signal
"""A :class:`Repetition`: a message of another process came again, and was dropped."""

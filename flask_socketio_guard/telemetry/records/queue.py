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

_OUTAGE_BURST = 5  # outages in one fold interval that are logged individually


@dataclass(frozen=True)
class ListenerChange(Record):
    """The message-queue listener moved from state *old* to *new*."""

    signal = signals.signal("listener-changed")
    counters = ("listener_stalls",)

    old: ListenerState
    new: ListenerState
    reason: str

    @property
    def level(self) -> int:
        """ERROR for a stall, WARNING for its end; reconnects are logged as broker changes."""
        if self.new is ListenerState.STALLED:
            return logging.ERROR
        if self.old is ListenerState.STALLED:
            return logging.WARNING
        if ListenerState.RECONNECTING in (self.old, self.new):
            return logging.DEBUG  # BrokerChange has a line for it
        return logging.INFO

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count a stall."""
        return {"listener_stalls": 1} if self.new is ListenerState.STALLED else NOTHING

    def entry(self) -> Entry:
        """Return a line with both states; never folded, as the last line must be current."""
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
        is_reachable: Whether the server answers now.
        reason: The driver's error message, when the server stopped answering.
        duration: Length of the outage in seconds, when the server answers again.
        is_refusing: Whether the server rejects this process (for instance its password), which
            retries cannot fix.
    """

    signal = signals.signal("broker-changed")
    server: ClassVar[str] = "the message queue"

    is_reachable: bool
    reason: str = ""
    duration: float = 0.0
    is_refusing: bool = False

    @property
    def level(self) -> int:
        """ERROR if somebody has to fix the configuration, else WARNING."""
        is_refused = self.is_refusing and not self.is_reachable
        return logging.ERROR if is_refused else logging.WARNING

    def entry(self) -> Entry:
        """Return a line; folded only if the state flaps, as the last line should be current."""
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
        count: Number of messages.
        reason: ``"overflow"``, ``"refused"`` (by the broker) or ``"exit"``.
        detail: The broker's error message, if there is one.
    """

    signal = signals.signal("outbox-lost")
    counters = ("outbox_dropped",)
    level = logging.ERROR

    count: int
    reason: str
    detail: str = ""

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count the messages."""
        return {"outbox_dropped": self.count}

    def entry(self) -> Entry:
        """Return a line with the number of messages and the reason."""
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
    """A duplicate of another process's message was received, and dropped.

    Attributes:
        host_id: Name of the sending process on the message queue.
        sequence: Number of the message among those of that process.
    """

    signal = signals.signal("message-repeated")
    counters = ("messages_repeated",)
    level = logging.INFO

    host_id: str
    sequence: int

    def entry(self) -> Entry:
        """Return a line with the number of the message and its sender."""
        host_id = safe(self.host_id)
        return Entry(
            "a duplicate message of another process was dropped: number %d of %s",
            (self.sequence, host_id),
            Fold(("repeated",), "duplicate messages of other processes dropped"),
            {"sequence": self.sequence, "host_id": host_id},
        )


message_repeated = Repetition.signal
"""A :class:`Repetition`: a duplicate of another process's message was dropped."""

"""Records of acknowledged delivery."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...states import DeliveryState
from .base import LONGEST_NAME, Entry, Fold, Record, signals
from .queue import BrokerChange

if TYPE_CHECKING:
    from collections.abc import Mapping

_COUNTERS = {
    DeliveryState.DELIVERED: "deliveries_acknowledged",
    DeliveryState.CANCELLED: "deliveries_withdrawn",
    DeliveryState.REPLACED: "deliveries_withdrawn",
}
_DEATHS = {
    DeliveryState.EXPIRED: "expired",
    DeliveryState.GONE: "was for a connection that has ended",
    DeliveryState.REFUSED: "was refused by its recipient",
}


@dataclass(frozen=True)
class DeliveryEnd(Record):
    """This process has ended a message of acknowledged delivery.

    Attributes:
        id: Of the message.
        recipient: Session id, room or identity.
        event: Name of the event.
        state: How it ended.
        attempts: How often it was sent.
    """

    signal = signals.signal("delivery-ended")
    counters = ("deliveries_acknowledged", "deliveries_dead", "deliveries_withdrawn")

    id: str
    recipient: str
    event: str
    state: DeliveryState
    attempts: int

    @property
    def level(self) -> int | None:
        """A warning if it became a dead letter."""
        return logging.WARNING if self.state in _DEATHS else None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one, for how it ended."""
        return {_COUNTERS.get(self.state, "deliveries_dead"): 1}

    def entry(self) -> Entry:
        """Return a line with what became of it."""
        death = _DEATHS[self.state]
        return Entry(
            "dead letter: message %s (%s) %s, after %d attempt(s)",
            (self.id, repr(self.event)[:LONGEST_NAME], death, self.attempts),
            Fold(("delivery", self.state), f"dead letters: a message {death}"),
            {"delivery_id": self.id, "state": str(self.state)},
        )


delivery_ended = DeliveryEnd.signal
"""A :class:`DeliveryEnd`: a message of acknowledged delivery has ended."""


@dataclass(frozen=True)
class StoreChange(BrokerChange):
    """The delivery store stopped answering, or answers again."""

    signal = signals.signal("delivery-store-changed")
    server = "the delivery store"


delivery_store_changed = StoreChange.signal
"""A :class:`StoreChange`, which is a :class:`BrokerChange`, of the delivery store."""


@dataclass(frozen=True)
class DeliveryLoss(Record):
    """Messages are lost with the memory of the process that ends.

    Attributes:
        count: How many.
    """

    signal = signals.signal("deliveries-abandoned")
    counters = ("deliveries_abandoned",)
    level = logging.WARNING

    count: int

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return how many."""
        return {"deliveries_abandoned": self.count}

    def entry(self) -> Entry:
        """Return a line with how many; a process writes it once."""
        return Entry(
            "%d unacknowledged messages are lost with the memory of this process", (self.count,)
        )


deliveries_abandoned = DeliveryLoss.signal
"""A :class:`DeliveryLoss`: this process ends, and the messages in its memory are lost."""

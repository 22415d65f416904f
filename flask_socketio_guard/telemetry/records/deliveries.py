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
    DeliveryState.GONE: "was for a connection that is gone",
    DeliveryState.REFUSED: "was refused by its recipient",
}


@dataclass(frozen=True)
class DeliveryEnd(Record):
    """A message that must arrive has come to its end, by this process.

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
        """A warning where it did not arrive, and nobody wanted that."""
        return logging.WARNING if self.state in _DEATHS else None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one, for how it ended."""
        return {_COUNTERS.get(self.state, "deliveries_dead"): 1}

    def entry(self) -> Entry:
        """Return a line with what became of it."""
        death = _DEATHS[self.state]
        return Entry(
            "a message that must arrive (%s, %s) %s, after %d attempt(s)",
            (self.id, repr(self.event)[:LONGEST_NAME], death, self.attempts),
            Fold(("delivery", self.state), f"messages that must arrive: {death}"),
            {"delivery_id": self.id, "state": str(self.state)},
        )


delivery_ended = DeliveryEnd.signal
"""A :class:`DeliveryEnd`: a message that must arrive was acknowledged or given up."""


@dataclass(frozen=True)
class StoreChange(BrokerChange):
    """The store of messages that must arrive stopped answering, or answers again."""

    signal = signals.signal("delivery-store-changed")
    server = "the store of messages that must arrive"


delivery_store_changed = StoreChange.signal
"""A :class:`StoreChange`, which is a :class:`BrokerChange`, of the store of such messages."""


@dataclass(frozen=True)
class DeliveryLoss(Record):
    """Deliveries end with the process in whose memory they are.

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
            "%d messages that must arrive were still in the memory of this process", (self.count,)
        )


deliveries_abandoned = DeliveryLoss.signal
"""A :class:`DeliveryLoss`: this process ends, and with it what is in its memory."""

"""Broadcasts under way: written to one client after the other, a few milliseconds at a time."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .runtime import clock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .runtime import Runtime
    from .sending import Outgoing

LEAST_RECIPIENTS: Final = 16
"""For fewer it is not worth the while; what they get may be written with other messages."""

MAX_DELIVERIES: Final = 50_000
MAX_BYTES: Final = 16 * 1024 * 1024

_TURN_TIME = 0.003  # seconds of one broadcast after the other before others get their turn
_DELIVERIES = 8  # between two looks at the clock
_LOOK_AHEAD = 8  # broadcasts
_MAX_TOGETHER = 64 * 1024  # bytes that are written in one go for being small


class Recipient(Protocol):
    """A client of a broadcast; hashable by identity."""

    def write(self, messages: list[Any]) -> None:
        """Write *messages* now, or queue them behind what waits; does not wait, never raises."""


_Broadcast: TypeAlias = "tuple[Outgoing, dict[Recipient, None]]"  # and who has yet to get it


class FanOut:
    """What has been broadcast, and to whom it has yet to be written.

    To write is what a broadcast costs, and to ten thousand it takes as long as a
    hundred events. So it is done in the loop's next turns, some of it in each. There is
    one queue of broadcasts, worked off in the order of the calls; whoever sends something
    else to one of the recipients calls :meth:`settle` before, so that each client gets
    everything in the order of the calls. What several broadcasts have for one client goes
    out in one piece. At a bound the caller works off what is too much.

    For one event loop; not thread-safe.

    Args:
        runtime: Its event loop.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._broadcasts: deque[_Broadcast] = deque()
        self._deliveries = 0
        self._bytes = 0
        self._is_due = False
        self.is_busy = False
        """Whether anything has yet to be written."""

    def __len__(self) -> int:
        return self._deliveries

    def add(self, message: Outgoing, recipients: Iterable[Recipient]) -> None:
        """Have *message* written to *recipients*, each once."""
        missing = dict.fromkeys(recipients)
        self._broadcasts.append((message, missing))
        self._deliveries += len(missing)
        self._bytes += message.size
        self.is_busy = True
        while self._deliveries > MAX_DELIVERIES or (
            self._bytes > MAX_BYTES and len(self._broadcasts) > 1
        ):
            self._work(clock() + _TURN_TIME)
        if not self._is_due:
            self._is_due = True
            self._runtime.call_soon(self._take_turn)

    def settle(self, recipient: Recipient) -> None:
        """Write to *recipient* all that it has yet to get."""
        for message, missing in self._broadcasts:
            if recipient in missing:
                del missing[recipient]
                self._deliveries -= 1
                recipient.write([message])

    def _take_turn(self) -> None:
        self._work(clock() + _TURN_TIME)
        self._is_due = self.is_busy
        if self._is_due:
            # A timer: sockets are looked at before it is due.
            self._runtime.call_later(0.0, self._take_turn)

    def _work(self, until: float) -> None:
        broadcasts = self._broadcasts
        while broadcasts:
            message, missing = broadcasts[0]
            while missing:
                next_ones = list(islice(broadcasts, 1, _LOOK_AHEAD))
                for _ in range(_DELIVERIES):
                    if not missing:
                        break
                    recipient, _ = missing.popitem()
                    self._deliveries -= 1
                    messages = [message]
                    if next_ones:
                        self._look_ahead(recipient, messages, next_ones)
                    recipient.write(messages)
                if clock() >= until and missing:
                    return
            if broadcasts and broadcasts[0][1] is missing:
                broadcasts.popleft()
                self._bytes -= message.size
        self.is_busy = False

    def _look_ahead(
        self, recipient: Recipient, messages: list[Outgoing], broadcasts: list[_Broadcast]
    ) -> None:
        """Add to *messages* what *broadcasts*, the next ones, have for *recipient*."""
        size = messages[0].size
        for message, missing in broadcasts:
            if recipient in missing:
                size += message.size
                if size > _MAX_TOGETHER:
                    return
                del missing[recipient]
                self._deliveries -= 1
                messages.append(message)

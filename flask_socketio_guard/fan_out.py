"""Broadcasts under way: written to one client after the other, a few milliseconds at a time."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from .runtime import clock
from .sending import Outgoing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .runtime import Runtime

LEAST_RECIPIENTS: Final = 16
"""For fewer it is not worth the while; what they get may be written with other messages."""

MAX_DELIVERIES: Final = 50_000
MAX_BYTES: Final = 16 * 1024 * 1024

_TURN_TIME = 0.003  # seconds of one broadcast after the other before others get their turn
_DELIVERIES = 8  # between two looks at the clock
_LOOK_AHEAD = 8  # broadcasts
_MAX_TOGETHER = 64 * 1024  # bytes that are written in one go for being small


class Broadcast(Outgoing, Protocol):
    """A message to many."""

    @property
    def frames(self) -> bytes:
        """It as it is written."""


class Batch:
    """Messages that are written in one piece; made once for many clients.

    Attributes:
        messages: In order.
        frames: All of them, as they are written.
    """

    __slots__ = ("frames", "messages")

    def __init__(self, messages: Sequence[Broadcast]) -> None:
        self.messages: Sequence[Any] = messages
        self.frames = (
            messages[0].frames
            if len(messages) == 1
            else b"".join([message.frames for message in messages])
        )


class Recipient(Protocol):
    """A client of a broadcast; hashable by identity."""

    def write(self, batch: Batch) -> None:
        """Write *batch* now, or queue it behind what waits; does not wait, never raises."""


_Missing: TypeAlias = "dict[Recipient, None]"  # who has yet to get it


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
        self._broadcasts: deque[tuple[Broadcast, _Missing]] = deque()
        self._deliveries = 0
        self._bytes = 0
        self._is_due = False
        self.is_busy = False
        """Whether anything has yet to be written."""

    def __len__(self) -> int:
        return self._deliveries

    def add(self, message: Broadcast, recipients: Iterable[Recipient]) -> None:
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
            self._schedule()

    def settle(self, recipient: Recipient) -> None:
        """Write to *recipient* all that it has yet to get."""
        for message, missing in self._broadcasts:
            if recipient in missing:
                del missing[recipient]
                self._deliveries -= 1
                recipient.write(Batch([message]))

    def _take_turn(self) -> None:
        self._is_due = False
        self._work(clock() + _TURN_TIME)
        if self.is_busy and not self._is_due:
            self._schedule()

    def _schedule(self) -> None:
        # A timer: sockets are looked at before it is due, the first time too. What has
        # arrived with the cause of a broadcast may be the cause of the next one.
        self._is_due = True
        self._runtime.call_later(0.0, self._take_turn)

    def _work(self, until: float) -> None:
        broadcasts = self._broadcasts
        while broadcasts:
            message, missing = broadcasts[0]
            alone = Batch([message])
            newest = None
            while missing:
                if broadcasts[-1] is not newest:
                    newest = broadcasts[-1]
                    next_ones = self._next_ones(message)
                    together = Batch([message, *(other for other, _ in next_ones)])
                for _ in range(_DELIVERIES):
                    if not missing:
                        break
                    recipient, _ = missing.popitem()
                    batch = alone
                    if next_ones:
                        ahead = [one for one in next_ones if recipient in one[1]]
                        for _, others in ahead:
                            del others[recipient]
                        if len(ahead) == len(next_ones):
                            batch = together
                        elif ahead:
                            batch = Batch([message, *(other for other, _ in ahead)])
                    self._deliveries -= len(batch.messages)
                    recipient.write(batch)
                if clock() >= until and missing:
                    return
            if broadcasts and broadcasts[0][1] is missing:
                broadcasts.popleft()
                self._bytes -= message.size
        self.is_busy = False

    def _next_ones(self, first: Broadcast) -> list[tuple[Broadcast, _Missing]]:
        """Return the broadcasts behind the first that are small enough to go out with it."""
        next_ones = []
        size = first.size
        for broadcast in islice(self._broadcasts, 1, _LOOK_AHEAD):
            size += broadcast[0].size
            if size > _MAX_TOGETHER:
                break
            next_ones.append(broadcast)
        return next_ones

"""Broadcasts under way: written to one client after the other, a few milliseconds at a time."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..core.runtime import TIME_SLICE, clock
from .send_queue import Outgoing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..core.runtime import Runtime

LEAST_RECIPIENTS: Final = 16
"""For fewer it is not worth the while; what they get may be written with other messages."""

MAX_DELIVERIES: Final = 50_000
MAX_BYTES: Final = 16 * 1024 * 1024

_MAX_DELIVERIES_AHEAD = 20_000  # to write, beyond which other processes have to wait
_DELIVERIES = 8  # between two looks at the clock
_LOOK_AHEAD = 8  # jobs
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


class _Job:
    """Messages on their way to the same clients.

    Attributes:
        messages: In order.
        missing: Who has yet to get them.
        size: Of the messages, in bytes.
        is_begun: Whether somebody has got them, so that no more may be added.
    """

    __slots__ = ("is_begun", "messages", "missing", "size")

    def __init__(self, message: Broadcast, missing: dict[Recipient, None]) -> None:
        self.messages = [message]
        self.missing = missing
        self.size = message.size
        self.is_begun = False


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
        self._jobs: deque[_Job] = deque()
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
        self._bytes += message.size
        self.is_busy = True
        last = self._jobs[-1] if self._jobs else None
        if (
            last is not None
            and not last.is_begun
            and last.size + message.size <= _MAX_TOGETHER
            and last.missing == missing
        ):
            last.messages.append(message)
            last.size += message.size
        else:
            self._jobs.append(_Job(message, missing))
            self._deliveries += len(missing)
        while self._deliveries > MAX_DELIVERIES or (
            self._bytes > MAX_BYTES and len(self._jobs) > 1
        ):
            self._work(clock() + TIME_SLICE)
        if not self._is_due:
            self._schedule()

    def wait_while_behind(self) -> None:
        """Backpressure: return when not much is to be written yet.

        Broadcasts of other processes come as fast as they are written here, and no faster.
        """
        while self._deliveries > _MAX_DELIVERIES_AHEAD:
            self._runtime.yield_control()

    def settle(self, recipient: Recipient) -> None:
        """Write to *recipient* all that it has yet to get."""
        for job in self._jobs:
            if recipient in job.missing:
                job.is_begun = True
                del job.missing[recipient]
                self._deliveries -= 1
                recipient.write(Batch(job.messages))

    def _take_turn(self) -> None:
        self._is_due = False
        try:
            self._work(clock() + TIME_SLICE)
        finally:  # whatever it was, the others are waiting
            if self.is_busy and not self._is_due:
                self._schedule()

    def _schedule(self) -> None:
        # A timer: sockets are looked at before it is due, the first time too. What has
        # arrived with the cause of a broadcast may be the cause of the next one.
        self._is_due = True
        self._runtime.call_later(0.0, self._take_turn)

    def _work(self, until: float) -> None:
        jobs = self._jobs
        while jobs:
            job = jobs[0]
            missing = job.missing
            newest = None
            while missing:
                if jobs[-1] is not newest:
                    newest = jobs[-1]
                    next_ones = self._begin_together()
                    together = _joined([job, *next_ones])
                for _ in range(_DELIVERIES):
                    if not missing:
                        break
                    recipient, _ = missing.popitem()
                    self._deliveries -= 1
                    if not next_ones:
                        recipient.write(together)
                        continue
                    ahead = [one for one in next_ones if recipient in one.missing]
                    for one in ahead:
                        del one.missing[recipient]
                    self._deliveries -= len(ahead)
                    is_all = len(ahead) == len(next_ones)
                    recipient.write(together if is_all else _joined([job, *ahead]))
                if clock() >= until and missing:
                    return
            if jobs and jobs[0] is job:
                jobs.popleft()
                self._bytes -= job.size
        self.is_busy = False

    def _begin_together(self) -> list[_Job]:
        """Return the jobs behind the first that are small enough to go out with it."""
        self._jobs[0].is_begun = True
        next_ones = []
        size = self._jobs[0].size
        for job in islice(self._jobs, 1, _LOOK_AHEAD):
            size += job.size
            if size > _MAX_TOGETHER:
                break
            job.is_begun = True
            next_ones.append(job)
        return next_ones


def _joined(jobs: list[_Job]) -> Batch:
    return Batch([message for job in jobs for message in job.messages])

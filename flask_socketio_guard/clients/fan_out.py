"""Broadcast fan-out: written to one client after another, a few milliseconds at a time."""

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
"""Broadcasts to fewer clients go directly into the send queues, which coalesce messages, too."""

MAX_DELIVERIES: Final = 50_000
"""Deliveries that may be pending before the emitter has to write itself."""

MAX_BYTES: Final = 16 * 1024 * 1024
"""Bytes of messages that may be pending before the emitter has to write itself."""

_MAX_DELIVERIES_AHEAD = 20_000  # pending ones beyond which the message queue is not read
_DELIVERIES = 8  # between two readings of the clock
_LOOK_AHEAD = 8  # jobs
_MAX_TOGETHER = 64 * 1024  # bytes of small messages that are coalesced into one write


class Broadcast(Outgoing, Protocol):
    """A message to many clients."""

    @property
    def frames(self) -> bytes:
        """The WebSocket frames of the message."""


class Batch:
    """Messages that are coalesced into one write; built once for many clients.

    Attributes:
        messages: In order.
        frames: The WebSocket frames of all messages.
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
        """Write *batch* now or append it to the send queue; never blocks, never raises."""


class _Job:
    """Messages to the same clients.

    Attributes:
        messages: In order.
        missing: The clients to which they have not been written yet.
        size: Of all messages, in bytes.
        is_begun: Whether they have been written to a client, so that none may be added.
    """

    __slots__ = ("is_begun", "messages", "missing", "size")

    def __init__(self, message: Broadcast, missing: dict[Recipient, None]) -> None:
        self.messages = [message]
        self.missing = missing
        self.size = message.size
        self.is_begun = False


class FanOut:
    """Writes broadcasts to their recipients in slices, so that the event loop stays responsive.

    Most of the cost of a broadcast is writing it; for ten thousand clients that takes as
    long as a hundred events. So the writes are spread over the next iterations of the loop.
    Broadcasts are queued and written in the order of the calls. A caller that sends
    anything else to a recipient must call :meth:`settle` first, to preserve the order of
    messages. Several pending broadcasts for one client are coalesced into one write. Beyond
    :data:`MAX_DELIVERIES` or :data:`MAX_BYTES`, :meth:`add` itself writes the excess.

    For one event loop; not thread-safe.

    Args:
        runtime: Of that event loop.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._jobs: deque[_Job] = deque()
        self._deliveries = 0
        self._bytes = 0
        self._is_due = False
        self.is_busy = False
        """Whether anything is pending."""

    def __len__(self) -> int:
        return self._deliveries

    def add(self, message: Broadcast, recipients: Iterable[Recipient]) -> None:
        """Queue *message* for *recipients*; it is written once to each."""
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
        """Apply backpressure: return once few enough deliveries are pending.

        Broadcasts of other processes are read no faster than they are written here.
        """
        while self._deliveries > _MAX_DELIVERIES_AHEAD:
            self._runtime.yield_control()

    def settle(self, recipient: Recipient) -> None:
        """Write everything that is pending for *recipient*."""
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
        finally:  # whatever was raised, other recipients are waiting
            if self.is_busy and not self._is_due:
                self._schedule()

    def _schedule(self) -> None:
        # A timer, as the loop polls its sockets before it fires, even the first time: input
        # that arrived together with the cause of this broadcast may cause the next one.
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
        """Return the jobs after the first that are small enough to be written with it."""
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

"""The store of acknowledged delivery in the memory of one process."""

from __future__ import annotations

import heapq
import itertools
import time
from _thread import RLock
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..core.runtime import clock as monotonic
from ..states import DELIVERY_TRANSITIONS, DeliveryEvent, DeliveryState
from .records import DEAD, MAX_NAMED, DeadLetter, Delivery
from .steps import (
    Acknowledge,
    DeadLetters,
    End,
    Expire,
    FailAll,
    Find,
    Finish,
    Join,
    Leave,
    Mark,
    Page,
    Put,
    Stored,
    Waiting,
    not_a_step,
)
from .store import DeliveryStore, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .steps import Step

_T = TypeVar("_T")
_SENT = DELIVERY_TRANSITIONS[DeliveryState.PENDING, DeliveryEvent.SENT]
_NAME_SIZE = 150  # bytes of a device that has acknowledged a message
_RECEIPT_SIZE = 400  # bytes of a receipt in this process, beside its address
_RETURNED = DELIVERY_TRANSITIONS[DeliveryState.IN_FLIGHT, DeliveryEvent.RETURNED]


@dataclass(slots=True)
class _Entry:
    delivery: Delivery
    address: str
    size: int
    deadline: float
    attempts: int = 0
    state: DeliveryState = DeliveryState.PENDING
    acknowledged: frozenset[str] = frozenset()
    by: tuple[str, ...] = ()
    acknowledgements: int = 0


class MemoryStore(DeliveryStore):
    """Keeps messages until this process ends.

    Args:
        max_messages: Messages that have not ended, >= 1.
        max_size: Bytes that they may take, >= 1.
        retention: Seconds for which the receipt of an ended message is kept, >= 0.
        max_ended_size: Bytes that receipts may take, >= 1.
        max_dead_letters: Dead letters that are kept, >= 1.
        max_dead_size: Bytes that dead letters may take, >= 1.
        dead_retention: Seconds for which a dead letter is kept, > 0.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        max_messages: int,
        max_size: int,
        retention: float,
        max_ended_size: int,
        max_dead_letters: int,
        max_dead_size: int,
        dead_retention: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._max_messages = max_messages
        self._max_size = max_size
        self._retention = retention
        self._max_ended_size = max_ended_size
        self._max_dead_letters = max_dead_letters
        self._max_dead_size = max_dead_size
        self._dead_retention = dead_retention
        self._clock = clock
        self._lock = RLock()  # never held during a wait
        self._numbers = itertools.count(1)
        self._size = 0
        self._open: dict[str, _Entry] = {}
        self._mailboxes: dict[str, dict[str, _Entry]] = {}
        self._by_key: dict[tuple[str, str], str] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._devices: dict[str, set[str]] = {}
        # Expiry, address, event, number, attempts, state, devices, their number: no object that the
        # garbage collector would have to visit, however many there are.
        self._ended: dict[str, tuple[float, str, str, int, int, str, str, int]] = {}
        self._ended_size = 0
        self._dead: dict[str, tuple[float, int, DeadLetter]] = {}  # expiry, size
        self._dead_size = 0
        self._steps: dict[type, Callable[..., Any]] = {
            Put: self._put,
            Mark: self._mark,
            Acknowledge: self._acknowledge,
            Finish: self._finish,
            FailAll: self._fail_all,
            Waiting: self._waiting,
            Find: self._find,
            DeadLetters: self._dead_letters,
            Expire: self._expire,
            Join: self._join,
            Leave: self._leave,
        }

    def __len__(self) -> int:
        return len(self._open)

    def apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
        """Do *steps*; see :class:`~.store.DeliveryStore`."""
        results: list[Any] = []
        with self._lock:
            for step in steps:
                try:
                    results.append(self.do(step))
                except Exception as exc:  # noqa: BLE001 - it belongs to its own step
                    results.append(exc)
        return results

    def do(self, step: Step[_T]) -> _T:
        """Do one step; return what it returns."""
        try:
            method = self._steps[type(step)]
        except KeyError:
            raise not_a_step(step) from None
        with self._lock:
            result: _T = method(step)
            return result

    @property
    def usage(self) -> Usage:
        """What the messages take; see :class:`~.store.DeliveryStore`."""
        return Usage(len(self._open), self._size, self._max_messages, self._max_size)

    def close(self) -> None:
        """Do nothing: there are no connections."""

    # The steps

    def _put(self, step: Put) -> Stored:
        delivery = step.delivery
        id = delivery.id
        if id in self._open or id in self._ended or id in self._dead:
            return Stored(self._known(id))
        address, size = delivery.address, delivery.size
        key = None if delivery.key is None else (address, delivery.key)
        older = None if key is None else self._by_key.get(key)
        count, used = len(self._open) + 1, self._size + size
        if older is not None:
            count, used = count - 1, used - self._open[older].size
        if count > self._max_messages or used > self._max_size:
            return Stored(None, full="messages" if count > self._max_messages else "size")
        replaced = None if older is None else self._end(older, DeliveryState.REPLACED)
        delivery = delivery.numbered(next(self._numbers))
        entry = _Entry(delivery, address, size, self._clock() + delivery.ttl)
        self._size += size
        self._open[delivery.id] = entry
        self._mailboxes.setdefault(address, {})[delivery.id] = entry
        if key is not None:
            self._by_key[key] = delivery.id
        heapq.heappush(self._deadlines, (entry.deadline, delivery.number, delivery.id))
        return Stored(delivery, replaced)

    def _mark(self, step: Mark) -> None:
        entry = self._open.get(step.id)
        if entry is not None:
            entry.attempts += step.attempts
            entry.state = _SENT if step.is_in_flight else _RETURNED

    def _acknowledge(self, step: Acknowledge) -> End | None:
        id, device, attempts = step
        entry = self._open.get(id)
        if entry is None:
            return End(self._known(id), is_new=False)
        entry.attempts += attempts
        if entry.delivery.requires_all:
            if len(entry.acknowledged) >= MAX_NAMED:  # devices that have left do not count
                entry.acknowledged &= self._devices.get(entry.address, set())
            entry.acknowledged |= {device}
            if device not in entry.by:
                entry.by = (*entry.by, device)[-MAX_NAMED:]
                entry.acknowledgements += 1
                if entry.acknowledgements <= MAX_NAMED:
                    entry.size += _NAME_SIZE
                    self._size += _NAME_SIZE
            if not self._have_all(entry):
                return None
        return End(self._end(id, DeliveryState.DELIVERED), is_new=True)

    def _finish(self, step: Finish) -> End:
        id, state = step
        if id not in self._open:
            return End(self._known(id), is_new=False)
        return End(self._end(id, state), is_new=True)

    def _fail_all(self, step: FailAll) -> list[Delivery]:
        ids = list(self._mailboxes.get(step.address, ()))[: step.limit]
        return [self._end(id, step.state) for id in ids]

    def _waiting(self, step: Waiting) -> Page:
        address, after, limit, max_size = step
        entries = self._mailboxes.get(address, {}).values()
        behind = (entry for entry in entries if entry.delivery.number > after)
        found: list[Delivery] = []
        size = 0
        for entry in behind:
            size += len(entry.delivery.body)
            if len(found) == limit or (found and size > max_size):
                return Page(found, found[-1].number, has_more=True)
            found.append(self._snapshot(entry))
        return Page(found, found[-1].number if found else 0, len(found) == limit)

    def _find(self, step: Find) -> Delivery | None:
        return self._known(step.id)

    def _dead_letters(self, step: DeadLetters) -> list[DeadLetter]:
        self._forget_dead(self._clock())
        newest_first = reversed(self._dead.values())
        return [letter for *_, letter in itertools.islice(newest_first, step.limit)]

    def _expire(self, step: Expire) -> list[Delivery]:
        expired: list[Delivery] = []
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now and len(expired) < step.limit:
            id = heapq.heappop(self._deadlines)[2]
            if id in self._open:
                expired.append(self._end(id, DeliveryState.EXPIRED))
        self._forget_ended(now)
        self._forget_dead(now)
        return expired

    def _join(self, step: Join) -> None:
        self._devices.setdefault(step.address, set()).add(step.device)

    def _leave(self, step: Leave) -> list[Delivery]:
        address, device = step
        devices = self._devices.get(address)
        if devices is None or device not in devices:
            return []
        devices.discard(device)
        if not devices:
            del self._devices[address]
        complete = [
            entry.delivery.id
            for entry in self._mailboxes.get(address, {}).values()
            if entry.delivery.requires_all and self._have_all(entry)
        ]
        return [self._end(id, DeliveryState.DELIVERED) for id in complete]

    # What the steps have in common

    def _known(self, id: str) -> Delivery | None:
        """Return a message as it is now; ``None`` if it ended too long ago."""
        entry = self._open.get(id)
        if entry is not None:
            return self._snapshot(entry)
        now = self._clock()
        self._forget_ended(now)
        self._forget_dead(now)
        ended = self._ended.get(id)
        if ended is not None:
            by = tuple(ended[6].split("\n")) if ended[7] else ()
            return Delivery.ended(id, *ended[1:5], DeliveryState(ended[5]), by, ended[7])
        if id not in self._dead:
            return None
        dead = self._dead[id][2].delivery
        known = (dead.address, dead.event, dead.number, dead.attempts, dead.state)
        return Delivery.ended(id, *known, dead.acknowledged_by, dead.acknowledgements)

    def _have_all(self, entry: _Entry) -> bool:
        devices = self._devices.get(entry.address, set())
        return bool(entry.acknowledged) and devices <= entry.acknowledged

    def _end(self, id: str, state: DeliveryState) -> Delivery:
        entry = self._open.pop(id)
        given, address = entry.delivery, entry.address
        self._size -= entry.size
        mailbox = self._mailboxes[address]
        del mailbox[id]
        if not mailbox:
            del self._mailboxes[address]
        if given.key is not None:
            del self._by_key[address, given.key]
        self._forget_deadlines()
        now = self._clock()
        known = (address, given.event, given.number, entry.attempts)
        by, count = entry.by, entry.acknowledgements
        self._ended[id] = (now + self._retention, *known, state.value, "\n".join(by), count)
        self._ended_size += _receipt_size(self._ended[id])
        if self._ended_size > self._max_ended_size:
            self._forget_ended(now)
        if state not in DEAD:
            return Delivery.ended(id, *known, state, by, count)
        dead = given.acknowledged(by, count).at(
            state, ttl=0.0, attempts=entry.attempts, body=given.body
        )
        self._dead[id] = (now + self._dead_retention, entry.size, DeadLetter(dead, time.time()))
        self._dead_size += entry.size
        self._forget_dead(now)
        return dead

    def _snapshot(self, entry: _Entry) -> Delivery:
        left = max(0.0, entry.deadline - self._clock())
        given = entry.delivery
        if entry.by:
            given = given.acknowledged(entry.by, entry.acknowledgements)
        return given.at(entry.state, ttl=left, attempts=entry.attempts, body=given.body)

    def _forget_ended(self, now: float) -> None:
        while self._ended:
            id, ended = next(iter(self._ended.items()))
            if ended[0] > now and self._ended_size <= self._max_ended_size:
                return
            del self._ended[id]
            self._ended_size -= _receipt_size(ended)

    def _forget_dead(self, now: float) -> None:
        while self._dead:
            id, (until, size, _) = next(iter(self._dead.items()))
            is_too_much = (
                len(self._dead) > self._max_dead_letters or self._dead_size > self._max_dead_size
            )
            if until > now and not is_too_much:
                return
            del self._dead[id]
            self._dead_size -= size

    def _forget_deadlines(self) -> None:
        """Remove the deadlines of ended messages once they are the majority."""
        if len(self._deadlines) > 1000 and len(self._deadlines) > 2 * len(self._open):
            self._deadlines = [item for item in self._deadlines if item[2] in self._open]
            heapq.heapify(self._deadlines)


def _receipt_size(ended: tuple[Any, ...]) -> int:
    return _RECEIPT_SIZE + len(ended[1]) + len(ended[6])

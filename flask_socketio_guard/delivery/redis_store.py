"""The store of acknowledged delivery in Redis, shared by all processes of an application."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from ..core.runtime import clock
from ..errors import ConfigError, DeliveryFormatError, DeliveryStoreError
from ..states import DeliveryState
from ..telemetry.records import logger
from .records import DEAD, DeadLetter, Delivery
from .redis_client import Driver, describe
from .redis_script import SCRIPT
from .store import Changes, End, Page, Put, SharedStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .store import Step

_PENDING, _IN_FLIGHT = DeliveryState.PENDING, DeliveryState.IN_FLIGHT

_T = TypeVar("_T")

VERSION: Final = b"2"
"""Of how messages are kept in Redis."""

LONGEST_WAIT: Final = 1.0
"""Seconds that may be waited for changes."""

_MAX_NEWS = 5000  # pieces, each of all that was done in one go
_MAX_NEWS_SIZE = 8 * 1024 * 1024  # bytes
_MAX_JUMP = 1.0  # seconds that the clock of Redis may differ from ours between two looks
_MAX_UNCERTAINTY = 0.2  # seconds; a reading that took longer is discarded
_PATIENCE = 2  # leases after which a process that says nothing is taken for dead
_BATCH = 200  # steps in one go: a script keeps everybody else waiting

# Bytes that Redis 6 needs for a message and for a receipt, beside the texts in them.
_MESSAGE_SIZE = 750
_SIZE_OF_KEY = 100
_SIZE_OF_ALL = 400  # of what tells whether all devices have it
_RECEIPT_SIZE = 150


class RedisStore(SharedStore):
    """Keeps messages in Redis, 5.0 or later, or Valkey, not a cluster.

    What is acknowledged to have been stored is as safe as Redis keeps it: with
    ``appendonly`` it survives a restart.

    Args:
        url: Begins with one of :data:`~..config.STORE_SCHEMES`.
        prefix: Of all keys; applications that share a Redis have different ones.
        host: Name of this process, unique in the fleet.
        timeout: Longest wait for an answer, in seconds, > 0.
        lease: Seconds after which others take over what a dead process did, > 0.
        max_messages: Messages that have not ended, >= 1.
        max_size: Bytes that they may take in Redis, >= 1.
        retention: Seconds for which an ended one is still found, >= 0.
        max_ended_size: Bytes that the receipts of those may take, >= 1.
        max_dead_letters: >= 1.
        max_dead_size: Bytes that dead letters may take, >= 1.
        dead_retention: Seconds for which a dead letter is kept, > 0.
        service: Name of the master that Sentinel is asked for, unless the URL has one.

    Raises:
        ConfigError: *url* is not a valid URL, or its driver is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        host: str,
        timeout: float,
        lease: float,
        max_messages: int,
        max_size: int,
        retention: float,
        max_ended_size: int,
        max_dead_letters: int,
        max_dead_size: int,
        dead_retention: float,
        service: str = "mymaster",
    ) -> None:
        self._prefix = prefix
        self._host = host
        self._own_host = host.encode()
        self._lease = lease
        self._head = [
            *map(str, (max_messages, max_size, retention, max_ended_size)),
            *map(str, (max_dead_letters, max_dead_size, dead_retention)),
            *map(str, (_MAX_NEWS, _MAX_NEWS_SIZE, _RECEIPT_SIZE)),
            host,
        ]
        self._driver = Driver(url, service=service, timeout=timeout)
        self._redis: Any = self._driver.client()
        # An answer may take longer here, but not for ever: the other side may be gone.
        self._news_redis: Any = self._driver.client(patience=LONGEST_WAIT)
        self._script = self._redis.register_script(SCRIPT)
        self._lock = self._redis.lock(
            prefix + "leader", timeout=lease, blocking=False, thread_local=False
        )
        self._is_leading = False
        self._is_checked = False
        self._news_at: bytes | str | None = None
        self._news_count = 0
        self._clocks: tuple[float, float] | None = None

    def apply(self, steps: Sequence[Step]) -> list[Any]:
        """Do *steps*; see :class:`~.store.Step`."""
        results: list[Any] = []
        with self._translated():
            self._check_version()
            for start in range(0, len(steps), _BATCH):
                results += self._apply(steps[start : start + _BATCH])
        return results

    def _apply(self, steps: Sequence[Step]) -> list[Any]:
        results: list[Any] = []
        words: list[str | bytes] = []
        has_put = False
        for step in steps:
            try:
                words += self._words(step)
            except ValueError as exc:  # UTF-8 cannot hold it
                results.append(exc)
            else:
                results.append(None)
                has_put = has_put or step.kind == "put"
        if not words:
            return results
        arguments = [*self._head, str(int(has_put)), *words]
        found, failures = self._script(keys=[self._prefix], args=arguments)
        errors = dict(zip(failures[::2], failures[1::2], strict=True))
        answers = iter(enumerate(found))
        for place, step in enumerate(steps):
            if results[place] is None:
                number, answer = next(answers)
                error = errors.get(number)
                results[place] = _result(step, answer) if error is None else _failure(error)
        return results

    def _words(self, step: Step) -> list[bytes]:
        """Return what the script is told for a step: its kind, how many words follow, and these.

        Raises:
            UnicodeEncodeError: UTF-8 cannot hold it.
        """
        kind, arguments = step
        words: tuple[object, ...] = arguments
        if kind == "put":
            delivery: Delivery = arguments[0]
            address, text = delivery.address, delivery.to_json()
            key = "" if delivery.key is None else json.dumps([address, delivery.key])
            words = (
                delivery.id,
                text,
                address,
                delivery.event,
                key,
                int(delivery.requires_all),
                delivery.ttl,
                _size(delivery, text, address, key),
            )
        elif kind == "mark":
            id, attempts, is_in_flight = arguments
            words = (id, attempts, (_IN_FLIGHT if is_in_flight else _PENDING).value)
        elif kind in ("finish", "fail_all"):
            what, state, *limit = arguments
            words = (what, state.value, int(state in DEAD), *limit)
        elif kind in ("join", "leave"):
            words = (*arguments, json.dumps(arguments))
        return [str(word).encode() for word in (kind, len(words), *words)]

    def _check_version(self) -> None:
        if self._is_checked:
            return
        try:
            self.require_no_cluster()  # it may not have answered before
        except ConfigError as exc:
            raise DeliveryStoreError(str(exc)) from exc
        key = self._prefix + "version"
        self._redis.set(key, VERSION, nx=True)
        if self._redis.get(key) != VERSION:
            raise DeliveryFormatError(
                "the messages in Redis were stored by another version of the guard"
            )
        self._is_checked = True

    # The fleet

    def changes(self, timeout: float) -> Changes | None:
        """Wait for what happens; see :class:`~.store.SharedStore`."""
        stream = self._prefix + "changes"
        with self._translated():
            if self._news_at is None:
                newest = self._news_redis.xrevrange(stream, count=1)
                self._news_at = newest[0][0] if newest else b"0-0"
                self._news_count = _count(newest[0][1]) if newest else 0
                return None
            wait = _ms(min(timeout, LONGEST_WAIT))
            found = self._news_redis.xread({stream: self._news_at}, count=1000, block=wait)
            if not found and self._has_been_emptied(stream):
                self._news_at = None
                return None
        changes = Changes([], [])
        is_complete = True
        for entry_id, fields in found[0][1] if found else ():
            count = _count(fields)
            is_complete = is_complete and count == self._news_count + 1
            self._news_at, self._news_count = entry_id, count
            if fields.get(b"host") != self._own_host:
                is_complete = _add_changes(changes, fields.get(b"what", b"")) and is_complete
        return changes if is_complete else None

    def _has_been_emptied(self, stream: str) -> bool:
        """Say whether Redis has lost the change feed, which begins anew then."""
        newest = self._news_redis.xrevrange(stream, count=1)
        return bool(_order(newest[0][0] if newest else b"0-0") < _order(self._news_at))

    def heartbeat(self) -> bool:
        """Say that this process lives; see :class:`~.store.SharedStore`."""
        return not self.do("heartbeat", _ms(_PATIENCE * self._lease))

    def lead(self) -> bool:
        """Say whether this process leads; see :class:`~.store.SharedStore`."""
        with self._translated():
            self._check_version()
            self._is_leading = self._keep_lock()
            if self._is_leading:
                self._mind_the_clock()
        return self._is_leading

    def _keep_lock(self) -> bool:
        if self._is_leading:
            try:
                self._lock.reacquire()
            except self._driver.lock_error:  # it ran out, and somebody else may have it
                self._clocks = None
            else:
                return True
        return bool(self._lock.acquire())

    def _mind_the_clock(self) -> None:
        """Take out of account what the clock of Redis has jumped, so that nothing expires by it."""
        asked_at = clock()
        seconds, microseconds = self._redis.time()
        answered_at = clock()
        if answered_at - asked_at > _MAX_UNCERTAINTY:
            return
        jumped = float(self._redis.get(self._prefix + "jumped") or 0.0)
        theirs = seconds + microseconds / 1e6 - jumped
        if self._clocks is not None:
            jump = (theirs - self._clocks[0]) - (answered_at - self._clocks[1])
            if abs(jump) > _MAX_JUMP:
                # The whole of it: what is set twice, because an answer was lost, counts once.
                self._redis.set(self._prefix + "jumped", jumped + jump)
                theirs -= jump
        self._clocks = theirs, answered_at

    def reap_dead_processes(self) -> list[Delivery]:
        """Forget their devices; see :class:`~.store.SharedStore`."""
        forgotten: list[Delivery] = []
        with self._translated():
            for name in self._redis.smembers(self._prefix + "hosts"):
                while True:
                    ended, count = self.do("reap", name.decode(), _BATCH)
                    forgotten += ended
                    if not count:
                        break
        return forgotten

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._driver.errors as exc:
            raise DeliveryStoreError(describe(exc)) from exc

    def require_no_cluster(self) -> None:
        """Make sure that Redis is no cluster; see :class:`~.redis_client.Driver`."""
        self._driver.require_no_cluster()

    def close(self) -> None:
        """Let go of the lease and the connections; idempotent."""
        try:
            if self._is_leading:
                self._is_leading = False
                self._lock.release()
        except self._driver.errors:
            pass  # it runs out by itself
        finally:
            self._redis.close()
            self._news_redis.close()


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _count(fields: Any) -> int:
    """Return the number of an entry of the change feed; 0 if it has none."""
    try:
        return int(fields.get(b"count", 0))
    except ValueError:
        return 0


def _order(entry_id: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split(b"-"))


def _size(delivery: Delivery, text: str, address: str, key: str) -> int:
    """Return about how many bytes of Redis a message takes; rather too many than too few."""
    size = _MESSAGE_SIZE + len(text)  # which is ASCII
    size += 3 * len(address.encode()) + len(delivery.event.encode()) + 2 * len(key)
    return size + _SIZE_OF_KEY * bool(key) + _SIZE_OF_ALL * delivery.requires_all


def _failure(error: bytes) -> DeliveryStoreError:
    """Return what a step raises that Redis could not do."""
    return DeliveryStoreError(error.decode(errors="replace").splitlines()[0][:200])


def _read(snapshot: Any) -> Delivery:
    body, number, attempts, state, left = snapshot[:5]
    try:
        return Delivery.from_json(
            body,
            ttl=max(0.0, float(left)),
            number=int(number),
            attempts=int(attempts),
            state=DeliveryState(cast("bytes", state).decode()),
        )
    except (ValueError, TypeError) as exc:
        raise DeliveryFormatError("a message in the store cannot be read") from exc


def _result(step: Step, found: Any) -> Any:
    """Return what a step returns, as the script says it; an error, if that cannot be read."""
    try:
        return _read_result(step, found)
    except DeliveryFormatError as exc:
        return exc
    except (ValueError, TypeError, AttributeError, IndexError):
        return DeliveryFormatError("what is in the store cannot be read")


def _read_result(step: Step, found: Any) -> Any:
    kind = step.kind
    if kind == "put":
        is_open, stored, replaced = found
        if isinstance(stored, int):
            stored = step.arguments[0].numbered(stored)
        elif stored:
            stored = _read(stored) if is_open else _ended(stored)
        return Put(stored or None, _ended(replaced) if replaced else None)
    if kind in ("acknowledge", "finish"):
        if found is None:  # others lack it
            return None
        is_new, ended = found
        return End(_ended(ended) if ended else None, is_new=bool(is_new))
    if kind in ("expire", "leave", "fail_all"):
        return _all_ended(found)
    if kind == "reap":
        return _all_ended(found[0]), found[1]
    if kind == "waiting":
        read = (_readable(partial(_read, snapshot)) for snapshot in found[0])
        deliveries = [delivery for delivery in read if delivery is not None]
        return Page(deliveries, int(found[1]), bool(found[2]))
    if kind == "find":
        is_open, one = found
        if not one:
            return None
        return _read(one) if is_open else _ended(one)
    if kind == "dead_letters":
        letters = (_readable(partial(_letter, snapshot)) for snapshot in found)
        return [letter for letter in letters if letter is not None]
    return found if kind == "heartbeat" else None


def _letter(snapshot: Any) -> DeadLetter:
    return DeadLetter(_read([*snapshot[:4], b"0"]), float(snapshot[5]))


def _all_ended(found: Any) -> list[Delivery]:
    read = (_readable(partial(_ended, each)) for each in found)
    return [ended for ended in read if ended is not None]


def _readable(read: Callable[[], _T]) -> _T | None:
    """Return what *read* does; ``None`` for what this version did not write, which stays."""
    try:
        return read()
    except (DeliveryFormatError, ValueError, TypeError) as exc:
        logger.error("a record in the delivery store was skipped: %s", exc)
        return None


def _ended(found: Any) -> Delivery:
    """Return a message that has ended, with a body only if it is dead."""
    id, address, event, number, attempts, state, *body = (
        each.decode() if isinstance(each, bytes) else str(each) for each in found
    )
    ended = Delivery.ended(id, address, event, int(number), int(attempts), DeliveryState(state))
    if body:
        known = _readable(partial(_body_of, body[0], ended))
        return ended if known is None else known
    return ended


def _body_of(text: str, ended: Delivery) -> Delivery:
    return Delivery.from_json(
        text, ttl=0.0, number=ended.number, attempts=ended.attempts, state=ended.state
    )


def _add_changes(changes: Changes, what: bytes) -> bool:
    """Add what one entry of the change feed says; say whether it can be read."""
    try:
        stored, ended = json.loads(what)
        deliveries = [_ended(words) for words in ended]
        changes.stored.extend(address for address in stored if isinstance(address, str))
        changes.ended.extend(deliveries)
    except (ValueError, TypeError, RecursionError) as exc:
        logger.error(
            "an unreadable entry of the change feed in the delivery store was skipped (%s)",
            type(exc).__name__,
        )
        return False
    return True

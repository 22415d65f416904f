"""The store of acknowledged delivery in Redis, shared by all processes of an application."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..core.runtime import clock
from ..errors import ConfigError, DeliveryFormatError, DeliveryStoreError
from ..telemetry.records import logger
from .own_calls import OwnCalls
from .redis_client import Driver, describe
from .redis_format import read_change, with_bodies
from .redis_script import SCRIPT
from .steps import SHARED_STEPS, Heartbeat, Put, Reap, not_a_step
from .store import Changes, SharedStore, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .records import Delivery
    from .steps import Step

VERSION: Final = b"3"
"""Version of the keys and records in Redis."""

LONGEST_WAIT: Final = 1.0
"""Seconds that one call may wait for changes."""

_MAX_CHANGES = 5000  # entries of the change feed, one for each batch
_MAX_CHANGES_SIZE = 8 * 1024 * 1024  # bytes
_MAX_JUMP = 1.0  # seconds by which the clock of Redis may drift from ours between two readings
_MAX_UNCERTAINTY = 0.2  # seconds; a reading that took longer is discarded
_PATIENCE = 2  # leases without a heartbeat after which a process counts as dead
_CHECK_INTERVAL = 2.0  # seconds between two looks at whether an idle change feed still exists
_PAGE = 500  # entries of the change feed
_BATCH = 200  # steps: Redis serves nobody else while a script runs

_RECEIPT_SIZE = 150  # bytes that Redis 6 needs for a receipt, beside the texts in it


class RedisStore(SharedStore):
    """Keeps messages in Redis 5.0 or later, or Valkey, without Redis Cluster.

    A stored message is as durable as Redis is: with ``appendonly`` it survives a restart.

    Args:
        url: Begins with one of :data:`~..config.STORE_SCHEMES`.
        prefix: Of all keys; applications that share a Redis have different ones.
        host: Name of this process, unique in the fleet.
        timeout: Longest wait for an answer, in seconds, > 0.
        lease: Seconds after which others take over what a dead process did, > 0.
        max_messages: Messages that have not ended, >= 1.
        max_size: Bytes that they may take in Redis, >= 1.
        retention: Seconds for which the receipt of an ended message is kept, >= 0.
        max_ended_size: Bytes that receipts may take, >= 1.
        max_dead_letters: Dead letters that are kept, >= 1.
        max_dead_size: Bytes that dead letters may take, >= 1.
        dead_retention: Seconds for which a dead letter is kept, > 0.
        service: Name of the master to ask Sentinel for, unless the URL has one.

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
        self._own_host = host.encode()
        self._lease = lease
        self._head = [
            *map(str, (max_messages, max_size, retention, max_ended_size)),
            *map(str, (max_dead_letters, max_dead_size, dead_retention)),
            *map(str, (_MAX_CHANGES, _MAX_CHANGES_SIZE, _RECEIPT_SIZE)),
            host,
        ]
        self._bounds = max_messages, max_size
        self._usage: Usage | None = None
        self._driver = Driver(url, service=service, timeout=timeout)
        self._redis: Any = self._driver.client()
        # A blocking read takes longer, but not for ever: the connection may be half-open.
        self._feed_redis: Any = self._driver.client(patience=LONGEST_WAIT)
        self._script = self._redis.register_script(SCRIPT)
        self._lock = self._redis.lock(
            prefix + "leader", timeout=lease, blocking=False, thread_local=False
        )
        self._is_leading = False
        self._is_checked = False
        self._own_calls = OwnCalls(_MAX_CHANGES)
        self._told = -1  # what the last heartbeat said of it
        self._feed_at: bytes | str | None = None
        self._is_feed_new = False
        self._feed_count = 0
        self._next_check_at = 0.0
        self._reported: Iterable[int] = ()  # entries that changes() returned as lost
        self._clocks: tuple[float, float] | None = None

    def apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
        """Do *steps*; see :class:`~.store.DeliveryStore`."""
        results: list[Any] = []
        counts: list[int] = []
        with self._translated():
            self._check_version()
            serial, answered = self._own_calls.begin(), None
            try:
                for start in range(0, len(steps), _BATCH):
                    results += self._apply(steps[start : start + _BATCH], counts)
                answered = counts
            finally:
                self._own_calls.end(serial, answered)
        return results

    def _apply(self, steps: Sequence[Step[Any]], counts: list[int]) -> list[Any]:
        results: list[Any] = []
        words: list[bytes] = []
        is_probing = False
        for step in steps:
            if type(step) not in SHARED_STEPS:
                results.append(not_a_step(step))
                continue
            try:
                words += step.words()
            except Exception as exc:  # noqa: BLE001 - it belongs to its own step
                results.append(exc)
            else:
                results.append(None)
                is_probing = is_probing or isinstance(step, Put | Heartbeat)
        if not words:
            return results
        arguments = [*self._head, str(int(is_probing)), *words]
        found, failures, usage, count = self._script(keys=[self._prefix], args=arguments)
        if usage:
            self._note_usage(*usage, is_probing=is_probing)
        if count:
            counts.append(count)
        errors = dict(zip(failures[::2], failures[1::2], strict=True))
        answers = iter(enumerate(found))
        for place, step in enumerate(steps):
            if results[place] is not None:
                continue
            number, answer = next(answers)
            if number in errors:
                results[place] = _failure(errors[number])
                continue
            try:
                results[place] = step.read(answer)
            except DeliveryFormatError as exc:
                results[place] = exc
            except (ValueError, TypeError, AttributeError, IndexError):
                results[place] = DeliveryFormatError("what is in the store cannot be read")
        return results

    @property
    def usage(self) -> Usage | None:
        """What the messages of all processes took; see :class:`~.store.DeliveryStore`."""
        return self._usage

    def _note_usage(self, messages: int, size: int, is_full: int, *, is_probing: bool) -> None:
        is_out_of_memory = bool(is_full)
        if not is_probing and self._usage is not None:
            is_out_of_memory = self._usage.is_out_of_memory
        self._usage = Usage(messages, size, *self._bounds, is_out_of_memory)

    def _check_version(self) -> None:
        if self._is_checked:
            return
        try:
            self.require_no_cluster()  # it may not have answered before
        except ConfigError as exc:
            raise DeliveryStoreError(str(exc)) from exc
        key = self._prefix + "version"
        found = self._redis.get(key)
        if found is None:  # not before: a Redis that is out of memory refuses even this
            self._redis.set(key, VERSION, nx=True)
            found = self._redis.get(key)
        if found != VERSION:
            raise DeliveryFormatError(
                "the messages in Redis were stored by another version of the guard"
            )
        if self._feed_at is None:  # what is done from now on must not be missed
            self._find_feed()
            self._is_feed_new = True
        self._is_checked = True

    def _find_feed(self) -> None:
        newest = self._redis.xrevrange(self._prefix + "changes", count=1)
        if self._feed_at is not None:  # another task was faster
            return
        count = _count(newest[0][1]) if newest else 0
        self._own_calls.restart(count)
        self._feed_at, self._feed_count = newest[0][0] if newest else b"0-0", count

    # The fleet

    def changes(self, timeout: float) -> Changes | None:
        """Wait for changes; see :class:`~.store.SharedStore`."""
        stream = self._prefix + "changes"
        with self._translated():
            self._own_calls.lost_are_told(self._reported)
            self._reported = ()
            if self._feed_at is None:
                self._find_feed()
                self._is_feed_new = True
            if self._is_feed_new:
                self._is_feed_new = False
                return None
            wait = _ms(min(timeout, LONGEST_WAIT))
            found = self._feed_redis.xread({stream: self._feed_at}, count=1000, block=wait)
            if not found and self._has_been_emptied(stream):
                self._feed_at = None
                return None
        changes, is_complete = self._take(found[0][1] if found else [])
        if not is_complete:
            return None
        lost = self._own_calls.lost()
        if lost:
            changes = changes._replace(own_ended=self._read_ends(lost.values()))
            self._reported = lost
        return changes

    def _take(self, entries: list[Any]) -> tuple[Changes, bool]:
        """Read entries of the change feed; return also whether that is all of it."""
        changes = Changes([], [])
        is_complete = True
        for entry_id, fields in entries:
            count = _count(fields)
            is_complete = is_complete and count == self._feed_count + 1
            self._feed_at, self._feed_count = entry_id, count
            if fields.get(b"host") == self._own_host:
                self._own_calls.read(count, fields.get(b"what", b""))
                continue
            change = read_change(fields.get(b"what", b""))
            if change is None:
                is_complete = False
            else:
                changes.stored.extend(change[0])
                changes.ended.extend(change[1])
        self._own_calls.passed(self._feed_count)
        return changes, is_complete

    def _read_ends(self, entries: Iterable[bytes]) -> list[Delivery]:
        """Return the messages that have ended, with the bodies of dead letters."""
        ended = [each for what in entries for each in (read_change(what) or ([], []))[1]]
        prefix = self._prefix + "b:"
        with self._translated():
            return with_bodies(ended, lambda ids: self._redis.mget([prefix + id for id in ids]))

    def _has_been_emptied(self, stream: str) -> bool:
        """Return whether Redis has lost the change feed, which then begins anew."""
        if clock() < self._next_check_at:
            return False
        self._next_check_at = clock() + _CHECK_INTERVAL
        newest = self._feed_redis.xrevrange(stream, count=1)
        return bool(_order(newest[0][0] if newest else b"0-0") < _order(self._feed_at))

    def heartbeat(self) -> bool:
        """Renew the heartbeat; see :class:`~.store.SharedStore`."""
        with self._translated():
            self._check_version()  # only then it is known what this process has told
        told = self._own_calls.told_up_to()
        was_known = self.do(Heartbeat(_ms(_PATIENCE * self._lease), told, told != self._told))
        self._told = told
        return not was_known

    def lead(self) -> bool:
        """Return whether this process leads; see :class:`~.store.SharedStore`."""
        with self._translated():
            self._check_version()
            self._is_leading = self._keep_lock()
            if self._is_leading:
                self._compensate_clock_jump()
        return self._is_leading

    def has_expired(self) -> bool:
        """Return whether a message has expired; see :class:`~.store.SharedStore`.

        By the clock of this process, which does not jump: one command instead of a script.
        """
        with self._translated():
            earliest = self._redis.zrange(self._prefix + "deadlines", 0, 0, withscores=True)
        if not earliest or self._clocks is None:
            return bool(earliest)
        theirs, ours = self._clocks
        return bool(earliest[0][1] <= theirs + clock() - ours)

    def _keep_lock(self) -> bool:
        if self._is_leading:
            try:
                self._lock.reacquire()
            except self._driver.lock_error:  # the lease ran out, and another process may hold it
                self._clocks = None
            else:
                return True
        return bool(self._lock.acquire())

    def _compensate_clock_jump(self) -> None:
        """Subtract a jump of the clock of Redis, so that no message expires by it."""
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
                # The total: if an answer is lost and it is set twice, it counts once.
                self._redis.set(self._prefix + "jumped", jumped + jump)
                theirs -= jump
        self._clocks = theirs, answered_at

    def reap_dead_processes(self) -> Iterator[Delivery]:
        """Forget them and their devices; see :class:`~.store.SharedStore`."""
        for host, told in self._dead_processes():
            if told is not None:
                yield from self._untold_ends(host, told)
            while True:
                ended, count = self.do(Reap(host.decode(), _BATCH))
                yield from ended
                if not count:  # what it has not told is forgotten, too
                    break

    def _dead_processes(self) -> list[tuple[bytes, int | None]]:
        """Return the names of dead processes, and up to where they have told their ends."""
        with self._translated():
            told = self._redis.hgetall(self._prefix + "told")
            known = {*self._redis.smembers(self._prefix + "hosts"), *told}
            hosts = sorted(known - {self._own_host})
            alive = [f"{self._prefix}alive:{host.decode()}" for host in hosts]
            if not hosts or self._redis.exists(*alive) == len(alive):
                return []
            is_alive = [each is not None for each in self._redis.mget(alive)]
        dead = [host for host, lives in zip(hosts, is_alive, strict=True) if not lives]
        return [(host, _int(told[host]) if host in told else None) for host in dead]

    def _untold_ends(self, host: bytes, told: int) -> Iterator[Delivery]:
        """Yield the messages that a process has ended, from entry *told* of the feed on."""
        stream, start = self._prefix + "changes", b"-"
        expected: int | None = told + 1
        while True:
            with self._translated():
                page = self._redis.xrange(stream, min=start, count=_PAGE)
                newest = _int(self._redis.get(stream + "-count") or 0)
            first = next(filter(None, (_count(fields) for _, fields in page)), newest + 1)
            if expected is not None and first > expected:
                logger.warning(
                    "%d entries of the change feed were trimmed before the ends in them could be "
                    "told for a process that has died",
                    first - expected,
                )
            expected = None
            yield from self._read_ends(
                fields.get(b"what", b"")
                for _, fields in page
                if fields.get(b"host") == host and _count(fields) > told
            )
            if len(page) < _PAGE:
                return
            at, _, part = page[-1][0].partition(b"-")
            start = b"%s-%d" % (at, int(part) + 1)

    def told(self) -> None:
        """Note what the calling task has told; see :class:`~.store.SharedStore`."""
        self._own_calls.told()

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
            if self._own_calls.is_settled and self._told >= 0:
                self._told = -1
                self._redis.hdel(self._prefix + "told", self._own_host)
            if self._is_leading:
                self._is_leading = False
                self._lock.release()
        except self._driver.errors:
            pass  # the lease runs out
        finally:
            self._redis.close()
            self._feed_redis.close()


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _count(fields: Any) -> int:
    """Return the number of an entry of the change feed; 0 if it has none."""
    return _int(fields.get(b"count", 0))


def _int(number: Any) -> int:
    try:
        return int(number)
    except ValueError:
        return 0


def _order(entry_id: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split(b"-"))


def _failure(error: bytes) -> DeliveryStoreError:
    """Return what a step raises that Redis could not do."""
    return DeliveryStoreError(error.decode(errors="replace").splitlines()[0][:200])

"""The store of acknowledged delivery in Redis, shared by all processes of an application."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..core.runtime import clock
from ..errors import ConfigError, DeliveryFormatError, DeliveryStoreError
from .redis_client import Driver, describe
from .redis_format import read_change
from .redis_script import SCRIPT
from .steps import SHARED_STEPS, Heartbeat, Put, Reap, not_a_step
from .store import Changes, SharedStore, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        self._feed_at: bytes | str | None = None
        self._feed_count = 0
        self._next_check_at = 0.0
        self._clocks: tuple[float, float] | None = None

    def apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
        """Do *steps*; see :class:`~.store.DeliveryStore`."""
        results: list[Any] = []
        with self._translated():
            self._check_version()
            for start in range(0, len(steps), _BATCH):
                results += self._apply(steps[start : start + _BATCH])
        return results

    def _apply(self, steps: Sequence[Step[Any]]) -> list[Any]:
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
        found, failures, usage = self._script(keys=[self._prefix], args=arguments)
        if usage:
            self._note_usage(*usage, is_probing=is_probing)
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
        self._is_checked = True

    # The fleet

    def changes(self, timeout: float) -> Changes | None:
        """Wait for changes; see :class:`~.store.SharedStore`."""
        stream = self._prefix + "changes"
        with self._translated():
            if self._feed_at is None:
                newest = self._feed_redis.xrevrange(stream, count=1)
                self._feed_at = newest[0][0] if newest else b"0-0"
                self._feed_count = _count(newest[0][1]) if newest else 0
                return None
            wait = _ms(min(timeout, LONGEST_WAIT))
            found = self._feed_redis.xread({stream: self._feed_at}, count=1000, block=wait)
            if not found and self._has_been_emptied(stream):
                self._feed_at = None
                return None
        changes = Changes([], [])
        is_complete = True
        for entry_id, fields in found[0][1] if found else ():
            count = _count(fields)
            is_complete = is_complete and count == self._feed_count + 1
            self._feed_at, self._feed_count = entry_id, count
            if fields.get(b"host") == self._own_host:
                continue
            change = read_change(fields.get(b"what", b""))
            if change is None:
                is_complete = False
            else:
                changes.stored.extend(change[0])
                changes.ended.extend(change[1])
        return changes if is_complete else None

    def _has_been_emptied(self, stream: str) -> bool:
        """Return whether Redis has lost the change feed, which then begins anew."""
        if clock() < self._next_check_at:
            return False
        self._next_check_at = clock() + _CHECK_INTERVAL
        newest = self._feed_redis.xrevrange(stream, count=1)
        return bool(_order(newest[0][0] if newest else b"0-0") < _order(self._feed_at))

    def heartbeat(self) -> bool:
        """Renew the heartbeat; see :class:`~.store.SharedStore`."""
        return not self.do(Heartbeat(_ms(_PATIENCE * self._lease)))

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

    def reap_dead_processes(self) -> list[Delivery]:
        """Forget their devices; see :class:`~.store.SharedStore`."""
        forgotten: list[Delivery] = []
        with self._translated():
            for name in self._redis.smembers(self._prefix + "hosts") - {self._own_host}:
                while True:
                    ended, count = self.do(Reap(name.decode(), _BATCH))
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
            pass  # the lease runs out
        finally:
            self._redis.close()
            self._feed_redis.close()


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


def _failure(error: bytes) -> DeliveryStoreError:
    """Return what a step raises that Redis could not do."""
    return DeliveryStoreError(error.decode(errors="replace").splitlines()[0][:200])

"""Rate limits, counted in this process's memory or in Redis for all processes.

Rates use the syntax of the ``limits`` library, which also keeps the counts in
Redis. It is an optional extra and is imported only when a rate is used. Counts in
memory are kept here, because the memory storage of ``limits`` starts a thread in
``hit`` (which under gevent switches to other greenlets), walks over all keys up to
a hundred times a second, and raises or loses a count in a race between threads.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..backoff import RATE_STORAGE
from ..core import runtime
from ..core.component import Component
from ..core.forks import renew_after_fork
from ..errors import ConfigError, RateLimited
from ..settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from limits.storage import RedisStorage
    from redis import BlockingConnectionPool

_MEMORY = "memory"
_REDIS = ("redis", "rediss", "redis+unix", "unix")
_MAX_KEYS = 50_000  # of one limit in one window; about 10 MB together with the previous window
_RESOLUTION = 0.001  # seconds; windows in Redis end on a millisecond
_ANSWER_TIMEOUT = 0.5  # seconds
_MAX_STORAGE_CONNECTIONS = 16
_RECHECK_INTERVAL = 1.0  # seconds
_MAX_REFUSALS = 10_000


class RateLimiter(Component):
    """Makes rate limits that share one storage.

    As long as no limit is made, it needs no library and opens no connection. Safe
    for threads and greenlets.

    While Redis is unreachable or does not answer, counting continues in this
    process's memory, from zero, and one caller retries Redis every few seconds.

    Args:
        storage_url: ``"memory://"``, or a ``redis://``, ``rediss://`` or ``unix://``
            URL that redis-py accepts.
        on_storage_failure: Called as ``on_storage_failure(exc)`` once per outage of
            Redis; must not raise.
        namespace: Part of every key in Redis; lets applications share one Redis.
        clock: Returns monotonic time in seconds.

    Raises:
        ConfigError: The storage is not supported. The message does not repeat
            the URL, which may contain a password.
    """

    def __init__(
        self,
        storage_url: str = "memory://",
        *,
        on_storage_failure: Callable[[Exception], object],
        namespace: str = "socketio-guard",
        clock: Callable[[], float] = runtime.clock,
    ) -> None:
        scheme = storage_url.partition("://")[0]
        if scheme != _MEMORY and scheme not in _REDIS:
            raise ConfigError(f'{PREFIX}RATE_STORAGE must be "memory://" or the URL of a Redis')
        self._clock = clock
        self._limits = 0
        self._shared: _SharedCounts | None = None
        if scheme != _MEMORY:
            self._shared = _SharedCounts(storage_url, namespace, clock, on_storage_failure)

    def limit(self, rate: str, *, name: str | None = None) -> Limit:
        """Return a limit with counts of its own.

        Args:
            rate: Number and time, such as ``"20/second"`` or ``"5 per 10 minutes"``.
            name: Part of its keys in Redis, unique per limit and the same in every
                process. By default limits are numbered, which works if all
                processes make the same limits in the same order.

        Raises:
            ConfigError: *rate* cannot be parsed, the ``limits`` library is not
                installed, or the URL of the storage is invalid.
        """
        amount, window = _parse(rate)
        self._limits += 1
        if self._shared is not None:
            self._shared.open()
        return Limit(
            name or str(self._limits), amount, window, shared=self._shared, clock=self._clock
        )

    def stop(self, timeout: float) -> None:
        """Close the connections to Redis; a later hit opens a new one."""
        del timeout
        if self._shared is not None:
            self._shared.close()


class Limit:
    """A rate limit, counted separately for each key; made by :meth:`RateLimiter.limit`.

    Refused attempts do not count.

    Source:
        "Sliding window counter" of the ``limits`` library (``"sliding-window-counter"``):
        a hit is accepted while ``previous * remaining / window + current < amount``, where
        *previous* and *current* are the counts of the previous and the current window, and
        *remaining* is the rest of the current window in seconds. It assumes that the hits of
        the previous window were spread evenly, and needs two numbers per key, however large
        *amount* is.
    """

    def __init__(
        self,
        name: str,
        amount: int,
        window: int,
        *,
        shared: _SharedCounts | None,
        clock: Callable[[], float],
    ) -> None:
        self._amount = amount
        self._window = window
        self._prefix = f"{name}/{amount}/{window}/"
        self._shared = shared
        self._local = _LocalCounts(amount, window, clock=clock)

    def hit(self, key: str) -> None:
        """Count one hit of *key*.

        With Redis it may block for up to half a second while Redis is slow or
        unreachable (twice that if all connections are busy).

        Args:
            key: A session id or an address, for example.

        Raises:
            RateLimited: The limit is reached; the hit is not counted.
        """
        delay = None
        if self._shared is not None:
            delay = self._shared.hit(self._prefix + key, self._amount, self._window)
        if delay is None:
            delay = self._local.hit(key)
        if delay:
            raise RateLimited(retry_after=delay)


class _LocalCounts:
    """The counts of one limit in memory: one dict for the current window, one for the previous.

    All keys share the same windows, so old counts are dropped all at once. With more than
    50,000 keys a window ends early: memory stays bounded, and the counts so far become those
    of the previous window.
    """

    def __init__(self, amount: int, window: int, *, clock: Callable[[], float]) -> None:
        self._amount = amount
        self._window = window
        self._clock = clock
        self._lock = threading.Lock()
        renew_after_fork(self, _lock=threading.Lock)
        self._previous: dict[str, int] = {}
        self._current: dict[str, int] = {}
        self._ends_at = clock() + window

    def hit(self, key: str) -> float:
        """Count a hit and return 0.0; if the limit is reached, return the seconds to wait."""
        with self._lock:
            now = self._clock()
            if now >= self._ends_at:
                self._next_window(now)
            remaining = self._ends_at - now
            previous = self._previous.get(key, 0)
            current = self._current.get(key, 0)
            if previous * remaining / self._window + current < self._amount:
                self._current[key] = current + 1
                if len(self._current) > _MAX_KEYS:
                    self._previous, self._current = self._current, {}
                return 0.0
        return _delay(previous, remaining, current, self._amount, self._window)

    def _next_window(self, now: float) -> None:
        is_adjacent = now < self._ends_at + self._window
        self._previous = self._current if is_adjacent else {}
        self._current = {}
        self._ends_at = self._ends_at + self._window if is_adjacent else now + self._window


class _SharedCounts:
    """The counts of all limits in Redis.

    After a refusal, the key is refused locally for a second, or for its delay if that
    is shorter, without asking Redis again: a flood of events does not reach Redis.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        clock: Callable[[], float],
        on_failure: Callable[[Exception], object],
    ) -> None:
        self._url = url.replace("redis+unix://", "unix://", 1)
        self._namespace = namespace
        self._clock = clock
        self._on_failure = on_failure
        self._lock = threading.Lock()
        renew_after_fork(self, _lock=threading.Lock)
        self._pool: BlockingConnectionPool | None = None
        self._storage: RedisStorage | None = None
        self._retry_at: float | None = None
        # For each refused key: when to ask Redis again, and when the limit allows a hit again.
        self._refusals: dict[str, tuple[float, float]] = {}

    def open(self) -> None:
        """Make the connection pool, which connects at the first hit.

        Raises:
            ConfigError: The URL is invalid.
        """
        try:
            if self._storage is None:
                self._connect_anew()
        except ValueError:  # may quote a part of the URL with its password: must not be chained
            reason = f"{PREFIX}RATE_STORAGE cannot be read as the URL of a Redis"
        else:
            return
        raise ConfigError(reason)

    def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            self._pool.disconnect()

    def hit(self, key: str, amount: int, window: int) -> float | None:
        """Count a hit of *key*.

        Returns:
            0.0 if it is accepted, the seconds to wait if the limit is reached, or
            ``None`` while Redis is unreachable.
        """
        now = self._clock()
        ask_at, open_at = self._refusals.get(key, (0.0, 0.0))
        if now < ask_at:
            return open_at - now
        if not self._may_ask(now):
            return None
        try:
            delay = self._ask(key, amount, window)
        except Exception as exc:  # noqa: BLE001 - reported; no failure here may stop events
            self._lost(exc)
            return None
        self._retry_at = None
        if delay:
            self._refused(key, delay)
        elif ask_at:
            self._refusals.pop(key, None)
        return delay

    def _ask(self, key: str, amount: int, window: int) -> float:
        storage = self._storage
        assert storage is not None
        # The key may contain text from a client; if that cannot be encoded, it must not count
        # as a failure of Redis.
        key = f"{self._namespace}/{key}".encode("utf-8", "backslashreplace").decode("utf-8")
        if storage.acquire_sliding_window_entry(key, amount, window):
            return 0.0
        previous, previous_ttl, current, current_ttl = storage.get_sliding_window(key, window)
        # A key expires after two windows: its own, and the next, in which it is the previous one.
        remaining = max(previous_ttl, current_ttl - window)
        return _delay(previous, remaining, current, amount, window)

    def _refused(self, key: str, delay: float) -> None:
        if len(self._refusals) >= _MAX_REFUSALS:
            self._refusals.clear()
        now = self._clock()
        self._refusals[key] = now + min(delay, _RECHECK_INTERVAL), now + delay

    def _may_ask(self, now: float) -> bool:
        """Return whether to ask Redis: always while it answers, otherwise one caller per retry."""
        if self._retry_at is None:
            return True
        with self._lock:
            if self._retry_at is None or now < self._retry_at:
                return self._retry_at is None
            self._postpone(now)
        # Connections that were idle while Redis was unreachable may be half-open.
        self._connect_anew()
        return True

    def _lost(self, exc: Exception) -> None:
        with self._lock:
            is_first = self._retry_at is None
            self._postpone(self._clock())
        if is_first:
            self._on_failure(exc)

    def _postpone(self, now: float) -> None:
        self._retry_at = now + RATE_STORAGE.delay(0)

    def _connect_anew(self) -> None:
        from limits.storage import RedisStorage
        from redis import BlockingConnectionPool

        self._pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=_MAX_STORAGE_CONNECTIONS,
            timeout=_ANSWER_TIMEOUT,
            socket_timeout=_ANSWER_TIMEOUT,
            socket_connect_timeout=_ANSWER_TIMEOUT,
        )
        self._storage = RedisStorage("redis://", connection_pool=self._pool)


def _delay(previous: int, remaining: float, current: int, amount: int, window: int) -> float:
    """Return the seconds until a hit is accepted: the formula of :class:`Limit`, solved for time.

    Args:
        previous: Count of the previous window.
        remaining: Seconds left of the current window.
        current: Count of the current window.
        amount: Upper bound of the count.
        window: Length of a window in seconds.
    """
    delay = 0.0
    if current >= amount:
        delay = remaining
    elif previous:
        delay = remaining - (amount - current) * window / previous
    return max(delay, 0.0) + _RESOLUTION


def _parse(rate: str) -> tuple[int, int]:
    """Return the number of hits and the length of the window in seconds.

    Raises:
        ConfigError: *rate* cannot be parsed, or the ``limits`` library is not installed.
    """
    try:
        from limits import parse_many
    except ImportError as exc:
        raise ConfigError(
            'rate limits need the package limits: pip install "Flask-SocketIO-Guard[ratelimit]"'
        ) from exc
    try:
        items = parse_many(rate)
    except ValueError:
        items = []
    if len(items) != 1 or items[0].amount < 1:
        raise ConfigError(f'a rate must be one number and time such as "20/second", not {rate!r}')
    return items[0].amount, items[0].get_expiry()

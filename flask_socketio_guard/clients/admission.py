"""Admission control: decided at the handshake, before a session is created.

No I/O, except for a rate limit that counts in Redis.
"""

from __future__ import annotations

import os
import sys
from _thread import RLock
from typing import TYPE_CHECKING, Final, Protocol

from ..core.component import Component, Watch
from ..errors import RateLimited

try:
    import resource
except ImportError:  # Windows, where applications are developed
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable

_RATE_KEY = "handshakes"
_SPARE_FILES: Final = 24  # for the message queue, databases, and files of the application
_SPARE_THREADS: Final = 4  # for requests and refusals, which are short
_MOST_OTHERS: Final = 16  # connections reserved for health checks, pages and refusals


def fit_to_files(connections: int, *, selectors: int = 0) -> int:
    """Return how many connections this process can hold open at a time, at most *connections*.

    Args:
        connections: The number wanted, >= 1.
        selectors: How many of them may have a selector of their own, which takes a file, too.

    Source:
        getrlimit(2), RLIMIT_NOFILE: beyond it ``accept`` fails with EMFILE.
    """
    if resource is None:
        return connections
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= 2 * connections + 1024:
        return connections
    free = most - _open_files() - _SPARE_FILES
    return max(1, min(connections, max(free - selectors, free // 2)))


def capacity(connections: int) -> int:
    """Return how many of *connections* Socket.IO may use; other requests need a few, too."""
    return max(1, connections - min(_MOST_OTHERS, connections // 8))


def websockets_of(threads: int) -> int:
    """Return how many of *threads* WebSockets may occupy; other requests need a few, too."""
    return max(1, threads - min(_SPARE_THREADS, max(1, threads // 8)))


def _open_files() -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(directory))
        except OSError:
            continue
    return 32


class SupportsHit(Protocol):
    """A rate limit."""

    def hit(self, key: str) -> None:
        """Count one attempt under *key*.

        Raises:
            RateLimited: The limit is exceeded.
        """


class Admission(Component):
    """Admits or refuses new clients, and counts the admitted ones by address.

    Safe for threads and greenlets.

    Args:
        max_connections: Most clients at a time; ``None`` means no limit.
        max_per_address: Most clients of one address at a time; ``None`` means no limit.
        count_open: Returns the current number of clients.
        limit: Rate limit of new clients, all addresses together; ``None`` means no limit.
        address_limit: Rate limit of new clients of one address; ``None`` means no limit.

    Attributes:
        is_draining: Whether all new clients are refused; set by the drain.
        max_websockets: Most WebSockets at a time; ``None`` means no limit. On a server with
            threads, each WebSocket occupies one of them.
    """

    def __init__(
        self,
        *,
        max_connections: int | None,
        max_per_address: int | None,
        count_open: Callable[[], int],
        limit: SupportsHit | None,
        address_limit: SupportsHit | None = None,
    ) -> None:
        self.is_draining = False
        self.max_websockets: int | None = None
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._count_open = count_open
        self._limit = limit
        self._address_limit = address_limit
        self._lock = RLock()  # not gevent's: no holder ever blocks
        self._counts: dict[str, int] = {}

    def serve(self, watch: Watch) -> None:
        """Limit the clients to the files that the process may open, unless a limit is set."""
        del watch
        if self._max_connections is None:
            self.limit_to(capacity(fit_to_files(sys.maxsize)))

    def gauges(self) -> dict[str, int]:
        """Return the number of clients."""
        return {"connections:open": self._count_open()}

    def limit_to(self, connections: int) -> None:
        """Set the maximum number of clients; those beyond it that are connected stay."""
        self._max_connections = connections

    def refusal(self, address: str) -> str | None:
        """Return why a new client from *address* is refused, or ``None``.

        The caller must report an admitted client to :meth:`opened` before it waits for
        anything, or more clients than allowed may pass meanwhile. A client that is refused
        for another reason does not count against the rate limit.

        Args:
            address: Of the client, as the application sees it; ``""`` over a Unix socket.

        Returns:
            ``"draining"``, ``"full"``, ``"address"`` (too many from it), ``"rate"``, or
            ``None`` to admit the client.
        """
        reason = self._no_room(address)
        address_limit = self._address_limit if address else None
        if reason is not None or (self._limit is None and address_limit is None):
            return reason
        try:
            # The address first: one that exceeds its own limit must not use up everybody's.
            if address_limit is not None:
                address_limit.hit(address)
            if self._limit is not None:
                self._limit.hit(_RATE_KEY)
        except RateLimited:
            return "rate"
        # While the limit was queried over the network, other clients may have been admitted, or
        # the drain may have started.
        return self._no_room(address)

    def opened(self, address: str) -> None:
        """Count an admitted client from *address*."""
        with self._lock:
            self._counts[address] = self._counts.get(address, 0) + 1

    def closed(self, address: str) -> None:
        """Count a client from *address* as gone; the count never falls below zero."""
        with self._lock:
            count = self._counts.get(address, 0) - 1
            if count > 0:
                self._counts[address] = count
            else:
                self._counts.pop(address, None)

    def count(self, address: str) -> int:
        """Return the number of clients from *address*."""
        return self._counts.get(address, 0)

    def _no_room(self, address: str) -> str | None:
        if self.is_draining:
            return "draining"
        if self._max_connections is not None and self._count_open() >= self._max_connections:
            return "full"
        bound = self._max_per_address
        # Clients over a Unix socket have no address.
        if address and bound is not None and self.count(address) >= bound:
            return "address"
        return None

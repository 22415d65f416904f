"""Admission control: decided at the handshake, before a session is created.

Pure, but for a limit that counts in Redis.
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
_MOST_OTHERS: Final = 16  # connections that are left for health checks, pages and refusals


def fit_to_files(connections: int, *, selectors: int = 0) -> int:
    """Return how many of so many *connections* this process may hold open at a time.

    Args:
        connections: Wanted, >= 1.
        selectors: How many of them may have a selector of their own, which is a file, too.

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
    """Return how many of so many *connections* are for Socket.IO; others need a few, too."""
    return max(1, connections - min(_MOST_OTHERS, connections // 8))


def websockets_of(threads: int) -> int:
    """Return how many of so many *threads* WebSockets may hold; others need a few, too."""
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
        """Count one more for *key*.

        Raises:
            RateLimited: There were too many.
        """


class Admission(Component):
    """Admits or refuses new clients, and counts the admitted ones by address.

    Safe for threads and greenlets.

    Args:
        max_connections: How many clients may be in; ``None``: any number.
        max_per_address: How many of them from one address; ``None``: any number.
        count_open: Returns how many are in.
        limit: How many may come in a time, all addresses together; ``None``: any number.
        address_limit: How many of them from one address; ``None``: any number.

    Attributes:
        is_draining: Whether nobody is let in any more; set by the drain.
        max_websockets: How many WebSockets there may be at a time; ``None``: any number. A
            server with threads has one less for others with each.
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
        self._lock = RLock()  # not gevent's: nobody waits while holding it
        self._counts: dict[str, int] = {}

    def serve(self, watch: Watch) -> None:
        """Take no more than there are files for, where nobody has said how many."""
        del watch
        if self._max_connections is None:
            self.limit_to(capacity(fit_to_files(sys.maxsize)))

    def gauges(self) -> dict[str, int]:
        """Return how many are in."""
        return {"connections:open": self._count_open()}

    def limit_to(self, connections: int) -> None:
        """Let in so many clients at the most from now on."""
        self._max_connections = connections

    def refusal(self, address: str) -> str | None:
        """Return why a new client from *address* is refused, or ``None``.

        The caller must report an admitted client to :meth:`opened` before it waits for
        anything, or more clients than allowed pass meanwhile. A client that is refused
        for another reason does not count against the rate.

        Args:
            address: The client's, as the application sees it.

        Returns:
            ``"draining"``, ``"full"``, ``"address"`` (too many from it), ``"rate"``, or
            ``None`` to let the client in.
        """
        reason = self._no_room(address)
        address_limit = self._address_limit if address else None
        if reason is not None or (self._limit is None and address_limit is None):
            return reason
        try:
            # The address first: one that comes too often takes no others' places in the rate.
            if address_limit is not None:
                address_limit.hit(address)
            if self._limit is not None:
                self._limit.hit(_RATE_KEY)
        except RateLimited:
            return "rate"
        # Others may have come, or the drain begun, while the limit was asked over the network.
        return self._no_room(address)

    def opened(self, address: str) -> None:
        """Count a client from *address* that is in."""
        with self._lock:
            self._counts[address] = self._counts.get(address, 0) + 1

    def closed(self, address: str) -> None:
        """Count a client from *address* as gone; of more than came, nothing is counted."""
        with self._lock:
            count = self._counts.get(address, 0) - 1
            if count > 0:
                self._counts[address] = count
            else:
                self._counts.pop(address, None)

    def count(self, address: str) -> int:
        """Return how many clients from *address* are in."""
        return self._counts.get(address, 0)

    def _no_room(self, address: str) -> str | None:
        if self.is_draining:
            return "draining"
        if self._max_connections is not None and self._count_open() >= self._max_connections:
            return "full"
        bound = self._max_per_address
        # Over a Unix socket nobody has an address.
        if address and bound is not None and self.count(address) >= bound:
            return "address"
        return None

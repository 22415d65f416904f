"""Graceful shutdown: disconnects the clients of a process before it ends."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from ..core.component import Component
from ..core.runtime import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..config import GuardConfig
    from ..core.runtime import Runtime

_STEP = 0.05  # seconds between two batches of clients
_POLL_INTERVAL = 0.02


class Drain(Component):
    """Disconnects the clients of one application gradually.

    Args:
        runtime: Provides sleep and flags.
        config: Supplies the delay and the window.
        sockets: Returns the transport sessions.
        close: Closes one of them in a way that makes its client reconnect by itself.
        is_quiet: Returns whether no client is left and no handler is running.
        is_stopped: Returns whether the process ends now, so that waiting is pointless.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: GuardConfig,
        *,
        sockets: Callable[[], Iterable[object]],
        close: Callable[[object], object],
        is_quiet: Callable[[], bool],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._runtime = runtime
        self._config = config
        self._sockets = sockets
        self._close = close
        self._is_quiet = is_quiet
        self._is_stopped = is_stopped
        self._is_over = runtime.flag()
        self._has_begun = False
        self._is_complete = False

    def drain(self, timeout: float) -> bool:
        """Disconnect all clients; a second caller waits for the first.

        New clients are refused from the start. After ``SOCKETIO_GUARD_DRAIN_DELAY``
        the connected clients are closed in batches over
        ``SOCKETIO_GUARD_DRAIN_WINDOW``, at random times, to spread their reconnects.

        Args:
            timeout: Longest wait for handlers to end afterwards, in seconds, >= 0.

        Returns:
            Whether all clients have left and all handlers have ended.

        Source:
            RFC 6455 and the IANA registry: close code 1012, "service restart".
        """
        if self._has_begun:
            self._is_over.wait(self._longest(timeout))
            return self._is_complete
        self._has_begun = True
        try:
            self._runtime.sleep(self._config.drain_delay)
            self._close_in_batches()
            self._is_complete = self._wait(timeout)
        finally:
            self._is_over.set()
        return self._is_complete

    @property
    def is_over(self) -> bool:
        """Whether the drain has ended, completely or not."""
        return self._is_over.is_set()

    def _longest(self, timeout: float) -> float:
        return self._config.drain_delay + self._config.drain_window + timeout + 1.0

    def _close_in_batches(self) -> None:
        sockets = list(self._sockets())
        random.shuffle(sockets)
        steps = max(1, math.ceil(self._config.drain_window / _STEP))
        size = max(1, math.ceil(len(sockets) / steps))
        for start in range(0, len(sockets), size):
            for socket in sockets[start : start + size]:
                self._close(socket)
            if start + size < len(sockets):
                self._runtime.sleep(random.uniform(0.5, 1.5) * _STEP)

    def _wait(self, timeout: float) -> bool:
        deadline = clock() + timeout
        while not self._is_quiet():
            if self._is_stopped() or clock() > deadline:
                return False
            for socket in list(self._sockets()):
                self._close(socket)  # of clients that were still connecting
            self._runtime.sleep(_POLL_INTERVAL)
        return True

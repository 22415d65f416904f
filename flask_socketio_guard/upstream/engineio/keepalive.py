"""TCP keepalive: the kernel detects a peer that has disappeared."""

from __future__ import annotations

import contextlib
import socket as sockets
from functools import lru_cache
from typing import Any

_KEEPALIVE_PROBES = 3


def keep_alive(sock: Any, *, silence: float) -> None:
    """Let the kernel detect a peer that has disappeared, where the platform supports it.

    Args:
        sock: A TCP socket; other kinds are not changed.
        silence: Seconds without traffic, or with unacknowledged data, after which the kernel
            closes the connection; rounded, at least 1.

    Source:
        tcp(7): TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT; RFC 5482.
    """
    with contextlib.suppress(OSError):
        for level, option, value in _keepalive_options(max(1, round(silence))):
            sock.setsockopt(level, option, value)


@lru_cache(maxsize=16)
def _keepalive_options(seconds: int) -> list[tuple[int, int, int]]:
    """Return (level, option, value) for each option that the platform supports."""
    wanted = {
        "TCP_KEEPIDLE": seconds,
        "TCP_KEEPINTVL": max(1, seconds // _KEEPALIVE_PROBES),
        "TCP_KEEPCNT": _KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": seconds * 1000,
    }
    return [
        (sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1),
        *(
            (sockets.IPPROTO_TCP, getattr(sockets, name), value)
            for name, value in wanted.items()
            if hasattr(sockets, name)
        ),
    ]

"""Free TCP ports that no outgoing connection can take."""

from __future__ import annotations

import random
import socket

_FIRST_PORT = 20_000
_LAST_PORT = 29_999


def free_port() -> int:
    """Return a port on the loopback interface that nobody listens on.

    The port lies below the range from which the kernel takes ports for outgoing connections.
    Otherwise a server that is down could lose its port to a client, or a client that keeps
    trying to reach it could be connected to itself (TCP simultaneous open).
    """
    for _ in range(200):
        port = random.randint(_FIRST_PORT, _LAST_PORT)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {_FIRST_PORT} and {_LAST_PORT}")

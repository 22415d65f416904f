"""Real parts for the tests: Redis, gunicorn, a TCP proxy and Socket.IO clients.

Everything here runs on the loopback interface, on ports of its own, and is stopped by whoever
started it.
"""

from __future__ import annotations

from tests.support.clients import RawClient, Received, SocketIOClient
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer, Sentinel
from tests.support.servers import GunicornServer, UwsgiServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import DeadlineExceeded, wait_until

__all__ = [
    "DeadlineExceeded",
    "GunicornServer",
    "RawClient",
    "Received",
    "RedisServer",
    "Sentinel",
    "SocketIOClient",
    "TcpProxy",
    "UwsgiServer",
    "free_port",
    "wait_until",
]

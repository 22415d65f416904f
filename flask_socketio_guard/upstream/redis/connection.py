"""One connection to Redis that sends commands in batches and reads all replies that are there.

redis-py establishes the connection. Its own read method returns one reply for each call, after a
check of the socket and a new timeout, which would be four fifths of the work of a queue.
Therefore replies are read with its parser, hiredis, directly.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import hiredis

from ...core.runtime import clock

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAUSE = 1.0  # seconds; longest pause between two parts of a reply
_PIECE = 32 * 1024  # bytes per send; a connection that takes longer than a timeout is broken
_BUFFER = 32 * 1024  # bytes per read; they are handled before control is yielded


class RedisConnection:
    """A connection to Redis. One task may send and one may read at the same time.

    Args:
        connection: A connection of redis-py or valkey-py, established, with RESP2. Nothing
            else may use it any more.

    Source:
        hiredis-py, ``Reader`` and ``pack_command``; Redis serialization protocol.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sock = connection._sock
        self._timeout: float | None = None
        self._received_at = 0.0
        # Errors become redis-py's exceptions, some of which mean that the connection is unusable.
        self._reader = hiredis.Reader(replyError=connection._parser.parse_error)

    def send(self, commands: Iterable[tuple[Any, ...]]) -> None:
        """Send *commands*, each a tuple of the command's name and its arguments.

        Raises:
            OSError: The connection was lost, or Redis accepted no data for the socket's timeout.
        """
        data = memoryview(b"".join([hiredis.pack_command(command) for command in commands]))
        left: int | None = None
        # ``sendall`` applies one timeout to all of the data, however much it is. A single send
        # over TLS does the same, without any sign of progress.
        while data:
            try:
                data = data[self._sock.send(data[:_PIECE]) :]
                left = self.unsent() if data else None
            except TimeoutError:
                before, left = left, self.unsent()
                if before is None or left is None or left >= before:
                    raise

    @property
    def is_receiving(self) -> bool:
        """Whether a part of a reply has arrived, and more of it within the last second."""
        return bool(self._reader.has_data()) and clock() - self._received_at < _PAUSE

    def unsent(self) -> int | None:
        """Return how many bytes Redis has not acknowledged, or ``None`` if that is unknown.

        Source:
            tcp(7), SIOCOUTQ.
        """
        try:
            waiting = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except (AttributeError, OSError, ValueError):
            return None
        return int.from_bytes(waiting, sys.byteorder)

    def read(self, timeout: float) -> list[Any]:
        """Return the replies that have arrived, waiting up to *timeout* seconds for the first.

        An error reply is returned as an exception object, not raised.

        Returns:
            An empty list after the timeout.

        Raises:
            OSError: The connection was lost.
            hiredis.ProtocolError: The data is not in the protocol of Redis.
        """
        if timeout != self._timeout:
            self._sock.settimeout(timeout)
            self._timeout = timeout
        reader = self._reader
        replies: list[Any] = []
        while not replies:
            try:
                data = self._sock.recv(_BUFFER)
            except (TimeoutError, BlockingIOError):
                break
            if not data:
                raise ConnectionError("Redis closed the connection")
            self._received_at = clock()
            reader.feed(data)
            try:
                while (reply := reader.gets()) is not False:
                    replies.append(reply)
            except hiredis.ProtocolError:
                self.close()  # the next call raises
                if not replies:
                    raise
        return replies

    def close(self) -> None:
        """Close the connection, which makes a pending :meth:`read` raise; idempotent."""
        self._connection.disconnect()

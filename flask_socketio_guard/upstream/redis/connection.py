"""One connection to Redis: commands go out in one piece, replies come in as many as there are.

redis-py makes the connection, with all that belongs to that. It reads one reply for each
call then, with a look at the socket before and a timeout set for each; for a queue that
is four fifths of the work. So from there on its parser, hiredis, is used directly.
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

_PAUSE = 1.0  # seconds between two pieces of a reply that is still on its way
_PIECE = 32 * 1024  # what is sent in one go; a connection takes so much in a timeout, or is broken
_BUFFER = 32 * 1024  # what is read in one go is handled in one go, before others get their turn


class RedisConnection:
    """Redis behind one socket. Each side of it is used by one task at a time.

    Args:
        connection: Of redis-py or valkey-py, connected, with RESP2. It is not to be
            used by others any more.

    Source:
        hiredis-py, ``Reader`` and ``pack_command``; Redis serialization protocol.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sock = connection._sock
        self._timeout: float | None = None
        self._received_at = 0.0
        # Errors become what redis-py makes of them: some mean that the connection is of no use.
        self._reader = hiredis.Reader(replyError=connection._parser.parse_error)

    def send(self, commands: Iterable[tuple[Any, ...]]) -> None:
        """Send *commands*.

        Raises:
            OSError: The connection was lost, or Redis takes nothing for the socket's timeout.
        """
        data = memoryview(b"".join([hiredis.pack_command(command) for command in commands]))
        left: int | None = None
        # ``sendall`` gives all of it one timeout, however large it is. So does TLS to what it is
        # given at a time, and shows nothing of it meanwhile.
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
        """Return how many bytes Redis has not confirmed; ``None`` where nobody can tell.

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

        An error that Redis answered is returned, not raised.

        Returns:
            Nothing if the time has passed.

        Raises:
            OSError: The connection was lost.
            hiredis.ProtocolError: What came is not of Redis.
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
        """Drop the connection; a :meth:`read` under way raises. Idempotent."""
        self._connection.disconnect()

"""The listening side of Redis pub/sub: messages, and probes in whatever way they can come."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ...errors import BrokerError
from ...queue.transport import Arrival, Probe
from .errors import categorize, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import RedisConnection

_PING_LATENCY = 0.1  # seconds that a ping waits for the reader, which sends it
_RETRY_PINGS = 10  # pings after which it is asked anew for the right to the probes' channel


class RedisSubscription:
    """Reads both channels over one connection.

    Args:
        connection: Subscribed to them.
        channel: Where messages come from.
        probe_channel: Where this process's probes come from.
        early: Replies that came right behind the subscription.
    """

    def __init__(
        self,
        connection: RedisConnection,
        channel: str,
        probe_channel: str,
        early: list[Any],
        *,
        on_probe: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_probed = True
        """Whether there is a right to the channel of the probes."""
        self._connection = connection
        self._channel = channel.encode()
        self._probe_channel = probe_channel.encode()
        self._early = early
        self._on_probe = on_probe
        self._ping: int | None = None
        self._pings = 0
        self._asked: deque[int | None] = deque()  # what is unanswered: pings, and None for a right

    def ping(self, token: int, *, is_refused: bool) -> None:
        """Have *token* come back over this connection; from any task."""
        self._ping = token
        if is_refused:
            self.is_probed = False

    def read(self, timeout: float) -> list[Arrival]:
        """Return what has arrived, waiting up to *timeout* seconds for the first.

        Raises:
            BrokerError: The connection was lost.
        """
        replies, self._early = self._early, []
        try:
            if not self.is_probed:
                self._ask()
                timeout = min(timeout, _PING_LATENCY)
            replies = replies or self._connection.read(timeout)
        except Exception as exc:
            raise BrokerError(describe(exc), category=categorize(exc)) from exc
        arrivals: list[Arrival] = []
        for reply in replies:
            if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
                _, channel, data = reply
                if channel == self._channel:
                    arrivals.append(data)
                elif channel == self._probe_channel and data.isdigit() and len(data) < 20:
                    arrivals.append(Probe(int(data)))
                    self._on_probe()
            elif self._asked and (is_answer(reply) or _is_pong(reply)):
                arrivals += self._answered(reply)
        return arrivals

    def _ask(self) -> None:
        # The reader does it, as TLS may not be read and written at a time by two threads.
        token, self._ping = self._ping, None
        if token is None:
            return
        commands: list[tuple[str | bytes, ...]] = [("PING", str(token))]
        self._asked.append(token)
        self._pings += 1
        if self._pings % _RETRY_PINGS == 0:
            commands.append(("SUBSCRIBE", self._probe_channel))
            self._asked.append(None)
        self._connection.send(commands)

    def _answered(self, reply: Any) -> list[Arrival]:
        token = self._asked.popleft()
        if token is None:
            self.is_probed = not isinstance(reply, Exception)
            return []
        return [Probe(token)]  # where PING is forbidden, that was said over this connection, too

    @property
    def is_receiving(self) -> bool:
        """Whether a message is on its way at this moment."""
        return self._connection.is_receiving

    def close(self) -> None:
        """Drop the connection; a read under way raises."""
        self._connection.close()


def is_answer(reply: Any) -> bool:
    """Say whether a reply to a subscriber answers a SUBSCRIBE."""
    return isinstance(reply, Exception) or (isinstance(reply, list) and reply[:1] == [b"subscribe"])


def _is_pong(reply: Any) -> bool:
    return isinstance(reply, list) and reply[:1] == [b"pong"]

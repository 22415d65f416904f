"""The subscriber's side of Redis pub/sub: it receives messages and probes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ...errors import BrokerError
from ...queue.transport import Arrival, Probe
from .errors import categorize, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import RedisConnection

_PING_LATENCY = 0.1  # seconds; longest wait of a ping until the reader sends it
_RETRY_PINGS = 10  # after so many pings, a new attempt to subscribe to the probe channel


class RedisSubscription:
    """Reads the channels of messages and of probes over one connection.

    Args:
        connection: A connection that is subscribed to both channels.
        channel: The channel of messages.
        probe_channel: The channel of this process's probes.
        early: Replies that arrived together with the subscription.
        on_probe: Called for each probe that arrives over its channel.
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
        """Whether Redis permits the subscription to the probe channel."""
        self._connection = connection
        self._channel = channel.encode()
        self._probe_channel = probe_channel.encode()
        self._early = early
        self._on_probe = on_probe
        self._ping: int | None = None
        self._pings = 0
        self._asked: deque[int | None] = deque()  # unanswered: pings, None for SUBSCRIBE

    def ping(self, token: int, *, is_refused: bool) -> None:
        """Let a PING return *token* over this connection; may be called from any task.

        Args:
            token: Identifies the probe.
            is_refused: Whether Redis has just refused a probe in its own channel.
        """
        self._ping = token
        if is_refused:
            self.is_probed = False

    def read(self, timeout: float) -> list[Arrival]:
        """Return the messages and probes that have arrived; may be empty.

        Waits up to *timeout* seconds for the first.

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
        # The reader sends pings, because two threads must not read and write TLS concurrently.
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
        return [Probe(token)]  # an error reply also shows that the connection works

    @property
    def is_receiving(self) -> bool:
        """Whether a message has arrived in part, with more of it within the last second."""
        return self._connection.is_receiving

    def close(self) -> None:
        """Close the connection, which makes a pending :meth:`read` raise."""
        self._connection.close()


def is_answer(reply: Any) -> bool:
    """Return whether a reply answers a SUBSCRIBE; an error reply does as well."""
    return isinstance(reply, Exception) or (isinstance(reply, list) and reply[:1] == [b"subscribe"])


def _is_pong(reply: Any) -> bool:
    return isinstance(reply, list) and reply[:1] == [b"pong"]

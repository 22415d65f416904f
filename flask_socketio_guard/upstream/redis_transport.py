"""Redis pub/sub over connections of our own.

redis-py's clients reconnect and resubscribe by themselves, out of sight; what
went wrong, when, and whether the answer is still to come has to be known here.
So this uses redis-py's ``Connection`` directly: it connects, authenticates,
speaks TLS and finds the master behind Sentinel.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import BrokerError, PublishError, PublishRefused
from ..transport import Arrival, Message, Probe
from .managers import SEQUENCE_MARK
from .redis_link import RedisLink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from socketio import RedisManager


class RedisTransport:
    """The Redis (or Valkey) server of a ``RedisManager``.

    Probes of each process have a channel of their own, subscribed to over the
    same connection as the real one, so that their cost grows with the number of
    processes and not with its square.

    Args:
        manager: Source of URL, options and channel.
        answer_timeout: Longest wait for an answer, in seconds, before the
            broker is asked over a fresh connection whether it is there.
    """

    name = "redis"

    def __init__(self, manager: RedisManager, *, answer_timeout: float) -> None:
        self._manager: Any = manager
        self._answer_timeout = answer_timeout
        self._lock = threading.Lock()

    @property
    def channel(self) -> str:
        """The channel that all processes share."""
        return str(self._manager.channel)

    @property
    def probe_channel(self) -> str:
        """The channel of this process's probes; changes with its host id after a fork."""
        return f"{self._manager.channel}:guard:{self._manager.host_id}"

    @property
    def exceptions(self) -> Any:
        """The exceptions of the driver in use, redis or valkey."""
        return self._manager._get_redis_module().exceptions

    def publisher(self, is_answering: Callable[[], bool]) -> RedisPublisher:
        """Return the way out; connects at its first use."""
        return RedisPublisher(self, self._answer_timeout, is_answering)

    def subscribe(self) -> RedisSubscription:
        """Subscribe to both channels over a new connection.

        Raises:
            BrokerError: Redis cannot be reached or refused.
        """
        link = self.connect()
        replies: list[Any] = []
        try:
            link.send([("SUBSCRIBE", self.channel, self.probe_channel)])
            while len(replies) < 2:
                replies += self._answers(link)
        except Exception as exc:
            link.close()
            raise BrokerError(describe(exc)) from exc
        return RedisSubscription(link, self.channel, self.probe_channel, replies[2:])

    def check(self) -> str | None:
        """Send PING over a fresh connection.

        Returns:
            ``None`` if it was answered, else the reason.
        """
        try:
            link = self.connect()
        except BrokerError as exc:
            return str(exc)
        try:
            link.send([("PING",)])
            self._answers(link)
        except Exception as exc:  # noqa: BLE001 - the reason is the result
            return describe(exc)
        finally:
            link.close()
        return None

    def _answers(self, link: RedisLink) -> list[Any]:
        replies = link.read(self._answer_timeout)
        if not replies:
            raise TimeoutError("Redis does not answer")
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def connect(self) -> RedisLink:
        """Return a new connection, authenticated and ready.

        Raises:
            BrokerError: It could not be made.
        """
        try:
            connection = self._new_pool().make_connection()
            connection.connect()
            return RedisLink(connection)
        except Exception as exc:
            raise BrokerError(describe(exc)) from exc

    def _new_pool(self) -> Any:
        """Return a pool that knows where Redis is and how to speak to it; for one connection."""
        manager = self._manager
        own_options = manager.redis_options
        with self._lock:
            # Upstream knows how to read every kind of URL, Sentinel's included.
            # RESP2: replies and messages in one form, in every version of the driver.
            manager.redis_options = {**own_options, "protocol": 2}
            try:
                manager._redis_connect()
                pool = manager.redis.connection_pool
            finally:
                manager.redis_options = own_options
                manager.redis = manager.pubsub = None
                manager.connected = False
        options = pool.connection_kwargs
        options.update(
            retry=Retry(NoBackoff(), 0),  # every failure shall be seen
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            socket_timeout=self._answer_timeout,
        )
        if "path" not in options:
            options["socket_connect_timeout"] = self._answer_timeout
            options.setdefault("socket_keepalive", True)
        return pool


class RedisPublisher:
    """Publishes batches as pipelines and waits for their replies."""

    def __init__(
        self, transport: RedisTransport, answer_timeout: float, is_answering: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._answer_timeout = answer_timeout
        self._is_answering = is_answering
        self._errors = transport.exceptions
        self._link: RedisLink | None = None
        self._can_count = True

    def publish(self, messages: Sequence[Message], probe: int | None) -> int | None:
        """Publish in order; returns the number of subscribers to the channel.

        Raises:
            PublishError: The connection was lost.
            PublishRefused: Redis answered a PUBLISH with an error.
        """
        transport = self._transport
        channel = transport.channel
        commands: list[tuple[str | bytes, ...]] = [
            ("PUBLISH", channel, stamp(message)) for message in messages
        ]
        if probe is not None:
            commands.append(("PUBLISH", transport.probe_channel, str(probe)))
        is_counting = self._can_count and (probe is not None or not messages)
        if is_counting:
            commands.append(("PUBSUB", "NUMSUB", channel))
        replies: list[Any] = []
        try:
            if self._link is None:
                self._link = transport.connect()
            self._link.send(commands)
            self._collect(replies, len(commands), self._link)
        except Exception as exc:
            self.close()
            published, refused = self._sort(replies[: len(messages)])
            raise PublishError(describe(exc), published=published, refused=len(refused)) from exc
        published, refused = self._sort(replies[: len(messages)])
        if refused:
            raise PublishRefused(describe(refused[0]), published=published, refused=len(refused))
        return self._subscribers(replies, len(messages), is_counting=is_counting)

    def _collect(self, replies: list[Any], count: int, link: RedisLink) -> None:
        """Add to *replies* what Redis answers, until there are *count*.

        A broker that hangs and a connection that is half open look the same
        from here. As long as the broker does not answer others either, this
        connection may yet: to give it up would send again what may be on its way.
        """
        while len(replies) < count:
            news = link.read(self._answer_timeout)
            if not news and self._is_answering():
                raise TimeoutError("the connection is half open: Redis answers, but not here")
            for reply in news:
                if isinstance(reply, self._errors.ConnectionError):  # "I am loading" is one
                    raise reply
                replies.append(reply)

    @staticmethod
    def _sort(replies: list[Any]) -> tuple[int, list[Exception]]:
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        return len(replies) - len(refused), refused

    def _subscribers(self, replies: list[Any], messages: int, *, is_counting: bool) -> int | None:
        if is_counting:
            if isinstance(replies[-1], list):
                return int(replies[-1][1])
            self._can_count = False  # an access list forbids PUBSUB
        return int(replies[messages - 1]) if messages else None

    def close(self) -> None:
        """Drop the connection."""
        link, self._link = self._link, None
        if link is not None:
            link.close()


class RedisSubscription:
    """Reads both channels over one connection.

    Args:
        link: Subscribed to them.
        channel: Where messages come from.
        probe_channel: Where this process's probes come from.
        early: Replies that came right behind the subscription.
    """

    def __init__(self, link: RedisLink, channel: str, probe_channel: str, early: list[Any]) -> None:
        self._link = link
        self._channel = channel.encode()
        self._probe_channel = probe_channel.encode()
        self._early = early

    def read(self, timeout: float) -> list[Arrival]:
        """Return what has arrived, waiting up to *timeout* seconds for the first.

        Raises:
            BrokerError: The connection was lost.
        """
        replies, self._early = self._early, []
        try:
            replies = replies or self._link.read(timeout)
        except Exception as exc:
            raise BrokerError(describe(exc)) from exc
        arrivals: list[Arrival] = []
        for reply in replies:
            if not isinstance(reply, list) or len(reply) != 3 or reply[0] != b"message":
                continue
            _, channel, data = reply
            if channel == self._channel:
                arrivals.append(data)
            elif channel == self._probe_channel and data.isdigit() and len(data) < 20:
                arrivals.append(Probe(int(data)))
        return arrivals

    def close(self) -> None:
        """Drop the connection; a read under way raises."""
        self._link.close()


def stamp(message: Message) -> bytes:
    """Return the payload with its sequence number as one more key of the object."""
    payload = message.payload
    if not payload.endswith(b"}"):
        return payload
    return b"%s%s%d}" % (payload[:-1], SEQUENCE_MARK, message.sequence)


def describe(exc: BaseException) -> str:
    """Return one line that says what went wrong; holds no password."""
    return f"{type(exc).__name__}: {exc}".splitlines()[0][:300]

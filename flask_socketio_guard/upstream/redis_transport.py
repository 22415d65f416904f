"""Redis pub/sub over connections of our own.

redis-py's clients reconnect and resubscribe by themselves, out of sight; what
went wrong, when, and whether the answer is still to come has to be known here.
So this uses redis-py's ``Connection`` directly: it connects, authenticates,
speaks TLS, finds the master behind Sentinel, and packs and parses.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import BrokerError, PublishError, PublishRefused
from ..transport import Arrival, Message, Probe
from .managers import SEQUENCE_MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from socketio import RedisManager

_READ_BATCH = 64


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
        connection = self.connect()
        try:
            connection.send_command("SUBSCRIBE", self.channel, self.probe_channel)
            for _ in range(2):
                connection.read_response(disable_decoding=True)
        except Exception as exc:
            connection.disconnect()
            raise BrokerError(describe(exc)) from exc
        return RedisSubscription(connection, self.channel, self.probe_channel)

    def check(self) -> str | None:
        """Send PING over a fresh connection.

        Returns:
            ``None`` if it was answered, else the reason.
        """
        try:
            connection = self.connect()
        except BrokerError as exc:
            return str(exc)
        try:
            connection.send_command("PING")
            connection.read_response(disable_decoding=True)
        except Exception as exc:  # noqa: BLE001 - the reason is the result
            return describe(exc)
        finally:
            connection.disconnect()
        return None

    def connect(self) -> Any:
        """Return a new connection, authenticated and ready.

        Raises:
            BrokerError: It could not be made.
        """
        try:
            pool = self._new_pool()
            connection = pool.make_connection()
            connection.connect()
        except Exception as exc:
            raise BrokerError(describe(exc)) from exc
        # redis-py connects again, unsubscribed, whenever a closed connection is used.
        connection.connect = connection.connect_check_health = _refuse_to_reconnect
        return connection

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
        self._connection: Any = None
        self._can_count = True

    def publish(self, messages: Sequence[Message], probe: int | None) -> int | None:
        """Publish in order; returns the number of subscribers to the channel.

        Raises:
            PublishError: The connection was lost.
            PublishRefused: Redis answered a PUBLISH with an error.
        """
        transport = self._transport
        commands: list[tuple[str | bytes, ...]] = [
            ("PUBLISH", transport.channel, stamp(message)) for message in messages
        ]
        if probe is not None:
            commands.append(("PUBLISH", transport.probe_channel, str(probe)))
        is_counting = self._can_count and (probe is not None or not messages)
        if is_counting:
            commands.append(("PUBSUB", "NUMSUB", transport.channel))
        published = 0
        refused: list[Exception] = []
        replies: list[Any] = []
        try:
            connection = self._connected()
            connection.send_packed_command(connection.pack_commands(commands))
            for position in range(len(commands)):
                self._await_reply(connection)
                reply = self._read_reply(connection)
                replies.append(reply)
                if position < len(messages):
                    if isinstance(reply, Exception):
                        refused.append(reply)
                    else:
                        published += 1
        except Exception as exc:
            self.close()
            raise PublishError(describe(exc), published=published, refused=len(refused)) from exc
        if refused:
            raise PublishRefused(describe(refused[0]), published=published, refused=len(refused))
        return self._subscribers(replies, len(messages), is_counting=is_counting)

    def _subscribers(self, replies: list[Any], messages: int, *, is_counting: bool) -> int | None:
        if is_counting:
            if isinstance(replies[-1], list):
                return int(replies[-1][1])
            self._can_count = False  # an access list forbids PUBSUB
        return int(replies[messages - 1]) if messages else None

    def _connected(self) -> Any:
        if self._connection is None:
            self._connection = self._transport.connect()
        return self._connection

    def _await_reply(self, connection: Any) -> None:
        """Wait for the reply to the oldest command without one.

        A broker that hangs and a connection that is half open look the same
        from here. As long as the broker does not answer others either, this
        connection may yet: to give it up would send again what may be on its way.
        """
        while not connection.can_read(timeout=self._answer_timeout):
            if self._is_answering():
                raise TimeoutError("the connection is half open: Redis answers, but not here")

    def _read_reply(self, connection: Any) -> Any:
        """Return the next reply; an error that Redis answered is returned, not raised."""
        try:
            return connection.read_response(disable_decoding=True)
        except self._errors.ConnectionError:
            raise
        except self._errors.ResponseError as exc:
            return exc

    def close(self) -> None:
        """Drop the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


class RedisSubscription:
    """Reads both channels over one connection."""

    def __init__(self, connection: Any, channel: str, probe_channel: str) -> None:
        self._connection = connection
        self._channel = channel.encode()
        self._probe_channel = probe_channel.encode()

    def read(self, timeout: float) -> list[Arrival]:
        """Return what has arrived, waiting up to *timeout* seconds for the first.

        Raises:
            BrokerError: The connection was lost.
        """
        connection = self._connection
        arrivals: list[Arrival] = []
        try:
            if not connection.can_read(timeout=timeout):
                return arrivals
            while True:
                self._take(connection.read_response(disable_decoding=True), arrivals)
                if len(arrivals) >= _READ_BATCH or not connection.can_read(timeout=0):
                    return arrivals
        except Exception as exc:
            if arrivals:
                return arrivals  # the next call raises
            raise BrokerError(describe(exc)) from exc

    def _take(self, reply: Any, arrivals: list[Arrival]) -> None:
        if not isinstance(reply, list) or len(reply) != 3 or reply[0] != b"message":
            return
        _, channel, data = reply
        if channel == self._channel:
            arrivals.append(data)
        elif channel == self._probe_channel and data.isdigit() and len(data) < 20:
            arrivals.append(Probe(int(data)))

    def close(self) -> None:
        """Drop the connection; a read under way raises."""
        self._connection.disconnect()


def _refuse_to_reconnect(*args: object, **kwargs: object) -> None:
    del args, kwargs
    raise ConnectionError("the connection is closed")


def stamp(message: Message) -> bytes:
    """Return the payload with its sequence number as one more key of the object."""
    payload = message.payload
    if not payload.endswith(b"}"):
        return payload
    return b"%s%s%d}" % (payload[:-1], SEQUENCE_MARK, message.sequence)


def describe(exc: BaseException) -> str:
    """Return one line that says what went wrong; holds no password."""
    return f"{type(exc).__name__}: {exc}".splitlines()[0][:300]

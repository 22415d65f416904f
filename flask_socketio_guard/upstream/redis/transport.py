"""Redis pub/sub over the guard's own connections.

redis-py's clients reconnect and resubscribe on their own and hide it. The guard must know what
failed, when, and whether a reply is still due. Therefore it uses redis-py's ``Connection``
directly, which connects, authenticates, handles TLS and finds the master behind Sentinel.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from redis.backoff import NoBackoff
from redis.retry import Retry

from ...errors import BrokerError, PublishError, PublishRefused
from ...queue.reachability import PERMISSION
from ...queue.transport import SEQUENCE_MARK
from ...telemetry.records import logger
from .connection import RedisConnection
from .errors import categorize, describe, means_not_now
from .subscription import RedisSubscription, is_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from socketio import RedisManager

    from ...queue.transport import QueueMessage


class RedisTransport:
    """The Redis (or Valkey) server of a ``RedisManager``.

    Each process has a channel for its own probes, subscribed to over the same connection as the
    channel of messages. Thus the cost of probes grows with the number of processes and not with
    its square. If Redis does not permit that channel, the listener works without it, and probes
    are PINGs over its connection until the permission is granted.

    Args:
        manager: Source of the URL, the options and the channel.
        answer_timeout: Longest wait for a reply, in seconds. After that, a check over a new
            connection shows whether Redis can be reached.
    """

    name = "redis"

    def __init__(self, manager: RedisManager, *, answer_timeout: float) -> None:
        self._manager: Any = manager
        self._answer_timeout = answer_timeout
        self._lock = threading.Lock()
        self._subscription: RedisSubscription | None = None
        self._is_told = False

    @property
    def is_probing(self) -> bool:
        """Whether probes are published; see :class:`~...queue.transport.Transport`."""
        return self._subscription is None or self._subscription.is_probed

    def ping(self, token: int, *, is_refused: bool) -> None:
        """Send a probe as a PING over the listener's connection, and log that once.

        Args:
            token: Identifies the probe.
            is_refused: Whether Redis has just refused to publish the probe.
        """
        if self._subscription is not None:
            self._subscription.ping(token, is_refused=is_refused)
        if not self._is_told:
            self._is_told = True
            logger.warning(
                "no permission for the channels %s:guard:* of Redis: the listener runs without "
                "end-to-end probes, and only its connection is monitored",
                self.channel,
            )

    def _probe_arrived(self) -> None:
        if self._is_told:
            self._is_told = False
            logger.warning("permission for the channels %s:guard:* was granted", self.channel)

    @property
    def channel(self) -> str:
        """The channel that all processes share."""
        return str(self._manager.channel)

    @property
    def probe_channel(self) -> str:
        """The channel of this process's probes; it changes with the host id after a fork."""
        return f"{self._manager.channel}:guard:{self._manager.host_id}"

    @property
    def exceptions(self) -> Any:
        """The ``exceptions`` module of the driver in use, redis or valkey."""
        return self._manager._get_redis_module().exceptions

    def publisher(self, is_answering: Callable[[], bool]) -> RedisPublisher:
        """Return a publisher, which connects when it is first used.

        Args:
            is_answering: Returns whether Redis answers over other connections.
        """
        return RedisPublisher(self, self._answer_timeout, is_answering)

    def subscribe(self) -> RedisSubscription:
        """Subscribe to both channels over a new connection.

        Raises:
            BrokerError: Redis cannot be reached, or refused the channel of messages.
        """
        connection = self.connect()
        probe_channel = self.probe_channel
        try:
            # A single SUBSCRIBE would be refused as a whole if one channel is not permitted.
            connection.send([("SUBSCRIBE", self.channel), ("SUBSCRIBE", probe_channel)])
            replies: list[Any] = []
            while sum(map(is_answer, replies)) < 2:
                replies += self._read(connection)
            is_probed = self._is_granted(*filter(is_answer, replies))
        except Exception as exc:
            connection.close()
            raise BrokerError(describe(exc), category=categorize(exc)) from exc
        early = [reply for reply in replies if not is_answer(reply)]
        subscription = self._subscription = RedisSubscription(
            connection, self.channel, probe_channel, early, on_probe=self._probe_arrived
        )
        subscription.is_probed = is_probed
        return subscription

    def _is_granted(self, own: Any, probes: Any) -> bool:
        """Return whether Redis permitted the probe channel; raise any other refusal."""
        if isinstance(own, Exception):
            raise own
        if isinstance(probes, Exception) and not self._is_forbidden(probes):
            raise probes
        return not isinstance(probes, Exception)

    def _is_forbidden(self, reply: Any) -> bool:
        return isinstance(reply, self.exceptions.NoPermissionError)

    def check(self) -> BrokerError | None:
        """Send PING over a fresh connection.

        Returns:
            ``None`` if Redis answered, otherwise the error.
        """
        try:
            connection = self.connect()
        except BrokerError as exc:
            return exc
        try:
            connection.send([("PING",)])
            (answer,) = self._read(connection)
        except Exception as exc:  # noqa: BLE001 - the error is the result
            answer = exc
        finally:
            connection.close()
        if isinstance(answer, Exception) and not self._is_forbidden(answer):
            return BrokerError(describe(answer), category=categorize(answer))
        return None  # a reply that PING is forbidden also shows that Redis can be reached

    def _read(self, connection: RedisConnection) -> list[Any]:
        replies = connection.read(self._answer_timeout)
        if not replies:
            raise TimeoutError("Redis does not answer")
        return replies

    def connect(self) -> RedisConnection:
        """Return a new connection, authenticated and ready for commands.

        Raises:
            BrokerError: The connection could not be established.
        """
        try:
            connection = self._new_pool().make_connection()
            connection.connect()
            return RedisConnection(connection)
        except Exception as exc:
            raise BrokerError(describe(exc), category=categorize(exc)) from exc

    def _new_pool(self) -> Any:
        """Return a connection pool made from the manager's URL and options, for one connection."""
        manager = self._manager
        own_options = manager.redis_options
        with self._lock:
            # Upstream parses every kind of URL, including Sentinel's.
            # RESP2 has the same format of replies and messages in all versions of the driver.
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
            retry=Retry(NoBackoff(), 0),  # the guard must see every failure
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
    """Publishes batches of messages as pipelines and waits for the replies."""

    def __init__(
        self, transport: RedisTransport, answer_timeout: float, is_answering: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._answer_timeout = answer_timeout
        self._is_answering = is_answering
        self._errors = transport.exceptions
        self._connection: RedisConnection | None = None
        self._can_count = True

    def publish(self, messages: Sequence[QueueMessage], probe: int | None) -> int | None:
        """Publish *messages* in order, and *probe* if it is not ``None``.

        Returns:
            The number of subscribers to the channel, or ``None`` if it is unknown.

        Raises:
            PublishError: The connection was lost, or publishing is not permitted.
            PublishRefused: Redis answered a PUBLISH with another error.
        """
        transport = self._transport
        channel = transport.channel
        commands: list[tuple[str | bytes, ...]] = [
            ("PUBLISH", channel, stamp(message)) for message in messages
        ]
        is_travelling = probe is not None and transport.is_probing
        if is_travelling:
            commands.append(("PUBLISH", transport.probe_channel, str(probe)))
        is_counting = self._can_count and (probe is not None or not messages)
        if is_counting:
            commands.append(("PUBSUB", "NUMSUB", channel))
        elif not commands:
            commands.append(("PING",))
        replies: list[Any] = []
        try:
            if self._connection is None:
                self._connection = transport.connect()
            self._connection.send(commands)
            self._collect(replies, len(commands), self._connection)
        except Exception as exc:
            self.close()
            published, refused = self._sort(replies[: len(messages)])
            raise PublishError(
                describe(exc),
                published=published,
                refused=len(refused),
                category=categorize(exc),
            ) from exc
        is_refused = is_travelling and isinstance(
            replies[len(messages)], self._errors.NoPermissionError
        )
        if probe is not None and (is_refused or not is_travelling):
            transport.ping(probe, is_refused=is_refused)
        self._require_taken(replies[: len(messages)])
        return self._subscribers(replies, len(messages), is_counting=is_counting)

    def _require_taken(self, replies: list[Any]) -> None:
        """Raise if messages were refused: each for good, or all for lack of permission."""
        published, refused = self._sort(replies)
        if not refused:
            return
        if isinstance(refused[0], self._errors.NoPermissionError):
            first = replies.index(refused[0])
            raise PublishError(describe(refused[0]), published=first, category=PERMISSION)
        raise PublishRefused(describe(refused[0]), published=published, refused=len(refused))

    def _collect(self, replies: list[Any], count: int, connection: RedisConnection) -> None:
        """Read into *replies* until there are *count* of them.

        From here, a broker that hangs looks like a half-open connection. As long as Redis does
        not answer over other connections either, this one may recover. Closing it would mean
        redelivery of messages that may have been published.
        """
        unsent = connection.unsent()
        while len(replies) < count:
            received = connection.read(self._answer_timeout)
            if not received:
                before, unsent = unsent, connection.unsent()
                if before and unsent is not None and unsent < before:
                    continue  # a large message on a slow connection
            if not received and self._is_answering():
                raise TimeoutError("the connection is half open: Redis answers, but not here")
            for reply in received:
                # "LOADING" is a ConnectionError; "BUSY", during a script, is of the second kind.
                if isinstance(reply, self._errors.ConnectionError) or means_not_now(reply):
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
        """Close the connection, if there is one; the next :meth:`publish` makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def stamp(message: QueueMessage) -> bytes:
    """Return the payload with its sequence number added as the last key of the JSON object."""
    payload = message.payload
    if not payload.endswith(b"}"):
        return payload
    return b"%s%s%d}" % (payload[:-1], SEQUENCE_MARK, message.sequence)

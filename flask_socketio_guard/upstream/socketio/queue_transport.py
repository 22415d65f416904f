"""A transport for any message queue of python-socketio, through two methods that all have."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from socketio import KombuManager

from ...core.runtime import clock
from ...errors import BrokerError, ConfigError, PublishError
from ...queue.transport import SEQUENCE_KEY, Arrival, Probe, QueueMessage
from ...telemetry.records import logger
from ..overrides import overrides
from .queue_managers import ThroughOutbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from socketio import PubSubManager

_PROBE = "guard_probe"


def require_scheme(manager: Any) -> None:
    """Check that the URL of a kombu queue has a scheme.

    kombu refuses unknown schemes, but takes a URL without ``://`` for the host of an AMQP
    broker, to which it tries to connect for ever. Neither the error nor the log line contains the
    URL, because it may include a password.

    Raises:
        ConfigError: A slash is missing after the scheme.
    """
    if not isinstance(manager, KombuManager) or overrides(type(manager), "_connection"):
        return
    url: Any = manager.url
    if not isinstance(url, str) or "://" in url or "transport" in manager.connection_options:
        return
    from kombu.transport import TRANSPORT_ALIASES

    scheme, _, rest = url.partition(":")
    if rest.startswith("/") and scheme in {*TRANSPORT_ALIASES, "rediss", "kafka"}:
        raise ConfigError(
            f"the URL of the message queue begins with {scheme + ':/'!r}: "
            f"write {scheme + '://'!r}, with two slashes"
        )
    logger.warning(
        "the URL of the message queue has no scheme, so it is taken for the host of an AMQP broker "
        "such as RabbitMQ: write redis:// or amqp:// in front of it"
    )


class QueueTransport:
    """A queue that is used only through ``_publish(data)`` and ``_listen()``.

    These methods do not report whether the broker can be reached. A message that is published
    during an outage is lost, as without the guard. Probes share the channel with messages, so all
    processes receive them and ignore those of others.

    Some managers, such as kombu's, block in ``_publish`` until the broker returns. A call that
    takes too long is then the only sign of an outage.

    Args:
        manager: A client manager, guarded or not.
        answer_timeout: Seconds that a call of ``_publish`` may take before the broker counts as
            unreachable.

    Source:
        python-socketio, "Writing your own client manager": ``PubSubManager``.
    """

    is_probing = True

    def __init__(self, manager: PubSubManager, *, answer_timeout: float) -> None:
        self._manager: Any = manager
        self._answer_timeout = answer_timeout
        self.publishing_since: float | None = None
        """When the current call of ``_publish`` began, or ``None`` if there is none."""
        self.failure: BrokerError | None = None
        """Why the last message could not be published, or ``None`` if it was."""
        self._id = uuid.uuid4().hex
        # The guarded class has its own _publish, which comes before the queue's.
        self._queue_class = next(
            cls
            for cls in type(manager).__mro__
            if "_publish" in vars(cls) and cls is not ThroughOutbox
        )
        self.name = str(getattr(manager, "name", "pubsub"))

    def publisher(self, is_answering: Callable[[], bool]) -> _QueuePublisher:
        """Return the publisher; *is_answering* is not used."""
        return _QueuePublisher(self, self._manager, self._queue_class, self._id)

    def subscribe(self) -> _QueueSubscription:
        """Start a new run of the queue's own listening generator."""
        return _QueueSubscription(self._manager, self._id)

    def check(self) -> BrokerError | None:
        """Infer from the last call of ``_publish`` whether the broker can be reached.

        Returns:
            ``None`` if it can, as far as is known, otherwise the reason why not.
        """
        since = self.publishing_since
        waited = 0.0 if since is None else clock() - since
        if waited < self._answer_timeout:
            return self.failure
        return BrokerError(f"a message has been waiting to be published for {waited:.1f} s")


class _QueuePublisher:
    def __init__(
        self, transport: QueueTransport, manager: Any, queue_class: Any, transport_id: str
    ) -> None:
        self._transport = transport
        self._manager = manager
        self._queue_class = queue_class
        self._id = transport_id

    def publish(self, messages: Sequence[QueueMessage], probe: int | None) -> None:
        if probe is not None:
            self._send({"method": _PROBE, "transport": self._id, "token": probe}, published=0)
        for published, message in enumerate(messages):
            data = json.loads(message.payload)
            data[SEQUENCE_KEY] = message.sequence
            self._send(data, published=published)

    def _send(self, data: dict[str, Any], *, published: int) -> None:
        self._transport.publishing_since = clock()
        try:
            self._queue_class._publish(self._manager, data)
        except Exception as exc:
            reason = f"{type(exc).__name__}: {exc}"
            self._transport.failure = BrokerError(reason)
            raise PublishError(reason, published=published) from exc
        else:
            self._transport.failure = None
        finally:
            self._transport.publishing_since = None

    def close(self) -> None:
        """Do nothing: the connection belongs to the manager."""


class _QueueSubscription:
    is_receiving = False  # cannot be determined

    def __init__(self, manager: Any, transport_id: str) -> None:
        self._messages: Iterator[Any] = iter(manager._listen())
        self._id = transport_id

    def read(self, timeout: float) -> list[Arrival]:
        """Return the next message; blocks without a timeout, as the generator has none.

        Raises:
            RuntimeError: The generator ended, which it never should.
        """
        message: Any = next(self._messages, _END)
        if message is _END:
            raise RuntimeError("the queue's listen() returned")
        probe = self._probe(message)
        return [message] if probe is None else [probe]

    def _probe(self, message: Any) -> Probe | None:
        if not isinstance(message, dict):
            if _PROBE not in str(message):
                return None
            try:
                message = json.loads(message)
            except (TypeError, ValueError):
                return None
        if not isinstance(message, dict) or message.get("method") != _PROBE:
            return None
        if message.get("transport") != self._id:
            return None
        token = message.get("token")
        return Probe(token) if isinstance(token, int) else None

    def close(self) -> None:
        """Do nothing: a running generator cannot be closed by another task."""


_END = object()

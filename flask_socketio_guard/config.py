"""All settings of the guard, read and validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import ConfigError
from .settings import (
    COUNT,
    FLAG,
    PATH,
    RATE,
    SECONDS,
    SECONDS_OR_ZERO,
    URL,
    Rule,
    Settings,
    is_filled,
    one_of,
    or_none,
    read_settings,
    setting,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SettingsT = TypeVar("SettingsT", bound=Settings)

STORE_SCHEMES = (
    "redis://",
    "rediss://",
    "redis+sentinel://",
    "unix://",
    "valkey://",
    "valkeys://",
    "valkey+sentinel://",
)
"""Schemes allowed in the URL of a store; those that ``RedisManager`` accepts."""

_STORE: Rule = (
    lambda value: (
        value is None
        or callable(value)
        or (isinstance(value, str) and value.startswith(STORE_SCHEMES))
    ),
    "None, a URL of Redis or Valkey, or a callable",
)
_DETAILS: Rule = (
    lambda value: value is None or callable(value) or is_filled(value),
    "None, a non-empty token or a callable",
)


@dataclass(frozen=True)
class GuardConfig(Settings):
    """The settings of the guard, one attribute per ``SOCKETIO_GUARD_*`` key.

    Durations are float seconds, sizes are bytes. A keyword overrides ``app.config``, which
    overrides the environment. The settings page of the documentation is generated from the
    metadata of these fields; see :func:`.settings_table`.
    """

    callback_timeout: float = setting(
        60.0, SECONDS, "how long an acknowledgement callback waits for its client's answer"
    )
    probe_interval: float = setting(1.0, SECONDS, "interval between two probes of the listener")
    probe_timeout: float = setting(
        2.0, SECONDS, "a probe that has not come back after this time is overdue"
    )
    broker_timeout: float = setting(
        1.0,
        SECONDS,
        "how long to wait for a reply of Redis before checking it over a fresh connection",
    )
    reconnect_max_delay: float = setting(
        0.3, SECONDS, "maximum backoff between two attempts to reach an unreachable broker"
    )
    resubscribe_timeout: float = setting(
        2.0,
        SECONDS_OR_ZERO,
        "after an outage, how long the outbox waits for the usual number of subscribers before it "
        "publishes its backlog",
    )
    restart_max_delay: float = setting(
        5.0, SECONDS, "maximum backoff between two restarts of a task"
    )
    outbox_max_messages: int = setting(10_000, COUNT, "messages that may wait in the outbox")
    outbox_max_bytes: int = setting(64 * 1024 * 1024, COUNT, "bytes that may wait in the outbox")
    outbox_overflow: str = setting(
        "raise",
        one_of("raise", "drop_oldest"),
        'when the outbox is full: `"raise"` `OutboxFull` to the caller, or `"drop_oldest"`, which '
        "always applies while Redis refuses to publish; counted either way",
    )
    exit_flush_timeout: float = setting(
        5.0,
        SECONDS_OR_ZERO,
        "how long an exiting process waits for its outbox to be published; a test or a command "
        "that has never reached Redis does not wait",
    )
    stop_timeout: float = setting(
        5.0, SECONDS_OR_ZERO, "how long tasks may take to end when the process stops"
    )
    broker_down: str = setting(
        "warn",
        one_of("warn", "fail"),
        'how `/readyz` answers during an outage of a broker that was reached before: `"warn"` '
        'with 200, `"fail"` with 503',
    )
    health_details: str | Callable[[Any], bool] | None = setting(
        None,
        _DETAILS,
        "who may see names, counts and ages: holders of a token (`Authorization: Bearer ...`), "
        "requests for which a callable that takes a `werkzeug.Request` returns true, or "
        "nobody; everybody in debug mode",
        is_secret=True,
    )
    healthz_path: str | None = setting(
        "/healthz",
        or_none(PATH),
        "path of the full health answer; `None` switches it off. A route of the application at "
        "this path would be hidden and causes a `ConfigError`",
    )
    livez_path: str | None = setting(
        "/livez", or_none(PATH), "path of the liveness answer; otherwise like `HEALTHZ_PATH`"
    )
    readyz_path: str | None = setting(
        "/readyz", or_none(PATH), "path of the readiness answer; otherwise like `HEALTHZ_PATH`"
    )
    health_in_front: bool = setting(
        True,
        FLAG,
        "whether these three paths are answered in front of the application; `False` passes "
        "requests for them through Flask, with its `before_request` functions and sessions",
    )
    max_connections: int | None = setting(
        None,
        or_none(COUNT),
        "Socket.IO connections that this process accepts; `None`: as many as it can hold "
        "([gunicorn's `worker_connections` and open files](deployment.md), minus a reserve for "
        "other requests). Further handshakes, WebSocket ones included, get 503 with "
        "`Retry-After`. When the process is full, a new client replaces the oldest one that has "
        "not joined a namespace within 3 s",
    )
    max_connections_per_address: int | None = setting(
        None,
        or_none(COUNT),
        "connections of one client address, as the application sees it: behind a proxy use "
        "Werkzeug's `ProxyFix`. An IPv6 client counts as its /64 network, in which it "
        "may use any address",
    )
    connection_rate: str | None = setting(
        None,
        or_none(RATE),
        'rate of new connections that this process accepts, such as `"100/second"`; further '
        "handshakes get 503 as well. CORS preflights and invalid handshakes "
        "do not count",
    )
    connection_rate_per_address: str | None = setting(
        None,
        or_none(RATE),
        'rate of new connections from one client address, such as `"10/second"`. Off by default: '
        "behind a proxy without `ProxyFix` all clients share one address",
    )
    max_joins_per_minute: int = setting(
        300,
        COUNT,
        "CONNECT packets that one client may send per minute, accepted or not; a client that "
        "sends more is refused with `rate_limited` and closed with 1008",
    )
    join_rate_per_address: str | None = setting(
        None,
        or_none(RATE),
        'rate of CONNECT packets from one client address, such as `"30/minute"`; further ones '
        "are refused with `rate_limited`. Behind a proxy use `ProxyFix`",
    )
    connect_timeout: float = setting(
        20.0, SECONDS, "how long a connect handler may run before its client is refused"
    )
    http_timeout: float = setting(
        75.0,
        SECONDS,
        "how long a client may be silent within an HTTP request, its body included, "
        "or between two requests on one connection, under gevent's WSGI server "
        "(`geventwebsocket` workers). Longer than the 60 s for which most proxies keep idle "
        "connections. gunicorn's own workers have `keepalive`",
    )
    join_timeout: float = setting(
        45.0, SECONDS, "a client that has joined no namespace after this time is closed"
    )
    max_in_flight: int = setting(
        64, COUNT, "events of one client that may run concurrently; further ones wait"
    )
    max_in_flight_bytes: int = setting(
        64 * 1024 * 1024,
        COUNT,
        "memory that these running events may take, estimated as for `MAX_WAITING_BYTES`: 64 "
        "plain messages of 1 MB run concurrently, but only a few that consist of many small "
        "lists and objects. A single event always runs",
    )
    max_waiting_bytes: int = setting(
        4 * 1024 * 1024,
        COUNT,
        "memory that one client's waiting events may take: 1 kB for each event plus its "
        "decoded payload. Beyond it the guard stops reading from the client until some "
        "events have begun (TCP backpressure; over polling the request waits). "
        "No event is lost or refused. While the client owes an acknowledgement (`call()`, a "
        "callback), the limit is eight times as high, because the acknowledgement may be "
        "queued behind its events",
    )
    max_containers: int = setting(
        100_000,
        COUNT,
        "lists and objects that one packet may contain: an empty list is two characters, "
        "but costs more than 80 bytes and 0.05 µs. A client that sends more is closed "
        "with 1009; over polling its request is answered with 400. A table of 50,000 "
        "rows is accepted, and any packet of 1 MB with more than ten characters per list or "
        "object; raise it if packets are larger than 1 MB",
    )
    event_output_max_bytes: int = setting(
        64 * 1024 * 1024,
        COUNT,
        "bytes of one event's acknowledgement and emits that may wait to be sent; only messages "
        "of 16 KiB and more count, a broadcast once. Beyond it `emit` blocks as long as some of "
        "these bytes are being sent, and otherwise raises `OutputTooLarge`; the client gets "
        "the code `output_too_large`. Sent bytes no longer count, so a handler may stream "
        "any amount",
    )
    departure_timeout: float = setting(
        30.0,
        SECONDS,
        "events that a client sent before it disconnected begin before its disconnect handler "
        "runs; if none can begin for this long, because its handlers do not end, the "
        "remaining ones are dropped and counted",
    )
    event_rate: str | None = setting(
        None,
        or_none(RATE),
        'rate of events from one client, such as `"20/second"`; further ones are rejected with '
        "`rate_limited`",
    )
    rate_storage: str = setting(
        "memory://",
        URL,
        'where rates are counted: in this process, or `"redis://..."` for all processes '
        "together; or a function that returns a custom store",
        is_secret=True,
    )
    send_queue_max_packets: int = setting(
        5000,
        COUNT,
        "messages that may wait for one client before `emit` blocks: see "
        "[backpressure](how-it-works.md#what-one-client-may-cost)",
    )
    send_queue_max_bytes: int = setting(
        1024 * 1024,
        COUNT,
        "bytes that may wait for one client; a larger message is accepted if nothing else waits",
    )
    slow_consumer_timeout: float = setting(
        10.0, SECONDS, "a client with a full queue is slow once it has taken nothing for this long"
    )
    slow_consumer: str = setting(
        "disconnect",
        one_of("disconnect", "drop_oldest", "drop_volatile"),
        'what happens to a slow client: `"disconnect"` (close code 1008, `slow '
        'consumer`), `"drop_oldest"` drops its oldest events, `"drop_volatile"` drops volatile '
        "ones and disconnects if there are none",
    )
    close_timeout: float = setting(
        2.0, SECONDS, "how long a client may take to answer a close frame"
    )
    websocket_compression: bool = setting(
        False,
        FLAG,
        "whether to accept permessage-deflate when a client offers it; costs memory "
        "for each connection",
    )
    drain_delay: float = setting(
        0.0,
        SECONDS_OR_ZERO,
        "time between answering unready and closing the first client, so that the load "
        "balancer notices",
    )
    drain_window: float = setting(
        1.0,
        SECONDS_OR_ZERO,
        "time over which clients are closed when the process stops, so that they do not "
        "all reconnect at once",
    )
    delivery_store: str | Callable[[], Any] | None = setting(
        None,
        _STORE,
        "where messages of [acknowledged delivery](delivery.md) are stored: in this process, or "
        '`"redis://..."` for all processes together; Sentinel, Unix sockets and Valkey '
        "as for the message queue; no Redis Cluster",
        is_secret=True,
    )
    delivery_lease: float = setting(
        5.0,
        SECONDS,
        "time after which other processes take over the work of a dead one; one that is silent for "
        "twice as long counts as dead",
    )
    delivery_ack_timeout: float = setting(
        10.0,
        SECONDS,
        "how long a client may take to acknowledge such a message before it is redelivered",
    )
    delivery_ttl: float = setting(
        3600.0, SECONDS, "default time to live of such a message; `deliver` can set another"
    )
    delivery_max_in_flight: int = setting(
        16, COUNT, "unacknowledged messages that one recipient may have in flight"
    )
    delivery_max_messages: int = setting(
        100_000,
        COUNT,
        "such messages that may be pending; beyond it `deliver` raises `DeliveryStoreFull`",
    )
    delivery_max_bytes: int = setting(
        128 * 1024 * 1024,
        COUNT,
        "bytes that they may take in the store, [everything stored with them "
        "included](delivery.md#storage-costs)",
    )
    delivery_max_message_bytes: int = setting(
        256 * 1024, COUNT, "bytes of JSON that the arguments of one such message may take"
    )
    delivery_retention: float = setting(
        600.0, SECONDS_OR_ZERO, "how long a receipt can be looked up after its message has ended"
    )
    delivery_max_receipt_bytes: int = setting(
        32 * 1024 * 1024, COUNT, "bytes that these receipts may take; the oldest are removed first"
    )
    delivery_dead_letter_retention: float = setting(
        7 * 24 * 3600.0, SECONDS, "how long dead letters are kept"
    )
    delivery_max_dead_letter_bytes: int = setting(
        16 * 1024 * 1024, COUNT, "bytes that dead letters may take; the oldest are removed first"
    )
    scripts_path: str | None = setting(
        "/socketio-guard",
        or_none(PATH),
        "path below which `deliveries.js` is served to browsers; a proxy must forward it as well. "
        "`None` switches it off",
    )
    blocking_timeout: float | None = setting(
        0.4,
        or_none(SECONDS),
        "an event loop that is blocked for longer is reported with the blocking stack; "
        "`None` switches this off",
    )
    log_fold_interval: float = setting(
        60.0,
        SECONDS,
        "interval for which repeats of a warning are counted before one line reports them",
    )
    fast: bool = setting(
        True,
        FLAG,
        "for diagnosis: `False` handles events and messages one by one, as upstream does. `True` "
        "determines the route and session of a connection once, reuses JSON encoders, and "
        "writes and publishes messages in batches",
    )

    _of_components: ClassVar[Mapping[type[Settings], Settings]] = {}

    def of(self, owner: type[SettingsT]) -> SettingsT:
        """Return the settings of a component, by the class that declares them.

        Raises:
            ConfigError: No registered component declares them.
        """
        found = self._of_components.get(owner)
        if not isinstance(found, owner):
            raise ConfigError(
                f"{owner.__name__} was not read: name it as `settings` of a component, and append "
                "that to guard.registry.components before init_app()"
            )
        return found

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any],
        components: Sequence[type[Settings]] = (),
        /,
        **overrides: Any,
    ) -> GuardConfig:
        """Read the ``SOCKETIO_GUARD_*`` keys of *mapping* and of the environment.

        Args:
            mapping: Usually ``app.config``; overrides the environment. Other keys are ignored.
            components: Settings classes of components; see :meth:`of`.
            overrides: Settings by attribute name; they override *mapping*.

        Raises:
            ConfigError: A key is unknown, a value is of the wrong type or out of range, or a
                setting is declared twice.
        """
        found = read_settings([cls, *components], mapping, overrides)
        config = found.pop(cls)
        assert isinstance(config, cls)
        object.__setattr__(config, "_of_components", found)
        return config

    @classmethod
    def from_environment(
        cls, components: Sequence[type[Settings]] = (), /, **overrides: Any
    ) -> GuardConfig:
        """Read the settings from ``SOCKETIO_GUARD_*`` environment variables only.

        For processes without a Flask application. The value ``none`` means
        ``None`` where that is allowed.

        Raises:
            ConfigError: A variable is unknown, or its value is out of range.
        """
        return cls.from_mapping({}, components, **overrides)

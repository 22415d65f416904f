"""Every setting of the guard: read once, validated, in seconds and bytes."""

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
"""What the URL of a store may begin with: as that of a ``RedisManager``."""

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
    """Every setting of the guard, one attribute for each ``SOCKETIO_GUARD_*`` key.

    Durations are float seconds, sizes are bytes. A keyword wins over ``app.config``, and that over
    the environment.

    Source:
        The page of settings is made of the metadata of these fields; see :func:`settings_table`.
    """

    callback_timeout: float = setting(
        60.0, SECONDS, "how long an acknowledgement callback waits for its client"
    )
    probe_interval: float = setting(1.0, SECONDS, "time between two probes of the listener")
    probe_timeout: float = setting(2.0, SECONDS, "a probe not back after this time is overdue")
    broker_timeout: float = setting(
        1.0, SECONDS, "longest wait for Redis before it is asked anew over a fresh connection"
    )
    reconnect_max_delay: float = setting(
        0.3, SECONDS, "cap of the delay between two attempts to reach a broker that is away"
    )
    resubscribe_timeout: float = setting(
        2.0,
        SECONDS_OR_ZERO,
        "after an outage, longest wait for the usual subscribers before the outbox empties itself",
    )
    restart_max_delay: float = setting(
        5.0, SECONDS, "cap of the delay between two restarts of a task"
    )
    outbox_max_messages: int = setting(10_000, COUNT, "messages that may wait for the broker")
    outbox_max_bytes: int = setting(64 * 1024 * 1024, COUNT, "bytes that may wait for the broker")
    outbox_overflow: str = setting(
        "raise",
        one_of("raise", "drop_oldest"),
        'at the bound: `"raise"` `OutboxFull` to the caller, or `"drop_oldest"`, as '
        "always while Redis refuses what is published; counted either way",
    )
    exit_flush_timeout: float = setting(
        5.0,
        SECONDS_OR_ZERO,
        "how long a process that exits waits for its outbox; a test or a command that "
        "has never reached Redis does not wait",
    )
    stop_timeout: float = setting(5.0, SECONDS_OR_ZERO, "how long tasks may take to end")
    broker_down: str = setting(
        "warn",
        one_of("warn", "fail"),
        'what it means for `/readyz` that a broker which was reached is away: `"warn"` '
        'is 200, `"fail"` is 503',
    )
    health_details: str | Callable[[Any], bool] | None = setting(
        None,
        _DETAILS,
        "who sees names, counts and ages: a token (`Authorization: Bearer ...`), a "
        "callable that takes a `werkzeug.Request`, or nobody; in debug mode everybody",
        is_secret=True,
    )
    healthz_path: str | None = setting(
        "/healthz",
        or_none(PATH),
        "path of the full health answer; `None` switches it off. A route of the "
        "application at it is a `ConfigError`, for it would be hidden",
    )
    livez_path: str | None = setting(
        "/livez", or_none(PATH), "path of the liveness answer, the same"
    )
    readyz_path: str | None = setting(
        "/readyz", or_none(PATH), "path of the readiness answer, the same"
    )
    health_in_front: bool = setting(
        True,
        FLAG,
        "whether these three are answered in front of the application; `False` sends them through "
        "Flask, with its `before_request` functions and sessions",
    )
    max_connections: int | None = setting(
        None,
        or_none(COUNT),
        "Socket.IO connections that this process accepts; `None`: as many as it can hold "
        "([gunicorn's `worker_connections` and open files](deployment.md), less some for "
        "other requests). Further handshakes get 503 with `Retry-After`, also in place "
        "of a WebSocket. When it is full, the oldest client goes that has joined nothing "
        "for 3 s",
    )
    max_connections_per_address: int | None = setting(
        None,
        or_none(COUNT),
        "the same for one client address, as the application sees it: behind a proxy use "
        "Werkzeug's `ProxyFix`. An IPv6 client counts as its /64 network, in which it "
        "may take any address",
    )
    connection_rate: str | None = setting(
        None,
        or_none(RATE),
        'new connections that this process accepts, such as `"100/second"`; further '
        "handshakes are refused in the same way. CORS preflights and invalid handshakes "
        "do not count",
    )
    connection_rate_per_address: str | None = setting(
        None,
        or_none(RATE),
        'the same for one client address, such as `"10/second"`. Off unless you set it: '
        "behind a proxy without `ProxyFix` all clients share one address",
    )
    max_joins_per_minute: int = setting(
        300,
        COUNT,
        "CONNECT packets that one client may send within a minute, whatever becomes of "
        "them; with more it is told `rate_limited` and closed with 1008",
    )
    join_rate_per_address: str | None = setting(
        None,
        or_none(RATE),
        'CONNECT packets from one client address, such as `"30/minute"`; further ones '
        "are refused with `rate_limited`. Behind a proxy use `ProxyFix`",
    )
    connect_timeout: float = setting(
        20.0, SECONDS, "longest run of a connect handler; then the client is refused"
    )
    http_timeout: float = setting(
        75.0,
        SECONDS,
        "how long a client may send nothing within an HTTP request, its body included, "
        "and between two on one connection, under gevent's WSGI server "
        "(`geventwebsocket` workers). Longer than proxies keep idle connections, 60 s "
        "for most. gunicorn's own workers have `keepalive`",
    )
    join_timeout: float = setting(
        45.0, SECONDS, "a client that has joined no namespace after this time is closed"
    )
    max_in_flight: int = setting(
        64, COUNT, "events of one client that run at a time; further ones wait"
    )
    max_in_flight_bytes: int = setting(
        64 * 1024 * 1024,
        COUNT,
        "memory that these may take, counted as below: 64 plain messages of 1 MB run at "
        "a time, but of such that are lists and objects all over only a few. One alone "
        "always runs",
    )
    max_waiting_bytes: int = setting(
        4 * 1024 * 1024,
        COUNT,
        "memory that one client's waiting events may take, 1 kB for each and what its "
        "payload takes when it is decoded. Beyond it the client is not read until some "
        "of them have begun, so that TCP slows it down; over polling its request waits. "
        "Nothing is lost or refused. While the client owes an answer (`call()`, a "
        "callback) it is read on up to eight times as much, since the answer may be "
        "behind its events",
    )
    max_containers: int = setting(
        100_000,
        COUNT,
        "lists and objects that one packet may hold: an empty list is two characters, "
        "and costs more than 80 bytes and 0.05 µs. A client that sends more is closed "
        "with 1009, over polling its request is answered with 400. A table of 50,000 "
        "rows passes, and whatever has more than ten characters for each list or object; "
        "raise it where packets are larger than 1 MB",
    )
    event_output_max_bytes: int = setting(
        64 * 1024 * 1024,
        COUNT,
        "bytes of answer and emits of one event that may wait at a time, messages from "
        "16 KiB on; a broadcast counts once. Beyond it `emit` waits as long as some of "
        "that leaves, and then raises `OutputTooLarge`; the client gets the code "
        "`output_too_large`. What has been sent counts no more, so a handler may stream "
        "as much as it likes",
    )
    departure_timeout: float = setting(
        30.0,
        SECONDS,
        "events that a client sent before it left begin before its disconnect handler "
        "runs; if none can begin for this time, because its handlers do not end, the "
        "rest is lost and counted",
    )
    event_rate: str | None = setting(
        None,
        or_none(RATE),
        'events of one client, such as `"20/second"`; those beyond are answered with '
        "`rate_limited`",
    )
    rate_storage: str = setting(
        "memory://",
        URL,
        'where rates are counted: in this process, or `"redis://..."` for all processes '
        "together; or a function that returns a store of your own",
        is_secret=True,
    )
    send_queue_max_packets: int = setting(
        5000,
        COUNT,
        "messages that may wait for one client before emitters wait, too: see "
        "[backpressure](how-it-works.md#what-one-client-may-cost)",
    )
    send_queue_max_bytes: int = setting(
        1024 * 1024,
        COUNT,
        "bytes that may wait for one client; a larger message passes when nothing else waits",
    )
    slow_consumer_timeout: float = setting(
        10.0, SECONDS, "a client whose queue is full is slow once it has taken nothing for so long"
    )
    slow_consumer: str = setting(
        "disconnect",
        one_of("disconnect", "drop_oldest", "drop_volatile"),
        'what happens to a slow client: `"disconnect"` (close code 1008, `slow '
        'consumer`), `"drop_oldest"` of its events, or `"drop_volatile"` ones and '
        "disconnect when there are none",
    )
    close_timeout: float = setting(2.0, SECONDS, "how long a client may take to answer a close")
    websocket_compression: bool = setting(
        False,
        FLAG,
        "whether to agree to permessage-deflate when a client offers it; costs memory "
        "for each connection",
    )
    drain_delay: float = setting(
        0.0,
        SECONDS_OR_ZERO,
        "time between turning unready and closing the first client, for the load "
        "balancer to notice",
    )
    drain_window: float = setting(
        1.0,
        SECONDS_OR_ZERO,
        "time over which clients are closed when the process stops, so that they do not "
        "all come back at once",
    )
    delivery_store: str | Callable[[], Any] | None = setting(
        None,
        _STORE,
        "where [messages that must arrive](delivery.md) are kept: in this process, or "
        '`"redis://..."` for all processes together; Sentinel, Unix sockets and Valkey '
        "as for the message queue, no cluster",
        is_secret=True,
    )
    delivery_lease: float = setting(
        5.0, SECONDS, "time after which others take over what a dead process did for such messages"
    )
    delivery_ack_timeout: float = setting(
        10.0, SECONDS, "how long a client may take to acknowledge one before it is sent again"
    )
    delivery_ttl: float = setting(
        3600.0, SECONDS, "how long one is kept for its recipient, unless `deliver` says otherwise"
    )
    delivery_max_in_flight: int = setting(
        16, COUNT, "such messages to one recipient that may be unacknowledged at a time"
    )
    delivery_max_messages: int = setting(
        100_000, COUNT, "such messages that may wait; `deliver` raises `DeliveryStoreFull` then"
    )
    delivery_max_bytes: int = setting(
        128 * 1024 * 1024,
        COUNT,
        "bytes that they may take in the store, [with all that is kept about "
        "them](delivery.md#what-it-takes)",
    )
    delivery_max_message_bytes: int = setting(
        256 * 1024, COUNT, "bytes of JSON that the arguments of one may take"
    )
    delivery_retention: float = setting(
        600.0, SECONDS_OR_ZERO, "how long receipts are good for after the message has ended"
    )
    delivery_max_receipt_bytes: int = setting(
        32 * 1024 * 1024, COUNT, "bytes that the receipts of those may take; the oldest go first"
    )
    delivery_dead_letter_retention: float = setting(
        7 * 24 * 3600.0, SECONDS, "how long dead letters are kept"
    )
    delivery_max_dead_letter_bytes: int = setting(
        16 * 1024 * 1024, COUNT, "bytes that they may take; the oldest go first"
    )
    scripts_path: str | None = setting(
        "/socketio-guard",
        or_none(PATH),
        "below it `deliveries.js` is served to browsers, so a proxy has to pass it, too; "
        "`None`: nowhere",
    )
    blocking_timeout: float | None = setting(
        0.4,
        or_none(SECONDS),
        "an event loop that is blocked for longer is reported with the stack that blocks "
        "it; `None`: never",
    )
    log_fold_interval: float = setting(
        60.0, SECONDS, "repeats of one warning are counted for so long and then told in one line"
    )
    fast: bool = setting(
        True,
        FLAG,
        "for diagnosis: `False` does everything as upstream does it, one by one. `True` "
        "works out route and session of a connection once, keeps JSON encoders, and "
        "writes and publishes many messages in one go",
    )

    _of_components: ClassVar[Mapping[type[Settings], Settings]] = {}

    def of(self, owner: type[SettingsT]) -> SettingsT:
        """Return the settings of a component, by the class that declares them.

        Raises:
            ConfigError: They were not read.
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
        """Read the ``SOCKETIO_GUARD_*`` keys of *mapping*, and of the environment.

        Args:
            mapping: Usually ``app.config``; other keys are ignored. It wins over the environment.
            components: Classes of settings that components have; see :meth:`of`.
            overrides: Settings by attribute name; they win over *mapping*.

        Raises:
            ConfigError: A key is unknown, or a value of the wrong type or out of range; or a
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
        """Read environment variables ``SOCKETIO_GUARD_*`` only.

        For processes without a Flask application. ``none`` is ``None`` where
        that is allowed.

        Raises:
            ConfigError: A variable is unknown or its value out of range.
        """
        return cls.from_mapping({}, components, **overrides)

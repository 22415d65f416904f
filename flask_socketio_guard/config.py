"""Settings: read once, validated, in seconds and bytes."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from .errors import ConfigError

PREFIX = "SOCKETIO_GUARD_"

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


@dataclass(frozen=True)
class GuardConfig:
    """Every setting of the guard, one attribute for each ``SOCKETIO_GUARD_*`` key.

    Durations are float seconds, sizes are bytes.

    Attributes:
        callback_timeout: How long an acknowledgement callback waits for its
            client, > 0.
        probe_interval: Time between two probes of the listener, > 0.
        probe_timeout: A probe not back after this time is overdue, > 0.
        broker_timeout: Longest wait for the broker's answer before it is asked
            anew over a fresh connection, > 0.
        reconnect_max_delay: Cap of the delay between two attempts to reach a
            broker that is away, > 0.
        resubscribe_timeout: After an outage, how long the outbox waits for the
            usual number of subscribers before it publishes what has piled up, >= 0.
        restart_max_delay: Cap of the delay between restarts of a task, > 0.
        outbox_max_messages: Messages that may wait for the broker, >= 1.
        outbox_max_bytes: Bytes that may wait for the broker, >= 1.
        outbox_overflow: ``"raise"`` (the caller of ``emit`` gets
            :class:`~flask_socketio_guard.OutboxFull`) or ``"drop_oldest"``.
        exit_flush_timeout: How long a process that exits waits for its outbox
            to empty, >= 0.
        stop_timeout: How long tasks may take to end when the process stops, >= 0.
        broker_down: What an unreachable broker means for readiness: ``"warn"``
            (200) or ``"fail"`` (503).
        health_details: Who sees names, counts and ages in the health answers: a
            token (sent as ``Authorization: Bearer``), a callable that takes a
            ``werkzeug.Request`` and returns a bool, or ``None`` (nobody, except
            in debug mode).
        healthz_path: Path of the full health answer, or ``None`` for none.
        livez_path: Path of the liveness answer, or ``None``.
        readyz_path: Path of the readiness answer, or ``None``.
        max_connections: Socket.IO connections this process accepts; further
            handshakes get 503. ``None``: as many as the process can hold, by gunicorn's
            ``worker_connections`` and the files it may open.
        max_connections_per_address: The same for one client address, as the
            application sees it (behind a proxy: with Werkzeug's ``ProxyFix``).
        connection_rate: New connections that this process accepts, in the words
            of the ``limits`` library (``"100/second"``). ``None``: no bound.
        connection_rate_per_address: The same for one client address, as
            *max_connections_per_address* sees it.
        max_joins_per_minute: CONNECT packets that one client may send within a minute, >= 1;
            with more it is closed.
        join_rate_per_address: CONNECT packets from one client address, in the words of
            *connection_rate*; further ones are refused with code ``"rate_limited"``.
            ``None``: no bound.
        connect_timeout: Longest run of a connect handler, > 0.
        http_timeout: How long a client may send nothing within an HTTP request, and between two on
            one connection, under gevent's WSGI server, > 0.
        join_timeout: A client that has joined no namespace by then is closed, > 0.
        max_in_flight: Events of one client that run at a time, >= 1.
        max_in_flight_bytes: Memory of one client's events that run at a time, in bytes, >= 1; one
            alone may have more, further ones wait.
        max_waiting_bytes: Memory of one client's waiting events, in bytes, >= 1; beyond it the
            client is not read until some have begun. Eight times that while it owes an answer.
        max_containers: Lists and objects that one packet may hold, >= 1; a client that sends more
            is closed.
        event_output_max_bytes: Bytes of what one event may cause to be sent and wait at a time,
            answers and emits, >= 1; beyond it these raise
            :class:`~flask_socketio_guard.OutputTooLarge`.
        departure_timeout: After a client has left, for how long none of its waiting events may
            begin before they are given up, > 0.
        event_rate: Events of one client, as *connection_rate*.
        rate_storage: Where rates are counted, in the words of the ``limits``
            library: ``"memory://"``, or ``"redis://..."`` for all processes together.
        send_queue_max_packets: Messages that may wait for one client, >= 1.
        send_queue_max_bytes: Bytes that may wait for one client, >= 1; a single
            larger message passes when nothing else waits.
        slow_consumer_timeout: A client whose queue is full is slow once it has taken nothing
            for so long, in seconds, > 0. Until then an emitter that may wait, waits for it.
        slow_consumer: What happens to a client that is slow:
            ``"disconnect"``, ``"drop_oldest"`` (of its waiting events) or
            ``"drop_volatile"`` (disconnect when none of them is volatile).
        close_timeout: How long a client may take to answer a close, > 0.
        websocket_compression: Whether to agree to permessage-deflate.
        drain_delay: Seconds between turning unready and closing the first
            client, >= 0.
        drain_window: Seconds over which clients are closed, >= 0.
        delivery_store: Where messages that must arrive are kept: ``None`` for the memory of this
            process, or a URL of Redis or Valkey for all processes together, ``"redis://..."``;
            :data:`STORE_SCHEMES` lists what it may begin with. Or a
            callable that returns a store of your own, a
            :class:`~flask_socketio_guard.delivery.store.DeliveryStore`.
        delivery_lease: Seconds after which others take over what a dead process did for such
            messages, > 0.
        delivery_ack_timeout: How long a client may take to acknowledge a message that must
            arrive before it is sent again, > 0.
        delivery_deadline: How long such a message is kept for its recipient, unless told
            otherwise, > 0.
        delivery_max_in_flight: Such messages to one recipient that may be unacknowledged at a
            time, >= 1.
        delivery_max_messages: Such messages that may wait in the store, >= 1.
        delivery_max_bytes: Bytes that they may take there, with all that is kept about them, >= 1.
        delivery_max_message_bytes: Bytes of JSON that the arguments of one may take, >= 1.
        delivery_retention: How long receipts are good for after the message has ended, >= 0.
        delivery_max_receipt_bytes: Bytes that the receipts of those may take, >= 1; the oldest
            go first.
        delivery_dead_letter_retention: How long dead letters are kept, > 0.
        delivery_max_dead_letter_bytes: Bytes that they may take, >= 1; the oldest go first.
        scripts_path: Below it ``deliveries.js`` is served to browsers; ``None`` for nowhere.
        blocking_timeout: A blocked event loop is reported after this time, > 0;
            ``None``: never.
        log_fold_interval: Repeats of one warning are counted for so long and
            then told in one line, > 0.
        fast_contexts: Whether route and session of a connection are worked out
            once, and not for each event. For diagnosis, as all that follow.
        fast_json: Whether JSON encoders and decoders are kept.
        fast_writes: Whether all that is sent to a client within one turn of the event
            loop is written in one go.
        fast_broadcasts: Whether broadcasts are written past the queues of those
            clients for whom nothing waits.
        fast_queue: Whether messages to and from other processes travel many at a time.
    """

    callback_timeout: float = 60.0
    probe_interval: float = 1.0
    probe_timeout: float = 2.0
    broker_timeout: float = 1.0
    reconnect_max_delay: float = 0.3
    resubscribe_timeout: float = 2.0
    restart_max_delay: float = 5.0
    outbox_max_messages: int = 10_000
    outbox_max_bytes: int = 64 * 1024 * 1024
    outbox_overflow: str = "raise"
    exit_flush_timeout: float = 5.0
    stop_timeout: float = 5.0
    broker_down: str = "warn"
    health_details: str | Callable[[Any], bool] | None = None
    healthz_path: str | None = "/healthz"
    livez_path: str | None = "/livez"
    readyz_path: str | None = "/readyz"
    max_connections: int | None = None
    max_connections_per_address: int | None = None
    connection_rate: str | None = None
    connection_rate_per_address: str | None = None
    max_joins_per_minute: int = 300
    join_rate_per_address: str | None = None
    connect_timeout: float = 20.0
    http_timeout: float = 75.0
    join_timeout: float = 45.0
    max_in_flight: int = 64
    max_in_flight_bytes: int = 64 * 1024 * 1024
    max_waiting_bytes: int = 4 * 1024 * 1024
    max_containers: int = 100_000
    event_output_max_bytes: int = 64 * 1024 * 1024
    departure_timeout: float = 30.0
    event_rate: str | None = None
    rate_storage: str = "memory://"
    send_queue_max_packets: int = 5000
    send_queue_max_bytes: int = 1024 * 1024
    slow_consumer_timeout: float = 10.0
    slow_consumer: str = "disconnect"
    close_timeout: float = 2.0
    websocket_compression: bool = False
    drain_delay: float = 0.0
    drain_window: float = 1.0
    delivery_store: str | Callable[[], Any] | None = None
    delivery_lease: float = 5.0
    delivery_ack_timeout: float = 10.0
    delivery_deadline: float = 3600.0
    delivery_max_in_flight: int = 16
    delivery_max_messages: int = 100_000
    delivery_max_bytes: int = 128 * 1024 * 1024
    delivery_max_message_bytes: int = 256 * 1024
    delivery_retention: float = 600.0
    delivery_max_receipt_bytes: int = 32 * 1024 * 1024
    delivery_dead_letter_retention: float = 7 * 24 * 3600.0
    delivery_max_dead_letter_bytes: int = 16 * 1024 * 1024
    scripts_path: str | None = "/socketio-guard"
    blocking_timeout: float | None = 0.4
    log_fold_interval: float = 60.0
    fast_contexts: bool = True
    fast_json: bool = True
    fast_writes: bool = True
    fast_broadcasts: bool = True
    fast_queue: bool = True

    def __post_init__(self) -> None:
        for name, (is_met, wanted) in _RULES.items():
            value = getattr(self, name)
            if is_met(value):
                continue
            # Tokens and passwords in URLs must not reach a log through an error.
            found = "" if name in _SECRETS else f", not {value!r}"
            raise ConfigError(f"{PREFIX}{name.upper()} must be {wanted}{found}")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], **overrides: Any) -> GuardConfig:
        """Read the ``SOCKETIO_GUARD_*`` keys of *mapping*.

        Args:
            mapping: Usually ``app.config``; other keys are ignored.
            overrides: Settings by attribute name; they win over *mapping*.

        Raises:
            ConfigError: A key is unknown or a value out of range.
        """
        names = [field.name for field in fields(cls)]
        settings: dict[str, Any] = {}
        for key, value in mapping.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                settings[_known(key.removeprefix(PREFIX).lower(), names, key)] = value
        for name, value in overrides.items():
            settings[_known(name, names, name)] = value
        return cls(**settings)

    @classmethod
    def from_environment(cls, **overrides: Any) -> GuardConfig:
        """Read numbers and words from environment variables ``SOCKETIO_GUARD_*``.

        For processes without a Flask application. ``none`` is ``None`` where
        that is allowed.

        Raises:
            ConfigError: A variable is unknown or its value out of range.
        """
        types = {field.name: field.type for field in fields(cls)}
        settings: dict[str, Any] = {}
        for key, text in os.environ.items():
            if key.startswith(PREFIX):
                name = _known(key.removeprefix(PREFIX).lower(), list(types), key)
                settings[name] = _parse(text, str(types[name]), key)
        for name, value in overrides.items():
            settings[_known(name, list(types), name)] = value
        return cls(**settings)


def _is_seconds(value: object, *, is_zero_allowed: bool = False) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value < float("inf") and (value > 0 or (is_zero_allowed and value == 0))


def require_seconds(name: str, value: object) -> None:
    """Make sure that *value* is a duration: a finite number of seconds, > 0.

    Raises:
        ConfigError: It is not; the text calls it *name*.
    """
    if not _is_seconds(value):
        raise ConfigError(f"{name} must be a number of seconds > 0, not {value!r}")


def require_plain(name: str, function: object) -> None:
    """Make sure that a call of *function* runs its body.

    Raises:
        ConfigError: It is an ``async def`` or a generator function; the text calls it *name*.
    """
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004 - of an object
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            kind, mend = "an async def", "write it as a plain def"
        elif inspect.isgeneratorfunction(each):
            kind, mend = "a generator", "let it return, and emit what it would yield"
        else:
            continue
        raise ConfigError(f"{name} is {kind} function, whose body would never run: {mend}")


def _is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object, *, beginning: str = "") -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.startswith(beginning)


def _known(name: str, names: list[str], key: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
    raise ConfigError(f"unknown setting {key}{hint}")


def _parse(text: str, annotation: str, key: str) -> object:
    if annotation.endswith("| None") and text.lower() == "none":
        return None
    if annotation == "bool":
        if text.lower() not in _WORDS:
            raise ConfigError(f"{key} must be true or false, not {text!r}")
        return _WORDS[text.lower()]
    try:
        if "int" in annotation:
            return int(text)
        if "float" in annotation:
            return float(text)
    except ValueError:
        raise ConfigError(f"{key} must be a number, not {text!r}") from None
    return text


_Rule = tuple[Callable[[object], bool], str]


def _or_none(rule: _Rule) -> _Rule:
    is_met, wanted = rule
    return lambda value: value is None or is_met(value), f"None or {wanted}"


def _one_of(*choices: str) -> _Rule:
    return choices.__contains__, " or ".join(repr(choice) for choice in choices)


_FLAG: _Rule = (lambda value: isinstance(value, bool), "True or False")
_POSITIVE: _Rule = (_is_seconds, "> 0")
_NOT_NEGATIVE: _Rule = (partial(_is_seconds, is_zero_allowed=True), ">= 0")
_COUNT: _Rule = (partial(_is_whole, least=1), "an integer >= 1")
_RATE: _Rule = (_is_text, 'a rate such as "20/second"')
_PATH: _Rule = (partial(_is_text, beginning="/"), 'a path that begins with "/"')
_STORE: _Rule = (
    lambda value: (
        value is None
        or callable(value)
        or (isinstance(value, str) and value.startswith(STORE_SCHEMES))
    ),
    "None, a URL of Redis or Valkey, or a callable",
)
_DETAILS: _Rule = (
    lambda value: value is None or callable(value) or _is_text(value),
    "None, a non-empty token or a callable",
)

_RULES: Mapping[str, _Rule] = {
    "callback_timeout": _POSITIVE,
    "probe_interval": _POSITIVE,
    "probe_timeout": _POSITIVE,
    "broker_timeout": _POSITIVE,
    "reconnect_max_delay": _POSITIVE,
    "resubscribe_timeout": _NOT_NEGATIVE,
    "restart_max_delay": _POSITIVE,
    "outbox_max_messages": _COUNT,
    "outbox_max_bytes": _COUNT,
    "outbox_overflow": _one_of("raise", "drop_oldest"),
    "exit_flush_timeout": _NOT_NEGATIVE,
    "stop_timeout": _NOT_NEGATIVE,
    "broker_down": _one_of("warn", "fail"),
    "health_details": _DETAILS,
    "healthz_path": _or_none(_PATH),
    "livez_path": _or_none(_PATH),
    "readyz_path": _or_none(_PATH),
    "max_connections": _or_none(_COUNT),
    "max_connections_per_address": _or_none(_COUNT),
    "connection_rate": _or_none(_RATE),
    "connection_rate_per_address": _or_none(_RATE),
    "max_joins_per_minute": _COUNT,
    "join_rate_per_address": _or_none(_RATE),
    "connect_timeout": _POSITIVE,
    "http_timeout": _POSITIVE,
    "join_timeout": _POSITIVE,
    "max_in_flight": _COUNT,
    "max_in_flight_bytes": _COUNT,
    "max_waiting_bytes": _COUNT,
    "max_containers": _COUNT,
    "event_output_max_bytes": _COUNT,
    "departure_timeout": _POSITIVE,
    "event_rate": _or_none(_RATE),
    "rate_storage": (lambda value: isinstance(value, str) and "://" in value, "a URL"),
    "send_queue_max_packets": _COUNT,
    "send_queue_max_bytes": _COUNT,
    "slow_consumer_timeout": _POSITIVE,
    "slow_consumer": _one_of("disconnect", "drop_oldest", "drop_volatile"),
    "close_timeout": _POSITIVE,
    "websocket_compression": _FLAG,
    "drain_delay": _NOT_NEGATIVE,
    "drain_window": _NOT_NEGATIVE,
    "delivery_store": _STORE,
    "delivery_lease": _POSITIVE,
    "delivery_ack_timeout": _POSITIVE,
    "delivery_deadline": _POSITIVE,
    "delivery_max_in_flight": _COUNT,
    "delivery_max_messages": _COUNT,
    "delivery_max_bytes": _COUNT,
    "delivery_max_message_bytes": _COUNT,
    "delivery_retention": _NOT_NEGATIVE,
    "delivery_max_receipt_bytes": _COUNT,
    "delivery_dead_letter_retention": _POSITIVE,
    "delivery_max_dead_letter_bytes": _COUNT,
    "scripts_path": _or_none(_PATH),
    "blocking_timeout": _or_none(_POSITIVE),
    "log_fold_interval": _POSITIVE,
    "fast_contexts": _FLAG,
    "fast_json": _FLAG,
    "fast_writes": _FLAG,
    "fast_broadcasts": _FLAG,
    "fast_queue": _FLAG,
}
_SECRETS = ("health_details", "rate_storage", "delivery_store")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

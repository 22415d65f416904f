"""Settings: read once, validated, in seconds and bytes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from .checks import is_seconds
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


def _is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object, *, beginning: str = "") -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.startswith(beginning)


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
_POSITIVE: _Rule = (is_seconds, "a number of seconds > 0")
_NOT_NEGATIVE: _Rule = (partial(is_seconds, is_zero_allowed=True), "a number of seconds >= 0")
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
_URL: _Rule = (lambda value: isinstance(value, str) and "://" in value, "a URL")


def _setting(default: Any, rule: _Rule, *meaning: str) -> Any:
    return field(default=default, metadata={"rule": rule, "meaning": "".join(meaning)})


@dataclass(frozen=True)
class GuardConfig:
    """Every setting of the guard, one attribute for each ``SOCKETIO_GUARD_*`` key.

    Durations are float seconds, sizes are bytes. A keyword wins over ``app.config``, and that over
    the environment.

    Source:
        The page of settings is made of the metadata of these fields; see :func:`settings_table`.
    """

    callback_timeout: float = _setting(
        60.0,
        _POSITIVE,
        "how long an acknowledgement callback waits for its client",
    )
    probe_interval: float = _setting(
        1.0,
        _POSITIVE,
        "time between two probes of the listener",
    )
    probe_timeout: float = _setting(
        2.0,
        _POSITIVE,
        "a probe not back after this time is overdue",
    )
    broker_timeout: float = _setting(
        1.0,
        _POSITIVE,
        "longest wait for Redis before it is asked anew over a fresh connection",
    )
    reconnect_max_delay: float = _setting(
        0.3,
        _POSITIVE,
        "cap of the delay between two attempts to reach a broker that is away",
    )
    resubscribe_timeout: float = _setting(
        2.0,
        _NOT_NEGATIVE,
        "after an outage, longest wait for the usual subscribers before the outbox empties itself",
    )
    restart_max_delay: float = _setting(
        5.0,
        _POSITIVE,
        "cap of the delay between two restarts of a task",
    )
    outbox_max_messages: int = _setting(
        10_000,
        _COUNT,
        "messages that may wait for the broker",
    )
    outbox_max_bytes: int = _setting(
        64 * 1024 * 1024,
        _COUNT,
        "bytes that may wait for the broker",
    )
    outbox_overflow: str = _setting(
        "raise",
        _one_of("raise", "drop_oldest"),
        'at the bound: `"raise"` `OutboxFull` to the caller, or `"drop_oldest"`, as '
        "always while Redis refuses what is published; counted either way",
    )
    exit_flush_timeout: float = _setting(
        5.0,
        _NOT_NEGATIVE,
        "how long a process that exits waits for its outbox; a test or a command that "
        "has never reached Redis does not wait",
    )
    stop_timeout: float = _setting(
        5.0,
        _NOT_NEGATIVE,
        "how long tasks may take to end",
    )
    broker_down: str = _setting(
        "warn",
        _one_of("warn", "fail"),
        'what it means for `/readyz` that a broker which was reached is away: `"warn"` '
        'is 200, `"fail"` is 503',
    )
    health_details: str | Callable[[Any], bool] | None = _setting(
        None,
        _DETAILS,
        "who sees names, counts and ages: a token (`Authorization: Bearer ...`), a "
        "callable that takes a `werkzeug.Request`, or nobody; in debug mode everybody",
    )
    healthz_path: str | None = _setting(
        "/healthz",
        _or_none(_PATH),
        "path of the full health answer; `None` switches it off. A route of the "
        "application at it is a `ConfigError`, for it would be hidden",
    )
    livez_path: str | None = _setting(
        "/livez",
        _or_none(_PATH),
        "path of the liveness answer, the same",
    )
    readyz_path: str | None = _setting(
        "/readyz",
        _or_none(_PATH),
        "path of the readiness answer, the same",
    )
    health_in_front: bool = _setting(
        True,
        _FLAG,
        "whether these three are answered in front of the application; `False` sends them through "
        "Flask, with its `before_request` functions and sessions",
    )
    max_connections: int | None = _setting(
        None,
        _or_none(_COUNT),
        "Socket.IO connections that this process accepts; `None`: as many as it can hold "
        "([gunicorn's `worker_connections` and open files](deployment.md), less some for "
        "other requests). Further handshakes get 503 with `Retry-After`, also in place "
        "of a WebSocket. When it is full, the oldest client goes that has joined nothing "
        "for 3 s",
    )
    max_connections_per_address: int | None = _setting(
        None,
        _or_none(_COUNT),
        "the same for one client address, as the application sees it: behind a proxy use "
        "Werkzeug's `ProxyFix`. An IPv6 client counts as its /64 network, in which it "
        "may take any address",
    )
    connection_rate: str | None = _setting(
        None,
        _or_none(_RATE),
        'new connections that this process accepts, such as `"100/second"`; further '
        "handshakes are refused in the same way. CORS preflights and invalid handshakes "
        "do not count",
    )
    connection_rate_per_address: str | None = _setting(
        None,
        _or_none(_RATE),
        'the same for one client address, such as `"10/second"`. Off unless you set it: '
        "behind a proxy without `ProxyFix` all clients share one address",
    )
    max_joins_per_minute: int = _setting(
        300,
        _COUNT,
        "CONNECT packets that one client may send within a minute, whatever becomes of "
        "them; with more it is told `rate_limited` and closed with 1008",
    )
    join_rate_per_address: str | None = _setting(
        None,
        _or_none(_RATE),
        'CONNECT packets from one client address, such as `"30/minute"`; further ones '
        "are refused with `rate_limited`. Behind a proxy use `ProxyFix`",
    )
    connect_timeout: float = _setting(
        20.0,
        _POSITIVE,
        "longest run of a connect handler; then the client is refused",
    )
    http_timeout: float = _setting(
        75.0,
        _POSITIVE,
        "how long a client may send nothing within an HTTP request, its body included, "
        "and between two on one connection, under gevent's WSGI server "
        "(`geventwebsocket` workers). Longer than proxies keep idle connections, 60 s "
        "for most. gunicorn's own workers have `keepalive`",
    )
    join_timeout: float = _setting(
        45.0,
        _POSITIVE,
        "a client that has joined no namespace after this time is closed",
    )
    max_in_flight: int = _setting(
        64,
        _COUNT,
        "events of one client that run at a time; further ones wait",
    )
    max_in_flight_bytes: int = _setting(
        64 * 1024 * 1024,
        _COUNT,
        "memory that these may take, counted as below: 64 plain messages of 1 MB run at "
        "a time, but of such that are lists and objects all over only a few. One alone "
        "always runs",
    )
    max_waiting_bytes: int = _setting(
        4 * 1024 * 1024,
        _COUNT,
        "memory that one client's waiting events may take, 1 kB for each and what its "
        "payload takes when it is decoded. Beyond it the client is not read until some "
        "of them have begun, so that TCP slows it down; over polling its request waits. "
        "Nothing is lost or refused. While the client owes an answer (`call()`, a "
        "callback) it is read on up to eight times as much, since the answer may be "
        "behind its events",
    )
    max_containers: int = _setting(
        100_000,
        _COUNT,
        "lists and objects that one packet may hold: an empty list is two characters, "
        "and costs more than 80 bytes and 0.05 µs. A client that sends more is closed "
        "with 1009, over polling its request is answered with 400. A table of 50,000 "
        "rows passes, and whatever has more than ten characters for each list or object; "
        "raise it where packets are larger than 1 MB",
    )
    event_output_max_bytes: int = _setting(
        64 * 1024 * 1024,
        _COUNT,
        "bytes of answer and emits of one event that may wait at a time, messages from "
        "16 KiB on; a broadcast counts once. Beyond it `emit` waits as long as some of "
        "that leaves, and then raises `OutputTooLarge`; the client gets the code "
        "`output_too_large`. What has been sent counts no more, so a handler may stream "
        "as much as it likes",
    )
    departure_timeout: float = _setting(
        30.0,
        _POSITIVE,
        "events that a client sent before it left begin before its disconnect handler "
        "runs; if none can begin for this time, because its handlers do not end, the "
        "rest is lost and counted",
    )
    event_rate: str | None = _setting(
        None,
        _or_none(_RATE),
        'events of one client, such as `"20/second"`; those beyond are answered with '
        "`rate_limited`",
    )
    rate_storage: str = _setting(
        "memory://",
        _URL,
        'where rates are counted: in this process, or `"redis://..."` for all processes '
        "together; or a function that returns a store of your own",
    )
    send_queue_max_packets: int = _setting(
        5000,
        _COUNT,
        "messages that may wait for one client before emitters wait, too: see "
        "[backpressure](how-it-works.md#what-one-client-may-cost)",
    )
    send_queue_max_bytes: int = _setting(
        1024 * 1024,
        _COUNT,
        "bytes that may wait for one client; a larger message passes when nothing else waits",
    )
    slow_consumer_timeout: float = _setting(
        10.0,
        _POSITIVE,
        "a client whose queue is full is slow once it has taken nothing for so long",
    )
    slow_consumer: str = _setting(
        "disconnect",
        _one_of("disconnect", "drop_oldest", "drop_volatile"),
        'what happens to a slow client: `"disconnect"` (close code 1008, `slow '
        'consumer`), `"drop_oldest"` of its events, or `"drop_volatile"` ones and '
        "disconnect when there are none",
    )
    close_timeout: float = _setting(
        2.0,
        _POSITIVE,
        "how long a client may take to answer a close",
    )
    websocket_compression: bool = _setting(
        False,
        _FLAG,
        "whether to agree to permessage-deflate when a client offers it; costs memory "
        "for each connection",
    )
    drain_delay: float = _setting(
        0.0,
        _NOT_NEGATIVE,
        "time between turning unready and closing the first client, for the load "
        "balancer to notice",
    )
    drain_window: float = _setting(
        1.0,
        _NOT_NEGATIVE,
        "time over which clients are closed when the process stops, so that they do not "
        "all come back at once",
    )
    delivery_store: str | Callable[[], Any] | None = _setting(
        None,
        _STORE,
        "where [messages that must arrive](delivery.md) are kept: in this process, or "
        '`"redis://..."` for all processes together; Sentinel, Unix sockets and Valkey '
        "as for the message queue, no cluster",
    )
    delivery_lease: float = _setting(
        5.0,
        _POSITIVE,
        "time after which others take over what a dead process did for such messages",
    )
    delivery_ack_timeout: float = _setting(
        10.0,
        _POSITIVE,
        "how long a client may take to acknowledge one before it is sent again",
    )
    delivery_ttl: float = _setting(
        3600.0,
        _POSITIVE,
        "how long one is kept for its recipient, unless `deliver` says otherwise",
    )
    delivery_max_in_flight: int = _setting(
        16,
        _COUNT,
        "such messages to one recipient that may be unacknowledged at a time",
    )
    delivery_max_messages: int = _setting(
        100_000,
        _COUNT,
        "such messages that may wait; `deliver` raises `DeliveryStoreFull` then",
    )
    delivery_max_bytes: int = _setting(
        128 * 1024 * 1024,
        _COUNT,
        "bytes that they may take in the store, [with all that is kept about "
        "them](delivery.md#what-it-takes)",
    )
    delivery_max_message_bytes: int = _setting(
        256 * 1024,
        _COUNT,
        "bytes of JSON that the arguments of one may take",
    )
    delivery_retention: float = _setting(
        600.0,
        _NOT_NEGATIVE,
        "how long receipts are good for after the message has ended",
    )
    delivery_max_receipt_bytes: int = _setting(
        32 * 1024 * 1024,
        _COUNT,
        "bytes that the receipts of those may take; the oldest go first",
    )
    delivery_dead_letter_retention: float = _setting(
        7 * 24 * 3600.0,
        _POSITIVE,
        "how long dead letters are kept",
    )
    delivery_max_dead_letter_bytes: int = _setting(
        16 * 1024 * 1024,
        _COUNT,
        "bytes that they may take; the oldest go first",
    )
    scripts_path: str | None = _setting(
        "/socketio-guard",
        _or_none(_PATH),
        "below it `deliveries.js` is served to browsers, so a proxy has to pass it, too; "
        "`None`: nowhere",
    )
    blocking_timeout: float | None = _setting(
        0.4,
        _or_none(_POSITIVE),
        "an event loop that is blocked for longer is reported with the stack that blocks "
        "it; `None`: never",
    )
    log_fold_interval: float = _setting(
        60.0,
        _POSITIVE,
        "repeats of one warning are counted for so long and then told in one line",
    )
    fast: bool = _setting(
        True,
        _FLAG,
        "for diagnosis: `False` does everything as upstream does it, one by one. `True` "
        "works out route and session of a connection once, keeps JSON encoders, and "
        "writes and publishes many messages in one go",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            is_met, wanted = setting.metadata["rule"]
            if is_met(value):
                continue
            # Tokens and passwords in URLs must not reach a log through an error.
            found = "" if setting.name in _SECRETS else f", not {value!r}"
            raise ConfigError(f"{PREFIX}{setting.name.upper()} must be {wanted}{found}")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], **overrides: Any) -> GuardConfig:
        """Read the ``SOCKETIO_GUARD_*`` keys of *mapping*, and of the environment.

        Args:
            mapping: Usually ``app.config``; other keys are ignored. It wins over the environment.
            overrides: Settings by attribute name; they win over *mapping*.

        Raises:
            ConfigError: A key is unknown, or a value of the wrong type or out of range.
        """
        settings = _from_environment()
        for key, value in mapping.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                settings[_known(key.removeprefix(PREFIX).lower(), key)] = value
        for name, value in overrides.items():
            settings[_known(name, name)] = value
        return cls(**settings)

    @classmethod
    def from_environment(cls, **overrides: Any) -> GuardConfig:
        """Read environment variables ``SOCKETIO_GUARD_*`` only.

        For processes without a Flask application. ``none`` is ``None`` where
        that is allowed.

        Raises:
            ConfigError: A variable is unknown or its value out of range.
        """
        return cls.from_mapping({}, **overrides)


def settings_table() -> str:
    """Return all settings as a table in Markdown: key, default and meaning."""
    rows = ["| key `SOCKETIO_GUARD_...` | default | meaning |", "|---|---|---|"]
    for setting in fields(GuardConfig):
        default = setting.default
        if isinstance(default, float) and default.is_integer():
            default = int(default)
        text = str(default) if type(default) in (int, float) else f"`{_quoted(default)}`"
        rows.append(f"| `{setting.name.upper()}` | {text} | {setting.metadata['meaning']} |")
    return "\n".join(rows) + "\n"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _from_environment() -> dict[str, Any]:
    types = {setting.name: str(setting.type) for setting in fields(GuardConfig)}
    settings: dict[str, Any] = {}
    for key, text in os.environ.items():
        if key.startswith(PREFIX):
            name = _known(key.removeprefix(PREFIX).lower(), key)
            settings[name] = _parse(text, types[name], key)
    return settings


def _known(name: str, key: str) -> str:
    names = [setting.name for setting in fields(GuardConfig)]
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
    raise ConfigError(f"unknown setting {key}{hint}")


_SECRETS = ("health_details", "rate_storage", "delivery_store")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

"""Settings: every key, its range, and the words of the error."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from flask_socketio_guard.checks import require_seconds
from flask_socketio_guard.config import STORE_SCHEMES, GuardConfig
from flask_socketio_guard.errors import ConfigError
from tests.support.cases import in_turn
from tests.tools.settings_page import PAGE, written

SECRET = "s3cret-token"

POSITIVE_SECONDS = (
    "callback_timeout",
    "probe_interval",
    "probe_timeout",
    "broker_timeout",
    "reconnect_max_delay",
    "restart_max_delay",
    "connect_timeout",
    "http_timeout",
    "join_timeout",
    "close_timeout",
    "slow_consumer_timeout",
    "delivery_lease",
    "delivery_ack_timeout",
    "delivery_ttl",
    "delivery_dead_letter_retention",
    "departure_timeout",
    "log_fold_interval",
)
SECONDS = (
    "resubscribe_timeout",
    "exit_flush_timeout",
    "stop_timeout",
    "drain_delay",
    "drain_window",
    "delivery_retention",
)
COUNTS = (
    "outbox_max_messages",
    "outbox_max_bytes",
    "max_joins_per_minute",
    "max_in_flight",
    "max_in_flight_bytes",
    "max_waiting_bytes",
    "max_containers",
    "event_output_max_bytes",
    "send_queue_max_packets",
    "delivery_max_in_flight",
    "delivery_max_messages",
    "delivery_max_bytes",
    "delivery_max_receipt_bytes",
    "delivery_max_dead_letter_bytes",
    "delivery_max_message_bytes",
    "send_queue_max_bytes",
)
OPTIONAL_COUNTS = ("max_connections", "max_connections_per_address")
RATES = (
    "connection_rate",
    "connection_rate_per_address",
    "event_rate",
    "join_rate_per_address",
)
FLAGS = ("health_in_front", "websocket_compression", "fast")
SECRETS = ("health_details", "rate_storage", "delivery_store")
PATHS = ("healthz_path", "livez_path", "readyz_path", "scripts_path")
NO_SECONDS: list[Any] = ["1", None, True, [], float("nan"), float("inf"), -0.1, -1]

WRONG: list[tuple[str, Any, str]] = [
    *(
        (name, value, "a number of seconds > 0")
        for name in POSITIVE_SECONDS
        for value in [*NO_SECONDS, 0, 0.0]
    ),
    *((name, value, "a number of seconds >= 0") for name in SECONDS for value in NO_SECONDS),
    *(
        (name, value, "an integer >= 1")
        for name in COUNTS
        for value in (0, -1, 1.5, "10", True, None)
    ),
    *(
        (name, value, "None or an integer >= 1")
        for name in OPTIONAL_COUNTS
        for value in (0, -1, 1.5, "10", True, [])
    ),
    *(
        (name, value, 'None or a rate such as "20/second"')
        for name in RATES
        for value in ("", " ", 20, 0.5, True, ["20/second"], b"20/second")
    ),
    *(
        ("blocking_timeout", value, "None or a number of seconds > 0")
        for value in [*NO_SECONDS, 0, 0.0]
        if value is not None
    ),
    *(
        (name, value, "True or False")
        for name in FLAGS
        for value in (0, 1, "true", "False", None, [])
    ),
    *(
        ("slow_consumer", value, "'disconnect' or 'drop_oldest' or 'drop_volatile'")
        for value in ("drop", "", "Disconnect", None, True, [])
    ),
    *(
        ("outbox_overflow", value, "'raise' or 'drop_oldest'")
        for value in ("drop_newest", "", None, True, [])
    ),
    *(("broker_down", value, "'warn' or 'fail'") for value in ("Warn", "", None, 1)),
    *(
        (name, value, 'None or a path that begins with "/" and has no "<"')
        for name in PATHS
        for value in ("healthz", "", " /", "/<name>", 1, True, [])
    ),
]
RIGHT: list[tuple[str, Any]] = [
    *((name, value) for name in POSITIVE_SECONDS for value in (0.001, 1, 2.5, 86_400)),
    *((name, value) for name in SECONDS for value in (0, 0.0, 1, 2.5)),
    *((name, value) for name in COUNTS for value in (1, 10**9)),
    *((name, value) for name in OPTIONAL_COUNTS for value in (None, 1, 5000)),
    *((name, value) for name in RATES for value in (None, "20/second", "5 per 10 minutes")),
    *(("blocking_timeout", value) for value in (None, 0.001, 1, 2.5)),
    *((name, value) for name in FLAGS for value in (True, False)),
    *(("slow_consumer", value) for value in ("disconnect", "drop_oldest", "drop_volatile")),
    *(("delivery_store", value) for value in (None, "redis://:secret@h/0", "unix:///r.sock")),
    *(("delivery_store", f"{scheme}h:1/0/main") for scheme in STORE_SCHEMES),
    *(("rate_storage", value) for value in ("memory://", "redis://:secret@localhost:6380/0")),
    *(("outbox_overflow", value) for value in ("raise", "drop_oldest")),
    *(("broker_down", value) for value in ("warn", "fail")),
    *((name, value) for name in PATHS for value in (None, "/", "/health/z")),
    *(("health_details", value) for value in (None, SECRET, bool)),
]


def key(name: str) -> str:
    return f"SOCKETIO_GUARD_{name.upper()}"


def refusal(settings: dict[str, Any]) -> str:
    """Return what is said against *settings*."""
    try:
        config = GuardConfig.from_mapping(settings)
    except ConfigError as error:
        return str(error)
    return f"nothing: they make {config}"


def test_defaults_are_the_documented_ones() -> None:
    assert GuardConfig() == GuardConfig(
        callback_timeout=60.0,
        probe_interval=1.0,
        probe_timeout=2.0,
        broker_timeout=1.0,
        reconnect_max_delay=0.3,
        resubscribe_timeout=2.0,
        restart_max_delay=5.0,
        outbox_max_messages=10_000,
        outbox_max_bytes=67_108_864,
        outbox_overflow="raise",
        exit_flush_timeout=5.0,
        stop_timeout=5.0,
        broker_down="warn",
        health_details=None,
        healthz_path="/healthz",
        livez_path="/livez",
        readyz_path="/readyz",
        health_in_front=True,
        max_connections=None,
        max_connections_per_address=None,
        connection_rate=None,
        connection_rate_per_address=None,
        max_joins_per_minute=300,
        join_rate_per_address=None,
        connect_timeout=20.0,
        http_timeout=75.0,
        join_timeout=45.0,
        max_in_flight=64,
        max_in_flight_bytes=67_108_864,
        max_waiting_bytes=4_194_304,
        max_containers=100_000,
        event_output_max_bytes=67_108_864,
        departure_timeout=30.0,
        event_rate=None,
        rate_storage="memory://",
        send_queue_max_packets=5000,
        send_queue_max_bytes=1_048_576,
        slow_consumer_timeout=10.0,
        slow_consumer="disconnect",
        close_timeout=2.0,
        websocket_compression=False,
        drain_delay=0.0,
        drain_window=1.0,
        delivery_store=None,
        scripts_path="/socketio-guard",
        delivery_lease=5.0,
        delivery_ack_timeout=10.0,
        delivery_ttl=3600.0,
        delivery_max_in_flight=16,
        delivery_max_messages=100_000,
        delivery_max_bytes=134_217_728,
        delivery_max_message_bytes=262_144,
        delivery_retention=600.0,
        delivery_max_receipt_bytes=33_554_432,
        delivery_dead_letter_retention=604_800.0,
        delivery_max_dead_letter_bytes=16_777_216,
        blocking_timeout=0.4,
        log_fold_interval=60.0,
        fast=True,
    )


def test_every_setting_is_tried_here() -> None:
    """A new setting needs its wrong and right values in this file."""
    names = {field.name for field in fields(GuardConfig)}
    assert {name for name, _ in RIGHT} == names
    assert {name for name, _, _ in WRONG} == names - set(SECRETS)


def test_every_setting_is_described() -> None:
    for field in fields(GuardConfig):
        assert len(field.metadata["meaning"].split()) > 3, field.name


def test_the_page_of_settings_is_made_of_them() -> None:
    page = PAGE.read_text("utf-8")
    assert written(page) == page, "run python -m tests.tools.settings_page"
    names = re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)
    assert names == [field.name.upper() for field in fields(GuardConfig)]


def test_a_keyword_wins_over_the_configuration_and_that_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("STOP_TIMEOUT", "1"), ("DRAIN_WINDOW", "2"), ("PROBE_TIMEOUT", "3")):
        monkeypatch.setenv(f"SOCKETIO_GUARD_{name}", value)
    mapping = {"SOCKETIO_GUARD_STOP_TIMEOUT": 10.0, "SOCKETIO_GUARD_DRAIN_WINDOW": 20.0}
    config = GuardConfig.from_mapping(mapping, stop_timeout=100.0)
    assert (config.stop_timeout, config.drain_window, config.probe_timeout) == (100.0, 20.0, 3.0)


@in_turn("name", dict.fromkeys(name for name, _, _ in WRONG))
def test_a_value_out_of_range_is_refused_with_key_wish_and_value(name: str) -> None:
    for value, wanted in [(value, wanted) for of, value, wanted in WRONG if of == name]:
        assert refusal({key(name): value}) == f"{key(name)} must be {wanted}, not {value!r}"


@in_turn("name", dict.fromkeys(name for name, _ in RIGHT))
def test_a_value_in_range_is_taken(name: str) -> None:
    for value in [value for of, value in RIGHT if of == name]:
        assert getattr(GuardConfig.from_mapping({key(name): value}), name) == value


@in_turn("value", ["", " ", 5, True, [SECRET], b"s3cret-token"])
def test_wrong_health_details_are_refused_and_never_shown(value: Any) -> None:
    """Whatever it is, it was meant to be a secret."""
    with pytest.raises(ConfigError) as caught:
        GuardConfig(health_details=value)
    assert str(caught.value) == (
        "SOCKETIO_GUARD_HEALTH_DETAILS must be None, a non-empty token or a callable"
    )
    assert SECRET not in str(caught.value)


@in_turn("value", ["", SECRET, f"redis:{SECRET}", 5, True, None, [SECRET]])
def test_a_wrong_rate_storage_is_refused_and_never_shown(value: Any) -> None:
    """The URL of a Redis may hold its password."""
    with pytest.raises(ConfigError) as caught:
        GuardConfig(rate_storage=value)
    assert str(caught.value) == "SOCKETIO_GUARD_RATE_STORAGE must be a URL"


@in_turn("value", ["", SECRET, f"redis:{SECRET}", f"http://{SECRET}", 5, True])
def test_a_wrong_delivery_store_is_refused_and_never_shown(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig(delivery_store=value)
    assert (
        str(caught.value)
        == "SOCKETIO_GUARD_DELIVERY_STORE must be None, a URL of Redis or Valkey, or a callable"
    )


@pytest.mark.parametrize(
    ("unknown", "text"),
    [
        (
            "SOCKETIO_GUARD_CALLBACK_TIMOUT",
            "unknown setting SOCKETIO_GUARD_CALLBACK_TIMOUT; "
            "did you mean SOCKETIO_GUARD_CALLBACK_TIMEOUT?",
        ),
        (
            "SOCKETIO_GUARD_MAX_CONNECTION",
            "unknown setting SOCKETIO_GUARD_MAX_CONNECTION; "
            "did you mean SOCKETIO_GUARD_MAX_CONNECTIONS?",
        ),
        ("SOCKETIO_GUARD_XYZZY", "unknown setting SOCKETIO_GUARD_XYZZY"),
        ("SOCKETIO_GUARD_", "unknown setting SOCKETIO_GUARD_"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(unknown: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig.from_mapping({unknown: 1})
    assert str(caught.value) == text


def test_keys_of_others_are_ignored() -> None:
    mapping: dict[Any, Any] = {"SECRET_KEY": "x", "SOCKETIO": 1, 5: 1, "SOCKETIO_GUARD": True}
    assert GuardConfig.from_mapping(mapping) == GuardConfig()


def test_arguments_win_over_keys() -> None:
    config = GuardConfig.from_mapping({key("stop_timeout"): 1}, stop_timeout=2.0)
    assert config.stop_timeout == 2.0


def test_an_unknown_argument_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig.from_mapping({}, stop_timeot=2.0)
    assert str(caught.value) == (
        "unknown setting stop_timeot; did you mean SOCKETIO_GUARD_STOP_TIMEOUT?"
    )


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(FrozenInstanceError):
        GuardConfig().stop_timeout = 1.0  # type: ignore[misc]


def test_numbers_and_words_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKETIO_GUARD_STOP_TIMEOUT", "2.5")
    monkeypatch.setenv("SOCKETIO_GUARD_OUTBOX_MAX_MESSAGES", "7")
    monkeypatch.setenv("SOCKETIO_GUARD_MAX_CONNECTIONS", "9")
    monkeypatch.setenv("SOCKETIO_GUARD_OUTBOX_OVERFLOW", "drop_oldest")
    monkeypatch.setenv("SOCKETIO_GUARD_HEALTH_DETAILS", SECRET)
    monkeypatch.setenv("SOCKETIO_GUARD_HEALTHZ_PATH", "/z")
    assert GuardConfig.from_environment() == GuardConfig(
        stop_timeout=2.5,
        outbox_max_messages=7,
        max_connections=9,
        outbox_overflow="drop_oldest",
        health_details=SECRET,
        healthz_path="/z",
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "True", "TRUE", "1", "yes")),
        *((text, False) for text in ("false", "False", "0", "no", "NO")),
    ],
)
def test_a_switch_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, value: bool
) -> None:
    """``bool("false")`` would be true."""
    monkeypatch.setenv("SOCKETIO_GUARD_WEBSOCKET_COMPRESSION", text)
    assert GuardConfig.from_environment().websocket_compression is value


@pytest.mark.parametrize("text", ["none", "None"])
@pytest.mark.parametrize(
    "name",
    [field.name for field in fields(GuardConfig) if (field.name, None) in RIGHT],
)
def test_what_may_be_none_can_be_switched_off_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(key(name), text)
    assert getattr(GuardConfig.from_environment(), name) is None


def test_every_kind_of_setting_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOCKETIO_GUARD_BLOCKING_TIMEOUT", "0.25")
    monkeypatch.setenv("SOCKETIO_GUARD_MAX_CONNECTIONS_PER_ADDRESS", "5")
    monkeypatch.setenv("SOCKETIO_GUARD_MAX_IN_FLIGHT", "1")
    monkeypatch.setenv("SOCKETIO_GUARD_EVENT_RATE", "20/second")
    monkeypatch.setenv("SOCKETIO_GUARD_RATE_STORAGE", "redis://localhost:6380")
    monkeypatch.setenv("SOCKETIO_GUARD_SLOW_CONSUMER", "drop_volatile")
    monkeypatch.setenv("SOCKETIO_GUARD_DRAIN_WINDOW", "0")
    assert GuardConfig.from_environment() == GuardConfig(
        blocking_timeout=0.25,
        max_connections_per_address=5,
        max_in_flight=1,
        event_rate="20/second",
        rate_storage="redis://localhost:6380",
        slow_consumer="drop_volatile",
        drain_window=0.0,
    )


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("STOP_TIMEOUT", "soon", "SOCKETIO_GUARD_STOP_TIMEOUT must be a number, not 'soon'"),
        (
            "STOP_TIMEOUT",
            "-1",
            "SOCKETIO_GUARD_STOP_TIMEOUT must be a number of seconds >= 0, not -1.0",
        ),
        (
            "OUTBOX_MAX_BYTES",
            "1.5",
            "SOCKETIO_GUARD_OUTBOX_MAX_BYTES must be a number, not '1.5'",
        ),
        ("BROKER_DOWN", "no", "SOCKETIO_GUARD_BROKER_DOWN must be 'warn' or 'fail', not 'no'"),
        *(
            (
                "WEBSOCKET_COMPRESSION",
                text,
                f"SOCKETIO_GUARD_WEBSOCKET_COMPRESSION must be true or false, not {text!r}",
            )
            for text in ("", "2", "maybe", "none")
        ),
        ("CLOSE_TIMEOUT", "none", "SOCKETIO_GUARD_CLOSE_TIMEOUT must be a number, not 'none'"),
        ("BLOCKING_TIMEOUT", "", "SOCKETIO_GUARD_BLOCKING_TIMEOUT must be a number, not ''"),
        (
            "BLOCKING_TIMEOUT",
            "inf",
            "SOCKETIO_GUARD_BLOCKING_TIMEOUT must be None or a number of seconds > 0, not inf",
        ),
        (
            "STOP_TIMOUT",
            "1",
            "unknown setting SOCKETIO_GUARD_STOP_TIMOUT; did you mean SOCKETIO_GUARD_STOP_TIMEOUT?",
        ),
    ],
)
def test_a_wrong_environment_variable_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, error: str
) -> None:
    monkeypatch.setenv(f"SOCKETIO_GUARD_{name}", text)
    with pytest.raises(ConfigError) as caught:
        GuardConfig.from_environment()
    assert str(caught.value) == error


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKETIO_GUARD_STOP_TIMEOUT", "2.5")
    assert GuardConfig.from_environment(stop_timeout=1.0).stop_timeout == 1.0


def test_an_unknown_argument_is_refused_where_settings_come_from_the_environment() -> None:
    """As with an application: no TypeError of the class behind."""
    with pytest.raises(ConfigError) as caught:
        GuardConfig.from_environment(calback_timeout=3)
    assert str(caught.value) == (
        "unknown setting calback_timeout; did you mean SOCKETIO_GUARD_CALLBACK_TIMEOUT?"
    )


@in_turn("value", [*NO_SECONDS, 0, 0.0])
def test_a_duration_that_is_no_setting_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        require_seconds("every", value)
    assert str(caught.value) == f"every must be a number of seconds > 0, not {value!r}"


@pytest.mark.parametrize("value", [0.001, 1, 86_400])
def test_a_duration_that_is_no_setting_is_taken(value: float) -> None:
    require_seconds("every", value)

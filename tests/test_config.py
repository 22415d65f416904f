"""Settings: every key, its range, and the words of the error."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.errors import ConfigError

SECRET = "s3cret-token"

POSITIVE_SECONDS = (
    "callback_timeout",
    "probe_interval",
    "probe_timeout",
    "broker_timeout",
    "reconnect_max_delay",
    "restart_max_delay",
)
SECONDS = ("resubscribe_timeout", "exit_flush_timeout", "stop_timeout")
COUNTS = ("outbox_max_messages", "outbox_max_bytes")
PATHS = ("healthz_path", "livez_path", "readyz_path")
NO_SECONDS = ["1", None, True, [], float("nan"), float("inf"), -0.1, -1]

WRONG = [
    *((name, value, "> 0") for name in POSITIVE_SECONDS for value in [*NO_SECONDS, 0, 0.0]),
    *((name, value, ">= 0") for name in SECONDS for value in NO_SECONDS),
    *(
        (name, value, "an integer >= 1")
        for name in COUNTS
        for value in (0, -1, 1.5, "10", True, None)
    ),
    *(
        ("max_connections", value, "None or an integer >= 1")
        for value in (0, -1, 1.5, "10", True, [])
    ),
    *(
        ("outbox_overflow", value, "'raise' or 'drop_oldest'")
        for value in ("drop_newest", "", None, True, [])
    ),
    *(("broker_down", value, "'warn' or 'fail'") for value in ("Warn", "", None, 1)),
    *(
        (name, value, 'None or a path that begins with "/"')
        for name in PATHS
        for value in ("healthz", "", 1, True, [])
    ),
]
RIGHT = [
    *((name, value) for name in POSITIVE_SECONDS for value in (0.001, 1, 2.5, 86_400)),
    *((name, value) for name in SECONDS for value in (0, 0.0, 1, 2.5)),
    *((name, value) for name in COUNTS for value in (1, 10**9)),
    *(("max_connections", value) for value in (None, 1, 5000)),
    *(("outbox_overflow", value) for value in ("raise", "drop_oldest")),
    *(("broker_down", value) for value in ("warn", "fail")),
    *((name, value) for name in PATHS for value in (None, "/", "/health/z")),
    *(("health_details", value) for value in (None, SECRET, bool)),
]


def key(name: str) -> str:
    return f"SOCKETIO_GUARD_{name.upper()}"


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
        max_connections=None,
    )


def test_every_setting_is_tried_here() -> None:
    """A new setting needs its wrong and right values in this file."""
    names = {field.name for field in fields(GuardConfig)}
    assert {name for name, _ in RIGHT} == names
    assert {name for name, _, _ in WRONG} == names - {"health_details"}


def test_every_setting_is_described() -> None:
    for field in fields(GuardConfig):
        assert f"\n    {field.name}: " in (inspect.getdoc(GuardConfig) or "")


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG)
def test_a_value_out_of_range_is_refused_with_key_wish_and_value(
    name: str, value: Any, wanted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig.from_mapping({key(name): value})
    assert str(caught.value) == f"{key(name)} must be {wanted}, not {value!r}"


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_a_value_in_range_is_taken(name: str, value: Any) -> None:
    assert getattr(GuardConfig.from_mapping({key(name): value}), name) == value


@pytest.mark.parametrize("value", ["", 5, True, [SECRET], b"s3cret-token"])
def test_wrong_health_details_are_refused_and_never_shown(value: Any) -> None:
    """Whatever it is, it was meant to be a secret."""
    with pytest.raises(ConfigError) as caught:
        GuardConfig(health_details=value)
    assert str(caught.value) == (
        "SOCKETIO_GUARD_HEALTH_DETAILS must be None, a non-empty token or a callable"
    )
    assert SECRET not in str(caught.value)


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
    ("name", "text", "error"),
    [
        ("STOP_TIMEOUT", "soon", "SOCKETIO_GUARD_STOP_TIMEOUT must be a number, not 'soon'"),
        ("STOP_TIMEOUT", "-1", "SOCKETIO_GUARD_STOP_TIMEOUT must be >= 0, not -1.0"),
        (
            "OUTBOX_MAX_BYTES",
            "1.5",
            "SOCKETIO_GUARD_OUTBOX_MAX_BYTES must be a number, not '1.5'",
        ),
        ("BROKER_DOWN", "no", "SOCKETIO_GUARD_BROKER_DOWN must be 'warn' or 'fail', not 'no'"),
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

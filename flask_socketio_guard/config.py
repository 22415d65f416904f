"""Settings: read once, validated, in seconds and bytes."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX = "SOCKETIO_GUARD_"


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
            handshakes get 503. ``None``: no bound.
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

    def __post_init__(self) -> None:
        for name in _POSITIVE_SECONDS:
            _require(_is_number(getattr(self, name)) and getattr(self, name) > 0, self, name, "> 0")
        for name in _SECONDS:
            _require(
                _is_number(getattr(self, name)) and getattr(self, name) >= 0, self, name, ">= 0"
            )
        for name in _COUNTS:
            _require(_is_count(getattr(self, name)), self, name, "an integer >= 1")
        _require(
            self.max_connections is None or _is_count(self.max_connections),
            self,
            "max_connections",
            "None or an integer >= 1",
        )
        for name, allowed in _CHOICES.items():
            wanted = " or ".join(repr(choice) for choice in allowed)
            _require(getattr(self, name) in allowed, self, name, wanted)
        for name in _PATHS:
            path = getattr(self, name)
            is_path = isinstance(path, str) and path.startswith("/")
            _require(path is None or is_path, self, name, 'None or a path that begins with "/"')
        details = self.health_details
        is_token = isinstance(details, str) and bool(details)
        _require(
            details is None or callable(details) or is_token,
            self,
            "health_details",
            "None, a non-empty token or a callable",
        )

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

        For processes without a Flask application.

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


_POSITIVE_SECONDS = (
    "callback_timeout",
    "probe_interval",
    "probe_timeout",
    "broker_timeout",
    "reconnect_max_delay",
    "restart_max_delay",
)
_SECONDS = ("resubscribe_timeout", "exit_flush_timeout", "stop_timeout")
_COUNTS = ("outbox_max_messages", "outbox_max_bytes")
_CHOICES = {"outbox_overflow": ("raise", "drop_oldest"), "broker_down": ("warn", "fail")}
_PATHS = ("healthz_path", "livez_path", "readyz_path")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")


def require_seconds(name: str, value: object) -> None:
    """Make sure that *value* is a duration: a finite number of seconds, > 0.

    Raises:
        ConfigError: It is not; the text calls it *name*.
    """
    if not (_is_number(value) and isinstance(value, int | float) and value > 0):
        raise ConfigError(f"{name} must be a number of seconds > 0, not {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(is_met: bool, config: GuardConfig, name: str, wanted: str) -> None:
    if is_met:
        return
    # A token is a secret and must not reach a log through an error.
    found = "" if name == "health_details" else f", not {getattr(config, name)!r}"
    raise ConfigError(f"{PREFIX}{name.upper()} must be {wanted}{found}")


def _known(name: str, names: list[str], key: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
    raise ConfigError(f"unknown setting {key}{hint}")


def _parse(text: str, annotation: str, key: str) -> object:
    try:
        if "int" in annotation:
            return int(text)
        if "float" in annotation:
            return float(text)
    except ValueError:
        raise ConfigError(f"{key} must be a number, not {text!r}") from None
    return text

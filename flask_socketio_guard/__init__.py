"""Flask-SocketIO-Guard: one line, and events keep flowing."""

from __future__ import annotations

from .config import GuardConfig
from .connections import Connection, Connections
from .errors import (
    BrokerError,
    ConfigError,
    ConnectionClosed,
    DuplicateTask,
    EventInvalid,
    EventRejected,
    GuardError,
    HandlerTimeout,
    HandOverFull,
    IncompatibleVersion,
    InvalidTransition,
    OutboxFull,
    PublishError,
    RateLimited,
    TaskError,
    TooManyInFlight,
)
from .extension import SocketIOGuard
from .handlers import Event
from .sending import SendOutcome
from .signals import Failure
from .states import ConnectionState, ListenerState, TaskState
from .supervisor import TaskHandle
from .version import __version__

__all__ = [
    "BrokerError",
    "ConfigError",
    "Connection",
    "ConnectionClosed",
    "ConnectionState",
    "Connections",
    "DuplicateTask",
    "Event",
    "EventInvalid",
    "EventRejected",
    "Failure",
    "GuardConfig",
    "GuardError",
    "HandOverFull",
    "HandlerTimeout",
    "IncompatibleVersion",
    "InvalidTransition",
    "ListenerState",
    "OutboxFull",
    "PublishError",
    "RateLimited",
    "SendOutcome",
    "SocketIOGuard",
    "TaskError",
    "TaskHandle",
    "TaskState",
    "TooManyInFlight",
    "__version__",
]

"""Flask-SocketIO-Guard: one line, and events keep flowing."""

from __future__ import annotations

from .config import GuardConfig
from .errors import (
    BrokerError,
    ConfigError,
    ConnectionClosed,
    DuplicateTask,
    EventInvalid,
    EventRejected,
    GuardError,
    HandlerTimeout,
    IncompatibleVersion,
    InvalidTransition,
    OutboxFull,
    PublishError,
    TaskError,
)
from .extension import SocketIOGuard
from .handlers import Event
from .signals import Failure
from .states import ListenerState, TaskState
from .supervisor import TaskHandle
from .version import __version__

__all__ = [
    "BrokerError",
    "ConfigError",
    "ConnectionClosed",
    "DuplicateTask",
    "Event",
    "EventInvalid",
    "EventRejected",
    "Failure",
    "GuardConfig",
    "GuardError",
    "HandlerTimeout",
    "IncompatibleVersion",
    "InvalidTransition",
    "ListenerState",
    "OutboxFull",
    "PublishError",
    "SocketIOGuard",
    "TaskError",
    "TaskHandle",
    "TaskState",
    "__version__",
]

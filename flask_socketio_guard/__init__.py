"""Flask-SocketIO-Guard: one line, and events keep flowing."""

from __future__ import annotations

from .config import GuardConfig
from .connections import Connection, Connections
from .delivery.receipts import Receipt
from .delivery.records import DeadLetter, Delivery, Retry
from .errors import (
    BrokerError,
    ConfigError,
    ConnectionClosed,
    DeliveryError,
    DeliveryFormatError,
    DeliveryInvalid,
    DeliveryStoreError,
    DeliveryStoreFull,
    DuplicateTask,
    EventInvalid,
    EventRejected,
    GuardError,
    HandlerTimeout,
    HandOverFull,
    IncompatibleVersion,
    InvalidTransition,
    OutboxFull,
    OutputTooLarge,
    PublishError,
    RateLimited,
    RoomInvalid,
    TaskError,
    UnknownDelivery,
)
from .extension import SocketIOGuard
from .handlers import Event
from .sending import SendOutcome
from .signals import Failure
from .states import ConnectionState, DeliveryState, ListenerState, TaskState
from .supervisor import TaskHandle
from .surveys import BroadcastAnswers
from .version import __version__

__all__ = [
    "BroadcastAnswers",
    "BrokerError",
    "ConfigError",
    "Connection",
    "ConnectionClosed",
    "ConnectionState",
    "Connections",
    "DeadLetter",
    "Delivery",
    "DeliveryError",
    "DeliveryFormatError",
    "DeliveryInvalid",
    "DeliveryState",
    "DeliveryStoreError",
    "DeliveryStoreFull",
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
    "OutputTooLarge",
    "PublishError",
    "RateLimited",
    "Receipt",
    "Retry",
    "RoomInvalid",
    "SendOutcome",
    "SocketIOGuard",
    "TaskError",
    "TaskHandle",
    "TaskState",
    "UnknownDelivery",
    "__version__",
]

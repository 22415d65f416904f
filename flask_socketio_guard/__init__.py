"""Flask-SocketIO-Guard: one line, and events keep flowing."""

from __future__ import annotations

from .clients.connections import Connection, Connections
from .clients.send_queue import SendOutcome
from .config import GuardConfig
from .core.supervisor import TaskHandle
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
    IncompatibleVersion,
    InvalidTransition,
    LoopQueueFull,
    OutboxFull,
    OutputTooLarge,
    PublishError,
    RateLimited,
    RoomInvalid,
    TaskError,
    UnknownDelivery,
)
from .events.broadcast_ack import BroadcastAnswers
from .events.handlers import HandlerCall
from .extension import SocketIOGuard
from .states import ConnectionState, DeliveryState, ListenerState, TaskState
from .telemetry.records import Failure
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
    "EventInvalid",
    "EventRejected",
    "Failure",
    "GuardConfig",
    "GuardError",
    "HandlerCall",
    "HandlerTimeout",
    "IncompatibleVersion",
    "InvalidTransition",
    "ListenerState",
    "LoopQueueFull",
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

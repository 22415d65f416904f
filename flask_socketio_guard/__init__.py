"""Flask-SocketIO-Guard, the reliability layer for Flask-SocketIO.

This module exports the names that applications use most. Errors are in :mod:`.errors`, signals and
their records in :mod:`.signals`, hooks for the server in :mod:`.gunicorn`.
"""

from __future__ import annotations

from .clients.connections import Connection
from .clients.send_queue import SendOutcome
from .config import GuardConfig
from .core.supervisor import TaskHandle
from .delivery.receipts import Receipt
from .delivery.records import DeadLetter, Delivery, Retry
from .events.broadcast_ack import BroadcastAnswers
from .events.handlers import HandlerCall
from .extension import SocketIOGuard
from .states import ConnectionState, DeliveryState, ListenerState, TaskState
from .version import __version__

__all__ = [
    "BroadcastAnswers",
    "Connection",
    "ConnectionState",
    "DeadLetter",
    "Delivery",
    "DeliveryState",
    "GuardConfig",
    "HandlerCall",
    "ListenerState",
    "Receipt",
    "Retry",
    "SendOutcome",
    "SocketIOGuard",
    "TaskHandle",
    "TaskState",
    "__version__",
]

"""Records of what happens in a guarded process: one signal and one class for each kind of event.

Each record class defines its own counters and log line. Counters, log, health and failure hooks
are subscribers; the code that sends a record knows none of them.
"""

from __future__ import annotations

from ..bus import (
    Telemetry,
    logger,
    send,
    subscribe,
)
from .base import Record, record_classes
from .clients import (
    ConnectionChange,
    HandshakeRefusal,
    SendLoss,
    Sweep,
    Violation,
    connection_changed,
    connections_swept,
    handshake_refused,
    protocol_violated,
    send_lost,
)
from .deliveries import (
    DeliveryEnd,
    DeliveryLoss,
    StoreChange,
    deliveries_abandoned,
    delivery_ended,
    delivery_store_changed,
)
from .queue import (
    BrokerChange,
    ListenerChange,
    OutboxLoss,
    Repetition,
    broker_changed,
    listener_changed,
    message_repeated,
    outbox_lost,
)
from .work import (
    LISTENER_TASK,
    CallbackLoss,
    Failure,
    LoopBlock,
    Rejection,
    TaskChange,
    callback_lost,
    failed,
    loop_blocked,
    rejected,
    task_changed,
)

__all__ = [
    "LISTENER_TASK",
    "BrokerChange",
    "CallbackLoss",
    "ConnectionChange",
    "DeliveryEnd",
    "DeliveryLoss",
    "Failure",
    "HandshakeRefusal",
    "ListenerChange",
    "LoopBlock",
    "OutboxLoss",
    "Record",
    "Rejection",
    "Repetition",
    "SendLoss",
    "StoreChange",
    "Sweep",
    "TaskChange",
    "Telemetry",
    "Violation",
    "broker_changed",
    "callback_lost",
    "connection_changed",
    "connections_swept",
    "deliveries_abandoned",
    "delivery_ended",
    "delivery_store_changed",
    "failed",
    "handshake_refused",
    "listener_changed",
    "logger",
    "loop_blocked",
    "message_repeated",
    "outbox_lost",
    "protocol_violated",
    "record_classes",
    "rejected",
    "send",
    "send_lost",
    "subscribe",
    "task_changed",
]

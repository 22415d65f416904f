"""The interface through which adopted upstream objects use the guard of their application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from .clients.admission import Admission
    from .clients.connections import Connection, Connections
    from .clients.fan_out import FanOut
    from .clients.send_queue import WriteBatcher
    from .config import GuardConfig
    from .core.deadlines import Deadlines
    from .core.runtime import Flag, Runtime
    from .events.callbacks import CallbackTable
    from .events.handlers import HandlerGuard
    from .events.rates import Limit
    from .telemetry.records import Telemetry


class Ports(Protocol):
    """The part of :class:`.AppGuard` that lower layers may use."""

    @property
    def callbacks(self) -> CallbackTable:
        """The pending acknowledgement callbacks."""

    @property
    def handlers(self) -> HandlerGuard:
        """Runs the application's handlers and records their failures."""

    @property
    def config(self) -> GuardConfig:
        """The settings of the application."""

    @property
    def runtime(self) -> Runtime:
        """Provides tasks, flags and sleep, by gevent or by threads."""

    @property
    def connections(self) -> Connections:
        """The clients of this process."""

    @property
    def deadlines(self) -> Deadlines:
        """Timers, such as that of a handshake."""

    @property
    def write_batcher(self) -> WriteBatcher:
        """Schedules the writes to transports in batches."""

    @property
    def fan_out(self) -> FanOut | None:
        """Writes broadcasts to clients over several loop iterations; ``None`` if it is off."""

    @property
    def telemetry(self) -> Telemetry:
        """Receives records of everything that signals, logs and counters report."""

    @property
    def admission(self) -> Admission:
        """Accepts or refuses new connections."""

    @property
    def event_limit(self) -> Limit | None:
        """Rate limit of a client's events; ``None`` if there is none."""

    @property
    def join_limit(self) -> Limit | None:
        """Rate limit of the CONNECT packets of one address; ``None`` if there is none."""

    @property
    def is_propagating(self) -> bool:
        """Whether Flask propagates exceptions of views to its test client."""

    def is_ordered(self, namespace: str, event: str) -> bool:
        """Return whether a client's events of that name are handled one after another."""

    def connected(self, connection: Connection) -> None:
        """Report that the connect handler has accepted a client."""

    def entered(self, sid: str, room: object) -> None:
        """Report that a client entered a room."""

    def take_broadcast_call(self, message: dict[str, Any]) -> None:
        """Handle another process's question to a room, or its answer to one."""

    def has_departed(self, sid: str) -> bool:
        """Return whether a client is known to have disconnected from this process.

        ``False`` for one that disconnected so long ago that it has been forgotten.
        """

    def listen(self) -> None:
        """Make sure that answers of other processes are received; may block at the first call."""

    def start(self) -> None:
        """Start listener and tasks; idempotent."""

    def publish(self, payload: bytes) -> None:
        """Put a message to other processes into the outbox."""

    def hand_over(self, target: Callable[[], object]) -> None:
        """Run *target* on the event loop; called from another native thread."""

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own; exceptions are recorded."""

    def flag(self) -> Flag:
        """Return a new flag of the application's runtime."""

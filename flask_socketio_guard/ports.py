"""What the upstream objects, once adopted, may ask of the guard of their application."""

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
    """The guard of one application, seen from below."""

    @property
    def callbacks(self) -> CallbackTable:
        """The callbacks that wait."""

    @property
    def handlers(self) -> HandlerGuard:
        """What encloses the application's handlers."""

    @property
    def config(self) -> GuardConfig:
        """The settings."""

    @property
    def runtime(self) -> Runtime:
        """How the application waits and spawns."""

    @property
    def connections(self) -> Connections:
        """The clients."""

    @property
    def deadlines(self) -> Deadlines:
        """What is due later."""

    @property
    def write_batcher(self) -> WriteBatcher:
        """Who writes, and when."""

    @property
    def fan_out(self) -> FanOut | None:
        """Who carries broadcasts, if not the queues of their recipients."""

    @property
    def telemetry(self) -> Telemetry:
        """Who is told what happens."""

    @property
    def admission(self) -> Admission:
        """Who decides on new clients."""

    @property
    def event_limit(self) -> Limit | None:
        """How many events a client may send, if there is a bound."""

    @property
    def join_limit(self) -> Limit | None:
        """How many CONNECT packets may come from one address, if there is a bound."""

    @property
    def is_propagating(self) -> bool:
        """Whether Flask's test client would raise what a view raises."""

    def is_ordered(self, namespace: str, event: str) -> bool:
        """Say whether events of that name are handled one after another."""

    def connected(self, connection: Connection) -> None:
        """Note that the connect handler let a client in."""

    def entered(self, sid: str, room: object) -> None:
        """Note that a client entered a room."""

    def take_broadcast_call(self, message: dict[str, Any]) -> None:
        """Act on a question to a room, or an answer to one, of another process."""

    def has_departed(self, sid: str) -> bool:
        """Say whether a client was here and has left, as far as that is remembered."""

    def listen(self) -> None:
        """See that answers of other processes are heard."""

    def start(self) -> None:
        """Start what runs in the background; idempotent."""

    def publish(self, payload: bytes) -> None:
        """Put a message to other processes into the outbox."""

    def hand_over(self, target: Callable[[], object]) -> None:
        """Run *target*, called from another native thread, on the event loop."""

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own and record what it raises."""

    def flag(self) -> Flag:
        """Return a new event of the application's runtime."""

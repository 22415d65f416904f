"""What the upstream packages, once adopted, ask of the guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .config import GuardConfig
    from .core.runtime import Flag, Runtime
    from .errors import EventRejected
    from .telemetry.records import Record


BROADCAST_CALL: Final = "guard_survey"
"""Method of a message that asks; peers without the guard ignore what they do not know."""

BROADCAST_PARTICIPANTS: Final = "guard_survey_roll"
"""Method of a message that says whom a process has asked."""

BROADCAST_ANSWER: Final = "guard_survey_answer"
"""Method of a message that brings one answer."""


@dataclass(frozen=True)
class Refusal:
    """The outcome of an event that failed or was rejected.

    Attributes:
        error: ``{"code": str | int, ...}`` as the client sees it, with ``"id"`` for a
            failure and ``"message"`` for a rejection.
        reply: The value to acknowledge with.
    """

    error: dict[str, object]
    reply: object


@dataclass(slots=True, eq=False)
class AckCallback:
    """An acknowledgement callback with what there is to know of it.

    Attributes:
        function: Called with the client's arguments.
        timeout: Seconds to wait; ``None`` takes the configured default.
        on_lost: Called with ``"expired"``, ``"gone"`` or ``"stopped"`` when no
            answer will come.
        is_inline: Whether *function* and *on_lost* belong to the guard, never
            block, and so need no task of their own.
    """

    function: Callable[..., object]
    timeout: float | None = None
    on_lost: Callable[[str], object] | None = None
    is_inline: bool = False

    def __call__(self, *arguments: object) -> object:
        """Call the function, for upstream code that takes any callable."""
        return self.function(*arguments)


class Awaiting(Protocol):
    """What waits for an acknowledgement: an :class:`AckCallback`, or something like it."""

    @property
    def function(self) -> Callable[..., object]: ...
    @property
    def timeout(self) -> float | None: ...
    @property
    def on_lost(self) -> Callable[[str], object] | None: ...
    @property
    def is_inline(self) -> bool: ...


class Question(NamedTuple):
    """An event that a client is to acknowledge.

    Attributes:
        namespace: Socket.IO namespace.
        event: Its name.
        arguments: JSON text of a list.
        callback: Called with the acknowledgement.
        ack_id: What it was known by when the same client was asked before, whose callback gets
            the answer instead; ``None`` the first time.
    """

    namespace: str
    event: str
    arguments: str
    callback: Awaiting
    ack_id: int | None = None


class Recipients(Protocol):
    """The clients of this process, as those who ask them see them."""

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return those who have that session id, or are in that room; in a list of one's own."""

    def ask(self, sid: str, question: Question) -> int | None:
        """Send an event to one client that is to acknowledge it.

        Returns:
            What its callback is known by; ``None`` if the client is gone.
        """


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...


class Deadlines(Protocol):
    """Where calls wait until they are due."""

    def call_later(self, delay: float, target: Callable[[], object]) -> Timer: ...


class Connection(Protocol):
    """One client's connection to one namespace."""

    sid: str
    namespace: str
    eio_sid: str
    reason: str
    is_accepted: bool
    is_left_to_connect: bool
    unbegun: int

    @property
    def is_open(self) -> bool: ...
    @property
    def is_connecting(self) -> bool: ...
    @property
    def is_ready(self) -> bool: ...
    def accept(self) -> bool: ...
    def refuse(self) -> None: ...
    def expect_handshake(self, timer: Timer) -> None: ...
    def shake_hands(self) -> bool: ...
    def begin_close(self, reason: str) -> bool: ...
    def finish(self) -> None: ...
    def defer(self, cleanup: Callable[[], object]) -> None: ...
    def expect(self) -> None: ...
    def begun(self) -> None: ...
    def wait_until_begun(self, all_begun: Flag, patience: float) -> bool: ...


def transport_of(connection: Connection) -> str | None:
    """Return what the transport of a client is known by; ``None`` if it ended with the client."""
    is_alone = connection.reason in ("", "client disconnect", "server disconnect")
    return connection.eio_sid if is_alone else None


class Connections(Protocol):
    """The clients of the application."""

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, sid: object) -> bool: ...
    def find(self, sid: object) -> Connection | None: ...
    def of(self, eio_sid: str) -> tuple[Connection, ...]: ...
    def add(self, sid: str, namespace: str, eio_sid: str) -> Connection: ...


class Telemetry(Protocol):
    """Who is told what happens, and tells the world."""

    def send(self, record: Record) -> None: ...


class Limit(Protocol):
    """So many within so long."""

    def hit(self, key: str) -> None: ...


class Admission(Protocol):
    """Who decides on new clients, and counts them by address."""

    max_websockets: int | None

    def refusal(self, address: str) -> str | None: ...
    def opened(self, address: str) -> None: ...
    def closed(self, address: str) -> None: ...


class WriteBatcher(Protocol):
    """Lets writers write in one go."""

    def add(self, writer: Any) -> None: ...


class FanOut(Protocol):
    """Carries broadcasts to their recipients."""

    @property
    def is_busy(self) -> bool: ...
    def add(self, message: Any, recipients: Iterable[Any]) -> None: ...
    def settle(self, recipient: Any) -> None: ...


class Callbacks(Protocol):
    """The table of callbacks that wait."""

    def waiting(self) -> list[tuple[object, int, Callable[..., object]]]: ...
    def add(self, recipient: object, callback: Awaiting) -> int: ...
    def resolve(self, ack_id: object, recipient: object, arguments: tuple[object, ...]) -> bool: ...
    def lose(self, ack_id: object, recipient: object, reason: str) -> bool: ...
    def discard(self, ack_id: int, recipient: object) -> None: ...
    def lose_recipient(self, recipient: str, reason: str) -> None: ...
    def is_owed_by(self, recipient: str) -> bool: ...


class Handlers(Protocol):
    """What encloses the application's handlers."""

    seen: list[BaseException] | None

    def connecting_sid(self) -> str | None: ...
    def run(self, name: str, namespace: str, sid: str, call: Callable[[], object]) -> object: ...
    def protect(
        self, handler: Callable[..., object], message: str | None
    ) -> Callable[..., object]: ...
    def reject(
        self, name: object, namespace: str, sid: str | None, error: EventRejected
    ) -> Refusal: ...
    def fail(self, name: str, namespace: str, sid: str | None, exc: BaseException) -> Refusal: ...
    def recording(self, target: Callable[..., object]) -> Callable[..., object]: ...


class Ports(Protocol):
    """The guard of one application, seen from below."""

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks that wait."""

    @property
    def handlers(self) -> Handlers:
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

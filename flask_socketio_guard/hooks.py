"""What the upstream packages, once adopted, ask of the guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from .errors import EventRejected
    from .runtime import Event


@dataclass(frozen=True)
class Refusal:
    """The outcome of an event that failed or was rejected.

    Attributes:
        error: ``{"code": str, ...}`` as the client sees it, with ``"id"`` for a
            failure and ``"message"`` for a rejection.
        reply: The value to acknowledge with.
    """

    error: dict[str, object]
    reply: object


@dataclass(frozen=True)
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


class Callbacks(Protocol):
    """The table of callbacks that wait."""

    def add(self, recipient: object, callback: AckCallback) -> int: ...
    def resolve(self, ack_id: object, recipient: object, arguments: tuple[object, ...]) -> bool: ...
    def lose(self, ack_id: object, recipient: object, reason: str) -> bool: ...
    def discard(self, ack_id: int, recipient: object) -> None: ...
    def lose_recipient(self, recipient: str, reason: str) -> None: ...


class Handlers(Protocol):
    """What encloses the application's handlers."""

    def run(self, name: str, namespace: str, sid: str, call: Callable[[], object]) -> object: ...
    def protect(
        self, handler: Callable[..., object], message: str | None
    ) -> Callable[..., object]: ...
    def reject(
        self, name: object, namespace: str, sid: str | None, error: EventRejected
    ) -> Refusal: ...
    def fail(self, name: str, namespace: str, sid: str | None, exc: BaseException) -> Refusal: ...
    def recording(self, target: Callable[..., object]) -> Callable[..., object]: ...


class Hooks(Protocol):
    """The guard of one application, seen from below."""

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks that wait."""

    @property
    def handlers(self) -> Handlers:
        """What encloses the application's handlers."""

    def start(self) -> None:
        """Start what runs in the background; idempotent."""

    def publish(self, payload: bytes) -> None:
        """Put a message to other processes into the outbox."""

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own and record what it raises."""

    def event(self) -> Event:
        """Return a new event of the application's runtime."""

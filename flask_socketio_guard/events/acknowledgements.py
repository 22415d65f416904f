"""Types shared by the code that asks clients, here or in other processes, to acknowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

BROADCAST_CALL: Final = "guard_survey"
"""Queue method of a message that asks a room; processes without the guard ignore it."""

BROADCAST_PARTICIPANTS: Final = "guard_survey_roll"
"""Queue method of a message that lists the clients that a process has asked."""

BROADCAST_ANSWER: Final = "guard_survey_answer"
"""Queue method of a message that carries one client's answer."""


@dataclass(frozen=True)
class Refusal:
    """The outcome of an event that failed or was rejected.

    Attributes:
        error: ``{"code": str | int, ...}`` as sent to the client, with ``"id"`` for a failure and
            ``"message"`` for a rejection.
        reply: The acknowledgement.
    """

    error: dict[str, object]
    reply: object


@dataclass(slots=True, eq=False)
class AckCallback:
    """An acknowledgement callback and how to call it.

    Attributes:
        function: Called with the client's arguments.
        timeout: Seconds to wait; ``None`` means the configured default.
        on_lost: Called with ``"expired"``, ``"gone"`` or ``"stopped"`` when no answer will come.
        is_inline: Whether *function* and *on_lost* are the guard's own, never block, and need no
            task of their own.
    """

    function: Callable[..., object]
    timeout: float | None = None
    on_lost: Callable[[str], object] | None = None
    is_inline: bool = False

    def __call__(self, *arguments: object) -> object:
        """Call the function, for upstream code that takes any callable."""
        return self.function(*arguments)


class Awaiting(Protocol):
    """Anything that can wait for an acknowledgement, with the attributes of an AckCallback."""

    # ruff: noqa: D102 - AckCallback documents them
    @property
    def function(self) -> Callable[..., object]: ...
    @property
    def timeout(self) -> float | None: ...
    @property
    def on_lost(self) -> Callable[[str], object] | None: ...
    @property
    def is_inline(self) -> bool: ...


class Question(NamedTuple):
    """An event that a client must acknowledge.

    Attributes:
        namespace: Socket.IO namespace.
        event: Name of the event.
        arguments: JSON text of a list.
        callback: Called with the acknowledgement.
        ack_id: The acknowledgement id of the previous attempt, reused because a late answer to
            that attempt counts for this one too; ``None`` for the first attempt.
    """

    namespace: str
    event: str
    arguments: str
    callback: Awaiting
    ack_id: int | None = None


class Recipients(Protocol):
    """The clients of this process that can be asked."""

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return a new list of the sessions in the room *recipient*, or the session itself."""

    def ask(self, sid: str, question: Question) -> int | None:
        """Send an event that one client must acknowledge.

        Returns:
            The acknowledgement id; ``None`` if the client is gone.
        """

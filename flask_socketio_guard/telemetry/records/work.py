"""Records of code that runs: handlers, callbacks, tasks and the event loop."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ...errors import EventRejected, HandlerTimeout
from ...states import TaskState
from ..printable import without_secrets
from .base import LONGEST_NAME, NOTHING, Entry, Fold, Record, in_brackets, safe, signals

if TYPE_CHECKING:
    from collections.abc import Mapping

LISTENER_TASK: Final = "socketio-guard:listener"
"""Name of the task that reads the message queue; its restarts are counted apart."""

_FAILURE_BURST = 20  # failures at one place and in one fold interval that are written in full
_LIMIT_CODES = ("rate_limited", "too_many_in_flight")
_LONGEST_STACK = 10_000


def _new_error_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Failure(Record):
    """Code raised where the guard caught it.

    Failures at one place in the code are folded once the first of an interval are written with
    traceback and error id; each is still told to the subscribers of the signal.

    Attributes:
        kind: ``"handler"``, ``"callback"``, ``"task"``, ``"hook"`` or ``"listener"``.
        exception: What was raised, with its traceback.
        name: The event, task or function that failed.
        namespace: Socket.IO namespace, where there is one.
        sid: Session id of the client concerned, where there is one.
        error_id: 16 hex digits, told to the client and written to the log.
    """

    signal = signals.signal("failed")
    counters = (
        "handler_failures",
        "callback_failures",
        "task_failures",
        "hook_failures",
        "listener_failures",
    )
    level = logging.ERROR

    kind: str
    exception: BaseException
    name: str = ""
    namespace: str | None = None
    sid: str | None = None
    error_id: str = field(default_factory=_new_error_id)

    @property
    def code(self) -> str:
        """The code that a client sees: ``"timeout"`` or ``"internal_error"``."""
        return "timeout" if isinstance(self.exception, HandlerTimeout) else "internal_error"

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one, for its kind."""
        return {f"{self.kind}_failures": 1}

    def entry(self) -> Entry:
        """Return a line with the traceback and the error id."""
        exc = self.exception
        place, kind = _place(exc), type(exc)
        return Entry(
            "%s %r%s failed with %s, error id %s",
            (
                self.kind,
                self.name[:LONGEST_NAME],
                f" [{safe(self.namespace)}]" if self.namespace else "",
                kind.__name__,
                self.error_id,
            ),
            Fold(
                ("failed", self.kind, place, kind),
                f"{self.kind} failed with {kind.__name__} at {place}",
                burst=_FAILURE_BURST,
            ),
            extra={
                "error_id": self.error_id,
                "kind": self.kind,
                "event": safe(self.name),
                "namespace": self.namespace and safe(self.namespace),
                "sid": self.sid,
            },
            exception=exc,
        )


failed = Failure.signal
"""A :class:`Failure`: code of the application, or of the guard, raised."""


@dataclass(frozen=True)
class Rejection(Record):
    """An event was refused.

    Attributes:
        event: Name of the event as the client sent it, cut to 100 characters.
        namespace: Socket.IO namespace.
        sid: Session id of the sender.
        error: The refusal, with code and message.
        exception: What the handler raised, where an error handler or an overridden
            ``trigger_event`` of the application has answered it; such is no :class:`Failure`.
        error_id: Told to the client with it.
    """

    signal = signals.signal("rejected")
    counters = ("events_rejected",)

    event: str
    namespace: str
    sid: str | None
    error: EventRejected
    exception: Exception | None = None
    error_id: str = ""

    @property
    def _is_limited(self) -> bool:
        return self.error.code in _LIMIT_CODES

    @property
    def level(self) -> int:
        """A warning where a limit was met; the rest is between client and application."""
        return logging.WARNING if self._is_limited else logging.DEBUG

    def entry(self) -> Entry:
        """Return a line with event and code."""
        code = safe(str(self.error.code))
        message = "event %r [%s] rejected: %s"
        arguments: tuple[object, ...] = (self.event[:LONGEST_NAME], safe(self.namespace), code)
        extra = {"event": safe(self.event), "namespace": safe(self.namespace), "sid": self.sid}
        if self._is_limited:
            fold = Fold(("rejected", code), f"events rejected: {code}")
            return Entry(message, arguments, fold, extra)
        if self.error_id:
            message += ", but answered by the application, error id %s"
            arguments += (self.error_id,)
        return Entry(message, arguments, extra=extra, exception=self.exception)


rejected = Rejection.signal
"""A :class:`Rejection`: an event was refused before or by its handler."""


@dataclass(frozen=True)
class CallbackLoss(Record):
    """An acknowledgement callback was dropped without being called.

    Attributes:
        reason: ``"expired"`` (its deadline passed), ``"gone"`` (the client is
            gone) or ``"stopped"`` (the process is stopping).
        recipient: Session id or room that the event was sent to.
    """

    signal = signals.signal("callback-lost")
    counters = ("callbacks_expired", "callbacks_dropped")
    level = logging.DEBUG

    reason: str
    recipient: object

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one, expired or dropped."""
        return {"callbacks_expired" if self.reason == "expired" else "callbacks_dropped": 1}

    def entry(self) -> Entry:
        """Return a line with the reason."""
        return Entry("an acknowledgement callback was dropped: %s", (self.reason,))


callback_lost = CallbackLoss.signal
"""A :class:`CallbackLoss`: an acknowledgement callback will never be called."""


@dataclass(frozen=True)
class TaskChange(Record):
    """A supervised task moved from *old* to *new*."""

    signal = signals.signal("task-changed")
    counters = ("listener_restarts", "task_restarts")

    name: str
    old: TaskState
    new: TaskState
    reason: str

    @property
    def level(self) -> int:
        """An error where it is not tried again."""
        return logging.ERROR if self.new is TaskState.FAILED else logging.DEBUG

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one where it is to be restarted."""
        if self.new is not TaskState.BACKING_OFF:
            return NOTHING
        return {"listener_restarts" if self.name == LISTENER_TASK else "task_restarts": 1}

    def entry(self) -> Entry:
        """Return a line with both states; not folded, for the last must be what is true now."""
        return Entry(
            "task %r: %s, was %s%s",
            (self.name, self.new, self.old, in_brackets(without_secrets(self.reason))),
            extra={"task": self.name, "state": str(self.new)},
        )


task_changed = TaskChange.signal
"""A :class:`TaskChange`."""


@dataclass(frozen=True)
class LoopBlock(Record):
    """The event loop could not run.

    Attributes:
        place: ``file:line in function`` that blocked.
        stack: The stack at that instant, as text.
        duration: Seconds; ``None`` while it is still going on.
    """

    signal = signals.signal("loop-blocked")
    counters = ("loop_blocks",)
    level = logging.WARNING

    place: str
    stack: str
    duration: float | None = None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return one where it is over."""
        return NOTHING if self.duration is None else {"loop_blocks": 1}

    def entry(self) -> Entry:
        """Return a line with the stack while it lasts, and one with its length then."""
        extra = {"place": self.place, "duration": self.duration}
        if self.duration is None:
            return Entry(
                "the event loop is blocked at %s\n%s",
                (self.place, self.stack[-_LONGEST_STACK:].rstrip("\n")),
                Fold(("blocked", self.place), f"the event loop is blocked at {self.place}"),
                extra,
            )
        return Entry(
            "the event loop was blocked for %.2f s at %s",
            (self.duration, self.place),
            Fold(("unblocked", self.place), f"the event loop was blocked at {self.place}"),
            extra,
        )


loop_blocked = LoopBlock.signal
"""A :class:`LoopBlock`: something kept the event loop from running."""


def _place(exc: BaseException) -> str:
    """Return file, line and function where *exc* was raised."""
    tb = exc.__traceback__
    if tb is None:
        return "an unknown place"
    while tb.tb_next is not None:
        tb = tb.tb_next
    code = tb.tb_frame.f_code
    return f"{code.co_filename}:{tb.tb_lineno} in {code.co_name}"

"""Records of running code: handlers, callbacks, tasks and the event loop."""

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
"""Name of the task that reads the message queue; its restarts are counted separately."""

_FAILURE_BURST = 20  # failures at one place and in one fold interval that are written in full
_LIMIT_CODES = ("rate_limited", "too_many_in_flight")
_LONGEST_STACK = 10_000


def _new_error_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Failure(Record):
    """The guard caught an exception.

    The first 20 failures at one place in the code within an interval are logged with traceback
    and error id, and the rest are folded; subscribers of the signal receive every one.

    Attributes:
        kind: ``"handler"``, ``"callback"``, ``"task"``, ``"hook"`` or ``"listener"``.
        exception: The exception, with its traceback.
        name: The event, task or function that failed.
        namespace: Socket.IO namespace, if there is one.
        sid: Session id of the client concerned, if there is one.
        error_id: 16 hex digits, sent to the client and written to the log.
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
        """The error code sent to the client: ``"timeout"`` or ``"internal_error"``."""
        return "timeout" if isinstance(self.exception, HandlerTimeout) else "internal_error"

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count the failure under its kind."""
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
        exception: The handler's exception, if an error handler or an overridden ``trigger_event``
            of the application has answered it; then it is not a :class:`Failure`.
        error_id: Sent to the client with the error.
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
        """WARNING if a limit was exceeded; other rejections concern only client and application."""
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
        """Count the callback as expired or as dropped."""
        return {"callbacks_expired" if self.reason == "expired" else "callbacks_dropped": 1}

    def entry(self) -> Entry:
        """Return a line with the reason."""
        return Entry("an acknowledgement callback was dropped: %s", (self.reason,))


callback_lost = CallbackLoss.signal
"""A :class:`CallbackLoss`: an acknowledgement callback will never be called."""


@dataclass(frozen=True)
class TaskChange(Record):
    """A supervised task moved from state *old* to *new*."""

    signal = signals.signal("task-changed")
    counters = ("listener_restarts", "task_restarts")

    name: str
    old: TaskState
    new: TaskState
    reason: str

    @property
    def level(self) -> int:
        """ERROR if the task will not be restarted."""
        return logging.ERROR if self.new is TaskState.FAILED else logging.DEBUG

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count a restart that is about to happen."""
        if self.new is not TaskState.BACKING_OFF:
            return NOTHING
        return {"listener_restarts" if self.name == LISTENER_TASK else "task_restarts": 1}

    def entry(self) -> Entry:
        """Return a line with both states; never folded, as the last line must be current."""
        return Entry(
            "task %r: %s, was %s%s",
            (self.name, self.new, self.old, in_brackets(without_secrets(self.reason))),
            extra={"task": self.name, "state": str(self.new)},
        )


task_changed = TaskChange.signal
"""A :class:`TaskChange`."""


@dataclass(frozen=True)
class LoopBlock(Record):
    """The event loop was blocked.

    Attributes:
        place: ``file:line in function`` that blocked.
        stack: The stack when the block was detected, as text.
        duration: In seconds; ``None`` while the loop is still blocked.
    """

    signal = signals.signal("loop-blocked")
    counters = ("loop_blocks",)
    level = logging.WARNING

    place: str
    stack: str
    duration: float | None = None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count a block once it is over."""
        return NOTHING if self.duration is None else {"loop_blocks": 1}

    def entry(self) -> Entry:
        """Return a line with the stack during the block, or with the duration after it."""
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
"""A :class:`LoopBlock`: code blocked the event loop."""


def _place(exc: BaseException) -> str:
    """Return where *exc* was raised, as ``file:line in function``."""
    tb = exc.__traceback__
    if tb is None:
        return "an unknown place"
    while tb.tb_next is not None:
        tb = tb.tb_next
    code = tb.tb_frame.f_code
    return f"{code.co_filename}:{tb.tb_lineno} in {code.co_name}"

"""Handlers that cannot hurt: each runs once, fails once, and answers once.

An event passes two gates. The outer one, :meth:`HandlerGuard.run`, encloses
everything that upstream does for the event and decides the outcome. The inner
one, :meth:`HandlerGuard.protect`, encloses the application's function alone, inside
the request context, so that a failure is known before an error handler can turn
it into a return value.
"""

from __future__ import annotations

import traceback
from _thread import RLock
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from socketio.exceptions import ConnectionRefusedError as ConnectionRefused
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.wrappers import Response

from ..core.component import Component
from ..core.forks import renew_after_fork
from ..errors import EventInvalid, EventRejected
from ..events.acknowledgements import Refusal
from ..telemetry.records import Failure, Rejection
from .dispatch import Arrival, arriving
from .signatures import accepts, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..telemetry.records import Telemetry

_REDIRECT, _SERVER_ERROR = 300, 500  # the first status of each kind
_FITTED_EVENTS = frozenset({"connect", "disconnect"})
_MAX_NAME = 100


@dataclass(frozen=True)
class HandlerCall:
    """An event that a handler is about to run for.

    Attributes:
        name: Event name, ``"connect"`` and ``"disconnect"`` included.
        namespace: Socket.IO namespace.
        sid: Session id of the client.
        args: What the handler will be called with.
    """

    name: str
    namespace: str
    sid: str
    args: tuple[object, ...]


class _Invocation:
    """One event, or one acknowledgement, on its way through upstream."""

    __slots__ = (
        "arrival",
        "attempt",
        "failure",
        "kind",
        "name",
        "namespace",
        "raised",
        "rejection",
        "sid",
    )

    def __init__(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        sid: str | None,
        arrival: Arrival | None = None,
    ) -> None:
        self.arrival = arrival
        self.kind = kind
        self.name = name
        self.namespace = namespace
        self.sid = sid
        self.raised: Exception | None = None
        self.attempt: tuple[Callable[..., object], int] | None = None
        """The handler that raised it, and with how many arguments."""
        self.failure: Failure | None = None
        self.rejection: EventRejected | None = None


_current: ContextVar[_Invocation | None] = ContextVar("socketio_guard_invocation", default=None)


class HandlerGuard(Component):
    """Runs the handlers of one application.

    Args:
        telemetry: Is told of failures and refusals.
        is_debug: Whether exception text may go to clients.
    """

    def __init__(self, telemetry: Telemetry, *, is_debug: Callable[[], bool]) -> None:
        self._telemetry = telemetry
        self._is_debug = is_debug
        self.before_event: list[Callable[[HandlerCall], object]] = []
        self.seen: list[BaseException] | None = None
        """What has failed, while a test client of Flask-SocketIO waits for it."""
        self.running = 0
        """Handlers that run now."""
        self._lock = RLock()  # not gevent's: nobody waits while holding it
        renew_after_fork(self, _lock=RLock)

    def abandon(self) -> None:
        """Count anew, in a forked child: the handlers are the parent's."""
        self.running = 0

    def gauges(self) -> dict[str, int]:
        """Return how many handlers run now."""
        return {"handlers:running": self.running}

    def run(self, name: str, namespace: str, sid: str, call: Callable[[], object]) -> object:
        """Call *call*, which leads to the handler of an event.

        Returns:
            What the handler returned, or a :class:`.Refusal`.

        Raises:
            socketio.exceptions.ConnectionRefusedError: A connect handler refuses
                its client. Nothing else is ever raised.
        """
        invocation = _Invocation("handler", name, namespace, sid, arriving.get())
        with self._lock:
            self.running += 1
        try:
            result = self._run(invocation, call)
        finally:
            with self._lock:
                self.running -= self.running > 0  # 0 in the child of a handler that has forked
        if (
            invocation.raised is None
            and invocation.failure is None
            and invocation.rejection is None
            and not _is_refusal(result)
        ):
            return result
        return self._refusal(invocation, name, namespace, sid, result)

    def run_callback(
        self, call: Callable[[], object], *, name: str, arrival: Arrival | None = None
    ) -> None:
        """Call *call*, which leads to an acknowledgement callback; never raises.

        Args:
            call: The callback.
            name: Of it, for records.
            arrival: The answer that it is called for, if it is for one.
        """
        try:
            self._run(_Invocation("callback", name, None, None, arrival), call)
        finally:
            if arrival is not None:
                arrival.begin()

    def connecting_sid(self) -> str | None:
        """Return for whose connect handler the caller is called, if it is for one."""
        invocation = _current.get()
        if invocation is None or invocation.kind != "handler" or invocation.name != "connect":
            return None
        return invocation.sid

    def recording(self, target: Callable[..., object]) -> Callable[..., object]:
        """Return *target* such that what it raises is recorded and goes no further."""
        name = getattr(target, "__qualname__", type(target).__qualname__)

        def recorded(*args: object, **kwargs: object) -> object:
            return self._run(_Invocation("task", name, None, None), lambda: target(*args, **kwargs))

        return recorded

    def _run(self, invocation: _Invocation, call: Callable[[], object]) -> object:
        token = _current.set(invocation)
        try:
            return call()
        except ConnectionRefused as exc:
            if invocation.name == "connect" and invocation.failure is None:
                raise
            self._fail(invocation, exc)
        except BaseException as exc:  # noqa: BLE001 - recorded; must not end a task of ours
            rejection = _rejection_of(exc) if invocation.kind == "handler" else None
            if rejection is None:
                self._fail(invocation, exc)
            else:
                invocation.rejection = rejection
        finally:
            _current.reset(token)
        return None

    def protect(self, handler: Callable[..., object], message: str | None) -> Callable[..., object]:
        """Return *handler* such that it does not run twice because it raised a TypeError.

        Upstream calls a handler again with fewer arguments when it sees one, also when the
        handler itself raised it. The second call gets the first one's exception instead. Any
        other is by whoever overrides ``trigger_event``, to fall back on another handler or to
        try again.

        Args:
            handler: The application's function.
            message: The event that it was registered for, ``None`` for a callback.
        """
        invocation = _current.get()
        if invocation is None:
            return handler

        def protected(*args: object) -> object:
            if invocation.arrival is not None:
                invocation.arrival.begin()
            if invocation.raised is not None:
                before, count = invocation.attempt or (None, 0)
                if before is handler and len(args) < count:
                    raise invocation.raised
                invocation.raised = invocation.rejection = None
            count = len(args)
            try:
                if self.before_event and message is not None:
                    self._call_hooks(invocation, args)
                if message in _FITTED_EVENTS:
                    args = fit(handler, args)
                elif message is not None:
                    _require_arguments(handler, len(args))
                return handler(*args)
            except EventRejected as exc:
                invocation.rejection = exc
            except ConnectionRefused:
                raise
            except Exception as exc:
                # An error handler, or whoever overrides what is in between, may answer it.
                invocation.raised, invocation.attempt = exc, (handler, count)
                raise
            return None

        return protected

    def reject(
        self,
        name: object,
        namespace: str,
        sid: str | None,
        error: EventRejected,
        exception: Exception | None = None,
        error_id: str = "",
    ) -> Refusal:
        """Refuse an event and record that; see :class:`Rejection`."""
        event = name[:_MAX_NAME] if isinstance(name, str) else f"<{type(name).__name__}>"
        record = Rejection(event, namespace, sid, error, exception, error_id)
        self._telemetry.send(record)
        answer: dict[str, object] = {"code": error.code, "message": error.message}
        return Refusal(answer, {"error": answer})

    def fail(self, name: str, namespace: str, sid: str | None, exc: BaseException) -> Refusal:
        """Record a failure after the handler, such as an answer that cannot be sent."""
        return self._failed(self._record(Failure("handler", exc, name, namespace, sid)))

    def _answered(
        self, invocation: _Invocation, name: str, namespace: str, sid: str, result: object
    ) -> Refusal:
        """Refuse an event whose handler raised what the application has answered."""
        exc = invocation.raised
        assert exc is not None
        known = _rejection_of(exc)
        if known is not None:
            refusal = self.reject(name, namespace, sid, known)
        else:
            failure = Failure("handler", exc, name, namespace, sid)
            error = EventRejected("the handler failed", code=failure.code)
            self.reject(name, namespace, sid, error, exc, failure.error_id)
            refusal = self._failed(failure)
        # An error handler may answer in its own words; nothing, or a bare True,
        # would tell the client that all went well.
        if result is None or result is True:
            return refusal
        return Refusal(refusal.error, result)

    def _call_hooks(self, invocation: _Invocation, args: tuple[object, ...]) -> None:
        event = HandlerCall(
            invocation.name, invocation.namespace or "/", invocation.sid or "", args
        )
        for hook in self.before_event:
            hook(event)

    def _fail(self, invocation: _Invocation, exc: BaseException) -> None:
        known = invocation.failure
        if known is not None and known.exception is exc:
            return
        failure = self._record(
            Failure(invocation.kind, exc, invocation.name, invocation.namespace, invocation.sid)
        )
        if known is None:
            invocation.failure = failure

    def _record(self, failure: Failure) -> Failure:
        if self.seen is not None:
            self.seen.append(failure.exception)
        self._telemetry.send(failure)
        return failure

    def _refusal(
        self, invocation: _Invocation, name: str, namespace: str, sid: str, result: object
    ) -> Refusal:
        if invocation.failure is not None:
            return self._failed(invocation.failure)
        if invocation.rejection is not None:
            return self.reject(name, namespace, sid, invocation.rejection)
        if invocation.raised is not None:
            return self._answered(invocation, name, namespace, sid, result)
        assert isinstance(result, Response)
        return self.reject(name, namespace, sid, _status_error(result.status_code, ""))

    def _failed(self, failure: Failure) -> Refusal:
        error: dict[str, object] = {"code": failure.code, "id": failure.error_id}
        if self._is_debug():
            # Survives an exception whose text cannot be made.
            lines = traceback.format_exception_only(failure.exception)
            error["message"] = "".join(lines).strip()
        return Refusal(error, {"error": error})


def _rejection_of(exc: BaseException) -> EventRejected | None:
    """Return what *exc* refuses an event with; ``None`` if it is a failure."""
    if isinstance(exc, EventRejected):
        return exc
    if not isinstance(exc, HTTPException):
        return None
    status = exc.code if exc.response is None else exc.response.status_code
    if status is None or status >= _SERVER_ERROR:
        return None
    return _status_error(status, exc.description)


def _is_refusal(result: object) -> bool:
    # What a decorator such as Flask-Login's ``login_required`` returns in the handler's place.
    return isinstance(result, Response) and _REDIRECT <= result.status_code < _SERVER_ERROR


def _status_error(status: int, description: object) -> EventRejected:
    text = description if isinstance(description, str) and description else None
    return EventRejected(text or HTTP_STATUS_CODES.get(status, "refused"), code=status)


def _require_arguments(handler: Callable[..., object], count: int) -> None:
    # A TypeError of the call would be told as a failure of the handler, with a
    # traceback for each packet of that kind that anybody cares to send.
    if not accepts(handler, count):
        raise EventInvalid(f"an event of this name does not have {count} arguments")

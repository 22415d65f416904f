"""Isolation of handlers: each runs once, and a failure is recorded and answered once.

Two wrappers enclose each event. The outer one, :meth:`HandlerGuard.run`, encloses
everything that upstream does for the event and decides the outcome. The inner
one, :meth:`HandlerGuard.protect`, encloses only the application's function, inside
the request context. It sees a failure before an error handler can turn it into a
return value.
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
    """The call of a handler that is about to happen.

    Attributes:
        name: Event name, which may be ``"connect"`` or ``"disconnect"``.
        namespace: Socket.IO namespace.
        sid: Session id of the client.
        args: Arguments of the handler.
    """

    name: str
    namespace: str
    sid: str
    args: tuple[object, ...]


class _Invocation:
    """The state of one event, acknowledgement or task while upstream's code handles it."""

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
        """The handler that raised it, and the number of arguments that it was called with."""
        self.failure: Failure | None = None
        self.rejection: EventRejected | None = None


_current: ContextVar[_Invocation | None] = ContextVar("socketio_guard_invocation", default=None)


class HandlerGuard(Component):
    """Runs the handlers of one application.

    Args:
        telemetry: Receives failures and rejections.
        is_debug: Returns whether clients may see the text of exceptions.
    """

    def __init__(self, telemetry: Telemetry, *, is_debug: Callable[[], bool]) -> None:
        self._telemetry = telemetry
        self._is_debug = is_debug
        self.before_event: list[Callable[[HandlerCall], object]] = []
        self.seen: list[BaseException] | None = None
        """Exceptions collected for a test client of Flask-SocketIO; ``None`` otherwise."""
        self.running = 0
        """Number of handlers that run now."""
        self._lock = RLock()  # not gevent's: no greenlet switches while holding it
        renew_after_fork(self, _lock=RLock)

    def abandon(self) -> None:
        """Reset the count in a forked child: the running handlers are the parent's."""
        self.running = 0

    def gauges(self) -> dict[str, int]:
        """Return the number of running handlers."""
        return {"handlers:running": self.running}

    def run(self, name: str, namespace: str, sid: str, call: Callable[[], object]) -> object:
        """Run *call*, upstream's code that calls the handler of an event.

        Returns:
            The return value of the handler, or a :class:`.Refusal`.

        Raises:
            socketio.exceptions.ConnectionRefusedError: A connect handler refuses
                its client. No other exception is ever raised.
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
        """Run *call*, an acknowledgement callback; record exceptions instead of raising them.

        Args:
            call: Calls the callback.
            name: Name of the callback, for records.
            arrival: The acknowledgement that triggered it, if a client sent one.
        """
        try:
            self._run(_Invocation("callback", name, None, None, arrival), call)
        finally:
            if arrival is not None:
                arrival.begin()

    def connecting_sid(self) -> str | None:
        """Return the session whose connect handler the caller runs in, if it runs in one."""
        invocation = _current.get()
        if invocation is None or invocation.kind != "handler" or invocation.name != "connect":
            return None
        return invocation.sid

    def recording(self, target: Callable[..., object]) -> Callable[..., object]:
        """Wrap *target*; the wrapper records exceptions instead of raising them."""
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
        except BaseException as exc:  # noqa: BLE001 - recorded; must not end the guard's tasks
            rejection = _rejection_of(exc) if invocation.kind == "handler" else None
            if rejection is None:
                self._fail(invocation, exc)
            else:
                invocation.rejection = rejection
        finally:
            _current.reset(token)
        return None

    def protect(self, handler: Callable[..., object], message: str | None) -> Callable[..., object]:
        """Wrap *handler* so that a TypeError that it raises does not make it run twice.

        On a TypeError, upstream calls a handler again with fewer arguments, even if the handler
        itself raised the error. The wrapper then raises the first call's exception again. Any
        other repeated call comes from an application that overrides ``trigger_event``, to retry
        or to fall back to another handler, and runs.

        Args:
            handler: The application's function.
            message: The event that it is registered for; ``None`` for a callback.
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
                # An error handler, or an overridden trigger_event, may turn it into an answer.
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
        """Record that an event was rejected; return the refusal to send. See :class:`Rejection`."""
        event = name[:_MAX_NAME] if isinstance(name, str) else f"<{type(name).__name__}>"
        record = Rejection(event, namespace, sid, error, exception, error_id)
        self._telemetry.send(record)
        answer: dict[str, object] = {"code": error.code, "message": error.message}
        return Refusal(answer, {"error": answer})

    def fail(self, name: str, namespace: str, sid: str | None, exc: BaseException) -> Refusal:
        """Record a failure after the handler, such as a return value that cannot be sent."""
        return self._failed(self._record(Failure("handler", exc, name, namespace, sid)))

    def _answered(
        self, invocation: _Invocation, name: str, namespace: str, sid: str, result: object
    ) -> Refusal:
        """Return the refusal for an exception that the application's error handler handled."""
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
        # The value that an error handler returns becomes the acknowledgement, except None and
        # True, which a client would take for success.
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
            # Unlike str(), this copes with an exception whose __str__ raises.
            lines = traceback.format_exception_only(failure.exception)
            error["message"] = "".join(lines).strip()
        return Refusal(error, {"error": error})


def _rejection_of(exc: BaseException) -> EventRejected | None:
    """Return the rejection that *exc* stands for; ``None`` if it is a failure."""
    if isinstance(exc, EventRejected):
        return exc
    if not isinstance(exc, HTTPException):
        return None
    status = exc.code if exc.response is None else exc.response.status_code
    if status is None or status >= _SERVER_ERROR:
        return None
    return _status_error(status, exc.description)


def _is_refusal(result: object) -> bool:
    # A decorator such as Flask-Login's ``login_required`` returns a response without calling
    # the handler.
    return isinstance(result, Response) and _REDIRECT <= result.status_code < _SERVER_ERROR


def _status_error(status: int, description: object) -> EventRejected:
    text = description if isinstance(description, str) and description else None
    return EventRejected(text or HTTP_STATUS_CODES.get(status, "refused"), code=status)


def _require_arguments(handler: Callable[..., object], count: int) -> None:
    # The TypeError of the call would count as a failure of the handler, and a client could fill
    # the log with tracebacks.
    if not accepts(handler, count):
        raise EventInvalid(f"this event does not take {count} arguments")

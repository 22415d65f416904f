"""Handlers run once, fail once and answer once; seen through Flask-SocketIO's test client."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from typing import TYPE_CHECKING, Any

import flask
import flask_socketio
import gevent
import pytest
from flask_socketio import ConnectionRefusedError as ConnectionRefused
from flask_socketio import Namespace, SocketIO

from flask_socketio_guard import HandlerCall, SocketIOGuard
from flask_socketio_guard.errors import ConfigError, EventRejected, HandlerTimeout
from flask_socketio_guard.events.acknowledgements import Refusal
from flask_socketio_guard.events.handlers import HandlerGuard
from flask_socketio_guard.events.signatures import fit
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.records import Telemetry
from tests.support import unit_support
from tests.support.cases import in_turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from flask_socketio_guard.signals import Failure
    from flask_socketio_guard.telemetry.records import Rejection
    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

SECRET = "text of the exception"


class UnheardOfError(BaseException):
    """What no application should raise."""


def collect_rejections(guarded: Guarded) -> list[Rejection]:
    """Return a list that will hold every rejection."""
    rejections: list[Rejection] = []

    def note(_sender: object, *, record: Rejection) -> None:
        rejections.append(record)

    signals.rejected.connect(note, sender=guarded.app, weak=False)
    return rejections


def collect_failures(guarded: Guarded) -> list[Failure]:
    """Return a list to which every failure will be added."""
    failures: list[Failure] = []
    guarded.guard.on_failure(failures.append)
    return failures


def raiser(exc: BaseException) -> Callable[..., None]:
    def handler(*args: object) -> None:
        del args
        raise exc

    return handler


# A failed handler


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError(SECRET),
        TypeError(SECRET),
        ConnectionRefusedError(SECRET),
        ConnectionRefused(SECRET),
        HandlerTimeout(1.0),
        SystemExit(SECRET),
        KeyboardInterrupt(SECRET),
        GeneratorExit(SECRET),
        gevent.GreenletExit(SECRET),
        gevent.Timeout(1.0, SECRET),
        UnheardOfError(SECRET),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_a_failed_handler_answers_with_an_error_and_its_id(
    guarded: Guarded, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises: one answer, one failure, one log record, one id."""
    failures = collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(raised))
    guarded.socketio.on_event("good", lambda: "still here")
    client = guarded.client()
    with caplog.at_level(logging.ERROR, "flask_socketio_guard"):
        answer = client.emit("bad", callback=True)
    (failure,) = failures
    code = "timeout" if isinstance(raised, HandlerTimeout) else "internal_error"
    assert answer == {"error": {"code": code, "id": failure.error_id}}
    assert SECRET not in json.dumps(answer)
    assert failure.exception is raised
    assert (failure.kind, failure.name, failure.namespace) == ("handler", "bad", "/")
    assert failure.sid
    (record,) = caplog.records
    assert failure.error_id in record.getMessage()
    assert guarded.guard.counters["handler_failures"] == 1
    assert client.emit("good", callback=True) == "still here"


def test_a_failed_handler_without_an_acknowledgement_is_recorded_all_the_same(
    guarded: Guarded,
) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    client = guarded.client()
    assert client.emit("bad") is None
    assert len(failures) == 1
    assert client.get_received() == []


def test_the_text_of_the_exception_goes_to_clients_in_debug_mode_only(guarded: Guarded) -> None:
    guarded.socketio.on_event("bad", raiser(RuntimeError(SECRET)))
    client = guarded.client()
    assert "message" not in client.emit("bad", callback=True)["error"]
    guarded.app.debug = True
    error = client.emit("bad", callback=True)["error"]
    assert error["message"] == f"RuntimeError: {SECRET}"


def test_an_exception_that_cannot_be_printed_is_a_failure_like_any_other(
    guarded: Guarded,
) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    failures = collect_failures(guarded)
    guarded.app.debug = True
    guarded.socketio.on_event("bad", raiser(Unprintable()))
    answer = guarded.client().emit("bad", callback=True)
    assert answer["error"]["code"] == "internal_error"
    assert len(failures) == 1


@pytest.mark.parametrize(
    "result",
    [{"a", "set"}, object(), {"deep": [{1, 2}]}, float, 1j],
    ids=["set", "object", "deep", "type", "complex"],
)
def test_an_answer_that_json_cannot_hold_is_a_failure(guarded: Guarded, result: object) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_event("ask", lambda: result)
    answer = guarded.client().emit("ask", callback=True)
    (failure,) = failures
    assert answer == {"error": {"code": "internal_error", "id": failure.error_id}}
    assert isinstance(failure.exception, TypeError)


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        (None, []),
        ("text", "text"),
        (0, 0),
        (False, False),
        ([], []),
        (["a", "b"], ["a", "b"]),
        (("a", 1), ["a", 1]),
        ({"k": 1}, {"k": 1}),
        (b"\x00\x01", b"\x00\x01"),
        ({"k": b"\x00"}, {"k": b"\x00"}),
    ],
    ids=repr,
)
def test_what_a_handler_returns_is_its_answer(
    guarded: Guarded, result: object, answer: object
) -> None:
    """As without the guard."""
    guarded.socketio.on_event("ask", lambda: result)
    assert guarded.client().emit("ask", callback=True) == answer


def test_an_event_without_a_handler_is_not_answered(guarded: Guarded) -> None:
    guarded.socketio.on_event("other", lambda: 1)
    assert guarded.client().emit("unknown", callback=True) is None
    assert guarded.guard.counters["handler_failures"] == 0


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2, 3, 4)])
def test_an_event_with_too_few_or_too_many_arguments_is_rejected(
    guarded: Guarded, arguments: tuple[int, ...]
) -> None:
    """Told as failures, a client could fill the log with tracebacks."""
    guarded.socketio.on_event("ask", lambda one, two, three=3: (one, two, three))
    client = guarded.client()
    answer = client.emit("ask", *arguments, callback=True)
    assert answer["error"]["code"] == "invalid"
    assert guarded.guard.counters["handler_failures"] == 0
    assert guarded.guard.counters["events_rejected"] == 1
    assert client.emit("ask", 1, 2, callback=True) == [1, 2, 3]


def test_a_decorator_that_adds_arguments_of_its_own_decides_by_itself(guarded: Guarded) -> None:
    def inner(extra: str, one: int) -> list[object]:
        return [extra, one]

    @functools.wraps(inner)
    def outer(*args: int) -> list[object]:
        return inner("extra", *args)

    guarded.socketio.on_event("ask", outer)
    assert guarded.client().emit("ask", 1, callback=True) == ["extra", 1]


def test_a_type_error_in_a_handler_is_a_failure_and_told_once(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_event("ask", raiser(TypeError(SECRET)))
    answer = guarded.client().emit("ask", callback=True)
    assert answer["error"]["code"] == "internal_error"
    assert len(failures) == 1


# Connect and disconnect


def test_a_failed_connect_handler_refuses_its_client(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_event("connect", raiser(RuntimeError(SECRET)))
    client = guarded.polling()
    answer = client.connect()
    assert answer.startswith("44")
    (failure,) = failures
    assert json.loads(answer[2:]) == {
        "message": "Connection rejected by server",
        "data": {"code": "internal_error", "id": failure.error_id},
    }
    assert SECRET not in answer
    assert list(guarded.socketio.server.manager.get_participants("/", None)) == []


@pytest.mark.parametrize(
    "raised",
    [RuntimeError(), TypeError(), SystemExit(1), gevent.GreenletExit(), UnheardOfError()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("auth", [None, {"token": 1}])
@pytest.mark.parametrize("takes_auth", [False, True])
def test_a_connect_handler_runs_once_whatever_it_raises(
    guarded: Guarded, raised: BaseException, auth: object, takes_auth: bool
) -> None:
    """Upstream tries up to four times after a TypeError."""
    failures = collect_failures(guarded)
    runs = []

    def connect() -> None:
        runs.append(1)
        raise raised

    guarded.socketio.on_event("connect", (lambda auth: connect()) if takes_auth else connect)
    client = guarded.client(auth=auth)
    assert not client.is_connected()
    assert runs == [1]
    assert [failure.exception for failure in failures] == [raised]


@pytest.mark.parametrize(
    "raised", [RuntimeError(), TypeError(), SystemExit(1)], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("takes_reason", [False, True])
@pytest.mark.parametrize("is_class", [False, True])
def test_a_disconnect_handler_runs_once_whatever_it_raises(
    guarded: Guarded, raised: BaseException, takes_reason: bool, is_class: bool
) -> None:
    failures = collect_failures(guarded)
    runs = []

    def disconnect() -> None:
        runs.append(1)
        raise raised

    handler = (lambda reason: disconnect()) if takes_reason else disconnect
    if is_class:
        namespace = Namespace("/")
        namespace.on_disconnect = handler
        guarded.socketio.on_namespace(namespace)
    else:
        guarded.socketio.on_event("disconnect", handler)
    client = guarded.client()
    client.disconnect()
    assert runs == [1]
    assert [failure.exception for failure in failures] == [raised]
    assert list(guarded.socketio.server.manager.get_participants("/", None)) == []


def test_connect_and_disconnect_handlers_get_what_they_ask_for(guarded: Guarded) -> None:
    got: dict[str, tuple[object, ...]] = {}
    for name, connect, disconnect in (
        (
            "/none",
            lambda: got.update({"connect /none": ()}),
            lambda: got.update({"disconnect /none": ()}),
        ),
        (
            "/one",
            lambda one: got.update({"connect /one": (one,)}),
            lambda one: got.update({"disconnect /one": (one,)}),
        ),
        (
            "/default",
            lambda one="unset": got.update({"connect /default": (one,)}),
            lambda one="unset": got.update({"disconnect /default": (one,)}),
        ),
        (
            "/any",
            lambda *args: got.update({"connect /any": args}),
            lambda *args: got.update({"disconnect /any": args}),
        ),
    ):
        guarded.socketio.on_event("connect", connect, namespace=name)
        guarded.socketio.on_event("disconnect", disconnect, namespace=name)
        client = guarded.client(namespace=name, auth={"token": 1})
        assert client.is_connected(name)
        client.disconnect(namespace=name)
    auth, reason = {"token": 1}, "client disconnect"
    assert got == {
        "connect /none": (),
        "connect /one": (auth,),
        "connect /default": (auth,),
        "connect /any": (auth,),
        "disconnect /none": (),
        "disconnect /one": (reason,),
        "disconnect /default": (reason,),
        "disconnect /any": (reason,),
    }
    assert guarded.guard.counters["handler_failures"] == 0


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``login_required`` and its like: takes anything and passes it on."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_decorated_handlers_get_what_the_function_inside_asks_for(guarded: Guarded) -> None:
    got: list[object] = []
    guarded.socketio.on_event("connect", decorated(lambda: got.append("connect")))
    guarded.socketio.on_event("disconnect", decorated(lambda reason: got.append(reason)))
    guarded.socketio.on_event("chat", decorated(lambda text: got.append(text)))
    client = guarded.client(auth={"token": 1})
    assert client.is_connected()
    client.emit("chat", "hello")
    client.disconnect()
    assert got == ["connect", "hello", "client disconnect"]


def with_user(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator with a signature of its own: takes one argument and passes on two."""

    @functools.wraps(function)
    def wrapper(auth: Any) -> Any:
        return function("user", auth)

    return wrapper


def test_the_signature_of_a_decorator_counts_before_that_of_the_function(guarded: Guarded) -> None:
    got: list[object] = []
    guarded.socketio.on_event("connect", with_user(lambda user, auth: got.extend([user, auth])))
    assert guarded.client(auth={"token": 1}).is_connected()
    assert got == ["user", {"token": 1}]
    assert fit(with_user(lambda *_: None), (1, 2, 3)) == (1,)


def test_a_connect_handler_that_returns_false_refuses_as_ever(guarded: Guarded) -> None:
    guarded.socketio.on_event("connect", lambda: False)
    assert guarded.polling().connect().startswith("44")
    assert guarded.guard.counters["handler_failures"] == 0
    assert guarded.guard.counters["events_rejected"] == 0


def test_a_refusal_of_the_application_passes_through(guarded: Guarded) -> None:
    """``ConnectionRefusedError`` of Flask-SocketIO is no failure."""
    guarded.socketio.on_event("connect", raiser(ConnectionRefused("not you", {"retry": 5})))
    answer = guarded.polling().connect()
    assert json.loads(answer[2:]) == {"message": "not you", "data": {"retry": 5}}
    assert guarded.guard.counters["handler_failures"] == 0


def test_a_refused_tcp_connection_is_a_failure_and_no_refusal(guarded: Guarded) -> None:
    """Python's ConnectionRefusedError has the same name; a database that is down raises it."""
    failures = collect_failures(guarded)
    guarded.socketio.on_event("connect", raiser(ConnectionRefusedError(111, SECRET)))
    answer = guarded.polling().connect()
    assert json.loads(answer[2:])["data"]["code"] == "internal_error"
    assert SECRET not in answer
    assert len(failures) == 1


# Error handlers of the application


@pytest.mark.parametrize("place", ["namespace", "default"])
@pytest.mark.parametrize(
    ("returned", "is_answered"),
    [(None, False), (True, False), ("sorry", True), (False, True), ({"e": 1}, True), (0, True)],
    ids=repr,
)
def test_an_error_handler_may_answer_but_not_claim_success(
    guarded: Guarded,
    caplog: pytest.LogCaptureFixture,
    place: str,
    returned: object,
    is_answered: bool,
) -> None:
    """What it has answered is a rejection: counted, and no line in the log."""
    failures, rejections = collect_failures(guarded), collect_rejections(guarded)
    seen: list[BaseException] = []

    def on_error(exc: BaseException) -> object:
        seen.append(exc)
        return returned

    if place == "default":
        guarded.socketio.on_error_default(on_error)
    else:
        guarded.socketio.on_error("/")(on_error)
    raised = RuntimeError(SECRET)
    guarded.socketio.on_event("bad", raiser(raised))
    answer = guarded.client().emit("bad", callback=True)
    assert seen == [raised]
    assert failures == []
    (rejection,) = rejections
    assert rejection.exception is raised
    assert guarded.guard.counters["handler_failures"] == 0
    assert guarded.guard.counters["events_rejected"] == 1
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    if is_answered:
        assert answer == returned
    else:
        assert answer == {"error": {"code": "internal_error", "id": rejection.error_id}}


@pytest.mark.parametrize("status", [400, 401, 403, 429])
def test_an_abort_is_an_answer_with_its_code(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """Of Flask, Werkzeug or Flask-Login; a client can cause one as often as it likes."""
    failures = collect_failures(guarded)
    guarded.socketio.on_event("no", lambda: flask.abort(status, "not you"))
    guarded.socketio.on_event("response", lambda: flask.abort(flask.Response("x", status=status)))
    guarded.socketio.on_event("connect", lambda: flask.abort(status, "not you"), namespace="/no")
    client = guarded.client()
    answer = client.emit("no", callback=True)
    assert answer == {"error": {"code": status, "message": "not you"}}
    assert client.emit("response", callback=True)["error"]["code"] == status
    assert not guarded.client(namespace="/no").is_connected("/no")
    assert failures == []
    assert guarded.guard.counters["events_rejected"] == 3
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_an_abort_for_an_error_of_the_server_is_a_failure(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_event("no", lambda: flask.abort(503))
    assert guarded.client().emit("no", callback=True)["error"]["code"] == "internal_error"
    assert len(failures) == 1


def test_a_redirect_to_the_login_page_is_a_refusal(guarded: Guarded) -> None:
    """Flask-Login's ``login_required`` returns it in the handler's place; stock lets it in."""
    failures = collect_failures(guarded)

    def login_required(*_args: object) -> object:
        return flask.redirect("/login")

    guarded.socketio.on_event("no", login_required)
    guarded.socketio.on_event("connect", login_required, namespace="/no")
    answer = guarded.client().emit("no", callback=True)
    assert answer == {"error": {"code": 302, "message": "Found"}}
    assert not guarded.client(namespace="/no").is_connected("/no")
    assert failures == []


@pytest.mark.parametrize("error", [KeyError("mine"), EventRejected("mine", code="mine")])
def test_what_an_overridden_trigger_event_answers_is_a_rejection(
    guarded: Guarded, error: Exception
) -> None:
    class Own(Namespace):
        def trigger_event(self, event: str, *args: object) -> object:
            if event == "direct":
                raise EventRejected("not here", code="direct")
            try:
                return super().trigger_event(event, *args)
            except KeyError:
                return "answered"

        def on_bad(self) -> None:
            raise error

    failures = collect_failures(guarded)
    guarded.socketio.on_namespace(Own("/own"))
    client = guarded.client(namespace="/own")
    answer = client.emit("bad", callback=True, namespace="/own")
    expected = {"error": {"code": "mine", "message": "mine"}}
    assert answer == ("answered" if isinstance(error, KeyError) else expected)
    answer = client.emit("direct", callback=True, namespace="/own")
    assert answer == {"error": {"code": "direct", "message": "not here"}}
    assert failures == []
    assert guarded.guard.counters["events_rejected"] == 2


@pytest.mark.parametrize(
    ("config", "is_raised"),
    [
        ({}, False),
        ({"TESTING": True}, True),
        ({"PROPAGATE_EXCEPTIONS": True}, True),
        ({"TESTING": True, "PROPAGATE_EXCEPTIONS": False}, False),
    ],
)
def test_what_fails_reaches_a_test_as_from_a_view(
    guarded: Guarded, config: dict[str, bool], is_raised: bool
) -> None:
    """With Flask-SocketIO's test client; also what cannot be encoded, and is recorded as ever."""
    guarded.app.config.update(config)
    failures = collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(LookupError("x")))
    guarded.socketio.on_event("odd", object)
    guarded.socketio.on_event("no", lambda: flask.abort(403))
    guarded.socketio.on_event("connect", raiser(LookupError("x")), namespace="/bad")
    guarded.socketio.on_event("disconnect", raiser(LookupError("x")))
    client = guarded.client()
    raising = pytest.raises(LookupError) if is_raised else contextlib.nullcontext()
    with raising:
        client.emit("bad", callback=True)
    with pytest.raises(TypeError) if is_raised else contextlib.nullcontext():
        client.emit("odd", callback=True)
    with raising:
        guarded.client(namespace="/bad")
    assert client.emit("no", callback=True)["error"]["code"] == 403
    with raising:
        client.disconnect()
    assert len(failures) == 4
    assert len(guarded.guard.connections) == 0


@pytest.mark.parametrize("returned", [None, True, "welcome", {"ok": True}], ids=repr)
def test_an_error_handler_can_let_nobody_in(guarded: Guarded, returned: object) -> None:
    seen: list[BaseException] = []

    @guarded.socketio.on_error_default
    def on_error(exc: BaseException) -> object:
        seen.append(exc)
        return returned

    guarded.socketio.on_event("connect", raiser(RuntimeError()))
    answer = guarded.polling().connect()
    assert answer.startswith("44")
    assert len(seen) == 1


def test_an_error_handler_that_raises_is_a_failure_of_its_own(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_error_default(raiser(ValueError("the error handler is bad too")))
    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    answer = guarded.client().emit("bad", callback=True)
    assert [type(failure.exception) for failure in failures] == [ValueError]
    assert answer["error"]["id"] == failures[0].error_id


def test_an_error_handler_that_raises_the_same_again_is_one_failure(guarded: Guarded) -> None:
    failures = collect_failures(guarded)

    @guarded.socketio.on_error_default
    def on_error(exc: BaseException) -> None:
        raise exc

    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    guarded.client().emit("bad", callback=True)
    assert len(failures) == 1


def test_an_error_handler_finds_the_request_of_the_event(guarded: Guarded) -> None:
    """As documented by Flask-SocketIO: ``request.event`` says what failed."""
    seen: list[object] = []

    @guarded.socketio.on_error_default
    def on_error(exc: BaseException) -> None:
        del exc
        seen.append(flask.request.event)  # type: ignore[attr-defined]

    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    guarded.client().emit("bad", 1, 2)
    assert seen == [{"message": "bad", "args": (1, 2)}]


def test_an_error_handler_does_not_hear_of_rejections(guarded: Guarded) -> None:
    """Nothing has gone wrong."""
    guarded.socketio.on_error_default(raiser(AssertionError("heard")))
    guarded.socketio.on_event("chat", raiser(EventRejected("not now")))
    assert guarded.client().emit("chat", callback=True)["error"]["code"] == "rejected"


# Rejections


@pytest.mark.parametrize("place", ["handler", "hook"])
def test_a_rejected_event_is_answered_with_code_and_message(guarded: Guarded, place: str) -> None:
    failures = collect_failures(guarded)
    runs = []
    rejection = EventRejected("too late", code="closed")
    if place == "handler":
        guarded.socketio.on_event("chat", raiser(rejection))
    else:
        guarded.guard.before_event(raiser(rejection))
        guarded.socketio.on_event("chat", lambda: runs.append(1))
    answer = guarded.client().emit("chat", callback=True)
    assert answer == {"error": {"code": "closed", "message": "too late"}}
    assert runs == []
    assert failures == []
    assert guarded.guard.counters["events_rejected"] == 1
    assert guarded.guard.counters["handler_failures"] == 0


@pytest.mark.parametrize("place", ["handler", "hook"])
def test_a_rejected_connect_refuses_its_client(guarded: Guarded, place: str) -> None:
    rejection = EventRejected("full", code="full")
    if place == "handler":
        guarded.socketio.on_event("connect", raiser(rejection))
    else:
        guarded.guard.before_event(raiser(rejection))
        guarded.socketio.on_event("connect", lambda: None)
    assert json.loads(guarded.polling().connect()[2:]) == {
        "message": "Connection rejected by server",
        "data": {"code": "full", "message": "full"},
    }


# Ports


def test_a_hook_sees_every_event_before_its_handler(guarded: Guarded) -> None:
    seen: list[HandlerCall] = []
    requests: list[object] = []

    @guarded.guard.before_event
    def look(event: HandlerCall) -> None:
        seen.append(event)
        requests.append(flask.request.sid)  # type: ignore[attr-defined]

    for name in ("connect", "disconnect"):
        guarded.socketio.on_event(name, lambda *_: None)
    guarded.socketio.on_event("chat", lambda *_: "answer")
    client = guarded.client(auth={"token": 1})
    sid = seen[0].sid
    assert client.emit("chat", "hello", 2, callback=True) == "answer"
    client.disconnect()
    assert seen == [
        HandlerCall("connect", "/", sid, ({"token": 1},)),
        HandlerCall("chat", "/", sid, ("hello", 2)),
        HandlerCall("disconnect", "/", sid, ("client disconnect",)),
    ]
    assert requests == [sid] * 3


def test_hooks_run_in_the_order_of_their_registration_until_one_rejects(guarded: Guarded) -> None:
    order: list[str] = []
    guarded.socketio.on_event("chat", lambda: order.append("handler"))
    client = guarded.client()
    guarded.guard.before_event(lambda _event: order.append("first"))
    client.emit("chat")
    assert order == ["first", "handler"]
    guarded.guard.before_event(raiser(EventRejected()))
    guarded.guard.before_event(lambda _event: order.append("never"))
    client.emit("chat")
    assert order == ["first", "handler", "first"]


@pytest.mark.parametrize(
    "raised", [RuntimeError(), SystemExit(1)], ids=lambda error: type(error).__name__
)
def test_a_hook_that_raises_fails_the_event(guarded: Guarded, raised: BaseException) -> None:
    """Fail closed: what should be looked at was not."""
    failures = collect_failures(guarded)
    runs = []
    guarded.guard.before_event(raiser(raised))
    guarded.socketio.on_event("chat", lambda: runs.append(1))
    client = guarded.client()
    assert client.emit("chat", callback=True)["error"]["code"] == "internal_error"
    assert runs == []
    assert len(failures) == 1


def test_a_failure_hook_sees_each_failure_once(guarded: Guarded) -> None:
    first, second = collect_failures(guarded), collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    client = guarded.client()
    for _ in range(3):
        client.emit("bad")
    assert len(first) == len(second) == 3
    assert len({failure.error_id for failure in first}) == 3


@pytest.mark.parametrize(
    "raised",
    [RuntimeError(), SystemExit(3), gevent.GreenletExit(), UnheardOfError()],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_hook_that_raises_is_recorded_once_and_harms_nobody(
    guarded: Guarded, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not called for its own failure without end, and the process goes on."""
    calls: list[str] = []

    @guarded.guard.on_failure
    def hook(failure: Failure) -> None:
        calls.append(failure.kind)
        raise raised

    others = collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(RuntimeError()))
    with caplog.at_level(logging.ERROR, "flask_socketio_guard"):
        answer = guarded.client().emit("bad", callback=True)
    assert answer["error"]["code"] == "internal_error"
    assert calls == ["handler", "hook"]
    assert sorted(failure.kind for failure in others) == ["handler", "hook"]
    assert guarded.guard.counters["hook_failures"] == 1
    assert len(caplog.records) == 2


# Namespaces as classes, catch-all handlers


class Answering(Namespace):
    """With an ``error`` method, which Flask-SocketIO calls."""

    errors: list[Exception]

    def on_bad(self) -> None:
        raise RuntimeError(SECRET)

    def on_reject(self) -> None:
        raise EventRejected("no")

    def on_good(self, text: str) -> str:
        return text

    def on_connect(self, auth: object = None) -> None:
        if auth == "raise":
            raise RuntimeError(SECRET)

    def error(self, exc: Exception) -> str:
        self.errors.append(exc)
        return "handled"


class Plain(Namespace):
    """Without one."""

    def on_bad(self) -> None:
        raise RuntimeError(SECRET)

    def on_good(self, text: str) -> str:
        return text


def test_a_namespace_class_is_protected_like_any_handler(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    guarded.socketio.on_namespace(Plain("/plain"))
    client = guarded.client(namespace="/plain")
    answer = client.emit("bad", callback=True, namespace="/plain")
    assert answer == {"error": {"code": "internal_error", "id": failures[0].error_id}}
    assert failures[0].namespace == "/plain"
    assert len(failures) == 1
    assert client.emit("good", "x", callback=True, namespace="/plain") == "x"


def test_an_error_method_of_a_namespace_may_answer_but_let_nobody_in(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    namespace = Answering("/answering")
    namespace.errors = []
    guarded.socketio.on_namespace(namespace)
    client = guarded.client(namespace="/answering")
    answer = client.emit("bad", callback=True, namespace="/answering")
    # Flask-SocketIO before 5.6.1 knows no error method.
    has_error_method = "self.error(" in inspect.getsource(Namespace.trigger_event)
    if has_error_method:
        assert answer == "handled"
        assert len(namespace.errors) == 1
        assert failures == []
    else:
        assert len(failures) == 1
        assert answer == {"error": {"code": "internal_error", "id": failures[0].error_id}}
    answer = client.emit("reject", callback=True, namespace="/answering")
    assert answer == {"error": {"code": "rejected", "message": "no"}}
    assert not guarded.client(namespace="/answering", auth="raise").is_connected("/answering")
    assert len(failures) == (0 if has_error_method else 2)


def test_a_namespace_class_registered_before_the_guard_is_protected(
    make_guarded: Callable[..., Guarded],
) -> None:
    socketio = SocketIO()
    socketio.on_namespace(Plain("/plain"))
    guarded = make_guarded(socketio=socketio)
    client = guarded.client(namespace="/plain")
    answer = client.emit("bad", callback=True, namespace="/plain")
    assert answer["error"]["code"] == "internal_error"


def test_a_catch_all_handler_is_protected(guarded: Guarded) -> None:
    failures = collect_failures(guarded)
    seen: list[tuple[object, ...]] = []

    @guarded.socketio.on("*")
    def any_event(event: str, *args: object) -> str:
        seen.append((event, *args))
        if event == "bad":
            raise RuntimeError(SECRET)
        return "caught"

    client = guarded.client()
    assert client.emit("anything", 1, callback=True) == "caught"
    assert client.emit("bad", callback=True)["error"]["code"] == "internal_error"
    assert seen == [("anything", 1), ("bad",)]
    assert failures[0].name == "bad"


def test_a_catch_all_namespace_is_protected(make_guarded: Callable[..., Guarded]) -> None:
    guarded = make_guarded(options={"namespaces": "*"})
    failures = collect_failures(guarded)
    guarded.socketio.on_event("bad", raiser(RuntimeError()), namespace="*")
    client = guarded.client(namespace="/some")
    answer = client.emit("bad", callback=True, namespace="/some")
    assert answer["error"]["code"] == "internal_error"
    assert failures[0].namespace == "/some"


# The gates by themselves


@in_turn(
    ("handler", "count"),
    [
        (lambda: None, 0),
        (lambda a: None, 1),
        (lambda a, b=2: None, 2),
        (lambda a, /, b: None, 2),
        (lambda *args: None, 3),
        (lambda a, *args: None, 3),
        (lambda a, *, key=1: None, 1),
        (lambda **kwargs: None, 0),
        (decorated(lambda a: None), 1),
        (decorated(decorated(lambda: None)), 0),
        (decorated(lambda *args: None), 3),
        (functools.partial(lambda a, b: None, 1), 1),
        (dict, 3),
        (print, 3),
    ],
)
def test_arguments_are_cut_to_what_a_signature_accepts(
    handler: Callable[..., object], count: int
) -> None:
    assert fit(handler, (1, 2, 3)) == (1, 2, 3)[:count]


def test_nothing_but_a_refusal_ever_leaves_a_handler() -> None:
    """Outside of any application."""
    guard = HandlerGuard(Telemetry(object()), is_debug=lambda: False)
    for exc in (RuntimeError(), SystemExit(), KeyboardInterrupt(), UnheardOfError()):
        refusal = guard.run("chat", "/", "sid", raiser(exc))
        assert isinstance(refusal, Refusal)
        assert refusal.error["code"] == "internal_error"
        assert refusal.reply == {"error": refusal.error}
    assert guard.run("chat", "/", "sid", lambda: "result") == "result"
    with pytest.raises(ConnectionRefused):
        guard.run("connect", "/", "sid", raiser(ConnectionRefused()))


def test_a_handler_outside_of_any_event_is_left_as_it_is() -> None:
    """Someone calls Flask-SocketIO's internals by hand; that is theirs."""
    guard = HandlerGuard(Telemetry(object()), is_debug=lambda: False)
    handler = raiser(RuntimeError())
    assert guard.protect(handler, "chat") is handler


def test_the_name_of_a_rejected_event_is_cut() -> None:
    """It comes from a client and goes to logs."""
    telemetry = Telemetry(object())
    guard = HandlerGuard(telemetry, is_debug=lambda: False)
    records: list[Any] = []
    subscription = telemetry.subscribe(signals.rejected, records.append)
    guard.reject("x" * 10_000, "/", "sid", EventRejected())
    guard.reject({"not": "a name"}, "/", "sid", EventRejected())
    assert [record.event for record in records] == ["x" * 100, "<dict>"]
    del subscription


# What would never run


async def coroutine(*_args: object) -> None:
    """Would return a coroutine that nobody awaits."""


def generator(*_args: object) -> Iterator[int]:
    """Would return a generator that nobody reads."""
    yield 1


async def asynchronous_generator(*_args: object) -> AsyncIterator[int]:
    """Both."""
    yield 1


class Callee:
    """Whose call is one."""

    async def __call__(self, *_args: object) -> None:
        """Do nothing."""


NEVER_RUN = [coroutine, generator, asynchronous_generator, Callee()]


@pytest.mark.parametrize("handler", [*NEVER_RUN, functools.partial(coroutine, 1)])
def test_a_handler_that_would_never_run_is_refused(guarded: Guarded, handler: Any) -> None:
    """However it is registered; stock takes it, and nothing ever happens."""
    socketio, guard = guarded.socketio, guarded.guard
    bad = type("Bad", (Namespace,), {"on_x": staticmethod(handler)})
    ways: list[Callable[[], object]] = [
        lambda: socketio.on("x")(handler),
        lambda: socketio.on_event("x", handler),
        lambda: guard.on("x")(handler),
        lambda: guard.on_event("x", handler),
        lambda: SocketIOGuard().on("x")(handler),
        lambda: socketio.on_namespace(bad("/x")),
        lambda: socketio.on_error()(handler),
        lambda: socketio.on_error_default(handler),
        lambda: guard.handshake("x", "/x")(handler),
        lambda: SocketIOGuard().handshake("x")(handler),
    ]
    for way in ways:
        with pytest.raises(ConfigError, match="would never run"):
            way()


@pytest.mark.parametrize("callback", NEVER_RUN)
def test_a_callback_that_would_never_run_is_refused(guarded: Guarded, callback: Any) -> None:
    """The emit raises; nothing was sent, and nothing waits."""
    socketio, guard = guarded.socketio, guarded.guard
    raised: list[str] = []

    @socketio.on("go")
    def go() -> None:
        for way in (
            lambda: flask_socketio.emit("x", callback=callback),
            lambda: flask_socketio.send("x", callback=callback),
            lambda: socketio.emit("x", callback=callback),
            lambda: socketio.server.emit("x", callback=callback),
            lambda: guard.emit("x", callback=callback),
            lambda: guard.emit("x", callback=print, on_timeout=callback),
        ):
            with pytest.raises(ConfigError, match="would never run"):
                way()
            raised.append("refused")

    client = guarded.client()
    client.emit("go", callback=True)
    assert raised == ["refused"] * 6
    assert guard.waiting_callbacks == 0


@pytest.mark.parametrize("handler", NEVER_RUN[:3])
def test_what_was_registered_before_the_guard_and_would_never_run_is_refused(
    handler: Any,
) -> None:
    app, socketio = flask.Flask(__name__), SocketIO(async_mode="threading")
    socketio.on("x")(handler)
    socketio.init_app(app)
    with pytest.raises(ConfigError, match=r"the handler of 'x' is an? .* function, whose"):
        SocketIOGuard(app, socketio)


def test_a_generator_that_a_decorator_has_made_a_plain_function_is_one(
    make_guarded: Callable[..., Guarded],
) -> None:
    @functools.wraps(generator)
    def decorated(*args: object) -> list[int]:
        return list(generator(*args))

    socketio = SocketIO()
    socketio.on_event("before", decorated)
    guarded = make_guarded(socketio=socketio)
    guarded.socketio.on_event("after", decorated)
    client = guarded.client()
    assert client.emit("before", callback=True) == client.emit("after", callback=True) == [1]

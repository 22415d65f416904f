"""Request contexts of events: as upstream makes them, whatever is worked out once."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import flask
import pytest
from flask import Flask, current_app, g, request, session
from flask.sessions import SecureCookieSessionInterface
from flask_socketio import SocketIO
from werkzeug.exceptions import NotFound
from werkzeug.routing import RequestRedirect

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.upstream.flask import event_context
from flask_socketio_guard.upstream.flask.event_context import RequestContext
from tests.support import unit_support
from tests.support.cases import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards
KINDS = ["stock", "slow", "fast"]


class Recorder:
    """An application that notes what its handlers see."""

    def __init__(self, kind: str, app: Flask | None = None, **options: Any) -> None:
        self.app = app or Flask(__name__)
        self.app.secret_key = "secret"
        self.seen: list[Any] = []
        socketio_class = options.pop("socketio_class", SocketIO)
        self.socketio = socketio_class(self.app, async_mode="threading", **options)
        if kind != "stock":
            SocketIOGuard(self.app, self.socketio, fast=kind == "fast")

    @property
    def is_fast(self) -> bool:
        """Whether the contexts of events are not upstream's."""
        contexts: Any = self.socketio.event_contexts
        return bool(contexts.is_fast)

    def run(self, see: Callable[[], object], events: int = 3, **options: Any) -> list[Any]:
        """Return what *see* returns in connect, so many events and disconnect of one client."""

        def note(*_args: object) -> None:
            self.seen.append(see())

        for name in ("connect", "event", "disconnect"):
            self.socketio.on_event(name, note)
        client = self.socketio.test_client(self.app, **options)
        for number in range(events):
            client.emit("event", number)
        client.disconnect()
        return self.seen


def beside_stock(see: Callable[[], object], **options: Any) -> list[Any]:
    """Return what is seen, and make sure that it is the same without the guard."""
    stock, slow, fast = (Recorder(kind).run(see, **options) for kind in KINDS)
    assert stock == slow == fast
    return fast


def test_the_environ_knows_the_request_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the first connection, whose request is compared with one that nobody used."""
    monkeypatch.setattr(event_context, "_known_names", weakref.WeakKeyDictionary())
    own: list[object] = [None]

    def see() -> object:
        return request.environ["werkzeug.request"] is own[0]

    def see_all() -> object:
        own[0] = request._get_current_object()  # type: ignore[attr-defined]
        return see()

    assert beside_stock(see_all) == [True] * 5


def test_the_request_is_the_one_of_the_connection() -> None:
    def see() -> object:
        return (
            request.method,
            request.url,
            request.base_url,
            request.path,
            request.args.to_dict(),
            sorted(request.headers.items()),
            request.cookies.to_dict(),
            request.remote_addr,
            request.host,
            request.is_secure,
            request.get_data(),
            request.endpoint,
            request.view_args,
            request.blueprints,
            request.namespace,  # type: ignore[attr-defined]
            request.event["message"],  # type: ignore[attr-defined]
            type(request.routing_exception),
            type(flask.globals.request_ctx.url_adapter),
        )

    seen = beside_stock(see, query_string="a=1&b=2", headers={"X-Custom": "yes", "Cookie": "c=d"})
    assert len(seen) == 5
    assert seen[1][4] == {"a": "1", "b": "2"}


def test_each_event_has_a_request_and_a_g_of_its_own() -> None:
    """What a handler leaves on them is not there for the next."""

    def see() -> object:
        left = [vars(request._get_current_object()).pop("mine", None), g.get("mine")]  # type: ignore[attr-defined]
        request.mine = g.mine = True  # type: ignore[attr-defined]
        request.args  # noqa: B018 - worked out on demand, and kept on the request
        return left, request.environ["werkzeug.request"] is request._get_current_object()  # type: ignore[attr-defined]

    assert beside_stock(see) == [([None, None], True)] * 5


def test_urls_are_built_as_in_any_request() -> None:
    def see() -> object:
        return flask.url_for("page", number=3), flask.url_for("page", number=3, _external=True)

    apps = []
    for kind in KINDS:
        app = Flask(__name__)
        app.add_url_rule("/page/<int:number>", "page", lambda number: str(number))
        apps.append(Recorder(kind, app).run(see))
    assert apps[0] == apps[1] == apps[2]
    assert apps[2][1] == ("/page/3", "http://localhost/page/3")


@pytest.mark.parametrize("rule", ["/<path:where>", "/socket.io/"])
def test_a_route_that_leads_to_the_path_is_seen(rule: str) -> None:
    def see() -> object:
        error = type(request.routing_exception)
        found = (request.endpoint, dict(request.view_args or {}), error)
        if request.view_args is not None:
            request.view_args["mine"] = 1
        return found

    seen = []
    for kind in KINDS:
        app = Flask(__name__)
        app.add_url_rule(rule, "caught", lambda **_: "")
        seen.append(Recorder(kind, app).run(see))
    assert seen[0] == seen[1] == seen[2]
    assert seen[2][2] == (
        ("caught", {"where": "socket.io"}, type(None))
        if rule == "/<path:where>"
        else (None, {}, RequestRedirect)
    )


def test_a_route_error_that_is_raised_keeps_nothing_alive() -> None:
    recorder = Recorder("fast")
    recorder.run(lambda: type(request.routing_exception))
    assert set(recorder.seen) == {NotFound}


@pytest.mark.parametrize("is_managed", [True, False])
def test_the_session_is_kept_as_upstream_keeps_it(is_managed: bool) -> None:
    """Managed by Flask-SocketIO it is one for the connection; else it is Flask's each time."""

    def see() -> object:
        session["count"] = session.get("count", 0) + 1
        return session["count"], session.modified, type(session._get_current_object()).__name__  # type: ignore[attr-defined]

    seen = [Recorder(kind, manage_session=is_managed).run(see) for kind in KINDS]
    assert seen[0] == seen[1] == seen[2]
    assert [count for count, _, _ in seen[2]] == ([1, 2, 3, 4, 5] if is_managed else [1] * 5)


class CountingSessions(SecureCookieSessionInterface):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.opened = self.saved = 0

    def open_session(self, app: Flask, request: flask.Request) -> Any:
        self.opened += 1
        return super().open_session(app, request)

    def save_session(self, *args: Any) -> None:
        self.saved += 1
        super().save_session(*args)


@pytest.mark.parametrize(
    ("kind", "is_managed", "opened", "saved"),
    [("stock", True, 5, 0), ("fast", True, 1, 0), ("stock", False, 5, 2), ("fast", False, 5, 2)],
)
def test_sessions_of_an_interface_are_opened_and_saved(
    kind: str, is_managed: bool, opened: int, saved: int
) -> None:
    """Where Flask manages them, a server-side session may have changed between two events."""
    app = Flask(__name__)
    app.session_interface = sessions = CountingSessions()
    recorder = Recorder(kind, app, manage_session=is_managed)
    numbers = iter(range(10))

    def see() -> None:
        if next(numbers) in (1, 3):
            session["changed"] = True

    recorder.run(see)
    assert (sessions.opened, sessions.saved) == (opened, saved)


def copy_and_run() -> object:
    def see() -> object:
        session["copied"] = session.get("copied", 0) + 1
        return (
            request.sid,  # type: ignore[attr-defined]
            request.event["message"],  # type: ignore[attr-defined]
            session["copied"],
            flask.has_request_context(),
            flask.url_for("page"),
            type(request.routing_exception),
        )

    sid = request.sid  # type: ignore[attr-defined]
    copied = flask.copy_current_request_context(see)
    return [seen[1:] for seen in (copied(), in_thread(copied)) if seen[0] == sid]


def in_thread(function: Callable[..., Any], *args: object) -> Any:
    """Return what *function* returns in a background task."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def hold(context: Any) -> object:
    """Push a context by hand, twice, and pop it."""
    context.push()
    with context:
        inner = flask.has_request_context(), request.path, session.get("copied")
    outer = current_app.name, request.is_json
    context.pop()
    return inner, outer


def push_by_hand() -> object:
    context = the_context()
    again = hold(context.copy()), in_thread(hold, context.copy()), hold(context)
    return again, the_context() is context, g.get("mine")


def the_context() -> Any:
    return flask.globals.request_ctx._get_current_object()  # type: ignore[attr-defined]


def make_another_like_it() -> object:
    """As extensions do that know Flask's class, or take it from the context."""
    context: Any = the_context()
    another = type(context)(current_app._get_current_object(), request.environ)  # type: ignore[attr-defined]
    with another, current_app.request_context(request.environ) as third:
        same = request.url == context.request.url, request is context.request
    with current_app.test_request_context("/page"):
        endpoint = request.endpoint
    return same, endpoint, type(third) is type(context), isinstance(context, RequestContext)


def stream() -> object:
    @flask.stream_with_context
    def numbers() -> Iterator[object]:
        yield request.event["message"]  # type: ignore[attr-defined]
        yield session.get("copied")

    return list(numbers())


def answer_later() -> object:
    ran: list[object] = []

    @flask.after_this_request
    def note(response: Any) -> Any:
        ran.append(response)
        return response

    response = current_app.process_response(current_app.make_response("x"))
    return [each is response for each in ran]


def flash() -> object:
    flask.flash("one")
    with the_context().copy():
        flask.flash("two")
    return flask.get_flashed_messages(), flask.get_flashed_messages()


def ask_about_it() -> object:
    context = the_context()
    return (
        type(context).__name__,
        repr(context).replace(hex(id(context)), "").replace(str(id(context)), ""),
        flask.has_request_context(),
        flask.has_app_context(),
        flask.globals.request_ctx.request == request,
        flask.globals.request_ctx.session == session,
        flask.globals.app_ctx.app is context.app,
        context.match_request(),
    )


@in_turn(
    "use",
    [
        copy_and_run,
        push_by_hand,
        make_another_like_it,
        stream,
        answer_later,
        flash,
        ask_about_it,
    ],
)
@in_turn("is_managed", [True, False])
def test_what_is_done_with_a_context_can_be_done_with_that_of_any_event(
    use: Callable[[], object], is_managed: bool
) -> None:
    """From the first event to the last, in the handler and in tasks that it starts."""
    seen = []
    for kind in KINDS:
        app = Flask(__name__)
        app.add_url_rule("/page", "page", lambda: "")
        seen.append(Recorder(kind, app, manage_session=is_managed).run(use))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[2]) == 5


def test_teardown_functions_run_for_each_event_with_what_was_raised() -> None:
    seen = []
    for kind in KINDS:
        app = Flask(__name__)
        ran: list[object] = []
        app.teardown_request(lambda exc, ran=ran: ran.append(("request", repr(exc))))
        app.teardown_appcontext(lambda exc, ran=ran: ran.append(("app", repr(exc))))
        app.before_request(lambda ran=ran: ran.append("before"))
        recorder = Recorder(kind, app)
        recorder.socketio.on_error_default(lambda exc: None)

        def fail() -> None:
            if request.event["message"] == "event":  # type: ignore[attr-defined]
                raise LookupError("x")

        recorder.run(fail)
        seen.append(ran)
    assert seen[0] == seen[1] == seen[2]
    assert seen[2] == [("request", "None"), ("app", "None")] * 5


class Marker:
    """Something in an environ whose end can be seen."""


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_nothing_of_a_connection_is_left_to_the_garbage_collector(kind: str) -> None:
    """Stock leaves all of it: an error on the request holds the frames of the event."""
    markers: list[weakref.ref[Marker]] = []

    def see() -> None:
        if not markers:
            request.environ["marker"] = marker = Marker()
            markers.append(weakref.ref(marker))

    gc.collect()
    gc.disable()
    try:
        Recorder(kind).run(see)
        assert markers[0]() is None
    finally:
        gc.enable()


class OwnRequest(flask.Request):
    """A request that needs its constructor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tenant = self.args.get("tenant")


class OwnFlask(Flask):
    """Makes requests of its own kind."""

    request_class = OwnRequest


def test_a_request_class_of_the_applications_own_is_used() -> None:
    seen = [
        Recorder(kind, OwnFlask(__name__)).run(
            lambda: (request.tenant, type(request._get_current_object()).__name__),  # type: ignore[attr-defined]
            query_string="tenant=a",
        )
        for kind in KINDS
    ]
    assert seen == [[("a", "OwnRequest")] * 5] * 3


class OwnContext(RequestContext):
    """A context of the application's own."""

    mine = True


class OwnContexts(Flask):
    """Makes contexts of its own kind."""

    def request_context(self, environ: Any) -> RequestContext:
        return OwnContext(self, environ)


class OwnHandling(SocketIO):
    """Handles events in its own way."""

    def _handle_event(self, handler: Any, *args: Any) -> Any:
        return super()._handle_event(handler, *args)


@pytest.mark.parametrize(
    ("app_class", "socketio_class", "reason"),
    [
        (OwnContexts, SocketIO, "the application creates request contexts of its own"),
        (Flask, OwnHandling, "SocketIO._handle_event is overridden"),
    ],
)
def test_what_is_not_known_is_left_to_upstream_and_told_once(
    caplog: pytest.LogCaptureFixture, app_class: Any, socketio_class: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    recorder = Recorder("fast", app_class(__name__), socketio_class=socketio_class)
    recorder.run(lambda: getattr(flask.globals.request_ctx, "mine", False))
    assert recorder.seen == [app_class is OwnContexts] * 5
    assert not recorder.is_fast
    assert [record.getMessage() for record in caplog.records if "contexts" in record.msg] == [
        f"events use Flask-SocketIO's own request contexts: {reason}"
    ]


def test_one_socketio_may_serve_several_applications() -> None:
    """Each as it was configured; one that has no guard as upstream does."""
    socketio = SocketIO()
    socketio.on_event("event", lambda: request.namespace)  # type: ignore[attr-defined]
    for is_fast in (True, False):
        app = Flask(__name__)
        socketio.init_app(app, async_mode="threading")
        SocketIOGuard(app, socketio, fast=is_fast)
        contexts: Any = socketio.event_contexts
        assert contexts.is_fast is is_fast
        assert socketio.test_client(app).emit("event", callback=True) == "/"
    bare = Flask(__name__)
    socketio.init_app(bare, async_mode="threading")
    assert socketio.test_client(bare).emit("event", callback=True) == "/"
    done: list[bool] = []
    socketio.start_background_task(done.append, True).join(5.0)
    assert done == [True]

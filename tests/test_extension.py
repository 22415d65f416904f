"""The extension object: set-up, its errors word for word, and what it adds to Flask-SocketIO."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import flask
import pytest
import socketio as python_socketio
from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import HandlerCall, ListenerState, SocketIOGuard, TaskState
from flask_socketio_guard.app_guard import all_guards
from flask_socketio_guard.errors import ConfigError, DuplicateTask, OutboxFull, TaskError
from tests.support import unit_support, wait_until
from tests.support.cases import in_turn
from tests.support.unit_support import BusManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_socketio_guard.signals import Failure
    from tests.support import GunicornServer, RawClient
    from tests.support.unit_support import Bus, Guarded, PollingClient

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
guarded = unit_support.guarded
bus = unit_support.bus


def new_app(socketio: SocketIO | None = None, **options: Any) -> tuple[Flask, SocketIO]:
    app, socketio = Flask("app"), socketio or SocketIO()
    socketio.init_app(app, async_mode="threading", **options)
    return app, socketio


def guards_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith("socketio-guard:")
    ]


# Set-up


def test_one_line_guards_an_application(nothing_left_behind: None) -> None:
    app, socketio = new_app()
    guard = SocketIOGuard(app, socketio)
    assert app.extensions["socketio_guard"] is guard
    assert app.extensions["socketio"] is socketio
    assert guard.listener_state is ListenerState.ABSENT


def test_the_socketio_of_the_application_is_found(nothing_left_behind: None) -> None:
    app, socketio = new_app()
    guard = SocketIOGuard(app)
    assert isinstance(socketio, SocketIO)
    assert guard.waiting_callbacks == 0


def test_objects_keep_their_identity_and_their_class(nothing_left_behind: None) -> None:
    """An application may hold them, compare them, or subclass them."""

    class OwnSocketIO(SocketIO):  # type: ignore[misc]
        pass

    socketio = OwnSocketIO()
    app, _ = new_app(socketio)
    server, manager = socketio.server, socketio.server.manager
    SocketIOGuard(app, socketio)
    assert isinstance(socketio, OwnSocketIO)
    assert socketio.server is server
    assert server.manager is manager
    assert isinstance(server, python_socketio.Server)
    assert isinstance(manager, python_socketio.Manager)


def test_settings_come_from_the_constructor_init_app_and_the_application(
    nothing_left_behind: None,
) -> None:
    """The nearer ones win."""
    app, socketio = new_app()
    app.config.update(
        SOCKETIO_GUARD_HEALTHZ_PATH="/a",
        SOCKETIO_GUARD_READYZ_PATH="/b",
        SOCKETIO_GUARD_LIVEZ_PATH="/c",
    )
    guard = SocketIOGuard(readyz_path="/d", livez_path="/e")
    guard.init_app(app, socketio, livez_path="/f")
    http = app.test_client()
    found = {path for path in "abcdef" if http.get(f"/{path}").status_code == 200}
    assert found == {"a", "d", "f"}
    guard.stop(2.0)


def test_a_bad_setting_is_an_error_at_set_up(nothing_left_behind: None) -> None:
    app, socketio = new_app()
    app.config["SOCKETIO_GUARD_PROBE_TIMEOUT"] = "soon"
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(app, socketio)
    assert (
        str(caught.value)
        == "SOCKETIO_GUARD_PROBE_TIMEOUT must be a number of seconds > 0, not 'soon'"
    )
    assert "socketio_guard" not in app.extensions


@pytest.mark.parametrize("is_same", [True, False], ids=["same-guard", "other-guard"])
def test_a_second_init_app_is_refused(guarded: Guarded, is_same: bool) -> None:
    guard = guarded.guard if is_same else SocketIOGuard()
    with pytest.raises(ConfigError) as caught:
        guard.init_app(guarded.app, guarded.socketio)
    assert str(caught.value) == (
        "this app already has a SocketIOGuard: call init_app() once for each app"
    )
    assert guarded.app.extensions["socketio_guard"] is guarded.guard


SWAPPED = "the app comes first: SocketIOGuard(app, socketio), or guard.init_app(app, socketio)"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (lambda app, socketio: (socketio, app), SWAPPED),
        (lambda _app, socketio: (socketio,), SWAPPED),
        (
            lambda app, socketio: (app.wsgi_app, socketio),
            "app must be a Flask application, not a _SocketIOMiddleware",
        ),
        (
            lambda app, socketio: (app, socketio.server),
            "socketio must be the SocketIO of Flask-SocketIO, not a Server",
        ),
    ],
    ids=["swapped", "only-socketio", "middleware", "server"],
)
def test_what_is_no_application_or_no_socketio_is_refused(
    nothing_left_behind: None, arguments: Callable[..., tuple[Any, ...]], text: str
) -> None:
    app, socketio = new_app()
    for set_up in (SocketIOGuard, SocketIOGuard().init_app):
        with pytest.raises(ConfigError) as caught:
            set_up(*arguments(app, socketio))
        assert str(caught.value) == text
    assert "socketio_guard" not in app.extensions


def test_an_application_without_socketio_is_refused(nothing_left_behind: None) -> None:
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(Flask("app"))
    assert str(caught.value) == (
        "the app has no SocketIO: call socketio.init_app(app) before guard.init_app(app)"
    )


@pytest.mark.parametrize("is_for_another", [False, True])
def test_a_socketio_that_does_not_serve_the_application_yet_is_refused(
    nothing_left_behind: None, is_for_another: bool
) -> None:
    socketio = SocketIO()
    if is_for_another:
        new_app(socketio)
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(Flask("app"), socketio)
    assert str(caught.value) == (
        "this SocketIO does not serve the app yet: "
        "call socketio.init_app(app) before guard.init_app(app, socketio)"
    )


def test_a_socketio_that_serves_two_applications_is_refused(guarded: Guarded) -> None:
    """It has one server, which would have two guards."""
    second = Flask("second")
    second.extensions["socketio"] = guarded.socketio
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(second, guarded.socketio)
    assert str(caught.value) == (
        "this SocketIO is guarded already: create one SocketIO for each app"
    )


def test_eventlet_that_is_merely_installed_is_named(nothing_left_behind: None) -> None:
    """Flask-SocketIO uses it unless it is told otherwise."""
    app, socketio = new_app()
    socketio.server.eio.async_mode = "eventlet"  # it is not installed here
    socketio.server.__dict__["async_mode"] = "eventlet"
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(app, socketio)
    assert str(caught.value) == (
        "eventlet is installed, and Flask-SocketIO uses it unless async_mode is set; the "
        'guard does not support it: set async_mode="gevent" or async_mode="threading"'
    )
    assert "socketio_guard" not in app.extensions


@pytest.mark.parametrize("async_mode", ["asgi"])
def test_another_async_mode_is_refused(nothing_left_behind: None, async_mode: str) -> None:
    app, socketio = new_app()
    socketio.server.eio.async_mode = async_mode
    socketio.server.__dict__["async_mode"] = async_mode
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(app, socketio)
    assert str(caught.value) == (
        f"async_mode {async_mode!r} is not supported: "
        'create SocketIO with async_mode="gevent" or async_mode="threading"'
    )
    assert "socketio_guard" not in app.extensions


def test_a_client_manager_of_an_unknown_kind_is_refused(nothing_left_behind: None) -> None:
    class OwnManager:
        def set_server(self, server: object) -> None:
            """Nothing to do."""

    app, socketio = new_app(client_manager=OwnManager())
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(app, socketio)
    assert str(caught.value) == (
        "client_manager is a OwnManager: use a subclass of "
        "socketio.Manager or socketio.PubSubManager"
    )


def test_a_queue_under_gevent_needs_a_patched_library(nothing_left_behind: None, bus: Bus) -> None:
    """This process is not patched: the listener would block everything."""
    app, socketio = Flask("app"), SocketIO()
    socketio.init_app(app, async_mode="gevent", client_manager=BusManager(bus))
    guard = SocketIOGuard(app, socketio)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            guard.start()
        assert str(caught.value) == (
            "a message queue under gevent needs a patched standard library: call "
            "gevent.monkey.patch_all() before anything else is imported, or serve "
            "with one of gunicorn's gevent workers, or with uWSGI's --gevent-monkey-patch"
        )


@pytest.mark.parametrize("url", ["redis:/:secret@host:6379/0", "amqp:/user:secret@host"])
def test_a_queue_whose_url_lacks_a_slash_is_refused(nothing_left_behind: None, url: str) -> None:
    """Stock takes all of it for the name of a host, and looks for that for ever."""
    app, socketio = new_app(message_queue=url)
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(app, socketio)
    scheme = url.partition(":")[0]
    assert str(caught.value) == (
        f"the URL of the message queue begins with '{scheme}:/': "
        f"write '{scheme}://', with two slashes"
    )


@pytest.mark.parametrize(
    ("url", "options", "is_warned"),
    [
        ("user:secret@host:6379", {}, True),
        ("secret:/", {}, True),
        ("localhost", {}, True),
        ("localhost", {"transport": "redis"}, False),
        ("memory://", {}, False),
        ("amqp://user:secret@host", {}, False),
        ("sqla+sqlite:///:memory:", {}, False),
        ("redis+socket:///tmp/x", {}, False),
    ],
)
def test_a_queue_that_works_on_stock_is_not_refused(
    nothing_left_behind: None,
    caplog: pytest.LogCaptureFixture,
    url: str,
    options: dict[str, str],
    is_warned: bool,
) -> None:
    manager = python_socketio.KombuManager(url, connection_options=options)
    app, socketio = new_app(client_manager=manager)
    SocketIOGuard(app, socketio)
    said = [record.getMessage() for record in caplog.records if "no scheme" in record.getMessage()]
    assert len(said) == is_warned
    assert "secret" not in caplog.text


# Several applications


def test_a_factory_may_be_called_again_and_again(nothing_left_behind: None) -> None:
    """One SocketIO and one guard as globals, as in every larger application's tests."""
    socketio, guard = SocketIO(), SocketIOGuard()
    guard.on("echo")(lambda value: value)

    def create_app() -> Flask:
        app = Flask("app")
        socketio.init_app(app, async_mode="threading")
        guard.init_app(app, socketio)
        return app

    for number in range(3):
        app = create_app()
        assert app.test_client().get("/readyz").status_code == 200
        client = socketio.test_client(app)
        assert client.emit("echo", number, callback=True) == number
        guard.emit("news", number)
        assert client.get_received()[-1]["args"] == [number]
    for each in all_guards():
        if each.socketio is socketio:
            each.stop(2.0)


def test_a_factory_that_is_called_again_stops_what_ran_for_the_last_application(
    nothing_left_behind: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a test-suite would collect threads, one application after the other."""
    socketio, guard = SocketIO(), SocketIOGuard()
    guard.task(name="steady")(lambda: guard.sleep(60.0))
    for _ in range(4):
        app = Flask("app")
        socketio.init_app(app, async_mode="threading")
        guard.init_app(app, socketio)
        assert app.test_client().get("/readyz").status_code == 200
    with app.app_context():
        guard.stop(2.0)
    wait_until(lambda: not guards_threads(), message=f"{len(guards_threads())} threads are left")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == []


@pytest.mark.parametrize("is_registered_again", [False, True])
def test_handlers_that_the_next_application_does_not_get_are_named(
    nothing_left_behind: None, caplog: pytest.LogCaptureFixture, is_registered_again: bool
) -> None:
    """Flask-SocketIO registers late ones with one server, and a module is imported once."""
    socketio, guard = SocketIO(), SocketIOGuard()
    socketio.on_event("early", str)
    guard.on("kept")(str)
    late: list[Flask] = []
    for _ in range(2):
        app, _ = new_app(socketio)
        if is_registered_again or not late:
            socketio.on_event("before", str, namespace="/x")
        guard.init_app(app, socketio)
        if is_registered_again or not late:
            socketio.on_event("late", str)
        late.append(app)
        assert app.test_client().get("/readyz").status_code == 200
    with app.app_context():
        guard.stop(2.0)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    text = (
        "no handler for 'late', 'before' of '/x' in this app, although an earlier app of the same "
        "SocketIO had one: register handlers before socketio.init_app() each time the factory is "
        "called, or with guard.on"
    )
    assert said == ([] if is_registered_again else [text])


def test_a_discarded_application_is_freed(nothing_left_behind: None) -> None:
    socketio, guard = SocketIO(), SocketIOGuard()
    app, _ = new_app(socketio)
    guard.init_app(app, socketio)
    reference = weakref.ref(app)
    next_app, _ = new_app(socketio)
    guard.init_app(next_app, socketio)
    del app
    gc.collect()
    assert reference() is None
    assert guard.waiting_callbacks == 0


def test_two_applications_with_one_guard_keep_to_themselves(
    make_guarded: Callable[..., Guarded],
) -> None:
    guard = SocketIOGuard()
    failures: list[Failure] = []
    guard.on_failure(failures.append)

    @guard.on("bad")
    def bad() -> None:
        raise RuntimeError(flask.current_app.name)

    first = make_guarded(guard=guard, app=Flask("first"))
    second = make_guarded(guard=guard, app=Flask("second"))
    clients = first.client(), second.client()
    clients[0].emit("bad")
    for app, count in ((first.app, 1), (second.app, 0)):
        with app.app_context():
            assert guard.counters["handler_failures"] == count
            assert flask.current_app.extensions["socketio_guard"] is guard
    clients[1].emit("bad")
    assert [str(failure.exception) for failure in failures] == ["first", "second"]
    with second.app.app_context():
        guard.emit("news")
    assert [len(client.get_received()) for client in clients] == [0, 1]


def test_two_applications_need_a_context_to_tell_them_apart(
    make_guarded: Callable[..., Guarded],
) -> None:
    guard = SocketIOGuard()
    made = [make_guarded(guard=guard) for _ in range(2)]
    with pytest.raises(RuntimeError) as caught:
        guard.emit("news")
    assert str(caught.value) == (
        "this SocketIOGuard guards several apps: use it inside `with app.app_context():`"
    )
    assert len(made) == 2


def test_a_guard_without_an_application_says_so() -> None:
    for use in (lambda guard: guard.emit("news"), lambda guard: guard.counters):
        with pytest.raises(RuntimeError) as caught:
            use(SocketIOGuard())
        assert str(caught.value) == (
            "this SocketIOGuard guards no app yet: call guard.init_app(app)"
        )


def test_two_guards_see_only_their_own_application(make_guarded: Callable[..., Guarded]) -> None:
    first, second = make_guarded(), make_guarded()
    failures: list[Failure] = []
    second.guard.on_failure(failures.append)
    for guarded in (first, second):
        guarded.socketio.on_event("bad", lambda: 1 // 0)
    first.client().emit("bad")
    assert failures == []
    assert first.guard.counters["handler_failures"] == 1
    assert second.guard.counters["handler_failures"] == 0


# Registration


@pytest.mark.parametrize("is_early", [True, False], ids=["before-init", "after-init"])
@pytest.mark.parametrize("via", ["guard", "socketio"])
def test_handlers_are_protected_whenever_they_are_registered(
    make_guarded: Callable[..., Guarded], is_early: bool, via: str
) -> None:
    socketio, guard = SocketIO(), SocketIOGuard()
    registry = guard if via == "guard" else socketio

    def register() -> None:
        @registry.on("bad")
        def bad() -> None:
            raise RuntimeError

        @registry.event
        def good(value: object) -> object:
            return value

        @registry.event(namespace="/other")
        def elsewhere() -> str:
            return "elsewhere"

        registry.on_event("also", lambda: "also", namespace="/other")

    if is_early:
        register()
    guarded = make_guarded(socketio=socketio, guard=guard)
    if not is_early:
        register()
    client = guarded.client()
    client.connect("/other")
    assert client.emit("bad", callback=True)["error"]["code"] == "internal_error"
    assert client.emit("good", 5, callback=True) == 5
    assert client.emit("elsewhere", namespace="/other", callback=True) == "elsewhere"
    assert client.emit("also", namespace="/other", callback=True) == "also"


def test_decorators_return_the_function_itself(guarded: Guarded) -> None:
    """So they can be stacked, and the function called."""

    def function(*args: object) -> None:
        del args

    guard = guarded.guard
    assert guard.on("a")(function) is function
    assert guard.on("b", timeout=1)(function) is function
    assert guard.event(function) is function
    assert guard.event(namespace="/x")(function) is function
    assert guard.before_event(function) is function
    assert guard.on_failure(function) is function
    assert guard.task(name="t")(function) is function


@in_turn("timeout", [0, -1.0, float("nan"), "5", True])
def test_a_timeout_out_of_range_is_refused(timeout: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard().on("slow", timeout=timeout)
    assert str(caught.value) == f"timeout must be a number of seconds > 0, not {timeout!r}"


# Timeouts of handlers


def test_a_handler_that_takes_too_long_is_answered_for(guarded: Guarded) -> None:
    """In threads it runs on, unheard."""
    release, ended = threading.Event(), threading.Event()
    failures: list[Failure] = []
    guarded.guard.on_failure(failures.append)

    @guarded.guard.on("slow", timeout=0.1)
    def slow() -> str:
        release.wait(5.0)
        ended.set()
        return "too late"

    client = guarded.client()
    answer = client.emit("slow", callback=True)
    assert answer == {"error": {"code": "timeout", "id": failures[0].error_id}}
    assert str(failures[0].exception) == "the handler took longer than 0.1 s"
    release.set()
    assert ended.wait(5.0)
    assert len(failures) == 1


def test_a_handler_with_a_timeout_works_as_one_without(guarded: Guarded) -> None:
    """Arguments, answer, request context and exceptions are the same."""
    guarded.socketio.on_event("connect", lambda: None)

    @guarded.guard.on("ask", timeout=5)
    def ask(one: int, two: int) -> tuple[object, ...]:
        return one, two, flask.request.sid, flask.current_app.name  # type: ignore[attr-defined]

    guarded.guard.on_event("bad", lambda: 1 // 0, timeout=5)
    client = guarded.client()
    one, two, sid, name = client.emit("ask", 1, 2, callback=True)
    assert (one, two, name) == (1, 2, "guarded")
    assert sid
    assert client.emit("bad", callback=True)["error"]["code"] == "internal_error"


@pytest.mark.parametrize("takes_auth", [False, True])
def test_a_connect_handler_with_a_timeout_refuses_when_it_takes_too_long(
    guarded: Guarded, takes_auth: bool
) -> None:
    release = threading.Event()
    runs: list[int] = []

    def connect() -> None:
        runs.append(1)
        release.wait(5.0)

    handler: Callable[..., None] = (lambda auth: connect()) if takes_auth else connect
    guarded.guard.on_event("connect", handler, timeout=0.1)
    assert not guarded.client(auth={"token": 1}).is_connected()
    assert runs == [1]
    release.set()


@pytest.fixture(scope="module")
def gevent_server() -> Iterator[GunicornServer]:
    """A server under gevent that admits two clients."""
    from tests.support import GunicornServer

    server = GunicornServer(
        "tests.support.unit_app:create_app()", env={"FLASK_SOCKETIO_GUARD_MAX_CONNECTIONS": "2"}
    )
    with server:
        yield server


@pytest.mark.parametrize(
    ("behaviour", "answer"), [("raise", None), ("answer all the same", "an answer")]
)
def test_a_greenlet_that_takes_too_long_is_interrupted_where_it_waits(
    gevent_server: GunicornServer,
    raw_client: Callable[..., RawClient],
    behaviour: str,
    answer: str | None,
) -> None:
    """It may still clean up, and even answer."""
    client = raw_client(gevent_server)
    began_at = time.monotonic()
    (given,) = client.call("slow", behaviour, ack_id=1)
    assert time.monotonic() - began_at < 3.0
    if answer is None:
        assert given["error"]["code"] == "timeout"
    else:
        assert given == answer
    assert gevent_server.state()["steps"].count("interrupted") >= 1
    assert client.call("quick", ack_id=2) == ["in time"]


# Emitting


def test_an_emit_spares_the_client_whose_event_is_handled(guarded: Guarded) -> None:
    @guarded.guard.on("say")
    def say() -> None:
        guarded.guard.emit("news", include_self=False)
        guarded.guard.emit("end")

    speaker, listener = guarded.client(), guarded.client()
    speaker.emit("say")
    assert [item["name"] for item in speaker.get_received()] == ["end"]
    assert [item["name"] for item in listener.get_received()] == ["news", "end"]


def test_an_emit_takes_what_socketio_takes(guarded: Guarded) -> None:
    guarded.socketio.on_event("any", print, namespace="/other")
    first, second = guarded.client(), guarded.client(namespace="/other")
    sid = next(iter(guarded.socketio.server.manager.get_participants("/", None)))[0]
    guarded.guard.emit("a", {"n": 1}, to=sid)
    guarded.guard.emit("b", ("x", 2), room=sid)
    guarded.guard.emit("c", skip_sid=sid)
    guarded.guard.emit("d", to="nobody")
    guarded.guard.emit("e", namespace="/other")
    assert [(item["name"], item["args"]) for item in first.get_received()] == [
        ("a", [{"n": 1}]),
        ("b", ["x", 2]),
    ]
    assert [item["name"] for item in second.get_received("/other")] == ["e"]


def test_a_message_is_sent_as_text_or_json(guarded: Guarded) -> None:
    client = guarded.client()
    guarded.guard.send("text")
    guarded.guard.send({"k": 1}, json=True)
    assert [(item["name"], item["args"]) for item in client.get_received()] == [
        ("message", "text"),
        ("json", {"k": 1}),
    ]


def test_a_client_is_disconnected(guarded: Guarded) -> None:
    reasons: list[str] = []
    guarded.socketio.on_event("disconnect", reasons.append)
    client = guarded.client()
    sid = next(iter(guarded.socketio.server.manager.get_participants("/", None)))[0]
    guarded.guard.disconnect(sid)
    assert not client.is_connected()
    assert len(reasons) == 1
    guarded.guard.disconnect(sid)
    guarded.guard.disconnect("nobody", "/")


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "5", True])
def test_a_callback_timeout_out_of_range_is_refused(guarded: Guarded, timeout: float) -> None:
    with pytest.raises(ConfigError) as caught:
        guarded.guard.emit("ask", to="sid", callback=print, callback_timeout=timeout)
    assert str(caught.value) == (
        f"callback_timeout must be a number of seconds > 0, not {timeout!r}"
    )


def test_without_a_queue_there_is_nothing_to_flush(guarded: Guarded) -> None:
    guarded.guard.emit("news")
    assert guarded.guard.flush(0.0)


# Callbacks


@pytest.fixture
def client(guarded: Guarded) -> PollingClient:
    """A connected client of *guarded*."""
    guarded.socketio.on_event("echo", lambda *args: args)
    client = guarded.polling()
    client.connect()
    return client


@pytest.mark.parametrize("api", ["guard", "socketio"])
def test_a_callback_of_an_event_runs_in_its_request_context(
    guarded: Guarded, client: PollingClient, api: str
) -> None:
    """As stock gives it one: ``request.sid`` is whose event asked, not who answered."""
    seen: list[object] = []

    @guarded.socketio.on("ask-other")
    def ask_other(sid: str) -> None:
        emitter = guarded.guard if api == "guard" else guarded.socketio
        emitter.emit("question", to=sid, callback=callback)

    def callback(answer: object) -> None:
        seen.extend([answer, flask.request.sid, flask.current_app.name])  # type: ignore[attr-defined]

    other = guarded.polling()
    other.connect()
    client.send(f'42["ask-other","{other.sid}"]')
    other.answer(other.question()[0], 42)
    wait_until(lambda: len(seen) == 3)
    assert seen == [42, client.sid, "guarded"]


def test_a_hook_before_events_does_not_run_before_callbacks(
    guarded: Guarded, client: PollingClient
) -> None:
    """An answer is no event."""
    seen: list[str] = []
    answers: list[object] = []
    guarded.guard.before_event(lambda event: seen.append(event.name))

    @guarded.socketio.on("ask-me")
    def ask_me() -> None:
        sid = flask.request.sid  # type: ignore[attr-defined]
        guarded.guard.emit("question", to=sid, callback=answers.append)

    client.send('42["ask-me"]')
    client.answer(client.question()[0], 42)
    wait_until(lambda: answers == [42])
    assert seen == ["ask-me"]


@pytest.mark.parametrize("api", ["guard", "socketio"])
def test_a_callback_of_anything_else_runs_in_the_application_context(
    guarded: Guarded, client: PollingClient, api: str
) -> None:
    seen: list[object] = []

    def callback() -> None:
        seen.extend([flask.has_request_context(), flask.current_app.name])

    emitter = guarded.guard if api == "guard" else guarded.socketio
    emitter.emit("question", to=client.sid, callback=callback)
    client.answer(client.question()[0])
    wait_until(lambda: len(seen) == 2)
    assert seen == [False, "guarded"]


def test_a_callback_of_a_route_runs_in_the_application_context(
    guarded: Guarded, client: PollingClient
) -> None:
    """A route's request is over when the answer comes."""
    seen: list[object] = []

    @guarded.app.post("/ask")
    def ask() -> str:
        guarded.guard.emit(
            "question", to=client.sid, callback=lambda: seen.append(flask.has_request_context())
        )
        return "asked"

    assert guarded.app.test_client().post("/ask").status_code == 200
    client.answer(client.question()[0])
    wait_until(lambda: seen == [False])


def test_a_callback_is_called_although_whose_event_asked_has_left(
    guarded: Guarded, client: PollingClient
) -> None:
    """Stock drops it in silence."""
    seen: list[object] = []
    other = guarded.polling()
    other.connect()

    @guarded.socketio.on("ask-other")
    def ask_other() -> None:
        guarded.guard.emit("question", to=other.sid, callback=seen.append)

    client.send('42["ask-other"]')
    ack_id, _ = other.question()
    client.leave()
    wait_until(lambda: len(list(guarded.socketio.server.manager.get_participants("/", None))) == 1)
    other.answer(ack_id, "late")
    wait_until(lambda: seen == ["late"])


@pytest.mark.parametrize(
    "raised",
    [RuntimeError(), TypeError(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("api", ["guard", "socketio"])
def test_a_callback_that_raises_is_recorded_once_and_called_once(
    guarded: Guarded, client: PollingClient, raised: BaseException, api: str
) -> None:
    failures: list[Failure] = []
    guarded.guard.on_failure(failures.append)
    runs: list[object] = []

    def callback(answer: object) -> None:
        runs.append(answer)
        raise raised

    emitter = guarded.guard if api == "guard" else guarded.socketio
    emitter.emit("question", to=client.sid, callback=callback)
    client.answer(client.question()[0], 1)
    wait_until(lambda: failures)
    assert client.call("echo", 1) == [1]
    assert runs == [1]
    assert [(failure.kind, failure.exception) for failure in failures] == [("callback", raised)]
    assert guarded.guard.counters["callback_failures"] == 1


def test_a_callback_that_was_not_answered_in_time_is_told_once(
    guarded: Guarded, client: PollingClient
) -> None:
    told: list[str] = []
    guarded.guard.emit(
        "question",
        to=client.sid,
        callback=lambda: told.append("answered"),
        callback_timeout=0.1,
        on_timeout=lambda: told.append(flask.current_app.name),
    )
    ack_id, _ = client.question()
    wait_until(lambda: told)
    client.answer(ack_id)
    assert client.call("echo", 1) == [1]
    assert told == ["guarded"]
    assert guarded.guard.counters["callbacks_expired"] == 1


def test_a_callback_whose_client_leaves_is_told_at_once_and_once(
    guarded: Guarded, client: PollingClient
) -> None:
    told: list[str] = []
    guarded.guard.emit(
        "question",
        to=client.sid,
        callback=lambda: told.append("answered"),
        callback_timeout=60,
        on_timeout=lambda: told.append("gone"),
    )
    client.question()
    client.leave()
    wait_until(lambda: told)
    guarded.guard.stop(1.0)
    assert told == ["gone"]
    assert guarded.guard.counters["callbacks_dropped"] == 1


def test_an_answered_callback_is_never_told_of_a_timeout(
    guarded: Guarded, client: PollingClient
) -> None:
    told: list[str] = []
    guarded.guard.emit(
        "question",
        to=client.sid,
        callback=lambda: told.append("answered"),
        callback_timeout=0.2,
        on_timeout=lambda: told.append("timeout"),
    )
    client.answer(client.question()[0])
    wait_until(lambda: told)
    time.sleep(0.3)
    assert told == ["answered"]


def test_a_timeout_handler_that_raises_is_recorded(guarded: Guarded, client: PollingClient) -> None:
    guarded.guard.emit(
        "question",
        to=client.sid,
        callback=print,
        callback_timeout=0.05,
        on_timeout=lambda: 1 // 0,
    )
    wait_until(lambda: guarded.guard.counters["callback_failures"] == 1)


def test_a_timeout_handler_of_an_event_runs_in_its_request_context(
    guarded: Guarded, client: PollingClient
) -> None:
    told: list[str] = []

    @guarded.socketio.on("ask-me")
    def ask_me() -> None:
        guarded.guard.emit(
            "question",
            to=flask.request.sid,  # type: ignore[attr-defined]
            callback=print,
            callback_timeout=0.05,
            on_timeout=lambda: told.append(flask.request.sid),  # type: ignore[attr-defined]
        )

    client.send('42["ask-me"]')
    wait_until(lambda: told)
    assert told == [client.sid]


def test_a_stop_tells_those_who_wait_for_an_answer(guarded: Guarded, client: PollingClient) -> None:
    told: list[str] = []
    guarded.guard.emit(
        "question", to=client.sid, callback=print, on_timeout=lambda: told.append("stopped")
    )
    guarded.guard.stop(1.0)
    wait_until(lambda: told == ["stopped"])
    assert guarded.guard.waiting_callbacks == 0


# Tasks


def test_a_task_starts_with_the_application_and_not_before(
    make_guarded: Callable[..., Guarded],
) -> None:
    """A preloading master sets the application up and never starts it."""
    guard = SocketIOGuard()
    runs: list[str] = []
    guard.task(lambda: runs.append(flask.current_app.name), name="early")
    guarded = make_guarded(guard=guard)
    guard.task(name="later")(lambda: runs.append("later"))
    time.sleep(0.05)
    assert runs == []
    assert guards_threads() == []
    guarded.app.test_client().get("/livez")
    wait_until(lambda: sorted(runs) == ["guarded", "later"])
    guard.task(lambda: runs.append("late"), name="late")
    wait_until(lambda: len(runs) == 3)


@pytest.mark.parametrize("has_parentheses", [False, True])
def test_a_task_may_be_registered_with_and_without_parentheses(
    guarded: Guarded, has_parentheses: bool
) -> None:
    runs: list[int] = []
    if has_parentheses:

        @guarded.guard.task()
        def once() -> None:
            runs.append(1)
    else:

        @guarded.guard.task
        def once() -> None:
            runs.append(1)

    guarded.guard.start()
    wait_until(lambda: runs == [1])
    assert callable(once)


def test_a_task_of_two_applications_runs_in_each(make_guarded: Callable[..., Guarded]) -> None:
    guard = SocketIOGuard()
    runs: list[str] = []
    guard.task(lambda: runs.append(flask.current_app.name), name="each")
    for name in ("first", "second"):
        made = make_guarded(guard=guard, app=Flask(name))
        made.inner.start()
    wait_until(lambda: sorted(runs) == ["first", "second"])


@pytest.mark.parametrize("is_started", [False, True])
def test_a_task_name_that_is_taken_is_refused_at_once(
    make_guarded: Callable[..., Guarded], is_started: bool
) -> None:
    """Not half-way through the start, which would leave the process unready for ever."""
    guard = SocketIOGuard()
    guarded = make_guarded(guard=guard)
    if is_started:
        guard.start()
    guard.task(lambda: guard.sleep(60.0), name="mine")
    with pytest.raises(DuplicateTask, match="'mine'"):
        guard.task(lambda: None, name="mine")
    assert guarded.app.test_client().get("/readyz").status_code == 200


@pytest.mark.parametrize("is_started", [False, True], ids=["before-start", "after-start"])
def test_a_name_that_a_background_task_shares_is_refused_where_it_is_given(
    make_guarded: Callable[..., Guarded], is_started: bool
) -> None:
    """In either order, and nothing is half registered: the process becomes ready."""
    guarded = make_guarded(guard=SocketIOGuard(), app=Flask("names"))
    guard, ran = guarded.guard, threading.Event()
    if is_started:
        guard.start()
    guard.task(lambda: guard.sleep(60.0), name="registered")
    guard.start_background_task(lambda: guard.sleep(60.0), name="running")
    with pytest.raises(DuplicateTask, match="'registered'"):
        guard.start_background_task(lambda: None, name="registered")
    with pytest.raises(DuplicateTask, match="'running'"):
        guard.task(lambda: None, name="running")
    with pytest.raises(ConfigError, match="'socketio-guard:tick'"):
        guard.task(lambda: None, name="socketio-guard:tick")
    with pytest.raises(ConfigError, match="'socketio-guard:outbox'"):
        guard.start_background_task(lambda: None, name="socketio-guard:outbox")
    assert guarded.app.test_client().get("/readyz").status_code == 200
    names = [task.name for task in guarded.inner.supervisor.tasks]
    assert {"registered", "running"} <= set(names)
    assert len(set(names)) == len(names)
    # What was refused is not registered with the next application either.
    guard.task(ran.set, name="third")
    other = make_guarded(guard=guard, app=Flask("other"))
    assert other.app.test_client().get("/readyz").status_code == 200
    assert ran.wait(5.0)


def test_a_task_that_fails_is_restarted_and_seen(guarded: Guarded) -> None:
    runs: list[int] = []
    failures: list[Failure] = []
    guarded.guard.on_failure(failures.append)

    @guarded.guard.task(name="shaky")
    def shaky() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise RuntimeError("boom")

    guarded.guard.start()
    wait_until(lambda: len(runs) == 3)
    assert [(failure.kind, failure.name) for failure in failures] == [("task", "shaky")] * 2
    assert guarded.guard.counters["task_failures"] == 2
    assert guarded.guard.counters["task_restarts"] == 2


@pytest.mark.parametrize(("critical", "status"), [(True, 503), (False, 200)])
def test_a_critical_task_that_failed_for_good_makes_the_process_unready(
    guarded: Guarded, critical: bool, status: int
) -> None:
    guarded.guard.start()

    @guarded.guard.task(name="doomed", critical=critical, max_restarts=0)
    def doomed() -> None:
        raise RuntimeError("boom")

    http = guarded.app.test_client()
    wait_until(lambda: guarded.guard.counters["task_failures"] == 1)
    wait_until(lambda: http.get("/readyz").json != {"status": "pass", "listener": "absent"})
    answer = http.get("/readyz")
    assert answer.status_code == status
    assert answer.get_json(force=True)["status"] == ("fail" if critical else "warn")
    assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"restart": "maybe"}, {"max_restarts": -1}, {"restart_window": 0}],
    ids=str,
)
def test_an_option_of_a_task_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SocketIOGuard().task(**options)(lambda: None)


def test_a_background_task_has_a_handle(guarded: Guarded) -> None:
    seen: list[object] = []
    release = threading.Event()

    def work(one: int, *, two: int) -> None:
        seen.extend([one, two, flask.current_app.name])
        release.wait(5.0)

    handle = guarded.guard.start_background_task(work, 1, two=2)
    wait_until(lambda: len(seen) == 3)
    assert seen == [1, 2, "guarded"]
    assert handle.state is TaskState.RUNNING
    assert not handle.join(0.01)
    release.set()
    assert handle.join(5.0)
    assert handle.state is TaskState.FINISHED
    assert (handle.restarts, handle.last_error) == (0, None)


def test_background_tasks_of_one_function_have_names_of_their_own(guarded: Guarded) -> None:
    release = threading.Event()
    handles = [guarded.guard.start_background_task(release.wait, 5.0) for _ in range(3)]
    assert len({handle.name for handle in handles}) == 3
    named = guarded.guard.start_background_task(release.wait, 5.0, name="mine")
    assert named.name == "mine"
    with pytest.raises(DuplicateTask):
        guarded.guard.start_background_task(release.wait, 5.0, name="mine")
    release.set()
    assert all(handle.join(5.0) for handle in [*handles, named])


def test_a_background_task_that_fails_is_not_restarted_by_default(guarded: Guarded) -> None:
    runs: list[int] = []

    def fail() -> None:
        runs.append(1)
        raise RuntimeError("boom")

    handle = guarded.guard.start_background_task(fail)
    assert handle.join(5.0)
    wait_until(lambda: handle.state is TaskState.FAILED)
    assert isinstance(handle.last_error, RuntimeError)
    again = guarded.guard.start_background_task(fail, restart="on-failure", max_restarts=1)
    assert again.join(5.0)
    assert len(runs) == 3


def test_no_background_task_starts_while_the_process_stops(guarded: Guarded) -> None:
    guarded.guard.start()
    guarded.guard.stop(1.0)
    with pytest.raises(TaskError, match="the process is stopping"):
        guarded.guard.start_background_task(print, name="late")


def test_what_a_stock_background_task_raises_is_recorded(guarded: Guarded) -> None:
    failures: list[Failure] = []
    guarded.guard.on_failure(failures.append)

    def stock_task(value: int) -> None:
        raise SystemExit(value)

    thread = guarded.socketio.start_background_task(stock_task, 3)
    thread.join(5.0)
    (failure,) = failures
    assert failure.kind == "task"
    assert failure.name.endswith("stock_task")
    assert isinstance(failure.exception, SystemExit)


# Sleep


def test_a_sleep_lasts_its_time(guarded: Guarded) -> None:
    began_at = time.monotonic()
    assert guarded.guard.sleep(0.05) is True
    assert time.monotonic() - began_at >= 0.045
    assert guarded.guard.sleep() is True


@pytest.mark.parametrize("place", ["task", "stock-task", "handler"])
def test_a_sleep_ends_early_when_the_process_stops(guarded: Guarded, place: str) -> None:
    slept: list[bool] = []
    asleep = threading.Event()

    def work() -> None:
        asleep.set()
        slept.append(guarded.guard.sleep(60.0))
        slept.append(guarded.guard.sleep(60.0))

    guarded.guard.start()
    thread: threading.Thread | None = None
    if place == "task":
        guarded.guard.start_background_task(work)
    elif place == "stock-task":
        thread = guarded.socketio.start_background_task(work)
    else:
        guarded.socketio.on_event("work", work)
        client = guarded.client()
        thread = threading.Thread(target=client.emit, args=["work"])
        thread.start()
    assert asleep.wait(5.0)
    time.sleep(0.02)
    began_at = time.monotonic()
    guarded.guard.stop(5.0)
    if thread is not None:
        thread.join(5.0)
    assert time.monotonic() - began_at < 2.0
    assert slept == [False, False]


def test_a_sleep_ends_early_when_only_its_task_stops(guarded: Guarded) -> None:
    slept: list[bool] = []
    handle = guarded.guard.start_background_task(lambda: slept.append(guarded.guard.sleep(60.0)))
    time.sleep(0.02)
    handle.stop()
    assert handle.join(2.0)
    assert slept == [False]


# The bound on connections


def test_a_crowded_process_refuses_new_clients_and_nothing_else(
    make_guarded: Callable[..., Guarded],
) -> None:
    # Engine.IO forgets a closed connection at its next round, after ping_timeout at the latest.
    guarded = make_guarded(max_connections=2, options={"ping_timeout": 1})
    guarded.socketio.on_event("echo", lambda value: value)
    guarded.app.add_url_rule("/page", view_func=lambda: "a page")
    clients = [guarded.polling() for _ in range(2)]
    for client in clients:
        client.connect()
    late = guarded.polling()
    refused = late.handshake()
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    assert refused.data == b""
    assert clients[0].call("echo", 1) == [1]
    http = guarded.app.test_client()
    assert http.get("/page").text == "a page"
    assert http.get("/readyz").status_code == 200
    clients[1].leave()
    wait_until(lambda: late.handshake().status_code == 200)


@pytest.mark.parametrize("query", ["&xsid=1", "&sid", "&sid=", "&SID=1", "&t=sid%3D1"])
def test_a_crowded_process_cannot_be_talked_round(
    make_guarded: Callable[..., Guarded], query: str
) -> None:
    """What only looks like a session id is a new client."""
    guarded = make_guarded(max_connections=1)
    guarded.polling().connect()
    assert guarded.polling().handshake(query).status_code >= 400
    assert len(guarded.socketio.server.eio.sockets) == 1


def test_a_made_up_session_id_gets_nobody_in(make_guarded: Callable[..., Guarded]) -> None:
    guarded = make_guarded(max_connections=1)
    guarded.polling().connect()
    assert guarded.polling().handshake("&sid=made-up").status_code == 400
    assert len(guarded.socketio.server.eio.sockets) == 1


def test_a_crowded_process_refuses_a_websocket(
    gevent_server: GunicornServer, raw_client: Callable[..., RawClient]
) -> None:
    """A client that waits for a WebSocket only would not hear of it after an answer 101."""
    import websocket

    clients = [raw_client(gevent_server) for _ in range(2)]
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        websocket.create_connection(
            f"{gevent_server.websocket_url}/socket.io/?EIO=4&transport=websocket", timeout=5
        )
    assert caught.value.status_code == 503
    assert gevent_server.get("/readyz").status_code == 200
    polling = gevent_server.get("/socket.io/?EIO=4&transport=polling")
    assert (polling.status_code, polling.headers["Retry-After"]) == (503, "5")
    assert clients[0].call("quick", ack_id=1) == ["in time"]


# Write-only processes


def test_a_write_only_process_emits_and_flushes(nothing_left_behind: None, bus: Bus) -> None:
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True), async_mode="threading")
    socketio.init_app(None)
    guard = SocketIOGuard(socketio=socketio)
    guard.emit("news", 1)
    socketio.emit("news", 2)
    assert guard.flush(5.0)
    assert [data["data"] for data in bus.published] == [[1], [2]]
    assert guard.listener_state is ListenerState.ABSENT
    guard.stop(2.0)
    assert guard.counters["outbox_dropped"] == 0


def test_a_write_only_process_starts_nothing_until_it_emits(
    nothing_left_behind: None, bus: Bus
) -> None:
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True), async_mode="threading")
    socketio.init_app(None)
    guard = SocketIOGuard(socketio=socketio)
    assert guards_threads() == []
    guard.emit("news")
    assert guard.flush(5.0)
    assert "socketio-guard:outbox" in guards_threads()
    guard.stop(2.0)


def test_what_cannot_be_sent_before_a_write_only_process_stops_is_counted_once(
    nothing_left_behind: None, bus: Bus
) -> None:
    bus.is_down = True
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True), async_mode="threading")
    socketio.init_app(None)
    guard = SocketIOGuard(socketio=socketio, exit_flush_timeout=0.1)
    for number in range(5):
        guard.emit("news", number)
    guard.stop(1.0)
    guard.stop(1.0)
    assert guard.counters["outbox_dropped"] == 5
    guard.emit("late")
    assert guard.counters["outbox_dropped"] == 6


def test_a_write_only_process_reads_its_settings_from_the_environment(
    nothing_left_behind: None, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCKETIO_GUARD_OUTBOX_MAX_MESSAGES", "2")
    bus.is_down = True
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True), async_mode="threading")
    socketio.init_app(None)
    guard = SocketIOGuard(socketio=socketio, exit_flush_timeout=0.0)
    for number in range(2):
        guard.emit("news", number)
    with pytest.raises(OutboxFull):
        guard.emit("news", 2)
    guard.stop(1.0)


@pytest.mark.parametrize("socketio", [None, SocketIO()], ids=["none", "unused"])
def test_a_write_only_guard_needs_a_write_only_socketio(socketio: SocketIO | None) -> None:
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard().init_app(None, socketio)
    assert str(caught.value) == (
        "without an app the guard needs a write-only SocketIO: "
        "SocketIOGuard(socketio=SocketIO(message_queue=...))"
    )


def test_a_socketio_of_an_application_is_not_taken_for_a_write_only_one(
    nothing_left_behind: None,
) -> None:
    """Whoever forgets to pass the application would get a deaf process."""
    _, socketio = new_app()
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard(socketio=socketio)
    assert str(caught.value) == (
        "this SocketIO was made with an app: pass it too, SocketIOGuard(app, socketio)"
    )


def test_a_second_write_only_socketio_is_refused(nothing_left_behind: None, bus: Bus) -> None:
    def write_only() -> SocketIO:
        socketio = SocketIO(client_manager=BusManager(bus, write_only=True))
        socketio.init_app(None, async_mode="threading")
        return socketio

    guard = SocketIOGuard(socketio=write_only())
    with pytest.raises(ConfigError) as caught:
        guard.init_app(None, write_only())
    assert str(caught.value) == "this SocketIOGuard already has a write-only SocketIO"


def test_one_process_may_serve_an_application_and_write_elsewhere(
    make_guarded: Callable[..., Guarded], bus: Bus
) -> None:
    socketio = SocketIO(client_manager=BusManager(bus, write_only=True))
    socketio.init_app(None, async_mode="threading")
    writer = SocketIOGuard(socketio=socketio)
    guarded = make_guarded()
    with guarded.app.app_context():
        writer.emit("elsewhere")
        guarded.guard.emit("here")
    assert writer.flush(5.0)
    assert [data["event"] for data in bus.published] == ["elsewhere"]
    writer.stop(2.0)


def test_an_event_given_to_hooks_is_a_value(guarded: Guarded) -> None:
    """Ports may keep it."""
    assert HandlerCall("a", "/", "s", (1,)) == HandlerCall("a", "/", "s", (1,))
    assert hash(HandlerCall("a", "/", "s", (1,)))


WINDOWS = """
import os, sys
for name in ("resource", "fcntl", "pwd", "grp"):
    sys.modules[name] = None
del os.register_at_fork, os.fork
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
app = Flask("developed")
socketio = SocketIO(app, async_mode="threading")
socketio.on_event("echo", lambda *args: args)
SocketIOGuard(app, socketio)
client = socketio.test_client(app)
print(client.emit("echo", 1, callback=True))
"""


def test_it_works_without_what_only_posix_has() -> None:
    """Applications are developed on Windows, too."""
    answer = subprocess.run(
        [sys.executable, "-c", WINDOWS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.stdout, answer.stderr) == ("1\n", "")

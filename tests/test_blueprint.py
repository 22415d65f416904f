"""The blueprint that owns the guard's paths, and health on its way through Flask or before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from flask import Blueprint, Flask, abort, request, url_for
from flask.cli import routes_command
from flask_socketio import SocketIO
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.errors import ConfigError
from tests.support import unit_support, unit_websocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded
    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards
make_guarded = unit_support.make_guarded
make_served = unit_websocket.make_served

NAMES = ("healthz", "readyz", "livez")
PATHS = [f"/{name}" for name in NAMES]
SCRIPT = "/socketio-guard/deliveries.js"
KINDS = ["gevent-websocket", "threads"]


def new_app(**options: Any) -> tuple[Flask, SocketIO]:
    app = Flask("app", static_folder=None, **options)
    return app, SocketIO(app, async_mode="threading")


# Where health is answered


@pytest.mark.parametrize("kind", KINDS)
def test_health_goes_through_the_application_if_it_is_to(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Its ``before_request`` runs then, and knows the guard's requests by their blueprint."""
    served = make_served(kind, health_in_front=False, health_details="secret")
    seen: list[tuple[str | None, str | None]] = []

    @served.app.before_request
    def note() -> None:
        seen.append((request.blueprint, request.endpoint))
        if request.blueprint != "socketio_guard":
            abort(401)

    assert served.request("GET", "/healthz").status == 200
    assert served.request("GET", "/elsewhere").status == 401
    assert seen == [("socketio_guard", "socketio_guard.healthz"), (None, None)]


@pytest.mark.parametrize("kind", KINDS)
def test_health_is_answered_in_front_of_the_application(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind)
    served.app.before_request(lambda: abort(401))
    assert [served.request("GET", path).status for path in PATHS] == [200] * 3
    assert served.request("GET", SCRIPT).status == 401


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_answers(make_served: Callable[..., Served], kind: str) -> None:
    """Status, body and headers: for every method, whoever asks, and while it fails."""
    admitted = {"Authorization": "Bearer secret"}

    def answers(is_in_front: bool) -> list[Any]:
        served = make_served(kind, health_in_front=is_in_front, health_details="secret")
        found = []
        for is_draining in (False, True):
            if is_draining:
                served.inner.lifecycle.drain(1.0)
            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                for headers in ({}, admitted):
                    answer = served.request(method, "/readyz", headers=headers)
                    has_checks = '"checks"' in answer.text
                    kept = [answer.headers.get(name) for name in ("Content-Type", "Cache-Control")]
                    if answer.status == 405:  # the page that says so is the application's
                        kept = sorted(answer.headers["Allow"].split(", "))
                    found.append((method, answer.status, has_checks, kept))
        return found

    in_front = answers(True)
    assert in_front == answers(False)
    assert [(method, status) for method, status, *_ in in_front[::2]] == [
        *(("GET", 200), ("HEAD", 200), ("OPTIONS", 405), ("POST", 405)),
        *(("GET", 503), ("HEAD", 503), ("OPTIONS", 405), ("POST", 405)),
    ]
    assert in_front[0][-1] == ["application/health+json", "no-store"]
    assert [has_checks for *_, has_checks, _ in in_front[:4]] == [False, True, False, False]


# What Flask knows of it


def test_flask_lists_the_routes(make_guarded: Callable[..., Guarded]) -> None:
    app = make_guarded().app
    listed = app.test_cli_runner().invoke(routes_command).output
    for name in NAMES:
        assert f"socketio_guard.{name} " in listed
        with app.test_request_context():
            assert url_for(f"socketio_guard.{name}") == f"/{name}"
    assert SCRIPT.rpartition("/")[0] in listed
    assert app.test_client().options(SCRIPT).status_code == 200


@pytest.mark.parametrize("is_in_front", [True, False])
def test_paths_that_are_moved_or_switched_off_are_no_routes(
    make_guarded: Callable[..., Guarded], is_in_front: bool
) -> None:
    app = make_guarded(
        health_in_front=is_in_front, healthz_path="/status", readyz_path=None, scripts_path=None
    ).app
    rules = {rule.rule for rule in app.url_map.iter_rules(endpoint="socketio_guard.healthz")}
    assert rules == {"/status"}
    http = app.test_client()
    statuses = [http.get(path).status_code for path in ("/status", "/livez", "/readyz", "/healthz")]
    assert statuses == [200, 200, 404, 404]
    assert "socketio_guard.readyz" not in app.view_functions


def test_without_any_path_there_is_no_blueprint(make_guarded: Callable[..., Guarded]) -> None:
    none = dict.fromkeys(("healthz_path", "readyz_path", "livez_path", "scripts_path"))
    app = Flask("guarded")
    app.register_blueprint(Blueprint("socketio_guard", __name__))
    make_guarded(app=app, **none)


@pytest.mark.parametrize("is_in_front", [True, False])
def test_it_is_found_below_a_prefix(
    make_guarded: Callable[..., Guarded], is_in_front: bool
) -> None:
    """An application is mounted, and one is behind middleware that strips a prefix."""
    app = Flask("guarded")
    app.config["APPLICATION_ROOT"] = "/api"
    inner = app.wsgi_app
    app.wsgi_app = DispatcherMiddleware(inner, {"/v1": inner})  # type: ignore[method-assign]
    make_guarded(app=app, health_in_front=is_in_front)
    mounted = Client(DispatcherMiddleware(Flask("outer"), {"/api": app}))
    for path in ("/api/healthz", "/api/v1/healthz", f"/api{SCRIPT}"):
        with mounted.get(path) as answer:
            assert answer.status_code == 200, path
    assert mounted.get("/healthz").status_code == 404
    with app.test_request_context():
        assert url_for("socketio_guard.healthz") == "/api/healthz"


@pytest.mark.parametrize("is_in_front", [True, False])
@pytest.mark.filterwarnings("ignore:Current server name:UserWarning")  # Werkzeug's
@pytest.mark.parametrize("matching", ["host_matching", "subdomain_matching"])
def test_it_is_found_on_every_host(
    make_guarded: Callable[..., Guarded], matching: str, is_in_front: bool
) -> None:
    """Load balancers ask by address, and routes without a host match none there."""
    app = Flask("guarded", static_folder=None, **{matching: True})
    app.config["SERVER_NAME"] = "example.com"
    app.add_url_rule("/", "index", lambda: "here", host="example.com", subdomain=None)
    make_guarded(app=app, health_in_front=is_in_front)
    http = app.test_client()
    for host in ("example.com", "api.example.com", "10.0.0.1:8000"):
        for path in (*PATHS, SCRIPT):
            with http.get(path, headers={"Host": host}) as answer:
                assert answer.status_code == 200, (host, path)
    assert http.get("/", headers={"Host": "example.com"}).text == "here"
    with app.test_request_context(base_url="http://example.com"):
        assert url_for("socketio_guard.healthz", _external=True) == "http://example.com/healthz"
    with app.app_context():
        assert url_for("socketio_guard.healthz") == "http://example.com/healthz"


@pytest.mark.parametrize("is_in_front", [True, False])
def test_a_new_server_answers_for_itself(
    make_guarded: Callable[..., Guarded], is_in_front: bool
) -> None:
    """The routes stay, and what is behind them is made anew."""
    guarded = make_guarded(health_in_front=is_in_front)
    http = guarded.app.test_client()
    assert http.get("/readyz").status_code == 200
    guarded.guard.stop(1.0)
    assert http.get("/readyz").status_code == 503
    app = Flask("guarded")
    make_guarded(app=app, health_in_front=is_in_front)
    app.extensions["socketio"].init_app(app, async_mode="threading")
    assert app.test_client().get("/readyz").status_code == 200


def test_each_application_answers_for_itself(make_guarded: Callable[..., Guarded]) -> None:
    guard = SocketIOGuard(health_in_front=False)
    one, other = make_guarded(guard=guard), make_guarded(guard=guard)
    assert [each.app.test_client().get("/readyz").status_code for each in (one, other)] == [200] * 2
    one.inner.stop(1.0)
    assert one.app.test_client().get("/readyz").status_code == 503
    assert other.app.test_client().get("/readyz").status_code == 200


# What it cannot be


def test_a_blueprint_of_the_same_name_is_told() -> None:
    app, socketio = new_app()
    app.register_blueprint(Blueprint("socketio_guard", __name__))
    with pytest.raises(ConfigError) as raised:
        SocketIOGuard(app, socketio)
    assert str(raised.value) == (
        "the application has a blueprint 'socketio_guard', which is the name of the guard's: "
        "rename it"
    )
    assert "socketio_guard" not in app.extensions


def test_a_blueprint_of_the_same_name_that_comes_later_is_told() -> None:
    app, socketio = new_app()
    SocketIOGuard(app, socketio)
    with pytest.raises(ValueError, match="already registered"):
        app.register_blueprint(Blueprint("socketio_guard", __name__))


@pytest.mark.parametrize("is_in_front", [True, False])
def test_a_route_of_the_application_is_told_before_and_after(is_in_front: bool) -> None:
    """The guard's own routes are none of the application's."""
    app, socketio = new_app()
    app.add_url_rule("/readyz", "mine", lambda: "mine")
    with pytest.raises(ConfigError, match=r"'mine'.*'/readyz'"):
        SocketIOGuard(app, socketio, health_in_front=is_in_front)
    app, socketio = new_app()
    SocketIOGuard(app, socketio, health_in_front=is_in_front)
    app.add_url_rule("/readyz", "mine", lambda: "mine")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"'mine'.*'/readyz'"):
            app.test_client().get("/")


def test_an_application_that_has_answered_takes_no_routes_and_has_health_in_front() -> None:
    app, socketio = new_app()
    app.test_client().get("/")
    with pytest.raises(AssertionError, match="first request"):
        SocketIOGuard(app, socketio, health_in_front=False, scripts_path=None)
    with pytest.raises(AssertionError, match="first request"):
        SocketIOGuard(app, socketio)
    SocketIOGuard(app, socketio, scripts_path=None)
    http = app.test_client()
    assert [http.get(path).status_code for path in PATHS] == [200] * 3


def test_an_application_that_is_guarded_late_has_health_in_front() -> None:
    """Its SocketIO was guarded for another one, and it was tested before it is served."""
    guard = SocketIOGuard(health_in_front=False)
    first, socketio = new_app()
    guard.init_app(first, socketio)
    late = Flask("late", static_folder=None)
    late.test_client().get("/")
    socketio.init_app(late, async_mode="threading")
    http = late.test_client()
    assert http.get("/livez").status_code == 404
    served = {"SERVER_SOFTWARE": "gunicorn/1"}
    statuses = [http.get(path, environ_overrides=served).status_code for path in ("/livez", "/x")]
    assert statuses == [200, 404]

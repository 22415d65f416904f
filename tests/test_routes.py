"""Routes of the application at paths of the guard: never hidden in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from flask import Blueprint, Flask, current_app, url_for
from flask_socketio import SocketIO
from werkzeug.routing import BaseConverter

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import all_guards
from flask_socketio_guard.errors import ConfigError
from tests.support import unit_support
from tests.support.cases import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flask.testing import FlaskClient

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards

SCRIPT = "/socketio-guard/deliveries.js"


class Lowercase(BaseConverter):
    """As custom converters are written: by a regular expression."""

    regex = "[a-z]+"


def is_down(**_values: Any) -> tuple[str, int]:
    """Answer as an application's own health check whose database is away."""
    return "the database is down", 503


def new_app(**options: Any) -> tuple[Flask, SocketIO]:
    app = Flask("app", **options)
    app.url_map.converters["lower"] = Lowercase
    return app, SocketIO(app, async_mode="threading")


def status(http: FlaskClient, path: str) -> int:
    with http.get(path) as answer:
        return answer.status_code


def by_route(app: Flask) -> None:
    app.add_url_rule("/healthz", "mine", is_down)


def by_blueprint(app: Flask) -> None:
    blueprint = Blueprint("checks", __name__, url_prefix="/healthz")
    blueprint.add_url_rule("", "mine", is_down)
    app.register_blueprint(blueprint)


def rule(text: str, **options: Any) -> Callable[[Flask], None]:
    return lambda app: app.add_url_rule(text, "mine", is_down, **options)


@pytest.mark.parametrize("add", [by_route, by_blueprint])
def test_an_own_health_check_that_is_there_is_not_hidden(add: Callable[[Flask], None]) -> None:
    """Without the guard a load balancer is told 503; with it, nothing starts."""
    app, socketio = new_app()
    add(app)
    assert app.test_client().get("/healthz").status_code == 503
    with pytest.raises(ConfigError) as raised:
        SocketIOGuard(app, socketio)
    assert str(raised.value) == (
        f"the application's route '/healthz' (endpoint {app.url_map._rules[-1].endpoint!r}) would "
        "be hidden by the guard's '/healthz': move the guard's with SOCKETIO_GUARD_HEALTHZ_PATH, "
        "or switch it off with None"
    )
    assert "socketio_guard" not in app.extensions


@pytest.mark.parametrize("has_started", [False, True])
@pytest.mark.parametrize("add", [by_route, by_blueprint])
def test_an_own_health_check_that_comes_later_is_not_hidden(
    add: Callable[[Flask], None], has_started: bool
) -> None:
    """Applications add their routes after their extensions: no request is answered, then.

    gunicorn's worker with threads may have started the guard by then.
    """
    app, socketio = new_app()
    SocketIOGuard(app, socketio)
    if has_started:
        next(guard for guard in all_guards() if guard.app is app).start()
    add(app)
    for path in ("/healthz", "/", "/healthz"):
        with pytest.raises(ConfigError, match="SOCKETIO_GUARD_HEALTHZ_PATH"):
            app.test_client().get(path)


@in_turn(
    ("text", "options", "setting"),
    [
        ("/readyz", {"methods": ["POST"]}, "READYZ_PATH"),
        ("/livez", {"subdomain": "api"}, "LIVEZ_PATH"),
        ("/livez/", {}, "LIVEZ_PATH"),
        ("/<any(alive, readyz):check>", {}, "READYZ_PATH"),
        ("/<any(alive, readyz):check>/", {}, "READYZ_PATH"),
        ("/health<letter>", {}, "HEALTHZ_PATH"),
        (SCRIPT, {}, "SCRIPTS_PATH"),
    ],
)
def test_every_rule_that_means_a_path_counts(
    text: str, options: dict[str, Any], setting: str
) -> None:
    app, socketio = new_app(subdomain_matching=True)
    rule(text, **options)(app)
    with pytest.raises(ConfigError, match=f"SOCKETIO_GUARD_{setting}, or"):
        SocketIOGuard(app, socketio)


@in_turn(
    "text",
    [
        *("/<path:page>", "/<page>", "/<string(length=7):page>", "/<lower:page>", "/<int:number>"),
        *("/healthz/<part>", "/healthzz", "/x/<page>", "/socketio-guard/<path:page>"),
    ],
)
def test_a_catch_all_route_and_others_go_on_to_work(text: str) -> None:
    """They serve what nobody else does, and the guard takes only what is its own."""
    app, socketio = new_app()
    rule(text)(app)
    SocketIOGuard(app, socketio)
    http = app.test_client()
    assert [status(http, path) for path in ("/healthz", "/readyz", "/livez", SCRIPT)] == [200] * 4
    own = {
        "/<path:page>": "/socketio-guard/other",
        "/socketio-guard/<path:page>": "/socketio-guard/a/b",
    }
    if text in own:
        assert status(http, own[text]) == 503


class Stored(BaseConverter):
    """As converters are written that ask a database, which needs an application context."""

    def to_python(self, value: str) -> str:
        return f"{current_app.name} {value}"


def test_a_converter_that_needs_the_application_is_not_asked() -> None:
    app, socketio = new_app()
    app.url_map.converters["stored"] = Stored
    app.add_url_rule("/<stored:item>", "item", lambda item: item)
    SocketIOGuard(app, socketio)
    http = app.test_client()
    assert http.get("/readyz").json is not None
    assert http.get("/mine").text == f"{app.name} mine"


def test_a_static_file_is_not_hidden(tmp_path: Path) -> None:
    app, socketio = new_app(static_folder=str(tmp_path), static_url_path="")
    SocketIOGuard(app, socketio)
    assert app.test_client().get("/readyz").status_code == 200
    (tmp_path / "readyz").write_text("mine")
    app, socketio = new_app(static_folder=str(tmp_path), static_url_path="")
    with pytest.raises(ConfigError, match="SOCKETIO_GUARD_READYZ_PATH"):
        SocketIOGuard(app, socketio)


def test_a_static_file_of_a_blueprint_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "deliveries.js").write_text("mine")
    app, socketio = new_app()
    pages = Blueprint(
        "pages", __name__, static_folder=str(tmp_path), static_url_path="/socketio-guard"
    )
    app.register_blueprint(pages)
    with pytest.raises(ConfigError, match="SOCKETIO_GUARD_SCRIPTS_PATH"):
        SocketIOGuard(app, socketio)


def test_the_script_has_one_route_and_that_is_the_one_that_pages_ask_for() -> None:
    app, socketio = new_app(static_folder=None)
    SocketIOGuard(app, socketio)
    with app.test_request_context():
        assert url_for("socketio_guard.static", filename="deliveries.js") == SCRIPT
    assert status(app.test_client(), "/static/deliveries.js") == 404


def test_the_settings_that_the_error_names_mend_it() -> None:
    app, socketio = new_app()
    for path in ("/healthz", "/readyz", SCRIPT):
        app.add_url_rule(path, path.replace(".", ""), is_down)
    app.config.update(
        SOCKETIO_GUARD_HEALTHZ_PATH="/guard/healthz",
        SOCKETIO_GUARD_READYZ_PATH=None,
        SOCKETIO_GUARD_SCRIPTS_PATH="/guard",
    )
    SocketIOGuard(app, socketio)
    http = app.test_client()
    assert [status(http, path) for path in ("/healthz", "/readyz", SCRIPT)] == [503] * 3
    assert [status(http, f"/guard/{name}") for name in ("healthz", "deliveries.js")] == [200] * 2

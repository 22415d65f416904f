"""Extensions that people use in event handlers: they find what they find without the guard."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
from cachelib import SimpleCache
from flask import Flask, jsonify, request, session
from flask_babel import Babel, format_decimal, get_locale
from flask_login import (
    LoginManager,
    UserMixin,
    current_user,
    login_required,
    login_user,
    logout_user,
)
from flask_session import Session
from flask_socketio import SocketIO, disconnect
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.pool import StaticPool

from flask_socketio_guard import SocketIOGuard
from tests.support import unit_support

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards

NAMES = {1: "ann", 2: "bob"}


class Visitor:
    """A browser: it visits pages, and has a Socket.IO connection with the same cookies."""

    def __init__(self, app: Flask, *, login: int | None = None) -> None:
        self._http = app.test_client()
        if login is not None:
            self.visit(f"/login/{login}")
        self._client = unit_support.PollingClient(app)
        self._client._http = self._http
        self._client.connect()
        self._answers = 0

    def visit(self, path: str) -> Any:
        return self._http.get(path).get_json()

    def ask(self, event: str, *args: Any) -> Any:
        self._answers += 1
        return self._client.call(event, *args, ack_id=self._answers)[0]

    def send(self, event: str) -> str:
        """Send an event, and return what comes next."""
        self._client.send(f"42{json.dumps([event])}")
        return self._client.receive("4", "1")


class Application:
    """An application with the extensions."""

    def __init__(self, *, is_guarded: bool, manages_session: bool) -> None:
        app = self.app = Flask("extended")
        app.config.update(
            SECRET_KEY="secret",
            SQLALCHEMY_DATABASE_URI="sqlite://",
            SQLALCHEMY_ENGINE_OPTIONS={
                "poolclass": StaticPool,
                "connect_args": {"check_same_thread": False},
            },
        )
        if not manages_session:
            app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=SimpleCache())
            Session(app)
        self.socketio = SocketIO(app, async_mode="threading", manage_session=manages_session)
        if is_guarded:
            SocketIOGuard(app, self.socketio)
        self.db = SQLAlchemy(app)
        Babel(app, locale_selector=lambda: session.get("language") or request.args.get("language"))
        self._add_users()
        self._add_handlers()

    def _add_users(self) -> None:
        db = self.db

        class User(UserMixin, db.Model):  # type: ignore[name-defined, misc]
            id = db.Column(db.Integer, primary_key=True)
            name = db.Column(db.String)
            visits = db.Column(db.Integer, default=0)

        self.user = User
        with self.app.app_context():
            db.create_all()
            db.session.add_all([User(id=key, name=name) for key, name in NAMES.items()])
            db.session.commit()
        logins = LoginManager(self.app)
        logins.user_loader(lambda key: db.session.get(User, int(key)))

        @self.app.get("/login/<int:key>")
        def login(key: int) -> Any:
            session["language"] = {1: "de", 2: "fr"}[key]
            return jsonify(login_user(db.session.get(User, key)))

        @self.app.get("/seen")
        def seen() -> Any:
            return jsonify(session.get("count"), current_user.is_authenticated)

    def _add_handlers(self) -> None:
        db, user = self.db, self.user
        on = self.socketio.on

        @on("who")
        def who() -> Any:
            return current_user.name if current_user.is_authenticated else "nobody"

        @on("enter")
        def enter(key: int) -> Any:
            login_user(db.session.get(user, key))
            return current_user.name

        @on("leave")
        def leave() -> Any:
            return [logout_user()]

        @on("secret")
        @authenticated_only
        def secret() -> str:
            return "secret"

        @on("refused")
        @login_required
        def refused() -> str:
            return "secret"

        @on("count")
        def count() -> Any:
            session["count"] = session.get("count", 0) + 1
            return session["count"]

        @on("speak")
        def speak(language: str | None) -> Any:
            if language is not None:
                session["language"] = language
            return [str(get_locale()), format_decimal(1234.5)]

        @on("forget to commit")
        def forget() -> Any:
            db.session.get(user, 1).visits = 999
            return len(db.session.dirty)

        @on("commit")
        def commit() -> Any:
            there = len(db.session.identity_map)
            db.session.get(user, 1).visits += 1
            db.session.commit()
            return [there, db.session.get(user, 1).visits]


def authenticated_only(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Do as Flask-SocketIO's documentation does it."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not current_user.is_authenticated:
            disconnect()
            return None
        return handler(*args, **kwargs)

    return wrapped


@pytest.fixture(params=["stock", "guarded"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Application]]:
    """Return a function that makes an application without the guard, or with it."""
    made: list[Application] = []

    def make(*, manages_session: bool = True) -> Application:
        is_guarded = request.param == "guarded"
        made.append(Application(is_guarded=is_guarded, manages_session=manages_session))
        return made[-1]

    yield make
    for application in made:
        with application.app.app_context():
            application.db.engine.dispose()


def test_the_user_is_known_in_every_event(make: Callable[..., Application]) -> None:
    """Flask-Login keeps the user in ``g``, which is one event's."""
    app = make().app
    visitors = [Visitor(app), Visitor(app, login=1), Visitor(app, login=2)]
    assert [visitor.ask("who") for visitor in visitors * 2] == ["nobody", "ann", "bob"] * 2
    stranger, ann, _ = visitors
    assert stranger.ask("enter", 2) == "bob"
    assert [stranger.ask("who"), ann.ask("who")] == ["bob", "ann"]
    assert ann.ask("leave") == [True]
    assert [visitor.ask("who") for visitor in visitors] == ["bob", "nobody", "bob"]
    assert ann.visit("/seen") == [None, True]  # the session of the connection is its own


def test_a_handler_for_users_disconnects_others(make: Callable[..., Application]) -> None:
    app = make().app
    assert Visitor(app, login=1).ask("secret") == "secret"
    assert Visitor(app, login=1).ask("refused") == "secret"
    assert Visitor(app).send("secret") == "41"


@pytest.mark.parametrize("manages_session", [True, False])
def test_the_session_is_the_connections_or_is_shared_with_pages(
    make: Callable[..., Application], manages_session: bool
) -> None:
    """Flask-Session keeps it on the server, where pages and events can share it."""
    visitor = Visitor(make(manages_session=manages_session).app, login=1)
    assert [visitor.ask("count") for _ in range(3)] == [1, 2, 3]
    assert visitor.visit("/seen") == [None if manages_session else 3, True]
    assert visitor.ask("count") == 4


def test_the_language_is_that_of_the_client(make: Callable[..., Application]) -> None:
    app = make().app
    english, german, french = Visitor(app), Visitor(app, login=1), Visitor(app, login=2)
    spoken = [visitor.ask("speak", None) for visitor in (english, german, french)]
    assert spoken == [["en", "1,234.5"], ["de", "1.234,5"], ["fr", "1\u202f234,5"]]
    assert german.ask("speak", "sv")[0] in ("sv", "de")
    assert german.ask("speak", None)[0] == "sv"


def test_a_database_session_ends_with_its_event(make: Callable[..., Application]) -> None:
    """What one event has not committed is not there in the next one."""
    visitor = Visitor(make().app)
    assert visitor.ask("forget to commit") == 1
    assert [visitor.ask("commit") for _ in range(2)] == [[0, 1], [0, 2]]

"""A pytest plugin that runs somebody else's tests with every ``SocketIO`` guarded.

``pytest -p tests.support.suite_plugin --guarded='{}'``; without ``--guarded`` nothing is guarded.
For a pytest in a process of its own: the classes that it changes stay changed.
"""

from __future__ import annotations

import json
from functools import wraps
from typing import TYPE_CHECKING, Any

import flask_socketio
import pytest

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.upstream.flask.socketio_object import GuardedSocketIO
from flask_socketio_guard.upstream.socketio.server import GuardedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask

GUARDED_COUNT = "guarded"
"""The property of the JUnit report that says how often a ``SocketIO`` was guarded."""

_guards: list[SocketIOGuard] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption(
        "--async-mode", help="the async_mode of each SocketIO that does not ask for one"
    )
    parser.addoption(
        "--guarded",
        metavar="SETTINGS",
        type=json.loads,
        help="guard every SocketIO, with these settings: a JSON object as for SocketIOGuard",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Change ``SocketIO`` before the first test module makes one."""
    mode: str | None = config.getoption("--async-mode")
    settings: dict[str, Any] | None = config.getoption("--guarded")
    stock_init_app = flask_socketio.SocketIO.init_app

    @wraps(stock_init_app)
    def init_app(self: flask_socketio.SocketIO, app: Flask | None, **options: Any) -> None:
        self.server_options.setdefault("async_mode", mode)
        stock_init_app(self, app, **options)
        if settings is not None:
            _guard(app, self, settings)

    flask_socketio.SocketIO.init_app = init_app


@pytest.fixture(scope="session", autouse=True)
def _tell_how_many(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    record_testsuite_property(GUARDED_COUNT, len(_guards))


def _guard(app: Flask | None, socketio: flask_socketio.SocketIO, settings: dict[str, Any]) -> None:
    if app is not None:
        # A SocketIO that is initialised once more has a new server, and wants a new guard.
        app.extensions.pop("socketio_guard", None)
        app.testing = True  # what a handler raises reaches the test then, as what a view raises
    guard = SocketIOGuard(app, socketio, **settings)
    _guards.append(guard)
    assert isinstance(socketio, GuardedSocketIO)
    assert isinstance(socketio.server, GuardedServer)

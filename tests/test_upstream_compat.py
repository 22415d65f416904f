"""The check at start-up, and that its versions are those of ``pyproject.toml``."""

from __future__ import annotations

import engineio
import flask_socketio
import pytest
import socketio
from flask import Flask

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.errors import IncompatibleVersion
from flask_socketio_guard.upstream import compat
from flask_socketio_guard.upstream.compat import WANTED, check_versions
from tests.support.servers import PROJECT_ROOT
from tests.tools.oldest import lower_bounds

SEAMS = [(owner, name) for owner, names in compat._SEAMS for name in names]


def remove(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Let *owner* lack an attribute, wherever in its bases it is."""
    for cls in owner.__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)


def test_the_installed_versions_are_compatible() -> None:
    check_versions()


@pytest.mark.parametrize(("owner", "name"), SEAMS)
def test_a_missing_seam_is_named_with_versions_found_and_wanted(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    remove(monkeypatch, owner, name)
    with pytest.raises(IncompatibleVersion) as caught:
        check_versions()
    text = str(caught.value)
    assert f"{owner.__module__}.{owner.__qualname__}.{name}" in text
    for package, oldest in WANTED.items():
        assert f"{package} {compat._version(package)}" in text
        assert f"{package}>={oldest}" in text


def test_an_application_is_told_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remove(monkeypatch, socketio.Server, "_trigger_event")
    app = Flask("app")
    sockets = flask_socketio.SocketIO(app, async_mode="threading")
    server_class = type(sockets.server)
    with pytest.raises(IncompatibleVersion):
        SocketIOGuard(app, sockets)
    assert type(sockets.server) is server_class
    assert "socketio_guard" not in app.extensions


def test_a_package_that_is_not_installed_is_said_to_be() -> None:
    assert compat._version("no-such-package-anywhere") == "(not installed)"


def test_the_versions_wanted_are_those_that_the_package_asks_for() -> None:
    bounds = lower_bounds(PROJECT_ROOT / "pyproject.toml")
    assert {name: bounds[name] for name in WANTED} == WANTED


def test_every_private_name_that_is_taken_hold_of_is_checked() -> None:
    """A guarded class overrides a private method: the seam must be in the table."""
    from flask_socketio_guard.upstream.flask.socketio_object import GuardedSocketIO
    from flask_socketio_guard.upstream.socketio.managers import GuardedManager
    from flask_socketio_guard.upstream.socketio.queue_managers import GuardedPubSubManager
    from flask_socketio_guard.upstream.socketio.server import GuardedServer

    checked = {name for _, name in SEAMS}
    for guarded, upstream in (
        (GuardedSocketIO, (flask_socketio.SocketIO,)),
        (GuardedServer, (socketio.Server,)),
        (GuardedManager, (socketio.Manager, socketio.PubSubManager)),
        (GuardedPubSubManager, (socketio.PubSubManager,)),
    ):
        overridden = {
            name
            for cls in guarded.__mro__[:-1]
            for name in vars(cls)
            if name.startswith("_")
            and not name.startswith("__")
            and any(hasattr(cls, name) for cls in upstream)
        }
        assert overridden <= checked
    assert hasattr(engineio.Server, "handle_request")

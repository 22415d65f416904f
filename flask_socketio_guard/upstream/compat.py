"""A check at startup that the installed packages have the methods on which the guard relies."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import engineio
import flask_socketio
import socketio
from engineio.socket import Socket
from socketio.base_manager import BaseManager
from socketio.pubsub_manager import PubSubManager

from ..errors import IncompatibleVersion

WANTED = {
    "Flask-SocketIO": "5.6.0",
    "python-socketio": "5.18.1",
    "python-engineio": "4.15.1",
}
"""The oldest version of each package against which the tests run."""

_SEAMS = (
    (flask_socketio.SocketIO, ("_handle_event", "start_background_task")),
    (
        socketio.Server,
        (
            "_get_event_handler",
            "_get_namespace_handler",
            "_handle_ack",
            "_handle_connect",
            "_handle_disconnect",
            "_handle_eio_connect",
            "_handle_eio_disconnect",
            "_handle_eio_message",
            "_handle_event_internal",
            "_send_packet",
            "_trigger_event",
        ),
    ),
    (
        engineio.Server,
        (
            "_bad_request",
            "_generate_sid_cookie",
            "_handle_connect",
            "_log_error_once",
            "_ok",
            "_upgrades",
            "handle_request",
            "start_background_task",
        ),
    ),
    (Socket, ("close", "handle_get_request", "handle_post_request", "send")),
    (
        BaseManager,
        (
            "_generate_ack_id",
            "basic_disconnect",
            "eio_sid_from_sid",
            "get_participants",
            "initialize",
            "is_pre_connected",
            "pre_connect",
            "pre_disconnect",
            "sid_from_eio_sid",
        ),
    ),
    (socketio.Manager, ("emit", "trigger_callback")),
    (
        PubSubManager,
        (
            "_handle_callback",
            "_handle_close_room",
            "_handle_disconnect",
            "_handle_emit",
            "_handle_enter_room",
            "_handle_leave_room",
            "_listen",
            "_publish",
            "_return_callback",
        ),
    ),
    (socketio.RedisManager, ("_listen", "_publish", "_redis_connect")),
)


def check_versions() -> None:
    """Check that every upstream method that the guard overrides or calls exists.

    Raises:
        IncompatibleVersion: A method is missing; the text names it, the installed versions and
            the required ones.
    """
    missing = [
        f"{owner.__module__}.{owner.__qualname__}.{name}"
        for owner, names in _SEAMS
        for name in names
        if not hasattr(owner, name)
    ]
    if missing:
        raise IncompatibleVersion(
            f"{', '.join(missing)} is missing in the installed packages "
            f"({_found()}); install {_wanted()}"
        )


def _found() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in WANTED)


def _wanted() -> str:
    return ", ".join(f"{name}>={oldest}" for name, oldest in WANTED.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"

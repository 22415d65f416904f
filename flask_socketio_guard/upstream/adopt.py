"""Gives a ``SocketIO``, its server and its client manager their guarded classes."""

from __future__ import annotations

import contextlib
import sys
import threading
import uuid
from _thread import RLock
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from socketio import Manager, PubSubManager, RedisManager
from websockets.frames import CloseCode

from ..errors import ConfigError
from ..events.pieces import Line
from ..queue.duplicates import Duplicates
from ..telemetry.records import logger
from .engineio.server import GuardedEngineServer
from .flask.event_context import EventContexts
from .flask.socketio_object import (
    GuardedSocketIO,
    note_handlers,
    patch_recipients,
    require_plain_handlers,
)
from .overrides import calls_on, check, guarded_class, is_guarded, is_upstream, overrides, rebind
from .redis.transport import RedisTransport
from .socketio.encoding import keep_json
from .socketio.managers import GuardedManager
from .socketio.queue_managers import GuardedPubSubManager, QueuedRedisManager, ThroughOutbox
from .socketio.queue_transport import QueueTransport, require_scheme
from .socketio.server import GuardedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_socketio import SocketIO

    from ..config import GuardConfig
    from ..ports import Ports
    from ..queue.transport import Transport


_ENDED: Final = 2048  # closed sessions whose ids are remembered


@contextlib.contextmanager
def given_back_on_failure(socketio: SocketIO) -> Iterator[None]:
    """Restore *socketio*, its server and its client manager if the body raises.

    Their classes, their attributes and the dicts and lists in these are restored.
    """
    server: Any = socketio.server
    owners: tuple[Any, ...] = (socketio, server, server.eio, server.manager)
    kinds = [type(owner) for owner in owners]
    tables: dict[int, tuple[Any, Any]] = {}
    for owner in owners:
        _keep(vars(owner), tables)
    try:
        yield
    except BaseException:
        for owner, kind in zip(owners, kinds, strict=True):
            owner.__class__ = kind
        for table, kept in tables.values():
            table.clear()
            (table.update if isinstance(table, dict) else table.extend)(kept)
        raise


def _keep(table: Any, tables: dict[int, tuple[Any, Any]]) -> None:
    """Add a copy of *table*, and of the dicts and lists in it, to *tables*, by their ids."""
    if type(table) in (dict, list) and id(table) not in tables:
        tables[id(table)] = table, table.copy()
        for value in table.values() if isinstance(table, dict) else table:
            _keep(value, tables)


def adopt(socketio: SocketIO, ports: Ports) -> None:
    """Replace the classes of *socketio*, its server and its client manager by guarded ones.

    The objects keep their identity and their state. The server is bound to *ports* for its
    whole life.

    Raises:
        ConfigError: The server is guarded already, its client manager is of an unsupported
            class, a handler would never run, or an override would be bypassed.
    """
    server: Any = socketio.server
    manager: Any = server.manager
    if isinstance(server, GuardedServer):
        raise ConfigError("this SocketIO is guarded already: create one SocketIO for each app")
    if not isinstance(manager, Manager):
        raise ConfigError(
            f"client_manager is a {type(manager).__name__}: use a subclass of "
            "socketio.Manager or socketio.PubSubManager"
        )
    if hasattr(socketio, "sockio_mw"):  # without an application it does not serve clients
        _require_loop(server)
    require_scheme(manager)
    require_plain_handlers(socketio)
    manager_class: Any = GuardedPubSubManager if has_queue(server) else GuardedManager
    is_used_again = isinstance(manager, GuardedManager)  # it was given to an earlier server
    if not is_used_again:
        check(manager, manager_class, unused=_UNUSED_OF_MANAGERS, needed=_NEEDED_OF_MANAGERS)
    check(server, GuardedServer, unused=_UNUSED_OF_SERVERS, needed=_NEEDED_OF_SERVERS)
    check(server.eio, GuardedEngineServer, unused=_UNUSED_OF_ENGINES, needed=_NEEDED_OF_ENGINES)
    if not isinstance(socketio, GuardedSocketIO):
        check(socketio, GuardedSocketIO, unused=(), needed=(), extended={"init_app"})
        _guard(socketio, GuardedSocketIO)
    if has_queue(server) and not is_used_again:
        _guard_queue(manager)
    elif not is_used_again:
        _guard(manager, manager_class)
    manager.guard = ports
    manager.has_own_delivery = overrides(type(manager), "_handle_emit")
    manager.has_own_participants = overrides(type(manager), "get_participants")
    manager.index_rooms()
    _guard(server, GuardedServer)
    server.guard = ports
    server.has_own_sending = overrides(type(server), "_send_packet", "_send_eio_packet")
    server.is_manager_asked = overrides(type(manager), "can_disconnect")
    _guard_engine(server.eio, ports)
    _rebind_engine_handlers(server)
    if overrides(type(server), "start_background_task"):
        server.eio.spawn_event = server.start_background_task
    note_handlers(socketio)
    patch_recipients()
    guarded: Any = socketio
    guarded.event_contexts = EventContexts(guarded, is_fast=ports.config.fast)
    keep_json(server, is_fast=ports.config.fast)
    server.check_observers()


def _require_loop(server: Any) -> None:
    """Check that uWSGI, if it is the server, runs gevent's event loop in mode ``gevent_uwsgi``.

    Raises:
        ConfigError: It does not.

    Source:
        uWSGI, "The uWSGI Python module": ``opt`` holds the options with which it was started.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if server.async_mode != "gevent_uwsgi" or uwsgi is None:
        return
    if "gevent" not in uwsgi.opt and uwsgi.opt.get("loop") != b"gevent":
        raise ConfigError(
            "Flask-SocketIO picks async_mode 'gevent_uwsgi' because gevent is installed, but uWSGI "
            "runs without it, so no client would get a response: start uWSGI with "
            "--gevent 1000 --gevent-monkey-patch"
        )


def _guard_queue(manager: Any) -> None:
    """Guard a manager with a queue, and keep an application's override of ``_publish``.

    For Redis, an override runs when a message is emitted, and its ``super()`` puts the message
    into the outbox. For any other queue it is what sends to the broker, after the outbox.
    """
    if _is_redis(type(manager)):
        _guard(manager, QueuedRedisManager)
    else:
        _guard(manager, GuardedPubSubManager, front=(ThroughOutbox,))
        if isinstance(manager, RedisManager):
            logger.info(
                "the message queue is used through %s, which hides whether Redis can be reached",
                type(manager).__name__.removeprefix("Guarded"),
            )
    manager._duplicates = Duplicates()


def _rebind_engine_handlers(server: Any) -> None:
    """Register the guarded methods for the engine's events, in place of upstream's.

    A handler that an application has registered instead is kept: it calls the server's itself.
    """
    engine = server.eio
    for event, name in (
        ("connect", "_handle_eio_connect"),
        ("message", "_handle_eio_message"),
        ("disconnect", "_handle_eio_disconnect"),
    ):
        if getattr(engine.handlers.get(event), "__self__", None) is server:
            engine.on(event, getattr(server, name))


def _guard_engine(engine: Any, ports: Ports) -> None:
    _guard(engine, GuardedEngineServer)
    engine.guard = ports
    engine.departing = {}
    engine.ended = deque(maxlen=_ENDED)
    engine.websocket_transports = set()
    engine.behind = set()
    engine.unjoined = {}
    _renew_locks(engine)
    # Upstream's service task looks for silent clients; here each has its own deadline.
    engine.start_service_task = False
    engine.spawn_event = None
    if overrides(type(engine), "start_background_task"):
        engine.spawn_event = engine.start_background_task
    _patch_gevent_websocket()


def _patch_gevent_websocket() -> None:
    # Installed with the extra "gunicorn"; threaded servers and plain gevent do not need it.
    with contextlib.suppress(ImportError):
        from .engineio.gevent_websocket import patch_gevent_websocket

        patch_gevent_websocket()


def has_queue(server: Any) -> bool:
    """Return whether a ``socketio.Server`` has a message queue."""
    return isinstance(server.manager, PubSubManager)


def transport_of(server: Any, config: GuardConfig) -> Transport | None:
    """Return a transport for the message queue of a ``socketio.Server``, or ``None``."""
    manager = server.manager
    if not has_queue(server):
        return None
    if _is_redis(type(manager)):
        return RedisTransport(manager, answer_timeout=config.broker_timeout)
    return QueueTransport(manager, answer_timeout=config.broker_timeout)


def new_host_id(server: Any) -> None:
    """Give the manager of this process its own host id, if it has a queue.

    Upstream creates the id in the manager's constructor. Processes that fork after that share it,
    so they would mistake each other's messages for their own and ignore them.
    """
    if has_queue(server):
        server.manager.host_id = uuid.uuid4().hex


def forsake_clients(server: Any) -> None:
    """Make a forked child forget its parent's clients, without any effect on them.

    Their sockets are shared with the parent: anything that the child wrote, and an orderly close,
    would reach the clients as if from the parent.
    """
    engine, manager = server.eio, server.manager
    for transport in list(engine.websocket_transports):
        transport.forsake()
    for socket in list(engine.sockets.values()):
        socket.forsake()
    for table in (
        *(
            engine.sockets,
            engine.departing,
            engine.websocket_transports,
            engine.behind,
            engine.unjoined,
        ),
        *(server.environ, server._binary_packet),
        *(manager.rooms, manager.eio_to_sid, manager.pending_connect, manager.pending_disconnect),
    ):
        table.clear()
    manager.index_rooms()
    if has_queue(server):
        manager._duplicates = Duplicates()
    server.manager_initialized = False
    _renew_locks(engine)


def _renew_locks(engine: Any) -> None:
    engine.line = Line(engine.guard.runtime)
    # Greenlets do not switch while they hold it, so a lock that never blocks is enough.
    engine.queue_lock = threading.Lock() if engine.async_mode == "threading" else RLock()


def close_for_restart(socket: Any) -> None:
    """Close an Engine.IO session in a way after which the client reconnects by itself."""
    socket.close(
        reason=socket.server.reason.SERVER_DISCONNECT,
        code=CloseCode.SERVICE_RESTART,
        text="service restart",
    )


def _guard(instance: Any, guarded: type, *, front: tuple[type, ...] = ()) -> None:
    """Make *instance* an instance of *guarded* too, which comes before upstream's class."""
    instance.__class__ = guarded_class(type(instance), guarded, front=front)
    rebind(instance)


def _is_redis(cls: type) -> bool:
    """Return whether a manager publishes and listens as ``RedisManager`` does."""
    # Otherwise the manager's own methods must be used, see QueueTransport.
    return (
        issubclass(cls, RedisManager)
        and not overrides(cls, "_listen", "_redis_connect")
        and all(
            calls_on(vars(own)["_publish"], "_publish")
            for own in cls.__mro__
            if "_publish" in vars(own) and not is_upstream(own) and not is_guarded(own)
        )
    )


_UNUSED_OF_MANAGERS: Final = (
    "_thread",
    "eio_sid_from_sid",
    "get_namespaces",
    "is_connected",
)
_NEEDED_OF_MANAGERS: Final = (
    "_generate_ack_id",
    "basic_disconnect",
    "basic_enter_room",
    "basic_leave_room",
    "initialize",
    "pre_connect",
)
_UNUSED_OF_SERVERS: Final = ("_handle_event",)
_NEEDED_OF_SERVERS: Final = (
    "_handle_connect",
    "_handle_disconnect",
    "_handle_eio_connect",
    "_handle_eio_disconnect",
    "_handle_eio_message",
    "disconnect",
)
_UNUSED_OF_ENGINES: Final = (
    "_service_task",
    "_trigger_event",
    "create_queue",
    "send",
    "send_packet",
)
_NEEDED_OF_ENGINES: Final = ("_handle_connect", "disconnect", "handle_request")

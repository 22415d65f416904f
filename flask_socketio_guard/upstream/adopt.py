"""Gives a ``SocketIO``, its server and its client manager their guarded classes."""

from __future__ import annotations

import threading
import uuid
from _thread import RLock
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from socketio import Manager, PubSubManager, RedisManager
from websockets.frames import CloseCode

from ..errors import ConfigError
from .encoding import keep_json
from .engine_server import GuardedEngineServer
from .event_context import EventContexts
from .flask_socketio import GuardedSocketIO, mend_recipients
from .managers import GuardedManager, GuardedPubSubManager
from .queue_transport import QueueTransport
from .redis_transport import RedisTransport
from .server import GuardedServer
from .websocket import mend_gevent_websocket

if TYPE_CHECKING:
    from flask_socketio import SocketIO

    from ..config import GuardConfig
    from ..hooks import Hooks
    from ..transport import Transport


def adopt(socketio: SocketIO, hooks: Hooks) -> None:
    """Put *socketio*, its server and its client manager under guard.

    The objects keep their identity and their state; the server is bound to
    *hooks* for as long as it lives.

    Raises:
        ConfigError: The server is guarded already, or its client manager is of
            a kind that cannot be.
    """
    server: Any = socketio.server
    manager: Any = server.manager
    if isinstance(server, GuardedServer):
        raise ConfigError("this SocketIO is guarded already: create one SocketIO for each app")
    if isinstance(manager, PubSubManager):
        _guard(manager, GuardedPubSubManager)
        manager._newest = OrderedDict()
    elif isinstance(manager, Manager):
        _guard(manager, GuardedManager)
    else:
        raise ConfigError(
            f"client_manager is a {type(manager).__name__}: use a subclass of "
            "socketio.Manager or socketio.PubSubManager"
        )
    manager.guard = hooks
    manager.index_rooms()
    _guard(server, GuardedServer)
    server.guard = hooks
    _guard_engine(server.eio, hooks)
    # The server registered these before it was guarded, and so those of its own class.
    server.eio.on("connect", server._handle_eio_connect)
    server.eio.on("message", server._handle_eio_message)
    server.eio.on("disconnect", server._handle_eio_disconnect)
    if not isinstance(socketio, GuardedSocketIO):
        _guard(socketio, GuardedSocketIO)
    mend_recipients()
    guarded: Any = socketio
    guarded.event_contexts = EventContexts(guarded, is_fast=hooks.config.fast_contexts)
    keep_json(server, is_fast=hooks.config.fast_json)


def _guard_engine(engine: Any, hooks: Hooks) -> None:
    _guard(engine, GuardedEngineServer)
    engine.guard = hooks
    engine.departing = {}
    engine.wires = set()
    engine.behind = set()
    _renew_lock(engine)
    # Upstream's monitor looks for silent clients; here each has its own deadline.
    engine.start_service_task = False
    mend_gevent_websocket()


def has_queue(server: Any) -> bool:
    """Say whether a ``socketio.Server`` has a message queue."""
    return isinstance(server.manager, PubSubManager)


def transport_of(server: Any, config: GuardConfig) -> Transport | None:
    """Return the message queue of a ``socketio.Server``, or ``None`` if it has none."""
    manager = server.manager
    if not isinstance(manager, PubSubManager):
        return None
    if isinstance(manager, RedisManager) and _is_stock_redis(type(manager)):
        return RedisTransport(manager, answer_timeout=config.broker_timeout)
    return QueueTransport(manager)


def new_host_id(server: Any) -> None:
    """Give the process a host id of its own.

    Upstream makes it in the manager's constructor; processes forked after that
    would take each other's messages for their own and skip them.
    """
    manager = server.manager
    if isinstance(manager, PubSubManager):
        manager.host_id = uuid.uuid4().hex


def forsake_clients(server: Any) -> None:
    """Let a forked child have none of its parent's clients, and do nothing to them.

    Their sockets are shared: what is written here, or ended in an orderly way, the
    clients would take for the parent's.
    """
    engine, manager = server.eio, server.manager
    for wire in list(engine.wires):
        wire.forsake()
    for socket in list(engine.sockets.values()):
        socket.forsake()
    for table in (engine.sockets, engine.departing, engine.wires, engine.behind):
        table.clear()
    for table in (server.environ, server._binary_packet):
        table.clear()
    for table in (manager.rooms, manager.eio_to_sid, manager.pending_disconnect):
        table.clear()
    manager.pending_connect.clear()
    manager.index_rooms()
    if isinstance(manager, PubSubManager):
        manager._newest = OrderedDict()
    server.manager_initialized = False
    _renew_lock(engine)


def _renew_lock(engine: Any) -> None:
    # Greenlets do not change places while it is held, and so need none that they could wait for.
    engine.queue_lock = threading.Lock() if engine.async_mode == "threading" else RLock()


def close_for_restart(socket: Any) -> None:
    """Close a transport session such that its client comes back by itself."""
    socket.close(
        reason=socket.server.reason.SERVER_DISCONNECT,
        code=CloseCode.SERVICE_RESTART,
        text="service restart",
    )


def _guard(instance: Any, guarded: type) -> None:
    """Make *instance* an instance of *guarded* as well, in front of its own class."""
    own = type(instance)
    instance.__class__ = type(f"Guarded{own.__name__}", (guarded, own), {})


def _is_stock_redis(cls: type[RedisManager]) -> bool:
    # Who overrides how messages travel wants them to travel that way.
    return all(
        getattr(cls, name) is getattr(RedisManager, name) for name in ("_listen", "_redis_connect")
    )

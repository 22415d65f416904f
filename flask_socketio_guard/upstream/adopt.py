"""Gives a ``SocketIO``, its server and its client manager their guarded classes."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from socketio import Manager, PubSubManager, RedisManager

from ..errors import ConfigError
from .flask_socketio import GuardedSocketIO
from .managers import GuardedManager, GuardedPubSubManager
from .queue_transport import QueueTransport
from .redis_transport import RedisTransport
from .server import GuardedServer

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
    elif isinstance(manager, Manager):
        _guard(manager, GuardedManager)
    else:
        raise ConfigError(
            f"client_manager is a {type(manager).__name__}: use a subclass of "
            "socketio.Manager or socketio.PubSubManager"
        )
    manager.guard = hooks
    _guard(server, GuardedServer)
    server.guard = hooks
    if not isinstance(socketio, GuardedSocketIO):
        _guard(socketio, GuardedSocketIO)


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


def _guard(instance: Any, guarded: type) -> None:
    """Make *instance* an instance of *guarded* as well, in front of its own class."""
    own = type(instance)
    instance.__class__ = type(f"Guarded{own.__name__}", (guarded, own), {})


def _is_stock_redis(cls: type[RedisManager]) -> bool:
    # Who overrides how messages travel wants them to travel that way.
    return all(
        getattr(cls, name) is getattr(RedisManager, name) for name in ("_listen", "_redis_connect")
    )

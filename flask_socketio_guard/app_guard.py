"""The guard of one application, or of a write-only process: its life, and who may ask it what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .assembly import Assembly
from .core import process
from .core.runtime import is_patched
from .errors import ConfigError, RoomInvalid
from .events.pipeline import HandlerEntry, pipeline
from .routes import require_free_paths
from .telemetry.records import logger
from .upstream import adopt, forsake_clients, is_session_id, new_host_id, take_lost_handlers

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask
    from flask_socketio import SocketIO

    from .clients.connections import Connection
    from .config import GuardConfig
    from .registry import Registry

_SUPERSEDED_STOP_TIMEOUT = 1.0  # holds up the start of the application that takes over, in seconds


class AppGuard(Assembly):
    """The guard of one application, or of a write-only ``SocketIO`` without one.

    It takes what :class:`.Assembly` takes. To the adopted upstream objects it is
    :class:`~flask_socketio_guard.ports.Ports`.
    """

    def __init__(
        self, app: Flask | None, socketio: SocketIO, config: GuardConfig, registry: Registry
    ) -> None:
        super().__init__(app, socketio, config, registry)
        adopt(socketio, self)
        self._build(self)
        self.is_replaced = False
        """Whether another guard stands in front of the application by now."""
        self.ordered: set[tuple[str, str]] = set()
        self.delivery.require_usable_store()
        process.join(self)

    # What is registered

    def register_all(self) -> None:
        """Take what was registered before.

        Raises:
            ConfigError: Something of it cannot be.
        """
        for entry in self._registry.handlers:
            self.register(entry)
        for spec in self._registry.tasks:
            self.tasks.add(spec)

    def register(self, entry: HandlerEntry) -> None:
        """Register a handler behind what is asked for around it."""
        if entry.is_ordered:
            self.ordered.add((entry.namespace or "/", entry.message))
        handler = pipeline(entry, self, self.rates)
        self.socketio.on_event(entry.message, handler, namespace=entry.namespace)

    # The life of the process

    @property
    def can_listen(self) -> bool:
        """Whether this process could hear other processes, and so serve clients."""
        return self.queue is None or not self.has_loop() or is_patched()

    @property
    def is_superseded(self) -> bool:
        """Whether the ``SocketIO`` serves another application by now.

        So it is when an application factory with one global ``SocketIO`` is
        called again, as test suites do.
        """
        return self.socketio.server is not self.server

    def check_paths(self) -> None:
        """See that no route that has come since ``init_app()`` is hidden by a path of the guard.

        Raises:
            ConfigError: One is.
        """
        if self.app is not None:
            require_free_paths(self.app, self.config)

    def start(self) -> None:
        """Start all that serves clients: listener, tasks and the rest; idempotent.

        Raises:
            ConfigError: A message queue is used under gevent without monkey-patching, or a
                route of the application is hidden by a path of the guard.
        """
        lifecycle = self.lifecycle
        if lifecycle.has_served:
            return
        with lifecycle.lock:
            if lifecycle.has_served or lifecycle.stopping.is_set():
                return
            self.check_paths()
            if self.app is not None:
                self._require_patched()
                self._tell_of_lost_handlers()
            self.lifecycle.serve()

    def _require_patched(self) -> None:
        if not self.can_listen:
            raise ConfigError(
                "a message queue under gevent needs a patched standard library: call "
                "gevent.monkey.patch_all() before anything else is imported, or serve "
                "with one of gunicorn's gevent workers, or with uWSGI's --gevent-monkey-patch"
            )
        if self.has_loop() and not self.runtime.can_kill:
            # Patched since: gunicorn's worker does so after a fork from a preloading master.
            self.supervisor.stop(self.config.broker_timeout, is_internal=True)
            self.lifecycle.abandon()
            self.runtime = self._new_runtime()
            self._build(self)

    def _tell_of_lost_handlers(self) -> None:
        lost = "" if self.is_superseded else take_lost_handlers(self.socketio)
        if lost:
            logger.warning(
                "no handler for %s in this application, while an earlier one of the same SocketIO "
                "had it: register handlers before socketio.init_app(), each time that the factory "
                "is called, or with guard.on",
                lost,
            )

    def flush(self, timeout: float) -> bool:
        """Wait until all that was emitted is with the broker."""
        return self.queue is None or self.queue.outbox.flush(timeout)

    def drain(self, timeout: float) -> bool:
        """Let the clients go, end the tasks, and empty the outbox; see :meth:`.Lifecycle.drain`."""
        return self.lifecycle.drain(timeout)

    def stop(self, timeout: float) -> None:
        """Flush the outbox and end every task, within about *timeout* seconds each."""
        self.lifecycle.stop(timeout)

    def discard(self) -> None:
        """Have no part in the application: it could not be guarded, or is guarded anew."""
        self.is_replaced = True
        self.stop(min(_SUPERSEDED_STOP_TIMEOUT, self.config.stop_timeout))
        self.failure_hooks.abandon()
        process.leave(self)

    def flush_at_exit(self) -> None:
        """Give what was emitted last a chance to get out before the process ends."""
        if self.lifecycle.stopping.is_set():
            return
        if self.queue is not None:
            self.queue.flush_last()
        self.delivery.record_loss()

    def after_fork(self) -> None:
        """Start afresh in a child process: tasks, connections and queue are the parent's."""
        has_served = self.lifecycle.has_served
        self.lifecycle.abandon()
        if has_served and self.app is not None:
            self.runtime.forsake_servers()
        forsake_clients(self.server)
        new_host_id(self.server)
        self.runtime = self._new_runtime()
        self._build(self)

    # What the adopted upstream objects ask for

    @property
    def is_propagating(self) -> bool:
        """Whether Flask's test client would raise what a view raises."""
        if self.app is None:
            return False
        wanted = self.app.config["PROPAGATE_EXCEPTIONS"]
        return bool(self.app.testing if wanted is None else wanted)

    def is_ordered(self, namespace: str, event: str) -> bool:
        """Say whether events of that name are handled one after another."""
        return (namespace, event) in self.ordered

    def connected(self, connection: Connection) -> None:
        """Note that the connect handler let a client in."""
        for tell in self._connected:
            tell(connection)

    def entered(self, sid: str, room: object) -> None:
        """Note that a client entered a room: something may wait for those in there."""
        connection = self.connections.find(sid)
        if connection is not None and connection.is_open and isinstance(room, str):
            for tell in self._entered:
                tell(connection, room)

    def hand_over(self, target: Callable[[], object]) -> None:
        """Run *target*, called from another native thread, on the event loop.

        Raises:
            LoopQueueFull: Too much waits for the event loop.
        """
        self.runtime.call_soon_threadsafe(self.handlers.recording(target))

    # What the public object asks for

    def identify(self, sid: str, identity: str) -> bool:
        """Note that a client is a device of *identity*; say whether it is here.

        Raises:
            RoomInvalid: *identity* is the session id of another client.
        """
        if identity != sid and (identity in self.connections or is_session_id(identity)):
            raise RoomInvalid("the identity is the session id of another client")
        connection = self.connections.find(sid)
        if connection is None:
            return False
        self.delivery.identify(connection, identity)
        return True


def all_guards() -> list[AppGuard]:
    """Return the guards of this process."""
    return [member for member in process.members() if isinstance(member, AppGuard)]


def stop_superseded(socketio: SocketIO) -> None:
    """Stop the guards of applications that *socketio* no longer serves."""
    for guard in all_guards():
        if guard.socketio is socketio and guard.is_superseded:
            guard.stop(min(_SUPERSEDED_STOP_TIMEOUT, guard.config.stop_timeout))

"""The guard of one application or of a write-only process, from registration to shutdown."""

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

_SUPERSEDED_STOP_TIMEOUT = 1.0  # seconds; delays the start of the application that takes over


class AppGuard(Assembly):
    """The guard of one application, or of a write-only ``SocketIO`` without one.

    Its arguments are those of :class:`.Assembly`. It implements
    :class:`~flask_socketio_guard.ports.Ports` for the adopted upstream objects.
    """

    def __init__(
        self, app: Flask | None, socketio: SocketIO, config: GuardConfig, registry: Registry
    ) -> None:
        super().__init__(app, socketio, config, registry)
        adopt(socketio, self)
        self._build(self)
        self.is_replaced = False
        """Whether the application is no longer guarded by this object."""
        self.ordered: set[tuple[str, str]] = set()
        self.delivery.require_usable_store()
        process.join(self)

    # What is registered

    def register_all(self) -> None:
        """Register the handlers and tasks that were declared before this guard existed.

        Raises:
            ConfigError: One of them cannot be registered.
        """
        for entry in self._registry.handlers:
            self.register(entry)
        for spec in self._registry.tasks:
            self.tasks.add(spec)

    def register(self, entry: HandlerEntry) -> None:
        """Register a handler with its timeout, schema and rate limit."""
        if entry.is_ordered:
            self.ordered.add((entry.namespace or "/", entry.message))
        handler = pipeline(entry, self, self.rates)
        self.socketio.on_event(entry.message, handler, namespace=entry.namespace)

    # The life of the process

    @property
    def can_listen(self) -> bool:
        """Whether this process can receive messages of other processes, and so serve clients."""
        return self.queue is None or not self.has_loop() or is_patched()

    @property
    def is_superseded(self) -> bool:
        """Whether the ``SocketIO`` now serves another application.

        This happens when an application factory with one global ``SocketIO`` is
        called again, as test suites do.
        """
        return self.socketio.server is not self.server

    def check_paths(self) -> None:
        """Check that the guard's paths hide no route that was added after ``init_app()``.

        Raises:
            ConfigError: They hide one.
        """
        if self.app is not None:
            require_free_paths(self.app, self.config)

    def start(self) -> None:
        """Start everything that serves clients: listener, tasks and the rest; idempotent.

        Raises:
            ConfigError: A message queue is used under gevent without monkey-patching, or a
                path of the guard hides a route of the application.
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
                self._warn_of_lost_handlers()
            self.lifecycle.serve()

    def _require_patched(self) -> None:
        if not self.can_listen:
            raise ConfigError(
                "a message queue under gevent needs a patched standard library: call "
                "gevent.monkey.patch_all() before anything else is imported, or serve "
                "with one of gunicorn's gevent workers, or with uWSGI's --gevent-monkey-patch"
            )
        if self.has_loop() and not self.runtime.can_kill:
            # Patched after this guard was made: gunicorn's worker does so if the master preloads.
            self.supervisor.stop(self.config.broker_timeout, is_internal=True)
            self.lifecycle.abandon()
            self.runtime = self._new_runtime()
            self._build(self)

    def _warn_of_lost_handlers(self) -> None:
        lost = "" if self.is_superseded else take_lost_handlers(self.socketio)
        if lost:
            logger.warning(
                "no handler for %s in this app, although an earlier app of the same SocketIO had "
                "one: register handlers before socketio.init_app() each time the factory is "
                "called, or with guard.on",
                lost,
            )

    def flush(self, timeout: float) -> bool:
        """Wait until the broker has acknowledged everything emitted so far."""
        return self.queue is None or self.queue.outbox.flush(timeout)

    def drain(self, timeout: float) -> bool:
        """Drain clients, stop tasks and empty the outbox; see :meth:`.Lifecycle.drain`."""
        return self.lifecycle.drain(timeout)

    def stop(self, timeout: float) -> None:
        """Flush the outbox and stop every task, within about *timeout* seconds each."""
        self.lifecycle.stop(timeout)

    def discard(self) -> None:
        """Detach from the application, which could not be guarded or gets a new guard."""
        self.is_replaced = True
        self.stop(min(_SUPERSEDED_STOP_TIMEOUT, self.config.stop_timeout))
        self.failure_hooks.abandon()
        process.leave(self)

    def flush_at_exit(self) -> None:
        """Publish the last messages before the process ends."""
        if self.lifecycle.stopping.is_set():
            return
        if self.queue is not None:
            self.queue.flush_last()
        self.delivery.record_loss()

    def after_fork(self) -> None:
        """Reset everything in a forked child: tasks, connections and queue are the parent's."""
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
        """Whether Flask propagates exceptions of views to its test client."""
        if self.app is None:
            return False
        wanted = self.app.config["PROPAGATE_EXCEPTIONS"]
        return bool(self.app.testing if wanted is None else wanted)

    def is_ordered(self, namespace: str, event: str) -> bool:
        """Return whether a client's events of that name are handled one after another."""
        return (namespace, event) in self.ordered

    def connected(self, connection: Connection) -> None:
        """Tell the components that the connect handler has accepted a client."""
        for hook in self._connected:
            hook(connection)

    def entered(self, sid: str, room: object) -> None:
        """Tell the components that a client entered a room, for which messages may be pending."""
        connection = self.connections.find(sid)
        if connection is not None and connection.is_open and isinstance(room, str):
            for hook in self._entered:
                hook(connection, room)

    def hand_over(self, target: Callable[[], object]) -> None:
        """Run *target* on the event loop; called from another native thread.

        Raises:
            LoopQueueFull: Too many calls wait for the event loop.
        """
        self.runtime.call_soon_threadsafe(self.handlers.recording(target))

    # What the public object asks for

    def identify(self, sid: str, identity: str) -> bool:
        """Set the identity of a client; return whether it is connected to this process.

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

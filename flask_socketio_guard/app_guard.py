"""The guard of one application: which components there are, and what they know of each other.

Nothing here is done: each component does one thing, and is listed once. What the adopted
upstream objects ask for, event by event, is an attribute that leads straight to it.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import weakref
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from .clients.admission import Admission
from .clients.connections import Connections
from .clients.drain import Drain
from .clients.fan_out import FanOut
from .clients.handshakes import Handshakes
from .clients.send_queue import WriteBatcher
from .config import require_plain, require_seconds
from .core.component import Component
from .core.deadlines import Deadlines
from .core.jobs import Jobs
from .core.lifecycle import Lifecycle
from .core.runtime import GEVENT_MODES, Runtime, is_about_to_exec, is_patched, runtime_for
from .core.supervisor import Supervisor, current_task, sleep
from .core.tasks import Tasks, TaskSpec
from .delivery.component import Deliveries
from .errors import ConfigError, RoomInvalid
from .events.broadcast_ack import BroadcastAcks
from .events.callbacks import CallbackRunner, CallbackTable
from .events.handlers import HandlerGuard
from .events.pipeline import HandlerEntry, pipeline
from .events.rates import Limit, RateLimiter
from .ports import AckCallback
from .queue.component import MessageQueue
from .routes import require_free_paths
from .states import ConnectionState, ListenerState, Phase
from .telemetry import records as signals
from .telemetry.counters import Counters
from .telemetry.health import Health, HealthEndpoints, Sources
from .telemetry.logs import LogLines
from .telemetry.loop_blocks import LoopMonitoring
from .telemetry.records import Failure, Telemetry, logger
from .upstream import (
    LocalClients,
    Sweeper,
    WebServer,
    adopt,
    close_for_restart,
    encode_strict,
    forsake_clients,
    has_queue,
    is_session_id,
    new_host_id,
    take_lost_handlers,
    transport_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask
    from flask_socketio import SocketIO

    from .config import GuardConfig
    from .ports import Connection
    from .queue.transport import Arrival
    from .registry import Registry

_SUPERSEDED_STOP_TIMEOUT = 1.0  # holds up the start of the application that takes over, in seconds
_MAX_DELIVERIES_AHEAD = 20_000


class AppGuard:
    """The guard of one application, or of a write-only ``SocketIO`` without one.

    Args:
        app: The application, or ``None`` in a write-only process.
        socketio: Initialised already.
        config: Its settings.
        registry: What was registered so far; its hooks are those of later, too.
    """

    def __init__(
        self,
        app: Flask | None,
        socketio: SocketIO,
        config: GuardConfig,
        registry: Registry,
    ) -> None:
        self.app = app
        self.socketio = socketio
        self.server: Any = socketio.server
        self.config = config
        self.sender: object = socketio if app is None else app
        self.telemetry = Telemetry(self.sender)
        self.handlers = HandlerGuard(self.sender, is_debug=self._is_debug)
        self.counters = Counters(self.sender)
        self._log_lines = LogLines(
            self.sender,
            fold_interval=config.log_fold_interval,
            loggers=(
                self.server.logger,
                self.server.eio.logger,
                logging.getLogger("geventwebsocket.handler"),
            ),
            count=self.counters.add,
        )
        self.is_replaced = False
        """Whether another guard stands in front of the application by now."""
        self.is_worker_alive: Callable[[], bool] = lambda: True
        self.on_drained: Callable[[float], object] | None = None
        self.ordered: set[tuple[str, str]] = set()
        self.rates = RateLimiter(
            config.rate_storage,
            on_storage_failure=lambda exc: self.telemetry.failed("hook", exc, "rate storage"),
            # Applications that share a Redis share no counts.
            namespace=f"socketio-guard:{self._fleet_name()}",
        )
        self.event_limit = self._limit(config.event_rate, "events")
        self.join_limit = self._limit(config.join_rate_per_address, "joins/address")
        self._registry = registry
        self.handlers.before_event = registry.before_event
        # What was registered outlives a fork, unlike the components that act on it.
        self._handshake_timeouts = dict(registry.handshakes)
        self._specs: list[TaskSpec] = []
        self._names = itertools.count(1)
        self.runtime = self._new_runtime()
        adopt(socketio, self)
        self._build()
        self.delivery.require_usable_store()
        self._subscriptions = [
            signals.subscribe(signals.failed, self.sender, self._call_failure_hooks)
        ]
        self._subscriptions += [
            signals.subscribe(signal, self.sender, lambda _: self.health.refresh())
            for signal in (
                signals.listener_changed,
                signals.broker_changed,
                signals.delivery_store_changed,
                signals.task_changed,
            )
        ]
        _alive.add(self)

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

    def transport_session(self, sid: str) -> str | None:
        """Return the id of a client's transport session; ``None`` if it is gone."""
        connection = self.connections.find(sid)
        return None if connection is None else connection.eio_sid

    def identity_of(self, sid: str) -> str | None:
        """Return whose device a client is, if that was said."""
        return self.delivery.dispatcher.identity_of(sid)

    def _build(self) -> None:
        """Make the components: everything with tasks, locks or connections; again after a fork."""
        config, runtime, telemetry, server = self.config, self.runtime, self.telemetry, self.server
        self.supervisor = Supervisor(
            runtime,
            on_failure=lambda task, exc: telemetry.failed("task", exc, task.name),
            on_change=lambda task, *change: telemetry.task_changed(task.name, *change),
        )
        lifecycle = self.lifecycle = Lifecycle(
            runtime,
            self.supervisor,
            config,
            on_change=self._phase_changed,
            is_worker_alive=lambda: self.is_worker_alive(),
            on_farewell=self._say_farewell,
        )
        self.jobs = Jobs(runtime, recording=self.handlers.recording)
        self.deadlines = Deadlines(
            runtime, on_failure=lambda exc: telemetry.failed("hook", exc, "deadline")
        )
        self.run_callback = CallbackRunner(runtime, self.handlers, self._context)
        self.callbacks = CallbackTable(
            runtime,
            timeout=config.callback_timeout,
            run=self.run_callback,
            on_lost=telemetry.callback_lost,
        )
        self.write_batcher = WriteBatcher(runtime)
        self.fan_out = FanOut(runtime) if config.fast and runtime.can_kill else None
        self.connections = Connections(
            on_change=self._connection_changed,
            on_failure=lambda client, exc: telemetry.failed(
                "hook", exc, "deferred cleanup", client.namespace, client.sid
            ),
            call_apart=lambda target: runtime.call_apart(target, Context()),
        )
        self.admission = Admission(
            max_connections=config.max_connections,
            max_per_address=config.max_connections_per_address,
            count_open=lambda: len(server.eio.sockets),
            limit=self._limit(config.connection_rate, "connections"),
            address_limit=self._limit(config.connection_rate_per_address, "connections/address"),
        )
        self.handshakes = Handshakes(
            self._handshake_timeouts, self.deadlines, disconnect=self._disconnect
        )
        drain = Drain(
            runtime,
            config,
            sockets=lambda: server.eio.sockets.values(),
            close=close_for_restart,
            is_quiet=self.is_quiet,
            is_stopped=lambda: lifecycle.phase is Phase.STOPPED,
        )
        self.tasks = Tasks(
            runtime,
            lifecycle,
            self._specs,
            context=self._context,
            restart_max_delay=config.restart_max_delay,
        )
        clients = LocalClients(self.connections, server.manager, self.callbacks)
        self.queue = self._new_queue()
        self.delivery = Deliveries(
            config,
            runtime,
            clients,
            deadlines=self.deadlines,
            channel=str(getattr(server.manager, "channel", "flask-socketio")),
            encode=encode_strict,
            run=self.run_callback,
            telemetry=telemetry,
            hooks=self._registry.on_dead_letter,
            has_queue=self.queue is not None,
            is_write_only=self.app is None,
        )
        self.broadcast_acks = BroadcastAcks(
            runtime,
            clients,
            publish=getattr(server.manager, "tell_others", None),
            spawn=self.jobs.spawn,
            recording=self.handlers.recording,
            count_others=lambda timeout: (
                0 if self.queue is None else self.queue.count_others(timeout)
            ),
            host_id=lambda: str(server.manager.host_id),
        )
        self.health = Health(
            Sources(
                supervisor=self.supervisor,
                is_serving=lambda: lifecycle.is_serving,
                listener_state=self.listener_state,
                counts=self.counters.as_dict,
                components=lambda: lifecycle.components,
            )
        )
        self.endpoints = HealthEndpoints(self.health, config, is_debug=self._is_debug)
        components: list[Component | None] = [
            self._log_lines,
            self.rates,
            self.health,
            self.handlers,
            self.admission,
            self.connections,
            self.handshakes,
            *(self._web() if self.app is not None else ()),
            Sweeper(server, self),
            self.delivery,
            self.callbacks,
            self.queue,
            drain,
            self.tasks,
            *(make(self) for make in self._registry.components),
        ]
        self._connect([component for component in components if component is not None])

    def _web(self) -> list[Component]:
        """Return what a process needs that serves clients, and no other one."""
        return [
            self.deadlines,
            WebServer(self.config, self.socketio),
            LoopMonitoring(self.runtime, self.config.blocking_timeout, self.sender),
        ]

    def _connect(self, components: list[Component]) -> None:
        self.lifecycle.components = components
        # Those that want to know; the others cost nothing.
        self._connected = _those_that("connected", components)
        self._entered = _those_that("entered", components)
        self._disconnected = _those_that("disconnected", components)
        # Called event by event.
        self.spawn = self.jobs.spawn
        self.flag = self.runtime.flag
        self.take_broadcast_call = self.broadcast_acks.take
        self.has_departed = self.delivery.dispatcher.has_departed
        self.listen: Callable[[], None] = lambda: None
        if self.queue is not None:
            self.publish = self.queue.publish
            self.listen = self.queue.listen

    def _new_queue(self) -> MessageQueue | None:
        transport = transport_of(self.server, self.config)
        if transport is None:
            return None
        return MessageQueue(
            self.runtime,
            self.lifecycle,
            self.config,
            transport,
            telemetry=self.telemetry,
            handle=self._take_message,
            is_write_only=self.app is None,
            at_exit=_at_exit,
        )

    def _new_runtime(self) -> Runtime:
        # Who cannot serve may emit all the same, as tests and commands do: that takes threads.
        can_only_emit = self.app is None or (
            self.has_loop() and has_queue(self.server) and not is_patched()
        )
        return runtime_for(self.server.async_mode, is_write_only=can_only_emit)

    def _fleet_name(self) -> str:
        """Return what all processes of the application have in common, and no others have."""
        channel = getattr(self.server.manager, "channel", None)
        if channel is None and self.app is not None:
            return self.app.name
        return str(channel)

    def _limit(self, rate: str | None, name: str) -> Limit | None:
        return None if rate is None else self.rates.limit(rate, name=name)

    # The life of the process

    @property
    def can_listen(self) -> bool:
        """Whether this process could hear other processes, and so serve clients."""
        return self.queue is None or not self.has_loop() or is_patched()

    def has_loop(self) -> bool:
        """Say whether a gevent loop serves the clients."""
        return self.server.async_mode in GEVENT_MODES

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
            self._build()

    def _tell_of_lost_handlers(self) -> None:
        lost = "" if self.is_superseded else take_lost_handlers(self.socketio)
        if lost:
            logger.warning(
                "no handler for %s in this application, while an earlier one of the same SocketIO "
                "had it: register handlers before socketio.init_app(), each time that the factory "
                "is called, or with guard.on",
                lost,
            )

    def _phase_changed(self) -> None:
        if self.lifecycle.phase in (Phase.DRAINING, Phase.STOPPED):
            self.admission.is_draining = True
        self.health.refresh()

    def _say_farewell(self, seconds: float) -> None:
        if self.on_drained is not None:
            self.on_drained(seconds)

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
        _alive.discard(self)

    @property
    def is_draining(self) -> bool:
        """Whether the clients are being let go, or were, and nothing has stopped yet."""
        return self.lifecycle.phase is Phase.DRAINING

    @property
    def is_drained(self) -> bool:
        """Whether the clients were let go, the tasks ended and the outbox emptied."""
        return self.lifecycle.is_drained

    @property
    def is_stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self.lifecycle.phase is Phase.STOPPED

    def is_quiet(self) -> bool:
        """Say whether no client is left and nothing runs for one."""
        engine = self.server.eio
        is_busy = (
            self.handlers.running
            or self.jobs.running
            or engine.sockets
            or engine.websocket_transports
        )
        return not is_busy and not self.connections

    def flush_at_exit(self) -> None:
        """Give what was emitted last a chance to get out before the process ends."""
        if self.lifecycle.stopping.is_set():
            return
        if self.queue is not None:
            self.queue.flush_last()
        self.delivery.tell_of_abandoned()

    def after_fork(self) -> None:
        """Start afresh in a child process: tasks, connections and queue are the parent's."""
        has_served = self.lifecycle.has_served
        self.lifecycle.abandon()
        if has_served and self.app is not None:
            self.runtime.forsake_servers()
        forsake_clients(self.server)
        new_host_id(self.server)
        self.runtime = self._new_runtime()
        self._build()

    @property
    def is_superseded(self) -> bool:
        """Whether the ``SocketIO`` serves another application by now.

        So it is when an application factory with one global ``SocketIO`` is
        called again, as test suites do.
        """
        return self.socketio.server is not self.server

    # What the adopted upstream objects ask for (ports.Ports)

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

    def _connection_changed(
        self, connection: Connection, old: ConnectionState | None, new: ConnectionState
    ) -> None:
        self.telemetry.connection_changed(
            connection.sid, connection.namespace, old, new, connection.reason
        )
        if new is ConnectionState.CLOSED:
            for tell in self._disconnected:
                tell(connection)

    def _take_message(self, arrival: Arrival) -> None:
        self.server.manager.deliver(arrival)
        if self.fan_out is not None and self.fan_out.is_busy:
            # Broadcasts of others come as fast as they are written here, and no faster.
            while len(self.fan_out) > _MAX_DELIVERIES_AHEAD:
                self.runtime.yield_control()

    def _disconnect(self, client: Connection) -> None:
        disconnect = partial(self.server.disconnect, client.sid, client.namespace)
        self.jobs.spawn("handshake", disconnect)

    # What the public object asks for

    def listener_state(self) -> ListenerState:
        """Return what is known of the listener."""
        return ListenerState.ABSENT if self.queue is None else self.queue.state

    def sleep(self, seconds: float) -> bool:
        """Sleep; end early, and return ``False``, when the task or process stops."""
        stopping = self.lifecycle.stopping
        if stopping.is_set():
            return False
        if current_task() is None and seconds > 0:
            return not stopping.wait(seconds)
        return sleep(self.runtime, seconds)

    def unique_name(self, name: str) -> str:
        """Return *name* with a number that makes it unique."""
        return f"{name}-{next(self._names)}"

    def ack_callback(
        self,
        function: Callable[..., object],
        timeout: float | None,
        on_timeout: Callable[[], object] | None,
    ) -> AckCallback:
        """Return *function* as a callback that runs in the request context of now, if any.

        Raises:
            ConfigError: *timeout* is out of range.
        """
        if timeout is not None:
            require_seconds("callback_timeout", timeout)
        require_plain("the callback", function)
        if on_timeout is not None:
            require_plain("on_timeout", on_timeout)
        bound: Callable[..., object] = self.socketio.in_present_request(function)
        on_lost = None
        if on_timeout is not None:
            expired: Callable[..., object] = self.socketio.in_present_request(on_timeout)

            def on_lost(reason: str) -> object:
                del reason
                return expired()

        return AckCallback(bound, timeout, on_lost)

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

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.app is None else self.app.app_context()

    def _is_debug(self) -> bool:
        return self.app is not None and self.app.debug

    def _call_failure_hooks(self, failure: Failure) -> None:
        for hook in self._registry.on_failure:
            try:
                hook(failure)
            except BaseException as exc:  # noqa: BLE001 - recorded; see signals.send
                if failure.kind != "hook":
                    self.telemetry.failed("hook", exc, getattr(hook, "__qualname__", repr(hook)))


def _those_that(hook: str, components: list[Component]) -> list[Any]:
    """Return the method *hook* of each component that has one of its own."""
    default = getattr(Component, hook)
    return [
        getattr(component, hook)
        for component in components
        if getattr(type(component), hook) is not default
    ]


_alive: weakref.WeakSet[AppGuard] = weakref.WeakSet()


def all_guards() -> list[AppGuard]:
    """Return the guards of this process."""
    return list(_alive)


def stop_superseded(socketio: SocketIO) -> None:
    """Stop the guards of applications that *socketio* no longer serves."""
    for guard in all_guards():
        if guard.socketio is socketio and guard.is_superseded:
            guard.stop(min(_SUPERSEDED_STOP_TIMEOUT, guard.config.stop_timeout))


def _after_fork() -> None:
    if is_about_to_exec():
        return  # gevent runs programs by a fork in Python
    for guard in all_guards():
        try:
            guard.after_fork()
        except Exception:  # noqa: BLE001 - of a store, for one; the others are to begin anew
            logger.exception("the guard of %s could not begin anew after a fork", guard.sender)


def _at_exit() -> None:
    for guard in all_guards():
        guard.flush_at_exit()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

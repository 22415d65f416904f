"""Construction of a guarded process: its components and the references between them.

This module contains no behaviour. Each component has one responsibility and is listed once. Hot
paths use attributes that refer directly to the method they need.
"""

from __future__ import annotations

import logging
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
from .core.component import Component, implementations_of
from .core.deadlines import Deadlines
from .core.jobs import Jobs
from .core.lifecycle import Lifecycle, ServerWorker
from .core.runtime import GEVENT_MODES, Runtime, is_patched, runtime_for
from .core.supervisor import Supervisor
from .core.tasks import Tasks, TaskSpec
from .delivery.component import Deliveries
from .events.broadcast_ack import BroadcastAcks
from .events.callbacks import CallbackRunner, CallbackTable, ack_callback
from .events.handlers import HandlerGuard
from .events.rates import Limit, RateLimiter
from .queue.component import MessageQueue
from .states import ConnectionState, ListenerState, Phase
from .telemetry.counters import Counters
from .telemetry.failure_hooks import FailureHooks
from .telemetry.health import Health, HealthEndpoints, Sources
from .telemetry.logs import LogLines
from .telemetry.loop_blocks import LoopMonitoring
from .telemetry.records import CallbackLoss, ConnectionChange, Failure, TaskChange, Telemetry
from .upstream import (
    LocalClients,
    Sweeper,
    WebServer,
    close_for_restart,
    encode_strict,
    has_queue,
    transport_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask
    from flask_socketio import SocketIO

    from .clients.connections import Connection
    from .config import GuardConfig
    from .ports import Ports
    from .queue.transport import Arrival
    from .registry import Registry


class Assembly:
    """The parts of one guarded process.

    Args:
        app: The application, or ``None`` in a write-only process.
        socketio: A ``SocketIO`` that is already initialised.
        config: The settings of the application.
        registry: What was registered so far; hooks that are added to it later count as well.
    """

    def __init__(
        self, app: Flask | None, socketio: SocketIO, config: GuardConfig, registry: Registry
    ) -> None:
        self.app = app
        self.socketio = socketio
        self.server: Any = socketio.server
        self.config = config
        self.sender: object = socketio if app is None else app
        self.worker = ServerWorker()
        self.telemetry = Telemetry(self.sender)
        self.handlers = HandlerGuard(self.telemetry, is_debug=self._is_debug)
        self.handlers.before_event = registry.before_event
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
        self.rates = RateLimiter(
            config.rate_storage,
            on_storage_failure=lambda exc: self.telemetry.send(
                Failure("hook", exc, "rate storage")
            ),
            # Applications that share a Redis must not share counts.
            namespace=f"socketio-guard:{self._fleet_name()}",
        )
        self.event_limit = self._limit(config.event_rate, "events")
        self.join_limit = self._limit(config.join_rate_per_address, "joins/address")
        self._registry = registry
        # Registrations survive a fork, unlike the components that act on them.
        self._handshake_timeouts = dict(registry.handshakes)
        self._specs: list[TaskSpec] = []
        self.runtime = self._new_runtime()

    def _build(self, ports: Ports) -> None:
        """Create everything that has tasks, locks or connections; called again after a fork.

        Args:
            ports: The interface for the adopted upstream objects, which is this object itself.
        """
        config, runtime, telemetry, server = self.config, self.runtime, self.telemetry, self.server
        self.supervisor = Supervisor(
            runtime,
            on_failure=lambda task, exc: telemetry.send(Failure("task", exc, task.name)),
            on_change=lambda task, *change: telemetry.send(TaskChange(task.name, *change)),
        )
        lifecycle = self.lifecycle = Lifecycle(
            runtime, self.supervisor, config, on_change=self._phase_changed, worker=self.worker
        )
        self.jobs = Jobs(runtime, recording=self.handlers.recording)
        self.deadlines = Deadlines(
            runtime, on_failure=lambda exc: telemetry.send(Failure("hook", exc, "deadline"))
        )
        run_callback = CallbackRunner(runtime, self.handlers, self._context)
        self.callbacks = CallbackTable(
            runtime,
            timeout=config.callback_timeout,
            run=run_callback,
            on_lost=lambda *loss: telemetry.send(CallbackLoss(*loss)),
        )
        self.write_batcher = WriteBatcher(runtime)
        self.fan_out = FanOut(runtime) if config.fast and runtime.can_kill else None
        self.connections = Connections(
            on_change=self._connection_changed,
            on_failure=lambda client, exc: telemetry.send(
                Failure("hook", exc, "deferred cleanup", client.namespace, client.sid)
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
            is_stopped=lambda: lifecycle.is_stopped,
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
            run=run_callback,
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
        self.health.follow(telemetry)
        self.endpoints = HealthEndpoints(self.health, config, is_debug=self._is_debug)
        self.failure_hooks = FailureHooks(telemetry, self._registry.on_failure)
        components: list[Component | None] = [
            self._log_lines,
            self.failure_hooks,
            self.rates,
            self.health,
            self.handlers,
            self.admission,
            self.connections,
            self.handshakes,
            *(self._web() if self.app is not None else ()),
            Sweeper(server, ports),
            self.delivery,
            self.callbacks,
            self.queue,
            drain,
            self.tasks,
            *(make(self) for make in self._registry.components),
        ]
        lifecycle.components = [component for component in components if component is not None]
        self._connect()

    def _web(self) -> list[Component]:
        """Return the components that only a process that serves clients needs."""
        return [
            self.deadlines,
            WebServer(self.config, self.socketio),
            LoopMonitoring(self.runtime, self.config.blocking_timeout, self.telemetry),
        ]

    def _connect(self) -> None:
        """Collect the components' hooks, and make the direct references for hot paths."""
        components = self.lifecycle.components
        self._connected = implementations_of("connected", components)
        self._entered = implementations_of("entered", components)
        self._disconnected = implementations_of("disconnected", components)
        self.spawn = self.jobs.spawn
        self.flag = self.runtime.flag
        self.take_broadcast_call = self.broadcast_acks.take
        self.has_departed = self.delivery.dispatcher.presence.has_departed
        self.identity_of = self.delivery.dispatcher.presence.identity_of
        self.transport_session = self.connections.transport_session
        self.ack_callback = partial(ack_callback, self.socketio.in_present_request)
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
        )

    def _new_runtime(self) -> Runtime:
        # A process that cannot serve clients can still emit, as tests and commands do, with
        # threads instead of greenlets.
        can_only_emit = self.app is None or (
            self.has_loop() and has_queue(self.server) and not is_patched()
        )
        return runtime_for(self.server.async_mode, is_write_only=can_only_emit)

    def _fleet_name(self) -> str:
        """Return a name that all processes of this application share, and no others."""
        channel = getattr(self.server.manager, "channel", None)
        if channel is None and self.app is not None:
            return self.app.name
        return str(channel)

    def _limit(self, rate: str | None, name: str) -> Limit | None:
        return None if rate is None else self.rates.limit(rate, name=name)

    def has_loop(self) -> bool:
        """Return whether a gevent event loop serves the clients."""
        return self.server.async_mode in GEVENT_MODES

    def is_quiet(self) -> bool:
        """Return whether no client is connected and no task runs for a client."""
        engine = self.server.eio
        is_busy = self.handlers.running or self.jobs.running
        return not (
            is_busy or engine.sockets or engine.websocket_transports or len(self.connections)
        )

    def listener_state(self) -> ListenerState:
        """Return the state of the listener; ``ABSENT`` without a message queue."""
        return ListenerState.ABSENT if self.queue is None else self.queue.state

    # Callbacks between components

    def _connection_changed(
        self, connection: Connection, old: ConnectionState | None, new: ConnectionState
    ) -> None:
        self.telemetry.send(
            ConnectionChange(connection.sid, connection.namespace, old, new, connection.reason)
        )
        if new is ConnectionState.CLOSED:
            for hook in self._disconnected:
                hook(connection)

    def _phase_changed(self) -> None:
        if self.lifecycle.phase in (Phase.DRAINING, Phase.STOPPED):
            self.admission.is_draining = True
        self.health.refresh()

    def _take_message(self, arrival: Arrival) -> None:
        self.server.manager.deliver(arrival)
        if self.fan_out is not None and self.fan_out.is_busy:
            self.fan_out.wait_while_behind()

    def _disconnect(self, client: Connection) -> None:
        disconnect = partial(self.server.disconnect, client.sid, client.namespace)
        self.jobs.spawn("handshake", disconnect)

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.app is None else self.app.app_context()

    def _is_debug(self) -> bool:
        return self.app is not None and self.app.debug

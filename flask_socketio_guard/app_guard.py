"""Everything that guards one application, wired together.

The rooms below know nothing of each other; what passes between them passes here.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from _thread import RLock
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

from . import signals
from .admission import Admission, capacity, fit_to_files
from .blocking import BlockReports
from .broker import Broker
from .callbacks import CallbackTable
from .config import require_plain, require_seconds
from .connections import Connections
from .deadlines import Deadlines
from .delivery.records import DEAD, DeadLetter
from .delivery.service import DeliveryService
from .drain import Drain
from .errors import ConfigError, DuplicateTask, RoomInvalid
from .fan_out import FanOut
from .handlers import HandlerGuard
from .health import TICK_INTERVAL, Health, HealthEndpoints, Sources
from .hooks import AckCallback
from .intake import Starter, arriving
from .listener import LISTENER_TASK, Listener
from .logs import LogLines
from .metrics import Counters
from .outbox import BATCH_MESSAGES, Outbox
from .printable import printable, without_secrets
from .rates import Limit, RateLimiter
from .routes import require_free_paths
from .runtime import GEVENT_MODES, Event, Runtime, clock, is_about_to_exec, is_patched, runtime_for
from .sending import Flusher
from .signals import (
    BrokerChange,
    CallbackLoss,
    ConnectionChange,
    DeliveryEnd,
    Facts,
    Failure,
    ListenerChange,
    OutboxLoss,
    Sweep,
    TaskChange,
    logger,
)
from .states import ConnectionState, ListenerState, TaskState
from .supervisor import (
    Restart,
    RestartPolicy,
    Supervisor,
    TaskHandle,
    current_task,
    is_stopping,
    sleep,
)
from .surveys import Surveys
from .tasks import Tasks, TaskSpec
from .upstream import (
    Sweeper,
    adopt,
    bound_silence,
    encode_strict,
    forsake_clients,
    has_queue,
    hold_answers,
    is_session_id,
    new_host_id,
    offer_compression,
    take_lost_handlers,
    transport_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flask import Flask
    from flask_socketio import SocketIO

    from .config import GuardConfig
    from .delivery.records import Delivery
    from .hooks import Awaiting, Connection
    from .transport import Arrival

_INTERNAL = RestartPolicy(restart=Restart.ALWAYS, first_delay=0.0, max_delay=1.0, max_restarts=None)
_SUPERSEDED_STOP_TIMEOUT = 1.0  # holds up the start of the application that takes over, in seconds
_WORKER_POLL_INTERVAL = 0.1  # seconds
_SWEEP_TICKS = 5
_MAX_DELIVERIES_AHEAD = 20_000
_LISTENING_POLL_INTERVAL = 0.01  # seconds


class AppGuard:
    """The guard of one application, or of a write-only ``SocketIO`` without one.

    Args:
        app: The application, or ``None`` in a write-only process.
        socketio: Initialised already.
        config: Its settings.
    """

    def __init__(self, app: Flask | None, socketio: SocketIO, config: GuardConfig) -> None:
        self.app = app
        self.socketio = socketio
        self.server: Any = socketio.server
        self.config = config
        self.sender: object = socketio if app is None else app
        self.handlers = HandlerGuard(self.sender, is_debug=self._is_debug)
        self.counters = Counters(self.sender)
        self.facts = Facts(self.sender)
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
        self._handshakes: dict[str, float] = {}
        self.rates = RateLimiter(
            config.rate_storage,
            on_storage_failure=self._rate_storage_failed,
            # Applications that share a Redis share no counts.
            namespace=f"socketio-guard:{self._fleet_name()}",
        )
        self.event_limit = self._limit(config.event_rate, "events")
        self.join_limit = self._limit(config.join_rate_per_address, "joins/address")
        self.on_failure: list[Callable[[Failure], object]] = []
        self.on_dead_letter: list[Callable[[DeadLetter], object]] = []
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
            signals.subscribe(signal, self.sender, self._something_changed)
            for signal in (
                signals.listener_changed,
                signals.broker_changed,
                signals.delivery_store_changed,
                signals.task_changed,
            )
        ]
        _alive.add(self)

    def _fleet_name(self) -> str:
        """Return what all processes of the application have in common, and no others have."""
        channel = getattr(self.server.manager, "channel", None)
        if channel is None and self.app is not None:
            return self.app.name
        return str(channel)

    def _limit(self, rate: str | None, name: str) -> Limit | None:
        return None if rate is None else self.rates.limit(rate, name=name)

    def _new_runtime(self) -> Runtime:
        # Who cannot serve may emit all the same, as tests and commands do: that takes threads.
        can_only_emit = self.app is None or (
            self.has_loop() and has_queue(self.server) and not is_patched()
        )
        return runtime_for(self.server.async_mode, is_write_only=can_only_emit)

    def _build(self) -> None:
        """Make everything that holds tasks, locks or connections; again after a fork."""
        config = self.config
        self._lock = threading.RLock()
        self._jobs_lock = RLock()  # not gevent's: nobody waits while holding it
        self.has_started = False
        self._is_sending = False
        self._is_writing = False
        self._is_exiting = False
        self._is_serving = False
        self._is_hearing = False
        self._is_told_of_memory = False
        self._jobs = 0
        self._stop_watching: Callable[[], None] = lambda: None
        self.stopping: Event = self.runtime.event()
        self._drained: Event = self.runtime.event()
        self._is_draining = False
        self._is_complete = False
        self.is_stopped = False
        """Whether :meth:`stop` was called."""
        self.supervisor = Supervisor(
            self.runtime, on_failure=self._task_failed, on_change=self._task_changed
        )
        self.callbacks = CallbackTable(
            self.runtime,
            timeout=config.callback_timeout,
            run=self._run_callback,
            on_lost=self._callback_lost,
        )
        self._starter = Starter(partial(self.runtime.call_later, 0.0))
        self.deadlines = Deadlines(self.runtime, on_failure=self._deadline_failed)
        self.flusher = Flusher(self.runtime)
        has_loop = self.runtime.can_kill
        self.fan_out = FanOut(self.runtime) if config.fast_broadcasts and has_loop else None
        self.connections = Connections(
            on_change=self._connection_changed,
            on_failure=self._cleanup_failed,
            call_apart=lambda target: self.runtime.call_apart(target, Context()),
        )
        self.admission = Admission(
            max_connections=config.max_connections,
            max_per_address=config.max_connections_per_address,
            count_open=lambda: len(self.server.eio.sockets),
            limit=self._limit(config.connection_rate, "connections"),
            address_limit=self._limit(config.connection_rate_per_address, "connections/address"),
        )
        self._sweeper = Sweeper(self.server, self)
        self._drain = Drain(
            self.runtime,
            config,
            sockets=lambda: self.server.eio.sockets.values(),
            is_quiet=self.is_quiet,
        )
        self.tasks = Tasks(
            self.runtime,
            self.supervisor,
            context=self._context,
            restart_max_delay=config.restart_max_delay,
        )
        self._build_deliveries()
        self._build_queue()
        self.health = Health(
            config,
            Sources(
                supervisor=self.supervisor,
                is_serving=lambda: self._is_serving,
                counts=self.counters.as_dict,
                gauges=self._gauges,
                broker=self.broker,
                outbox=self.outbox,
                listener=self.listener,
                is_store_reachable=lambda: self.delivery.is_store_reachable,
                is_probing=lambda: self._transport is None or self._transport.is_probing,
            ),
        )
        self.endpoints = HealthEndpoints(self.health, config, is_debug=self._is_debug)

    def _build_deliveries(self) -> None:
        recipients = _Recipients(self)
        self.delivery = DeliveryService(
            self.config,
            self.runtime,
            recipients,
            present=self._present,
            deadlines=self.deadlines,
            channel=str(getattr(self.server.manager, "channel", "flask-socketio")),
            encode=encode_strict,
            run=self._run_callback,
            on_end=self._delivery_ended,
            on_failure=self._deadline_failed,
            on_store_change=self._store_changed,
        )
        manager = self.server.manager
        self.surveys = Surveys(
            self.runtime,
            recipients,
            publish=getattr(manager, "tell_others", None),
            spawn=self.spawn,
            recording=self.handlers.recording,
            count_others=self._count_others,
            host_id=lambda: str(manager.host_id),
        )

    def _build_queue(self) -> None:
        config = self.config
        self.broker: Broker | None = None
        self.outbox: Outbox | None = None
        self.listener: Listener | None = None
        transport = self._transport = transport_of(self.server, config)
        if transport is None:
            return
        broker = self.broker = Broker(transport.check, on_change=self._broker_changed)
        outbox = self.outbox = Outbox(
            self.runtime,
            transport.publisher(broker.check),
            broker,
            max_messages=config.outbox_max_messages,
            max_bytes=config.outbox_max_bytes,
            batch_messages=BATCH_MESSAGES if config.fast_queue else 1,
            is_dropping_oldest=config.outbox_overflow == "drop_oldest",
            reconnect_max_delay=config.reconnect_max_delay,
            resubscribe_timeout=config.resubscribe_timeout,
            is_listening=self._is_listening,
            on_lost=self._outbox_lost,
            on_trouble=self._publishing_refused,
            on_probe=self._probe_published,
        )
        self.listener = Listener(
            self.runtime,
            self.supervisor,
            broker,
            subscribe=transport.subscribe,
            handle=self._take_message,
            send_probe=outbox.put_probe,
            probe_interval=config.probe_interval,
            probe_timeout=config.probe_timeout,
            reconnect_max_delay=config.reconnect_max_delay,
            on_change=self._listener_changed,
            on_message_failure=self._message_failed,
        )

    # What the adopted upstream objects ask for (hooks.Hooks)

    @property
    def can_listen(self) -> bool:
        """Whether this process could hear other processes, and so serve clients."""
        return self.outbox is None or not self.has_loop() or is_patched()

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
        if self.has_started:
            return
        with self._lock:
            if self.has_started or self.stopping.is_set():
                return
            self.check_paths()
            if self.app is not None:
                self._require_patched()
            self.start_sending()
            self.has_started = True
            self.runtime.settle()
            if self.app is not None:
                self._tell_of_lost_handlers()
                self._start_serving()
                self.delivery.lead(self._watch)
                if self.listener is not None:
                    self.listener.start()
            for spec in self._specs:
                self.tasks.start(spec)
            self._is_serving = True
        self.health.tick()

    def start_sending(self) -> None:
        """Start what a process needs that emits and delivers, but serves nobody; idempotent."""
        with self._lock:
            if self._is_sending or self.stopping.is_set():
                return
            self._is_sending = True
            self.runtime.settle()
            self._start_writing()
            if self.app is not None:
                self._start_sweeping()
            self.delivery.start(self._watch)
            self.supervisor.watch(
                "socketio-guard:tick", self._tick, policy=_INTERNAL, is_internal=True
            )

    def _tell_of_lost_handlers(self) -> None:
        lost = "" if self.is_superseded else take_lost_handlers(self.socketio)
        if lost:
            logger.warning(
                "no handler for %s in this application, while an earlier one of the same SocketIO "
                "had it: register handlers before socketio.init_app(), each time that the factory "
                "is called, or with guard.on",
                lost,
            )

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
            self.runtime = self._new_runtime()
            self._build()

    def has_loop(self) -> bool:
        """Say whether a gevent loop serves the clients."""
        return self.server.async_mode in GEVENT_MODES

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

    def refusal(self, address: str) -> str | None:
        """Say why a new client from *address* is not let in, or ``None``."""
        return self.admission.refusal(address)

    @property
    def max_websockets(self) -> int | None:
        """How many WebSockets there may be at a time, if there is a bound."""
        return self.admission.max_websockets

    def came(self, address: str) -> None:
        """Note that a transport session was made for a client at *address*."""
        self.admission.opened(address)

    def left(self, address: str) -> None:
        """Note that such a session has ended."""
        self.admission.closed(address)

    def connected(self, connection: Connection) -> None:
        """Note that the connect handler let a client in."""
        # What was waiting for it comes after the packet that lets it in.
        courier, namespace = self.delivery.courier, connection.namespace
        for room in self.server.manager.get_rooms(connection.sid, namespace):
            if isinstance(room, str) and room != connection.sid:
                courier.came(room, namespace)
        courier.opened(connection.sid, namespace)
        timeout = self._handshakes.get(connection.namespace)
        if timeout is not None:
            close = partial(self.server.disconnect, connection.sid, connection.namespace)
            connection.expect_handshake(
                self.deadlines.call_later(timeout, partial(self.spawn, "handshake", close))
            )

    def entered(self, sid: str, room: object) -> None:
        """Note that a client entered a room: something may wait for those in there."""
        connection = self.connections.find(sid)
        if connection is not None and connection.is_open and isinstance(room, str):
            self.delivery.courier.came(room, connection.namespace)

    def take_survey(self, message: dict[str, Any]) -> None:
        """Act on a question to a room, or an answer to one, of another process."""
        self.surveys.take(message)

    def _count_others(self, timeout: float) -> int | None:
        if self.outbox is None:
            return 0
        # What was published last has to be out: only then it is known who hears it.
        is_out = self.outbox.flush(timeout)
        heard = self.outbox.subscribers if is_out else None
        return None if heard is None else heard - 1

    def has_departed(self, sid: str) -> bool:
        """Say whether a client was here and has left, as far as that is remembered."""
        return self.delivery.courier.has_departed(sid)

    def listen(self) -> None:
        """See that answers of other processes are heard.

        A process that only emits begins to listen when it asks for the first time, and
        waits until it hears, so that no answer comes too early.
        """
        if self.app is not None or self.listener is None:
            return
        self.start()
        with self._lock:
            is_first, self._is_hearing = not self._is_hearing, True
            if is_first and not self.stopping.is_set():
                self.listener.start()
        deadline = clock() + self.config.resubscribe_timeout
        while self.listener.state is ListenerState.STARTING and clock() < deadline:
            self.runtime.sleep(_LISTENING_POLL_INTERVAL)

    def identify(self, sid: str, identity: str) -> bool:
        """Note that a client is a device of *identity*; say whether it is here.

        Raises:
            RoomInvalid: *identity* is the session id of another client.
        """
        connection = self.connections.find(sid)
        if connection is None:
            return False
        if identity != sid and (identity in self.connections or is_session_id(identity)):
            raise RoomInvalid("the identity is the session id of another client")
        identify = partial(self.delivery.courier.identify, sid, connection.namespace, identity)
        if self.runtime.is_home():
            identify()
        else:
            self.runtime.call_home(identify)
        return True

    def require_store(self) -> None:
        """See that messages that must arrive can be stored where their recipients are.

        Raises:
            ConfigError: This process only emits, and its store is its own.
        """
        if self.delivery.store.is_shared or self.outbox is None:
            return
        if self.app is None:
            raise ConfigError(
                "a process that only emits needs a store that it shares with others: set "
                "SOCKETIO_GUARD_DELIVERY_STORE in its environment, or pass delivery_store="
            )
        if not self._is_told_of_memory:
            self._is_told_of_memory = True
            logger.warning(
                "messages that must arrive stay in the memory of this process, although there is "
                "a message queue: set SOCKETIO_GUARD_DELIVERY_STORE"
            )

    def require_handshake(self, namespace: str, timeout: float) -> None:
        """Close connections to *namespace* that are not ready *timeout* seconds after they opened.

        Raises:
            ConfigError: The namespace has one already.
        """
        if namespace in self._handshakes:
            raise ConfigError(f"namespace {namespace!r} already has a handshake")
        self._handshakes[namespace] = timeout

    def publish(self, payload: bytes) -> None:
        """Put a message into the outbox and see that it gets out of there."""
        assert self.outbox is not None
        self.outbox.put(payload)
        if not self._is_writing:
            self._start_writing()
        if not self.has_started or self.app is None or self._is_exiting:
            self._see_it_out(self.outbox)

    def _see_it_out(self, outbox: Outbox) -> None:
        """Wait, for a while, until what was emitted is with the broker.

        A process that serves nobody may end at any instant, without a word (``os._exit``),
        and often does so right behind its last emit; so does one that is about to exit. To
        wait is what stock does.
        """
        task = current_task()
        is_writer = task is not None and task.is_internal
        if not is_writer and not self.stopping.is_set() and self.runtime.can_wait():
            outbox.settle(self.config.broker_timeout)

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own and record what it raises."""
        run = self.handlers.recording(target)
        spawn = partial(
            self.runtime.spawn, run, name=f"socketio-guard:{name}", on_exit=self._job_exited
        )

        def run_here() -> None:
            run()
            self._job_exited(None)

        with self._jobs_lock:
            self._jobs += 1
        self._starter.start(spawn, run_here)

    def hand_over(self, target: Callable[[], object]) -> None:
        """Run *target*, called from another native thread, on the event loop.

        Raises:
            HandOverFull: Too much waits for the event loop.
        """
        self.runtime.call_home(self.handlers.recording(target))

    def _job_exited(self, _exc: BaseException | None) -> None:
        with self._jobs_lock:
            self._jobs -= 1

    def event(self) -> Event:
        """Return a new event of the runtime."""
        return self.runtime.event()

    # The life of the process

    def add_task(self, spec: TaskSpec) -> None:
        """Start *spec* with the application, or now if that has started.

        Raises:
            DuplicateTask: There is a task of that name; nothing has changed.
        """
        with self._lock:
            self.require_free(spec.name)
            if self.has_started:
                self.tasks.start(spec)
            self._specs.append(spec)

    def start_task(self, spec: TaskSpec) -> TaskHandle:
        """Start *spec* now.

        Raises:
            DuplicateTask: A task of that name is running, or will start with the application.
        """
        with self._lock:
            self.require_free(spec.name)
            return self.tasks.start(spec)

    def require_free(self, name: str) -> None:
        """See that a task of that name can start, now and with the application.

        Two of one name would be noticed at the start otherwise, and leave that half done.

        Raises:
            DuplicateTask: It cannot.
        """
        is_waiting = not self.has_started and any(spec.name == name for spec in self._specs)
        if is_waiting or self.supervisor.is_running(name):
            raise DuplicateTask(f"a task named {name!r} exists already: give one a name=")

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

    def flush(self, timeout: float) -> bool:
        """Wait until all that was emitted is with the broker."""
        return self.outbox is None or self.outbox.flush(timeout)

    def drain(self, timeout: float) -> bool:
        """Let the clients go, end the tasks, and empty the outbox.

        Args:
            timeout: Longest wait for handlers, for tasks and for the outbox, in
                seconds each.

        Returns:
            Whether nothing was left undone.
        """
        with self._lock:
            is_first, self._is_draining = not self._is_draining, True
            self._is_serving = False
            self.admission.is_draining = True
            self.stopping.set()
            self.health.refresh()
        if not is_first:
            self._drained.wait(self.config.drain_delay + self.config.drain_window + 3 * timeout)
            return self._is_complete
        late: list[str] = []
        ending = self.runtime.spawn(
            lambda: late.extend(self._stop_tasks(timeout)), name="socketio-guard:stop"
        )
        is_quiet = self._drain.run(timeout)
        ending.join()
        is_flushed = self._flush_before_end(timeout)
        self._is_complete = is_quiet and is_flushed and not late
        self._drained.set()
        return self._is_complete

    @property
    def is_draining(self) -> bool:
        """Whether the clients are being let go, or were."""
        return self._is_draining

    @property
    def is_drained(self) -> bool:
        """Whether the clients were let go, the tasks ended and the outbox emptied."""
        return self._drained.is_set()

    def is_quiet(self) -> bool:
        """Say whether no client is left and nothing runs for one."""
        engine = self.server.eio
        is_busy = self.handlers.running or self._jobs or engine.sockets or engine.wires
        return not is_busy and not self.connections

    def stop(self, timeout: float) -> None:
        """Flush the outbox and end every task, within about *timeout* seconds each."""
        with self._lock:
            self.is_stopped = True
            self._is_serving = False
            self.admission.is_draining = True
            self.health.refresh()
        self._drain.end()
        if not self.is_drained:
            self._stop_tasks(timeout)
            self._flush_before_end(timeout)
        late = self.supervisor.stop(timeout, is_internal=True)
        if late:
            logger.warning("tasks did not end in time: %s", ", ".join(late))
        self._stop_watching()
        if self.listener is not None:
            self.listener.stopped()
        if self.outbox is not None:
            self.outbox.close()
        self.callbacks.lose_all("stopped")
        self.delivery.stop(min(timeout, self.config.exit_flush_timeout))
        self._tell_of_abandoned(self.delivery.abandoned)
        self.health.stopped()
        self.rates.close()
        self._log_lines.close()

    def discard(self) -> None:
        """Have no part in the application: it could not be guarded, or is guarded anew."""
        self.is_replaced = True
        self.stop(min(_SUPERSEDED_STOP_TIMEOUT, self.config.stop_timeout))
        _alive.discard(self)

    def flush_at_exit(self) -> None:
        """Give what was emitted last a chance to get out before the process ends."""
        if self.stopping.is_set():
            return
        self._is_exiting = True  # exit functions of the application may follow, and emit
        if self.outbox is not None and len(self.outbox) and not self._flush_last(self.outbox):
            self.outbox.close()
        self._tell_of_abandoned(self.delivery.abandoned)

    def _flush_before_end(self, timeout: float) -> bool:
        """Wait until the outbox is empty, but not for a right to publish that is not there."""
        timeout = min(timeout, self.config.exit_flush_timeout)
        if self.outbox is not None and self.outbox.trouble:
            return self.outbox.settle(timeout)
        return self.flush(timeout)

    def _flush_last(self, outbox: Outbox) -> bool:
        assert self.broker is not None
        if outbox.trouble:
            return False
        if self.app is None or self.broker.has_answered:
            return outbox.flush(self.config.exit_flush_timeout)
        # A test or a command where there is no broker: its end shall not be late.
        return outbox.settle(self.config.exit_flush_timeout)

    def _tell_of_abandoned(self, count: int) -> None:
        if count:
            self.counters.add("deliveries_abandoned", count)
            logger.warning(
                "%d messages that must arrive were still in the memory of this process", count
            )

    def after_fork(self) -> None:
        """Start afresh in a child process: tasks, connections and queue are the parent's."""
        self._stop_watching()
        self.supervisor.abandon()
        if self.outbox is not None and self.listener is not None:
            self.outbox.abandon()
            self.listener.abandon()
        if self.has_started and self.app is not None:
            self.runtime.forsake_servers()
        forsake_clients(self.server)
        new_host_id(self.server)
        self.runtime = self._new_runtime()
        self._build()

    def listener_state(self) -> ListenerState:
        """Return what is known of the listener."""
        if self.listener is None or (self.app is None and not self._is_hearing):
            return ListenerState.ABSENT
        return self.listener.state

    @property
    def is_superseded(self) -> bool:
        """Whether the ``SocketIO`` serves another application by now.

        So it is when an application factory with one global ``SocketIO`` is
        called again, as test suites do.
        """
        return self.socketio.server is not self.server

    def sleep(self, seconds: float) -> bool:
        """Sleep; end early, and return ``False``, when the task or process stops."""
        if self.stopping.is_set():
            return False
        if current_task() is None and seconds > 0:
            return not self.stopping.wait(seconds)
        return sleep(self.runtime, seconds)

    def _start_writing(self) -> None:
        with self._lock:
            if self._is_writing or self.outbox is None or self.stopping.is_set():
                return
            self._is_writing = True
            _flush_at_the_end()
            self.supervisor.watch(
                "socketio-guard:outbox",
                self.outbox.write,
                policy=_INTERNAL,
                is_internal=True,
                wake=self.outbox.wake,
            )
            if self.app is None:
                self._start_sweeping()

    def _watch(
        self, name: str, target: Callable[[], object], wake: Callable[[], object] | None
    ) -> None:
        self.supervisor.watch(name, target, policy=_INTERNAL, is_internal=True, wake=wake)

    def _start_sweeping(self) -> None:
        self.supervisor.watch(
            "socketio-guard:callbacks",
            self.callbacks.sweep,
            policy=_INTERNAL,
            is_internal=True,
            wake=self.callbacks.wake,
        )

    def _start_serving(self) -> None:
        if self.config.max_connections is None:
            self.admission.limit_to(capacity(fit_to_files(sys.maxsize)))
        self.supervisor.watch(
            "socketio-guard:deadlines",
            self.deadlines.run,
            policy=_INTERNAL,
            is_internal=True,
            wake=self.deadlines.wake,
        )
        bound_silence(self.config.http_timeout)
        hold_answers(self.socketio.sockio_mw.engineio_path)
        if self.config.websocket_compression:
            offer_compression(self.socketio.sockio_mw.engineio_path)
        if self.config.blocking_timeout is not None:
            reports = BlockReports(self.sender)
            self._stop_watching = self.runtime.watch_loop(
                self.config.blocking_timeout, reports.blocked, reports.unblocked
            )

    def _tick(self) -> None:
        ticks = 0
        next_tick_at = clock()
        while not is_stopping():
            self.delivery.tick()
            if self._is_serving and not self.is_worker_alive():
                self._is_serving = False
                self.runtime.spawn(self._say_farewell, name="socketio-guard:drain")
            if clock() >= next_tick_at:
                next_tick_at = clock() + TICK_INTERVAL
                ticks += 1
                self.health.tick()
                self._log_lines.tick()
                self.server.look()
                if ticks % _SWEEP_TICKS == 0:
                    self._sweep()
            # A worker that is to stop says so to nobody; its load balancer shall know soon.
            sleep(self.runtime, max(0.0, min(_WORKER_POLL_INTERVAL, next_tick_at - clock())))

    def _sweep(self) -> None:
        removed = self._sweeper.sweep()
        if removed:
            record = Sweep(sum(removed.values()), tuple(removed))
            signals.send(signals.connections_swept, self.sender, record)

    def _say_farewell(self) -> None:
        """Do what a process does that was told to stop, before its server lets go."""
        told_at = clock()
        self.drain(self.config.stop_timeout)
        if self.on_drained is not None:
            self.on_drained(clock() - told_at)

    def _stop_tasks(self, timeout: float) -> list[str]:
        """End the application's tasks; its clients may still be there."""
        self.stopping.set()
        late = self.supervisor.stop(timeout, is_internal=False)
        if late:
            logger.warning("tasks did not end in time: %s", ", ".join(late))
        return late

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.app is None else self.app.app_context()

    def _is_debug(self) -> bool:
        return self.app is not None and self.app.debug

    def _is_listening(self) -> bool:
        return self.listener_state() in (ListenerState.RUNNING, ListenerState.ABSENT)

    def _gauges(self) -> dict[str, int]:
        return {
            "callbacks:waiting": len(self.callbacks),
            "connections:open": len(self.server.eio.sockets),
            "connections:closing": self.connections.count(ConnectionState.CLOSING),
            "handlers:running": self.handlers.running,
            "deliveries:inFlight": self.delivery.courier.in_flight,
        }

    # Facts, on their way to the signals

    def _run_callback(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        def call() -> object:
            with self._context():
                return function(*arguments)

        name = getattr(function, "__qualname__", type(function).__qualname__)
        arrival = arriving.get()
        if arrival is not None:
            arrival.is_taken = True
        run = partial(self.handlers.run_callback, call, name=name, arrival=arrival)
        if self.runtime.is_home():
            self.runtime.start(run)
        else:
            self.runtime.spawn(run, name="socketio-guard:callback")

    def _callback_lost(self, reason: str, recipient: object) -> None:
        signals.send(signals.callback_lost, self.sender, CallbackLoss(reason, recipient))

    def _task_failed(self, task: TaskHandle, exc: BaseException) -> None:
        signals.send(signals.failed, self.sender, Failure("task", exc, task.name))

    def _task_changed(self, task: TaskHandle, old: TaskState, new: TaskState, reason: str) -> None:
        is_reader = task.is_internal and task.name == LISTENER_TASK
        if is_reader and new is TaskState.BACKING_OFF and self.listener is not None:
            self.listener.crashed(f"the reader ended: {reason}")
        signals.send(signals.task_changed, self.sender, TaskChange(task.name, old, new, reason))

    def _deadline_failed(self, exc: BaseException) -> None:
        signals.send(signals.failed, self.sender, Failure("hook", exc, "deadline"))

    def _rate_storage_failed(self, exc: Exception) -> None:
        signals.send(signals.failed, self.sender, Failure("hook", exc, "rate storage"))

    def _cleanup_failed(self, connection: Connection, exc: BaseException) -> None:
        failure = Failure("hook", exc, "deferred cleanup", connection.namespace, connection.sid)
        signals.send(signals.failed, self.sender, failure)

    def _connection_changed(
        self, connection: Connection, old: ConnectionState | None, new: ConnectionState
    ) -> None:
        change = ConnectionChange(connection.sid, connection.namespace, old, new, connection.reason)
        signals.send(signals.connection_changed, self.sender, change)
        if new is ConnectionState.CLOSED:
            transport = _transport_of(connection)
            left = partial(
                self.delivery.courier.left, connection.sid, connection.namespace, transport
            )
            if self.runtime.can_kill:
                left()
            else:
                # The lock of the connections is held, which a thread in the courier may want.
                self.deadlines.call_later(0.0, left)

    def _present(self) -> Iterable[tuple[str, str]]:
        """Yield what the clients of this process can be reached by, with namespaces."""
        for connection in self.connections.values():
            namespace = connection.namespace
            for room in self.server.manager.get_rooms(connection.sid, namespace):
                if isinstance(room, str):
                    yield room, namespace

    def _delivery_ended(self, delivery: Delivery) -> None:
        end = DeliveryEnd(
            delivery.id, delivery.recipient, delivery.event, delivery.state, delivery.attempts
        )
        signals.send(signals.delivery_ended, self.sender, end)
        if delivery.state in DEAD:
            for hook in self.on_dead_letter:
                self._run_callback(hook, (DeadLetter(delivery, time.time()),))

    def _take_message(self, arrival: Arrival) -> None:
        self.server.manager.deliver(arrival)
        if self.fan_out is not None and self.fan_out.is_busy:
            # Broadcasts of others come as fast as they are written here, and no faster.
            while len(self.fan_out) > _MAX_DELIVERIES_AHEAD:
                self.runtime.give_way()

    def _message_failed(self, exc: BaseException) -> None:
        signals.send(signals.failed, self.sender, Failure("listener", exc, "queue message"))

    def _listener_changed(self, old: ListenerState, new: ListenerState, reason: str) -> None:
        signals.send(signals.listener_changed, self.sender, ListenerChange(old, new, reason))

    def _broker_changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        if self.listener is not None:
            if is_reachable:
                self.listener.broker_answers()
            else:
                self.listener.broker_lost(reason)
        is_refusing = self.broker is not None and self.broker.is_refusing
        change = BrokerChange(is_reachable, reason, duration, is_refusing)
        signals.send(signals.broker_changed, self.sender, change)

    def _store_changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        change = BrokerChange(is_reachable, reason, duration)
        signals.send(signals.delivery_store_changed, self.sender, change)

    def _outbox_lost(self, count: int, reason: str, detail: str) -> None:
        signals.send(signals.outbox_lost, self.sender, OutboxLoss(count, reason, detail))

    def _publishing_refused(self, reason: str) -> None:
        if reason:
            logger.error(
                "the message queue refuses what is published: clients of this process get it, and "
                "others what the outbox keeps until it is no longer refused: %s",
                printable(without_secrets(reason)),
            )
        else:
            logger.warning("the message queue takes what is published again")
        self.health.refresh()

    def _probe_published(self, token: int) -> None:
        if self.listener is not None:
            self.listener.probe_published(token)

    def _call_failure_hooks(self, failure: Failure) -> None:
        for hook in self.on_failure:
            try:
                hook(failure)
            except BaseException as exc:  # noqa: BLE001 - recorded; see signals.send
                if failure.kind != "hook":
                    record = Failure("hook", exc, getattr(hook, "__qualname__", repr(hook)))
                    signals.send(signals.failed, self.sender, record)

    def _something_changed(self, record: object) -> None:
        del record
        self.health.refresh()


def _transport_of(connection: Connection) -> str | None:
    """Return what the transport of a client is known by; ``None`` if it ended with the client."""
    is_alone = connection.reason in ("", "client disconnect", "server disconnect")
    return connection.eio_sid if is_alone else None


class _Recipients:
    """Who of this process's clients a message is for, and the way to them.

    Args:
        guard: Whose clients.
    """

    def __init__(self, guard: AppGuard) -> None:
        self._find = guard.connections.find
        self._manager = guard.server.manager
        self._callbacks = guard.callbacks

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return those who have that session id or are in that room, and are let in."""
        clients = self._manager.clients_in(namespace, recipient)
        return [sid for sid, _ in clients if self.is_open(sid)]

    def is_open(self, sid: str) -> bool:
        """Say whether a client is let in, and not leaving."""
        connection = self._find(sid)
        return connection is not None and connection.is_open

    def is_here(self, sid: str) -> bool:
        """Say whether a client is here; it may not be let in yet, or be leaving."""
        connection = self._find(sid)
        return connection is not None and connection.state is not ConnectionState.CLOSED

    def transport_of(self, sid: str) -> str | None:
        """Return what the transport of a client is known by, unless that has ended."""
        connection = self._find(sid)
        return None if connection is None else _transport_of(connection)

    def ask(
        self,
        sid: str,
        namespace: str,
        event: str,
        arguments: str,
        callback: Awaiting,
        ack_id: int | None = None,
    ) -> int | None:
        """Send an event to a client that is to acknowledge it; see the manager's ``ask``."""
        connection = self._find(sid)
        if connection is None:
            return None
        asked: int | None = self._manager.ask(
            sid, connection.eio_sid, namespace, event, arguments, callback, ack_id
        )
        return asked

    def forget(self, ack_id: int, sid: str) -> None:
        """Wait for that acknowledgement no longer."""
        self._callbacks.discard(ack_id, sid)


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


def _flush_at_the_end() -> None:
    """See that a child of multiprocessing, or Celery's, flushes: it runs no exit functions.

    Source:
        multiprocessing, ``BaseProcess._bootstrap``: forgets finalizers of the parent, runs its
        own at the end of the child, and then calls ``os._exit``. billiard is Celery's copy.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        util: Any = sys.modules.get(name)
        if util is not None:
            util.Finalize(None, _at_exit, exitpriority=0)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

"""Everything that guards one application, wired together.

The rooms below know nothing of each other; what passes between them passes here.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from . import signals
from .broker import Broker
from .callbacks import CallbackTable
from .config import require_seconds
from .errors import ConfigError
from .handlers import HandlerGuard
from .health import TICK_INTERVAL, Health, HealthEndpoints, Sources
from .hooks import AckCallback
from .listener import LISTENER_TASK, Listener
from .logs import LogLines
from .metrics import Counters
from .outbox import Outbox
from .runtime import Event, is_patched, runtime_for
from .signals import BrokerChange, CallbackLoss, Failure, ListenerChange, OutboxLoss, TaskChange
from .states import ListenerState, TaskState
from .supervisor import (
    Restart,
    RestartPolicy,
    Supervisor,
    TaskHandle,
    current_task,
    is_stopping,
    sleep,
)
from .tasks import Tasks, TaskSpec
from .upstream import adopt, new_host_id, refuse_websocket, transport_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask import Flask
    from flask_socketio import SocketIO

    from .config import GuardConfig

_INTERNAL = RestartPolicy(restart=Restart.ALWAYS, first_delay=0.0, max_delay=1.0, max_restarts=None)
_SUPERSEDED_STOP_TIMEOUT = 1.0  # holds up the start of the application that takes over, in seconds
_RETRY_AFTER = "5"  # seconds a refused client is asked to wait


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
        self._log_lines = LogLines(self.sender)
        self.is_worker_alive: Callable[[], bool] = lambda: True
        self.on_failure: list[Callable[[Failure], object]] = []
        self._specs: list[TaskSpec] = []
        self._names = itertools.count(1)
        adopt(socketio, self)
        self._build()
        self._subscriptions = [
            signals.subscribe(signals.failed, self.sender, self._call_failure_hooks)
        ]
        self._subscriptions += [
            signals.subscribe(signal, self.sender, self._something_changed)
            for signal in (
                signals.listener_changed,
                signals.broker_changed,
                signals.task_changed,
            )
        ]
        _alive.add(self)

    def _build(self) -> None:
        """Make everything that holds tasks, locks or connections; again after a fork."""
        config = self.config
        self.runtime = runtime_for(self.server.async_mode, is_write_only=self.app is None)
        self._lock = threading.RLock()
        self._is_started = False
        self._is_writing = False
        self._is_serving = False
        self.stopping: Event = self.runtime.event()
        self.supervisor = Supervisor(
            self.runtime, on_failure=self._task_failed, on_change=self._task_changed
        )
        self.callbacks = CallbackTable(
            self.runtime,
            timeout=config.callback_timeout,
            run=self._run_callback,
            on_lost=self._callback_lost,
        )
        self.tasks = Tasks(
            self.runtime,
            self.supervisor,
            context=self._context,
            restart_max_delay=config.restart_max_delay,
        )
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
            ),
        )
        self.endpoints = HealthEndpoints(self.health, config, is_debug=self._is_debug)

    def _build_queue(self) -> None:
        config = self.config
        self.broker: Broker | None = None
        self.outbox: Outbox | None = None
        self.listener: Listener | None = None
        transport = transport_of(self.server, config)
        if transport is None:
            return
        broker = self.broker = Broker(transport.check, on_change=self._broker_changed)
        outbox = self.outbox = Outbox(
            self.runtime,
            transport.publisher(broker.check),
            broker,
            max_messages=config.outbox_max_messages,
            max_bytes=config.outbox_max_bytes,
            is_dropping_oldest=config.outbox_overflow == "drop_oldest",
            reconnect_max_delay=config.reconnect_max_delay,
            resubscribe_timeout=config.resubscribe_timeout,
            is_listening=self._is_listening,
            on_lost=self._outbox_lost,
            on_probe=self._probe_published,
        )
        if self.app is None:
            return
        manager: Any = self.server.manager
        self.listener = Listener(
            self.runtime,
            self.supervisor,
            broker,
            subscribe=transport.subscribe,
            handle=manager.deliver,
            send_probe=outbox.put_probe,
            probe_interval=config.probe_interval,
            probe_timeout=config.probe_timeout,
            reconnect_max_delay=config.reconnect_max_delay,
            on_change=self._listener_changed,
            on_message_failure=self._message_failed,
        )

    # What the adopted upstream objects ask for (hooks.Hooks)

    def start(self) -> None:
        """Start listener, tasks and the rest; idempotent.

        Raises:
            ConfigError: A message queue is used under gevent without monkey-patching.
        """
        if self._is_started:
            return
        with self._lock:
            if self._is_started or self.stopping.is_set():
                return
            if self.outbox is not None and self.server.async_mode == "gevent":
                _require_patched(is_write_only=self.app is None)
            self._is_started = True
            self._start_writing()
            if self.app is not None:
                self._start_sweeping()
            self.supervisor.watch(
                "socketio-guard:tick", self._tick, policy=_INTERNAL, is_internal=True
            )
            if self.listener is not None:
                self.listener.start()
            for spec in self._specs:
                self.tasks.start(spec)
            self._is_serving = True
        self.health.tick()

    def publish(self, payload: bytes) -> None:
        """Put a message into the outbox and see that it gets out of there."""
        assert self.outbox is not None
        self.outbox.put(payload)
        if not self._is_writing:
            self._start_writing()

    def spawn(self, name: str, target: Callable[[], object]) -> None:
        """Run *target* in a task of its own and record what it raises."""
        self.runtime.spawn(self.handlers.recording(target), name=f"socketio-guard:{name}")

    def event(self) -> Event:
        """Return a new event of the runtime."""
        return self.runtime.event()

    # The life of the process

    def add_task(self, spec: TaskSpec) -> None:
        """Start *spec* with the application, or now if that has started."""
        with self._lock:
            self._specs.append(spec)
            if self._is_started:
                self.tasks.start(spec)

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

    def stop(self, timeout: float) -> None:
        """Flush the outbox and end every task, within about *timeout* seconds each."""
        with self._lock:
            self._is_serving = False
            self.health.refresh()
        self._stop_tasks(timeout)
        self.flush(min(timeout, self.config.exit_flush_timeout))
        late = self.supervisor.stop(timeout, is_internal=True)
        if late:
            signals.logger.warning("tasks did not end in time: %s", ", ".join(late))
        if self.listener is not None:
            self.listener.stopped()
        if self.outbox is not None:
            self.outbox.close()
        self.callbacks.lose_all("stopped")
        self.health.stopped()

    def flush_at_exit(self) -> None:
        """Give what was emitted last a chance to get out before the process ends."""
        if self.outbox is not None and len(self.outbox) and not self.stopping.is_set():
            self.flush(self.config.exit_flush_timeout)
            self.outbox.close()

    def after_fork(self) -> None:
        """Start afresh in a child process: tasks, connections and queue are the parent's."""
        new_host_id(self.server)
        self._build()

    def listener_state(self) -> ListenerState:
        """Return what is known of the listener."""
        return ListenerState.ABSENT if self.listener is None else self.listener.state

    @property
    def is_superseded(self) -> bool:
        """Whether the ``SocketIO`` serves another application by now.

        So it is when an application factory with one global ``SocketIO`` is
        called again, as test suites do.
        """
        return self.socketio.server is not self.server

    def is_crowded(self) -> bool:
        """Say whether the bound on connections is reached."""
        bound = self.config.max_connections
        sockets = self.server.eio.sockets
        if bound is None or len(sockets) < bound:
            return False
        # Upstream's sweep leaves closed ones in the table for a while.
        return sum(not known.closed for known in list(sockets.values())) >= bound

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
            self.supervisor.watch(
                "socketio-guard:outbox",
                self.outbox.write,
                policy=_INTERNAL,
                is_internal=True,
                wake=self.outbox.wake,
            )
            if self.app is None:
                self._start_sweeping()

    def _start_sweeping(self) -> None:
        self.supervisor.watch(
            "socketio-guard:callbacks",
            self.callbacks.sweep,
            policy=_INTERNAL,
            is_internal=True,
            wake=self.callbacks.wake,
        )

    def _tick(self) -> None:
        while not is_stopping():
            if self._is_serving and not self.is_worker_alive():
                self._is_serving = False
                self.spawn("farewell", partial(self._stop_tasks, self.config.stop_timeout))
            self.health.tick()
            sleep(self.runtime, TICK_INTERVAL)

    def _stop_tasks(self, timeout: float) -> None:
        """End the application's tasks; its clients may still be there."""
        self.stopping.set()
        late = self.supervisor.stop(timeout, is_internal=False)
        if late:
            signals.logger.warning("tasks did not end in time: %s", ", ".join(late))

    def _context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.app is None else self.app.app_context()

    def _is_debug(self) -> bool:
        return self.app is not None and self.app.debug

    def _is_listening(self) -> bool:
        return self.listener is None or self.listener.state is ListenerState.RUNNING

    def _gauges(self) -> dict[str, int]:
        return {
            "callbacks:waiting": len(self.callbacks),
            "connections:open": len(self.server.eio.sockets),
        }

    # Facts, on their way to the signals

    def _run_callback(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        def call() -> object:
            with self._context():
                return function(*arguments)

        name = getattr(function, "__qualname__", type(function).__qualname__)
        self.runtime.spawn(
            lambda: self.handlers.run_callback(call, name=name), name="socketio-guard:callback"
        )

    def _callback_lost(self, reason: str, recipient: object) -> None:
        signals.send(signals.callback_lost, self.sender, CallbackLoss(reason, recipient))

    def _task_failed(self, task: TaskHandle, exc: BaseException) -> None:
        signals.send(signals.failed, self.sender, Failure("task", exc, task.name))

    def _task_changed(self, task: TaskHandle, old: TaskState, new: TaskState, reason: str) -> None:
        is_reader = task.is_internal and task.name == LISTENER_TASK
        if is_reader and new is TaskState.BACKING_OFF and self.listener is not None:
            self.listener.crashed(f"the reader ended: {reason}")
        signals.send(signals.task_changed, self.sender, TaskChange(task.name, old, new, reason))

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
        change = BrokerChange(is_reachable, reason, duration)
        signals.send(signals.broker_changed, self.sender, change)

    def _outbox_lost(self, count: int, reason: str, detail: str) -> None:
        signals.send(signals.outbox_lost, self.sender, OutboxLoss(count, reason, detail))

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


class GuardMiddleware:
    """Goes in front of an application: health, start, and the bound on connections.

    Args:
        wsgi_app: What was there before.
        guard: The guard of the application.
    """

    def __init__(self, wsgi_app: WSGIApplication, guard: AppGuard) -> None:
        self._wsgi_app = wsgi_app
        self._guard = guard

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        guard = self._guard
        guard.start()
        path = environ.get("PATH_INFO", "")
        if guard.endpoints.handles(path):
            return guard.endpoints(environ, start_response)
        if guard.is_crowded() and self._is_handshake(path, environ):
            return _refuse(environ, start_response)
        return self._wsgi_app(environ, start_response)

    def _is_handshake(self, path: str, environ: WSGIEnvironment) -> bool:
        engineio_path: str = self._guard.socketio.sockio_mw.engineio_path
        # Requests that carry a session id belong to a connection that was let in.
        is_new = "sid" not in parse_qs(environ.get("QUERY_STRING", ""))
        return is_new and path.startswith(engineio_path)


def _refuse(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Ask a new client to come back later."""
    websocket = environ.get("wsgi.websocket")
    if websocket is not None:
        # gevent-websocket has answered 101 before the application is asked.
        refuse_websocket(websocket, "the server is full")
        return []
    start_response(
        "503 Service Unavailable",
        [("Retry-After", _RETRY_AFTER), ("Content-Type", "text/plain"), ("Content-Length", "0")],
    )
    return [b""]


def _require_patched(*, is_write_only: bool) -> None:
    if not is_write_only and not is_patched():
        raise ConfigError(
            "a message queue under gevent needs a patched standard library: call "
            "gevent.monkey.patch_all() before anything else is imported, or serve "
            "with one of gunicorn's gevent workers"
        )


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
    for guard in all_guards():
        guard.after_fork()


def _at_exit() -> None:
    for guard in all_guards():
        guard.flush_at_exit()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

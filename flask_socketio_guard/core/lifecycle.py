"""The lifecycle of a process: one phase machine that starts and stops all components."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ..states import PHASE_TRANSITIONS, Phase, PhaseEvent, StateMachine
from .component import implementations_of
from .runtime import Flag, Runtime, clock
from .supervisor import is_stopping, sleep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..config import GuardConfig
    from .component import Component
    from .supervisor import Supervisor, TaskHandle

TICK_INTERVAL = 1.0
"""Seconds between two ticks."""

_POLL_INTERVAL = 0.1  # seconds
_logger = logging.getLogger("flask_socketio_guard")


class ServerWorker:
    """The worker of the web server that this process is, if known; outlives a fork.

    Attributes:
        is_alive: Returns ``False`` once the server has told this process to stop.
        on_drained: Called after the resulting drain, with the seconds that it took.
    """

    def __init__(self) -> None:
        self.is_alive: Callable[[], bool] = lambda: True
        self.on_drained: Callable[[float], object] | None = None


class Lifecycle:
    """Starts, ticks, drains and stops the components of one application.

    Args:
        runtime: For flags and sleeps.
        supervisor: Runs all tasks, including those of the application.
        config: Settings.
        on_change: Called after each change of the phase.
        worker: The web server's worker that this process is.

    Attributes:
        components: In the order in which they start.
        lock: Held while the phase changes and while tasks are added.
        stopping: Set when the application's tasks must end.
    """

    def __init__(
        self,
        runtime: Runtime,
        supervisor: Supervisor,
        config: GuardConfig,
        *,
        on_change: Callable[[], None],
        worker: ServerWorker,
    ) -> None:
        self._runtime = runtime
        self.supervisor = supervisor
        self._config = config
        self.refresh = on_change
        self._worker = worker
        self.components: Sequence[Component] = ()
        self.lock = threading.RLock()
        self.stopping: Flag = runtime.flag()
        self._drained: Flag = runtime.flag()
        self._is_complete = False
        self._machine: StateMachine[Phase, PhaseEvent] = StateMachine(Phase.NEW, PHASE_TRANSITIONS)

    @property
    def phase(self) -> Phase:
        """The current phase of the process."""
        return self._machine.state

    @property
    def is_serving(self) -> bool:
        """Whether the process serves clients and accepts new ones."""
        return self._machine.state is Phase.SERVING

    @property
    def has_served(self) -> bool:
        """Whether the process serves clients, or did so before it began to drain or stop."""
        return self._machine.state not in _BEFORE_SERVING

    @property
    def is_draining(self) -> bool:
        """Whether the process drains or has drained, and nothing has been stopped yet."""
        return self._machine.state is Phase.DRAINING

    @property
    def is_stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._machine.state is Phase.STOPPED

    @property
    def is_drained(self) -> bool:
        """Whether the drain is over: clients disconnected, tasks ended, queues sent."""
        return self._drained.is_set()

    def watch(
        self, name: str, target: Callable[[], object], wake: Callable[[], object] | None = None
    ) -> TaskHandle:
        """Start a supervised task of the guard itself."""
        return self.supervisor.watch_internal(name, target, wake)

    def start(self) -> None:
        """Start what a process needs to emit and deliver without serving clients; idempotent."""
        with self.lock:
            if self.phase is not Phase.NEW or self.stopping.is_set():
                return
            self._machine.send(PhaseEvent.EMIT)
            self._runtime.bind_loop()
            for component in self.components:
                component.start(self.watch)
            self.watch("socketio-guard:tick", self._tick)

    def serve(self) -> None:
        """Start everything that serving clients needs; idempotent."""
        if self.has_served:
            return
        with self.lock:
            if self.has_served or self.stopping.is_set():
                return
            self.start()
            self._machine.send(PhaseEvent.SERVE)
            self._runtime.bind_loop()
            for component in self.components:
                component.serve(self.watch)
            self._machine.send(PhaseEvent.SERVED)
        self.refresh()

    def drain(self, timeout: float) -> bool:
        """Disconnect the clients, end the application's tasks and send what is queued.

        A second caller waits for the first.

        Args:
            timeout: Longest wait for handlers, for tasks and for the outbox, in seconds each.

        Returns:
            Whether everything was completed in time.
        """
        if self._begin_drain():
            return self._drain(timeout)
        config = self._config
        self._drained.wait(config.drain_delay + config.drain_window + 3 * timeout)
        return self._is_complete

    def _begin_drain(self) -> bool:
        with self.lock:
            if not self._machine.allows(PhaseEvent.DRAIN):
                return False
            self._machine.send(PhaseEvent.DRAIN)
            self.stopping.set()
        self.refresh()
        return True

    def _drain(self, timeout: float) -> bool:
        late: list[str] = []
        ending = self._runtime.spawn(
            lambda: late.extend(self._stop_tasks(timeout)), name="socketio-guard:stop"
        )
        done = [component.drain(timeout) for component in self.components]
        ending.join()
        done.append(self.flush(min(timeout, self._config.exit_flush_timeout)))
        self._is_complete = all(done) and not late
        self._drained.set()
        return self._is_complete

    def flush(self, timeout: float) -> bool:
        """Wait until what is queued has been sent; return whether it has, within *timeout*."""
        done = [component.flush(timeout) for component in self.components]  # no short circuit
        return all(done)

    def stop(self, timeout: float) -> None:
        """End every task and component, within about *timeout* seconds each."""
        with self.lock:
            is_drained = self.is_drained
            self._machine.send(PhaseEvent.STOP)
        self.refresh()
        if not is_drained:
            self._stop_tasks(timeout)
            self.flush(min(timeout, self._config.exit_flush_timeout))
        self._log_late(self.supervisor.stop(timeout, is_internal=True))
        for component in reversed(self.components):
            component.stop(timeout)

    def abandon(self) -> None:
        """Drop all state in a forked child: it belongs to the parent."""
        self.supervisor.abandon()
        for component in self.components:
            component.abandon()

    def _stop_tasks(self, timeout: float) -> list[str]:
        """End the application's tasks; clients may still be connected."""
        self.stopping.set()
        late = self.supervisor.stop(timeout, is_internal=False)
        self._log_late(late)
        return late

    def _log_late(self, names: list[str]) -> None:
        if names:
            _logger.warning("tasks did not end in time: %s", ", ".join(names))

    def _tick(self) -> None:
        next_tick_at = clock()
        polls = implementations_of("poll", self.components)
        ticks = implementations_of("tick", self.components)
        while not is_stopping():
            for poll in polls:
                poll()
            if self.is_serving and not self._worker.is_alive() and self._begin_drain():
                self._runtime.spawn(self._drain_before_exit, name="socketio-guard:drain")
            if clock() >= next_tick_at:
                next_tick_at = clock() + TICK_INTERVAL
                for tick in ticks:
                    tick()
            # No hook reports that a worker was told to stop, and its load balancer should
            # learn of it soon: hence the poll.
            sleep(self._runtime, max(0.0, min(_POLL_INTERVAL, next_tick_at - clock())))

    def _drain_before_exit(self) -> None:
        """Drain a process that was told to stop, before its server closes the connections."""
        began_at = clock()
        self._drain(self._config.stop_timeout)
        if self._worker.on_drained is not None:
            self._worker.on_drained(clock() - began_at)


_BEFORE_SERVING = (Phase.NEW, Phase.EMITTING)

"""The life of a process: one phase, and the components that go through it together."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ..states import PHASE_TRANSITIONS, Phase, PhaseEvent, StateMachine
from .component import those_that
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
    """The server's process that this one is, as far as it is known; outlives a fork.

    Attributes:
        is_alive: Says whether the server has not told this process to stop.
        on_drained: Called with the seconds that a drain took which that has led to.
    """

    def __init__(self) -> None:
        self.is_alive: Callable[[], bool] = lambda: True
        self.on_drained: Callable[[float], object] | None = None


class Lifecycle:
    """Starts, ticks, drains and stops the components of one application.

    Args:
        runtime: For events and tasks.
        supervisor: Runs tasks, those of the application included.
        config: Settings.
        on_change: Called after each change of the phase, and by :meth:`refresh`.
        worker: The server's process that this one is.

    Attributes:
        components: In the order in which they start.
        lock: Held while the phase changes, and tasks are added.
        stopping: Set when tasks of the application are to end.
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
        """Where the process stands."""
        return self._machine.state

    @property
    def is_serving(self) -> bool:
        """Whether clients are served, and new ones let in."""
        return self._machine.state is Phase.SERVING

    @property
    def has_served(self) -> bool:
        """Whether it has begun to serve clients, or is beyond that."""
        return self._machine.state not in _BEFORE_SERVING

    @property
    def is_draining(self) -> bool:
        """Whether the clients are being let go, or were, and nothing has stopped yet."""
        return self._machine.state is Phase.DRAINING

    @property
    def is_stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._machine.state is Phase.STOPPED

    @property
    def is_drained(self) -> bool:
        """Whether clients were let go, tasks ended and everything sent."""
        return self._drained.is_set()

    def watch(
        self, name: str, target: Callable[[], object], wake: Callable[[], object] | None = None
    ) -> TaskHandle:
        """Start a supervised task of the guard's own."""
        return self.supervisor.watch_internal(name, target, wake)

    def start(self) -> None:
        """Start what a process needs that emits and delivers, but serves nobody; idempotent."""
        with self.lock:
            if self.phase is not Phase.NEW or self.stopping.is_set():
                return
            self._machine.send(PhaseEvent.EMIT)
            self._runtime.bind_loop()
            for component in self.components:
                component.start(self.watch)
            self.watch("socketio-guard:tick", self._tick)

    def serve(self) -> None:
        """Start all that serves clients; idempotent."""
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
        """Let the clients go, end the tasks, and have sent what is on its way out.

        Whoever calls second waits for the first.

        Args:
            timeout: Longest wait for handlers, for tasks and for the outbox, in seconds each.

        Returns:
            Whether nothing was left undone.
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
        """Wait until what is on its way out has got there."""
        done = [component.flush(timeout) for component in self.components]  # each gets its chance
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
        self._tell_of_late(self.supervisor.stop(timeout, is_internal=True))
        for component in reversed(self.components):
            component.stop(timeout)

    def abandon(self) -> None:
        """Have no part in it, in a forked child."""
        self.supervisor.abandon()
        for component in self.components:
            component.abandon()

    def _stop_tasks(self, timeout: float) -> list[str]:
        """End the application's tasks; its clients may still be there."""
        self.stopping.set()
        late = self.supervisor.stop(timeout, is_internal=False)
        self._tell_of_late(late)
        return late

    def _tell_of_late(self, names: list[str]) -> None:
        if names:
            _logger.warning("tasks did not end in time: %s", ", ".join(names))

    def _tick(self) -> None:
        next_tick_at = clock()
        polls, ticks = those_that("poll", self.components), those_that("tick", self.components)
        while not is_stopping():
            for poll in polls:
                poll()
            if self.is_serving and not self._worker.is_alive() and self._begin_drain():
                self._runtime.spawn(self._say_farewell, name="socketio-guard:drain")
            if clock() >= next_tick_at:
                next_tick_at = clock() + TICK_INTERVAL
                for tick in ticks:
                    tick()
            # A worker that is to stop says so to nobody; its load balancer shall know soon.
            sleep(self._runtime, max(0.0, min(_POLL_INTERVAL, next_tick_at - clock())))

    def _say_farewell(self) -> None:
        """Do what a process does that was told to stop, before its server lets go."""
        told_at = clock()
        self._drain(self._config.stop_timeout)
        if self._worker.on_drained is not None:
            self._worker.on_drained(clock() - told_at)


_BEFORE_SERVING = (Phase.NEW, Phase.EMITTING)

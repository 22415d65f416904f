"""Background tasks of the application: named, supervised, and periodic without drift."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

from ..checks import require_seconds
from ..errors import ConfigError, DuplicateTask
from .component import Component, Watch
from .runtime import Runtime, clock
from .supervisor import Restart, RestartPolicy, TaskHandle, current_task, is_stopping, sleep

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from .lifecycle import Lifecycle


INTERNAL: Final = "socketio-guard:"
"""Prefix of the names of the guard's own tasks."""

RestartName: TypeAlias = Literal["never", "on-failure", "always"]


@dataclass(frozen=True)
class TaskSpec:
    """A task that starts with the application.

    Attributes:
        name: Unique per application.
        target: Called without arguments, in the application context.
        every: Seconds between the starts of two runs, or ``None`` for one run.
        policy: When it is restarted.
        is_critical: Whether its failure makes the process unready.
    """

    name: str
    target: Callable[[], object]
    every: float | None
    policy: RestartPolicy
    is_critical: bool

    def __post_init__(self) -> None:
        """Reject a name that is reserved for the guard's own tasks.

        Raises:
            ConfigError: The name begins with :data:`INTERNAL`.
        """
        if self.name.startswith(INTERNAL):
            raise ConfigError(
                f"a task must not be named {self.name!r}: {INTERNAL!r} is the guard's"
            )


def task_spec(
    target: Callable[[], object],
    *,
    name: str | None,
    every: float | None,
    restart: str,
    critical: bool,
    max_restarts: int | None,
    restart_window: float,
) -> TaskSpec:
    """Return a spec made from options that were checked.

    Raises:
        ConfigError: An option is out of range.
    """
    if every is not None:
        require_seconds("every", every)
    policy = restart_policy(restart, max_restarts=max_restarts, restart_window=restart_window)
    return TaskSpec(name or task_name(target), target, every, policy, critical)


def restart_policy(
    restart: str, *, max_restarts: int | None, restart_window: float
) -> RestartPolicy:
    """Return the policy for a restart type given by name.

    Raises:
        ConfigError: There is no such type, or a bound is out of range.
    """
    try:
        when = Restart(restart)
    except ValueError:
        choices = ", ".join(repr(choice.value) for choice in Restart)
        raise ConfigError(f"restart must be one of {choices}, not {restart!r}") from None
    if max_restarts is not None and max_restarts < 0:
        raise ConfigError(f"max_restarts must be >= 0 or None, not {max_restarts!r}")
    require_seconds("restart_window", restart_window)
    return RestartPolicy(restart=when, max_restarts=max_restarts, restart_window=restart_window)


def task_name(target: Callable[..., object]) -> str:
    """Return the default name of a task: ``module.function``."""
    name = getattr(target, "__qualname__", type(target).__qualname__)
    return f"{getattr(target, '__module__', '?')}.{name}"


class StartOptions(TypedDict, total=False):
    """The options of ``start_background_task``, for type checkers."""

    name: str | None
    restart: RestartName
    critical: bool
    max_restarts: int | None
    restart_window: float


class Tasks(Component):
    """The application's tasks.

    Args:
        runtime: For sleep.
        lifecycle: Its supervisor runs and restarts them.
        specs: The tasks that start with the application; the list itself is extended.
        context: Returns the context in which each run executes, such as ``app.app_context``.
        restart_max_delay: Cap of the delay between restarts, in seconds.
    """

    def __init__(
        self,
        runtime: Runtime,
        lifecycle: Lifecycle,
        specs: list[TaskSpec],
        *,
        context: Callable[[], AbstractContextManager[object]],
        restart_max_delay: float,
    ) -> None:
        self._runtime = runtime
        self._lifecycle = lifecycle
        self._specs = specs
        self._context = context
        self._restart_max_delay = restart_max_delay
        self._numbers = itertools.count(1)

    def serve(self, watch: Watch) -> None:
        """Start the tasks that were added before."""
        del watch  # for tasks of the guard's own
        for spec in self._specs:
            self._start(spec)

    def add(self, spec: TaskSpec) -> None:
        """Start *spec* with the application, or now if the application has started.

        Raises:
            DuplicateTask: A task of that name exists; nothing has changed.
        """
        with self._lifecycle.lock:
            self.require_free(spec.name)
            if self._lifecycle.has_served:
                self._start(spec)
            self._specs.append(spec)

    def run(self, spec: TaskSpec) -> TaskHandle:
        """Start *spec* now.

        Raises:
            DuplicateTask: A task of that name is running, or will start with the application.
        """
        with self._lifecycle.lock:
            self.require_free(spec.name)
            return self._start(spec)

    def unique_name(self, name: str) -> str:
        """Return *name* with a number that makes it unique."""
        return f"{name}-{next(self._numbers)}"

    def sleep(self, seconds: float) -> bool:
        """Sleep; return early, with ``False``, if the task or the process stops."""
        stopping = self._lifecycle.stopping
        if stopping.is_set():
            return False
        if current_task() is None and seconds > 0:
            return not stopping.wait(seconds)
        return sleep(self._runtime, seconds)

    def require_free(self, name: str) -> None:
        """Check that a task of that name can start, now and with the application.

        Otherwise a duplicate would be noticed only at the start, and leave it half done.

        Raises:
            DuplicateTask: The name is taken.
        """
        lifecycle = self._lifecycle
        is_waiting = not lifecycle.has_served and any(spec.name == name for spec in self._specs)
        if is_waiting or lifecycle.supervisor.is_running(name):
            raise DuplicateTask(f"a task named {name!r} exists already: give one a name=")

    def _start(self, spec: TaskSpec) -> TaskHandle:
        target = spec.target if spec.every is None else self._periodic(spec.target, spec.every)
        return self._lifecycle.supervisor.watch(
            spec.name,
            self._in_context(target),
            policy=replace(spec.policy, max_delay=self._restart_max_delay),
            is_critical=spec.is_critical,
        )

    def _in_context(self, target: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with self._context():
                target()

        return run

    def _periodic(self, target: Callable[[], object], every: float) -> Callable[[], object]:
        """Return a task that calls *target* at multiples of *every* seconds.

        They are counted from the first run, across restarts. Calls that a slow run misses
        are skipped.
        """
        grid: list[float] = []

        def run() -> None:
            if not grid:
                grid.append(clock())
            else:
                _wait_for_next()
            while not is_stopping():
                with self._context():
                    target()
                _wait_for_next()

        def _wait_for_next() -> None:
            elapsed = clock() - grid[0]
            next_at = (elapsed // every + 1) * every
            sleep(self._runtime, next_at - elapsed)

        return run

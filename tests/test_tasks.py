"""Tasks of the application: their options, their context and the grid of ``every``."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.core import tasks as tasks_module
from flask_socketio_guard.core.lifecycle import Lifecycle, ServerWorker
from flask_socketio_guard.core.runtime import Runtime, clock
from flask_socketio_guard.core.supervisor import Restart, Supervisor, TaskHandle, current_task
from flask_socketio_guard.core.tasks import Tasks, TaskSpec, restart_policy, task_name, task_spec
from flask_socketio_guard.errors import ConfigError, DuplicateTask
from flask_socketio_guard.states import TaskState
from tests.support import unit_support
from tests.support.cases import in_turn
from tests.support.unit_support import FakeClock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


def spec(target: Callable[[], object], **options: Any) -> TaskSpec:
    defaults: dict[str, Any] = {
        "name": "task",
        "every": None,
        "restart": "on-failure",
        "critical": False,
        "max_restarts": None,
        "restart_window": 60.0,
    }
    return task_spec(target, **{**defaults, **options})


class Started:
    """Tasks under a supervisor, in a context that counts its uses."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.failures: list[BaseException] = []
        self.depth = 0
        self.entered = 0
        self.supervisor = Supervisor(
            runtime, on_failure=lambda _, exc: self.failures.append(exc), on_change=lambda *_: None
        )
        lifecycle = Lifecycle(
            runtime,
            self.supervisor,
            GuardConfig(),
            on_change=lambda: None,
            worker=ServerWorker(),
        )
        self.tasks = Tasks(runtime, lifecycle, [], context=self._context, restart_max_delay=0.02)

    @contextmanager
    def _context(self) -> Iterator[None]:
        self.depth += 1
        self.entered += 1
        try:
            yield
        finally:
            self.depth -= 1

    def start(self, target: Callable[[], object], **options: Any) -> TaskHandle:
        return self.tasks.run(spec(target, **options))

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_for(self.runtime, condition)


@pytest.fixture
def started(runtime: Runtime) -> Iterator[Started]:
    started = Started(runtime)
    yield started
    assert started.supervisor.stop(2.0, is_internal=False) == []


def named() -> None:
    """A task."""


@in_turn(
    ("options", "text"),
    [
        ({"every": 0}, "every must be a number of seconds > 0, not 0"),
        ({"every": -1.0}, "every must be a number of seconds > 0, not -1.0"),
        ({"every": "1"}, "every must be a number of seconds > 0, not '1'"),
        ({"every": True}, "every must be a number of seconds > 0, not True"),
        ({"every": float("nan")}, "every must be a number of seconds > 0, not nan"),
        (
            {"restart": "sometimes"},
            "restart must be one of 'never', 'on-failure', 'always', not 'sometimes'",
        ),
        (
            {"restart": None},
            "restart must be one of 'never', 'on-failure', 'always', not None",
        ),
        ({"max_restarts": -1}, "max_restarts must be >= 0 or None, not -1"),
        ({"restart_window": 0}, "restart_window must be a number of seconds > 0, not 0"),
        ({"restart_window": -5.0}, "restart_window must be a number of seconds > 0, not -5.0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(named, **options)
    assert str(caught.value) == text


@pytest.mark.parametrize("restart", ["never", "on-failure", "always"])
def test_restart_types_are_given_by_name(restart: str) -> None:
    policy = restart_policy(restart, max_restarts=5, restart_window=30.0)
    assert policy.restart is Restart(restart)
    assert (policy.max_restarts, policy.restart_window) == (5, 30.0)


def test_a_task_is_named_after_its_function() -> None:
    assert task_name(named) == "tests.test_tasks.named"
    assert spec(named, name=None).name == "tests.test_tasks.named"
    assert spec(named, name="mine").name == "mine"
    assert task_name(Started.start) == "tests.test_tasks.Started.start"
    assert "partial" in task_name(functools.partial(named))


def test_a_task_runs_in_the_context_of_the_application(started: Started) -> None:
    depths: list[int] = []
    assert started.start(lambda: depths.append(started.depth)).join(5.0)
    assert depths == [1]
    assert started.depth == 0


def test_each_run_gets_a_context_of_its_own(started: Started) -> None:
    """After a crash too; what a run keeps in ``g`` is gone with it."""

    def fail() -> None:
        runs.append(started.depth)
        if len(runs) < 3:
            raise RuntimeError("boom")

    runs: list[int] = []
    assert started.start(fail).join(5.0)
    assert runs == [1, 1, 1]
    assert started.entered == 3
    assert len(started.failures) == 2


def test_delays_between_restarts_are_capped_by_the_setting(started: Started) -> None:
    """Ten crashes: 20 ms at most between two runs, although the policy's own cap is 5 s."""

    def fail() -> None:
        runs.append(clock())
        if len(runs) < 10:
            raise RuntimeError("boom")

    runs: list[float] = []
    assert started.start(fail).join(5.0)
    assert runs[-1] - runs[0] < 2.0


def test_a_name_that_runs_is_refused(started: Started) -> None:
    release = started.runtime.flag()
    handle = started.start(release.wait)
    with pytest.raises(DuplicateTask):
        started.start(named)
    release.set()
    assert handle.join(5.0)


def test_a_critical_task_is_marked(started: Started) -> None:
    handle = started.start(named, critical=True)
    assert handle.is_critical
    assert not handle.is_internal
    assert handle.join(5.0)


# The grid


class Grid:
    """A clock that moves only in ``sleep``, so that a year of runs takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.slept: list[float] = []
        monkeypatch.setattr(tasks_module, "clock", self.clock)
        monkeypatch.setattr(tasks_module, "sleep", self._sleep)

    def _sleep(self, runtime: Runtime, seconds: float) -> bool:
        del runtime
        assert seconds > 0
        self.slept.append(seconds)
        self.clock.advance(seconds)
        task = current_task()
        return task is None or not task.stopping.is_set()


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    return Grid(monkeypatch)


def run_on(grid: Grid, started: Started, every: float, durations: list[float]) -> list[float]:
    """Run a task that takes *durations* and return when each run began, from 0."""
    began: list[float] = []

    def target() -> None:
        began.append(grid.clock.now)
        if len(began) == len(durations):
            task = current_task()
            assert task is not None
            task.stop()
        grid.clock.advance(durations[len(began) - 1])

    assert started.start(target, every=every).join(5.0)
    return [round(at - began[0], 6) for at in began]


def test_runs_begin_on_a_grid_whatever_they_take(grid: Grid, started: Started) -> None:
    durations = [0.3, 0.0, 0.999, 0.5, 0.1]
    assert run_on(grid, started, 1.0, durations) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_slow_run_skips_what_it_missed(grid: Grid, started: Started) -> None:
    """It is not made up for in a burst."""
    assert run_on(grid, started, 1.0, [2.5, 0.1, 7.2, 0.1]) == [0.0, 3.0, 4.0, 12.0]


def test_the_grid_does_not_drift_over_many_runs(grid: Grid, started: Started) -> None:
    """A day at ten runs a second would drift by minutes if delays added up."""
    began = run_on(grid, started, 0.1, [0.013] * 5000)
    assert began == [round(0.1 * number, 6) for number in range(5000)]


def test_the_grid_outlives_a_restart(grid: Grid, started: Started) -> None:
    """A crash neither shifts it nor earns an extra run."""
    began: list[float] = []

    def target() -> None:
        began.append(grid.clock.now)
        if len(began) == 2:
            grid.clock.advance(0.25)
            raise RuntimeError("boom")
        if len(began) == 4:
            task = current_task()
            assert task is not None
            task.stop()

    assert started.start(target, every=1.0).join(5.0)
    assert [round(at - began[0], 6) for at in began] == [0.0, 1.0, 2.0, 3.0]


def test_runs_keep_to_the_grid_in_real_time(started: Started) -> None:
    """Each run takes a third of its interval."""
    began: list[float] = []

    def target() -> None:
        began.append(clock())
        started.runtime.sleep(0.015)

    handle = started.start(target, every=0.05)
    started.wait_for(lambda: len(began) >= 12)
    handle.stop()
    assert handle.join(5.0)
    late = sorted((at - began[0]) % 0.05 for at in began[1:])
    # In the middle of the pack; a busy machine delays some.
    assert late[len(late) // 2] < 0.025


def test_each_periodic_run_has_a_context_of_its_own(started: Started) -> None:
    handle = started.start(lambda: runs.append(started.entered), every=0.01)
    runs: list[int] = []
    started.wait_for(lambda: len(runs) >= 3)
    handle.stop()
    assert handle.join(5.0)
    assert runs[:3] == [runs[0], runs[0] + 1, runs[0] + 2]


def test_a_periodic_task_stops_between_its_runs(started: Started) -> None:
    runs: list[bool] = []
    handle = started.start(lambda: runs.append(True), every=60.0)
    started.wait_for(lambda: runs)
    handle.stop()
    assert handle.join(1.0)
    assert handle.state is TaskState.STOPPED
    assert len(runs) == 1

"""Tasks that end, tasks that do not, and the order in which they stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from flask_socketio_guard.core import supervisor as supervisor_module
from flask_socketio_guard.core.runtime import GeventRuntime, Job, Runtime, ThreadRuntime, clock
from flask_socketio_guard.core.supervisor import (
    Restart,
    RestartPolicy,
    Supervisor,
    TaskHandle,
    current_task,
    is_stopping,
    sleep,
)
from flask_socketio_guard.errors import DuplicateTask, TaskError
from flask_socketio_guard.states import TaskState
from tests.support import unit_support
from tests.support.unit_support import FakeClock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

SOON = 0.005
NEVER = RestartPolicy(restart=Restart.NEVER)
ON_FAILURE = RestartPolicy(restart=Restart.ON_FAILURE, first_delay=SOON, max_delay=0.02)
ONCE = RestartPolicy(restart=Restart.ON_FAILURE, max_restarts=0)
ALWAYS = RestartPolicy(restart=Restart.ALWAYS, first_delay=SOON, max_delay=0.02, max_restarts=None)


class UnheardOfError(BaseException):
    """What no application should raise."""


@dataclass
class Watched:
    """A supervisor and what it told."""

    runtime: Runtime
    failures: list[tuple[str, BaseException]] = field(default_factory=list)
    changes: list[tuple[str, str, str, str]] = field(default_factory=list)
    on_failure: Callable[[TaskHandle, BaseException], object] = lambda *_: None
    on_change: Callable[[TaskHandle, TaskState], object] = lambda *_: None

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(self.runtime, on_failure=self._failed, on_change=self._changed)

    def _failed(self, handle: TaskHandle, exc: BaseException) -> None:
        self.failures.append((handle.name, exc))
        self.on_failure(handle, exc)

    def _changed(self, handle: TaskHandle, old: TaskState, new: TaskState, reason: str) -> None:
        self.changes.append((handle.name, str(old), str(new), reason))
        self.on_change(handle, new)

    def watch(
        self, target: Callable[[], object], policy: RestartPolicy = NEVER, **options: Any
    ) -> TaskHandle:
        name = options.pop("name", "task")
        return self.supervisor.watch(name, target, policy=policy, **options)

    def wait_for(self, condition: Callable[[], object], message: str = "") -> None:
        wait_for(self.runtime, condition, message=message or "the condition did not come true")


@pytest.fixture
def watched(runtime: Runtime) -> Iterator[Watched]:
    """A supervisor in each runtime; its tasks are stopped afterwards."""
    watched = Watched(runtime)
    yield watched
    watched.supervisor.stop(2.0, is_internal=False)
    watched.supervisor.stop(2.0, is_internal=True)


def boom() -> None:
    raise RuntimeError("boom")


class Counting:
    """A task that counts its runs and then does what it is told to."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.runs = 0
        self.then = then

    def __call__(self) -> None:
        self.runs += 1
        self.then()


def wait_to_be_stopped() -> None:
    task = current_task()
    assert task is not None
    task.stopping.wait()


# Restart policies


@pytest.mark.parametrize(
    ("policy", "state"),
    [(NEVER, TaskState.FAILED), (ON_FAILURE, None), (ALWAYS, None)],
    ids=["never", "on-failure", "always"],
)
def test_a_task_that_raises_is_restarted_by_its_policy(
    watched: Watched, policy: RestartPolicy, state: TaskState | None
) -> None:
    task = Counting(boom)
    handle = watched.watch(task, policy)
    if state is None:
        watched.wait_for(lambda: task.runs >= 3, "it was not started again")
        assert handle.restarts >= 2
    else:
        watched.wait_for(lambda: handle.state is state)
        assert task.runs == 1
        assert handle.join(0)
    assert isinstance(handle.last_error, RuntimeError)
    assert watched.failures[0][0] == "task"


@pytest.mark.parametrize(
    ("policy", "is_restarted"),
    [(NEVER, False), (ON_FAILURE, False), (ALWAYS, True)],
    ids=["never", "on-failure", "always"],
)
def test_a_task_that_returns_is_restarted_by_its_policy(
    watched: Watched, policy: RestartPolicy, is_restarted: bool
) -> None:
    task = Counting()
    handle = watched.watch(task, policy)
    if is_restarted:
        watched.wait_for(lambda: task.runs >= 3, "it was not started again")
    else:
        assert handle.join(5.0)
        assert handle.state is TaskState.FINISHED
        assert task.runs == 1
    assert watched.failures == []
    assert handle.last_error is None


@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        gevent.GreenletExit(),
        gevent.Timeout(1),
        UnheardOfError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_base_exception_is_a_failure_like_any_other(
    watched: Watched, raised: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    """It neither ends the process nor goes past the log."""

    def fail_once() -> None:
        if task.runs == 1:
            raise raised
        wait_to_be_stopped()

    task = Counting(fail_once)
    handle = watched.watch(task, ON_FAILURE)
    watched.wait_for(lambda: task.runs == 2)
    assert watched.failures == [("task", raised)]
    assert handle.last_error is raised
    assert capfd.readouterr() == ("", "")


def test_changes_are_told_in_order_with_their_reason(watched: Watched) -> None:
    def fail_once() -> None:
        if task.runs == 1:
            boom()

    task = Counting(fail_once)
    handle = watched.watch(task, ON_FAILURE)
    assert handle.join(5.0)
    assert watched.changes == [
        ("task", "starting", "running", ""),
        ("task", "running", "backing-off", "RuntimeError"),
        ("task", "backing-off", "starting", ""),
        ("task", "starting", "running", ""),
        ("task", "running", "finished", ""),
    ]


def test_a_restart_after_a_return_says_so(watched: Watched) -> None:
    watched.watch(Counting(), ALWAYS)
    watched.wait_for(lambda: ("task", "running", "backing-off", "returned") in watched.changes)


# Backoff and restart intensity


class Delays:
    """A runtime whose ``call_later`` notes the delay and calls when it is told to."""

    def __init__(self, runtime: Runtime) -> None:
        self.delays: list[float] = []
        self.pending: list[Callable[[], object]] = []
        self.can_kill = runtime.can_kill
        self.spawn = runtime.spawn
        self.flag = runtime.flag
        self.sleep = runtime.sleep
        self.call_with_timeout = runtime.call_with_timeout

    def call_later(self, delay: float, target: Callable[[], object]) -> Any:
        self.delays.append(delay)
        self.pending.append(target)
        return self

    def cancel(self) -> None:
        self.pending.clear()


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(supervisor_module, "clock", fake)
    return fake


@pytest.fixture
def delays(runtime: Runtime) -> Delays:
    return Delays(runtime)


def crash(delays: Delays, watched: Watched, handle: TaskHandle, times: int) -> None:
    """Let the task crash so often, with its restarts between."""
    for _ in range(times):
        watched.wait_for(lambda: len(delays.pending) == 1 or handle.state is TaskState.FAILED)
        if handle.state is TaskState.FAILED:
            return
        delays.pending.pop()()
    watched.wait_for(lambda: len(delays.pending) == 1 or handle.state is TaskState.FAILED)


def test_delays_double_up_to_their_cap(delays: Delays, fake_clock: FakeClock) -> None:
    watched = Watched(delays)  # type: ignore[arg-type]
    policy = RestartPolicy(Restart.ON_FAILURE, first_delay=0.1, max_delay=5.0, max_restarts=None)
    handle = watched.watch(boom, policy)
    crash(delays, watched, handle, 9)
    for number, delay in enumerate(delays.delays):
        longest = min(5.0, 0.1 * 2**number)
        assert longest / 2 <= delay <= longest
    handle.stop()


def test_a_task_that_crashes_three_times_in_a_minute_is_seen(
    delays: Delays, fake_clock: FakeClock
) -> None:
    watched = Watched(delays)  # type: ignore[arg-type]
    handle = watched.watch(boom, RestartPolicy(Restart.ALWAYS, max_restarts=None))
    crash(delays, watched, handle, 0)
    fake_clock.advance(31.0)
    crash(delays, watched, handle, 1)
    fake_clock.advance(30.0)
    crash(delays, watched, handle, 1)
    assert not handle.is_flapping
    crash(delays, watched, handle, 1)
    assert handle.is_flapping
    fake_clock.advance(61.0)
    assert not handle.is_flapping
    handle.stop()


def test_a_first_delay_of_zero_restarts_at_once_the_first_time(
    delays: Delays, fake_clock: FakeClock
) -> None:
    """The listener's policy: back at once, but no busy loop."""
    watched = Watched(delays)  # type: ignore[arg-type]
    policy = RestartPolicy(Restart.ALWAYS, first_delay=0.0, max_delay=5.0, max_restarts=None)
    handle = watched.watch(boom, policy)
    crash(delays, watched, handle, 3)
    assert delays.delays[0] == 0.0
    assert 0.05 <= delays.delays[1] <= 0.1
    assert 0.1 <= delays.delays[2] <= 0.2
    handle.stop()


def test_a_long_run_begins_the_delays_anew(delays: Delays, fake_clock: FakeClock) -> None:
    watched = Watched(delays)  # type: ignore[arg-type]
    policy = RestartPolicy(Restart.ON_FAILURE, first_delay=0.1, max_delay=5.0, max_restarts=None)
    handle = watched.watch(lambda: (fake_clock.advance(run_time), boom()), policy)
    run_time = 0.0
    crash(delays, watched, handle, 5)
    assert delays.delays[-1] > 1.0
    run_time = 5.1
    crash(delays, watched, handle, 1)
    assert delays.delays[-1] <= 0.1
    handle.stop()


def test_more_restarts_than_the_intensity_fail_the_task_for_good(
    delays: Delays, fake_clock: FakeClock
) -> None:
    watched = Watched(delays)  # type: ignore[arg-type]
    policy = RestartPolicy(Restart.ON_FAILURE, max_restarts=3, restart_window=60.0)
    task = Counting(boom)
    handle = watched.watch(task, policy)
    crash(delays, watched, handle, 10)
    assert handle.state is TaskState.FAILED
    assert handle.join(0)
    assert (task.runs, handle.restarts) == (4, 3)
    assert watched.changes[-1] == ("task", "running", "failed", "RuntimeError")


def test_restarts_outside_the_window_do_not_count(delays: Delays, fake_clock: FakeClock) -> None:
    watched = Watched(delays)  # type: ignore[arg-type]
    policy = RestartPolicy(Restart.ON_FAILURE, max_restarts=3, restart_window=60.0)
    handle = watched.watch(lambda: (fake_clock.advance(21.0), boom()), policy)
    crash(delays, watched, handle, 20)
    assert handle.restarts == 21
    handle.stop()


def test_no_restart_is_allowed_with_an_intensity_of_zero(watched: Watched) -> None:
    task = Counting(boom)
    handle = watched.watch(task, RestartPolicy(Restart.ON_FAILURE, max_restarts=0))
    watched.wait_for(lambda: handle.state is TaskState.FAILED)
    assert task.runs == 1


# Names


def test_a_name_that_is_taken_is_refused(watched: Watched) -> None:
    watched.watch(wait_to_be_stopped, name="mine")
    with pytest.raises(DuplicateTask, match=r"^a task named 'mine' is already running$"):
        watched.watch(boom, name="mine")
    assert [handle.name for handle in watched.supervisor.tasks] == ["mine"]


def test_a_name_is_free_again_when_its_task_has_ended(watched: Watched) -> None:
    first = watched.watch(lambda: None)
    assert first.join(5.0)
    watched.wait_for(lambda: not watched.supervisor.tasks)
    assert watched.watch(lambda: None).join(5.0)


def test_a_failed_task_stays_to_be_seen_until_its_name_is_taken_anew(watched: Watched) -> None:
    first = watched.watch(boom, ONCE)
    assert first.join(5.0)
    watched.wait_for(lambda: first.state is TaskState.FAILED)
    assert watched.supervisor.tasks == [first]
    second = watched.watch(wait_to_be_stopped)
    assert watched.supervisor.tasks == [second]


@pytest.mark.parametrize("policy", [NEVER, ONCE], ids=["never", "gave-up"])
def test_failed_tasks_do_not_pile_up(watched: Watched, policy: RestartPolicy) -> None:
    """``start_background_task`` gives each a name of its own."""
    for number in range(150):
        handle = watched.watch(boom, policy, name=f"task-{number}")
        assert handle.join(5.0)
    watched.wait_for(lambda: len(watched.supervisor.tasks) <= 100)
    if policy is ONCE:
        assert watched.supervisor.tasks[-1].name == "task-149"


def test_a_task_that_was_not_to_be_restarted_fails_within_its_rights(watched: Watched) -> None:
    """Its failure is logged; the process is none the worse for it."""
    handle = watched.watch(boom, NEVER)
    assert handle.join(5.0)
    watched.wait_for(lambda: not watched.supervisor.tasks)
    assert handle.state is TaskState.FAILED
    critical = watched.watch(boom, NEVER, is_critical=True)
    assert critical.join(5.0)
    watched.runtime.sleep(0.01)
    assert watched.supervisor.tasks == [critical]


def test_critical_tasks_that_have_failed_are_never_forgotten(watched: Watched) -> None:
    critical = watched.watch(boom, ONCE, name="critical", is_critical=True)
    assert critical.join(5.0)
    for number in range(120):
        assert watched.watch(boom, ONCE, name=f"task-{number}").join(5.0)
    watched.wait_for(lambda: len(watched.supervisor.tasks) <= 101)
    assert critical in watched.supervisor.tasks


# Stop, join, kill


def test_a_stop_is_seen_by_the_task(watched: Watched) -> None:
    seen = []

    def run() -> None:
        wait_to_be_stopped()
        seen.append(is_stopping())

    handle = watched.watch(run, ALWAYS)
    watched.wait_for(lambda: handle.state is TaskState.RUNNING)
    assert not handle.join(0.01)
    handle.stop()
    handle.stop()
    assert handle.join(5.0)
    assert handle.state is TaskState.STOPPED
    assert seen == [True]
    assert watched.supervisor.tasks == []


def test_a_task_that_raises_while_it_stops_has_stopped(watched: Watched) -> None:
    """Code that is torn down often raises; that is no failure to be told of."""

    def run() -> None:
        wait_to_be_stopped()
        boom()

    handle = watched.watch(run, ON_FAILURE)
    watched.wait_for(lambda: handle.state is TaskState.RUNNING)
    handle.stop()
    assert handle.join(5.0)
    assert handle.state is TaskState.STOPPED
    assert watched.failures == []


def test_a_task_that_waits_for_its_restart_stops_at_once(watched: Watched) -> None:
    policy = RestartPolicy(Restart.ON_FAILURE, first_delay=60.0, max_delay=60.0)
    task = Counting(boom)
    handle = watched.watch(task, policy)
    watched.wait_for(lambda: handle.state is TaskState.BACKING_OFF)
    handle.stop()
    assert handle.join(1.0)
    assert handle.state is TaskState.STOPPED
    assert task.runs == 1


@pytest.mark.parametrize("told_by", ["failure", "backing-off", "running", "failed", "finished"])
def test_a_task_can_be_stopped_by_whoever_is_told_of_it(
    watched: Watched, told_by: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An ``on_failure`` hook may well decide that once was enough."""
    if told_by == "failure":
        watched.on_failure = lambda handle, _exc: handle.stop()
    else:
        watched.on_change = lambda handle, new: str(new) == told_by and handle.stop()
    target = (lambda: None) if told_by in ("running", "finished") else boom
    # A restart that is due in a minute must not be left behind either.
    policy = RestartPolicy(Restart.ON_FAILURE, first_delay=60.0, max_delay=60.0)
    handle = watched.watch(target, NEVER if told_by == "failed" else policy)
    assert handle.join(2.0), f"it is {handle.state} for ever"
    assert str(handle.state) == (told_by if told_by in ("failed", "finished") else "stopped")
    assert capfd.readouterr().err == ""


class Lingering(ThreadRuntime):
    """Threads that live on for a while after they have told of their end, as real ones do."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.has_told = threading.Event()

    def spawn(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_exit: Callable[[BaseException | None], None] | None = None,
    ) -> Job:
        def tell(exc: BaseException | None) -> None:
            if on_exit is not None:
                on_exit(exc)
            self.has_told.set()
            self.release.wait(5.0)

        return super().spawn(target, name=name, on_exit=tell)


def test_a_task_can_be_stopped_while_its_last_thread_is_not_quite_gone(
    nothing_left_behind: None,
) -> None:
    """Between the end of a run and the end of its thread anything may happen."""
    runtime = Lingering()
    watched = Watched(runtime)
    policy = RestartPolicy(Restart.ON_FAILURE, first_delay=60.0, max_delay=60.0)
    handle = watched.watch(boom, policy)
    assert runtime.has_told.wait(5.0)
    handle.stop()
    assert handle.join(1.0), "nobody will ever end it"
    runtime.release.set()


def test_a_killed_task_is_observed_and_restarted(nothing_left_behind: None) -> None:
    watched = Watched(GeventRuntime())
    task = Counting(wait_to_be_stopped)
    handle = watched.watch(task, ON_FAILURE)
    watched.wait_for(lambda: task.runs == 1)
    handle.kill()
    watched.wait_for(lambda: task.runs == 2, "nobody noticed")
    assert isinstance(watched.failures[0][1], gevent.GreenletExit)
    handle.stop()
    assert handle.join(5.0)


def test_a_task_killed_before_its_first_step_is_observed_and_restarted(
    nothing_left_behind: None,
) -> None:
    watched = Watched(GeventRuntime())
    task = Counting(wait_to_be_stopped)
    handle = watched.watch(task, ON_FAILURE)
    handle.kill()
    watched.wait_for(lambda: task.runs == 1)
    assert handle.restarts == 1
    handle.stop()
    assert handle.join(5.0)


def test_a_greenlet_killed_by_a_stranger_is_observed_and_restarted(
    nothing_left_behind: None,
) -> None:
    """Anyone can find a greenlet and kill it."""
    watched = Watched(GeventRuntime())
    greenlets = []

    def run() -> None:
        greenlets.append(gevent.getcurrent())
        wait_to_be_stopped()

    handle = watched.watch(run, ALWAYS)
    watched.wait_for(lambda: greenlets)
    greenlets[0].kill()
    watched.wait_for(lambda: len(greenlets) == 2, "nobody noticed")
    handle.stop()
    assert handle.join(5.0)


# Replacement


def test_a_run_that_hangs_is_replaced(watched: Watched) -> None:
    release = watched.runtime.flag()

    def hang_once() -> None:
        if task.runs == 1:
            release.wait()
        else:
            wait_to_be_stopped()

    task = Counting(hang_once)
    handle = watched.watch(task, ON_FAILURE)
    watched.wait_for(lambda: task.runs == 1)
    handle.replace("it hangs")
    watched.wait_for(lambda: task.runs == 2, "no fresh run")
    assert handle.restarts == 1
    assert watched.failures == []
    assert ("task", "running", "backing-off", "it hangs") in watched.changes
    release.set()
    watched.runtime.sleep(0.02)
    assert handle.state is TaskState.RUNNING
    assert task.runs == 2


def test_an_abandoned_greenlet_is_interrupted(nothing_left_behind: None) -> None:
    watched = Watched(GeventRuntime())
    steps: list[str] = []

    def hang() -> None:
        try:
            wait_to_be_stopped()
        finally:
            steps.append("ended")

    handle = watched.watch(hang, ON_FAILURE)
    watched.wait_for(lambda: handle.state is TaskState.RUNNING)
    watched.runtime.sleep(0)
    handle.replace("it hangs")
    watched.wait_for(lambda: steps == ["ended"])
    assert watched.failures == []
    handle.stop()
    assert handle.join(5.0)


def test_what_an_abandoned_run_still_does_goes_unheard(watched: Watched) -> None:
    """A thread cannot be killed; it may raise much later."""
    release, ended = watched.runtime.flag(), watched.runtime.flag()

    def hang_once() -> None:
        if task.runs > 1:
            wait_to_be_stopped()
        try:
            release.wait()
        finally:
            ended.set()
        boom()

    task = Counting(hang_once)
    handle = watched.watch(task, NEVER)
    watched.wait_for(lambda: task.runs == 1)
    handle.replace("it hangs")
    release.set()
    assert ended.wait(5.0)
    watched.runtime.sleep(0.02)
    assert watched.failures == []
    assert handle.state is TaskState.RUNNING
    assert handle.last_error is None


def test_a_task_that_stops_is_not_replaced(watched: Watched) -> None:
    release = watched.runtime.flag()
    task = Counting(release.wait)
    handle = watched.watch(task, ALWAYS)
    watched.wait_for(lambda: task.runs == 1)
    handle.stop()
    handle.replace("it hangs")
    release.set()
    assert handle.join(5.0)
    assert (task.runs, handle.restarts) == (1, 0)


def test_a_task_that_has_ended_is_not_replaced(watched: Watched) -> None:
    task = Counting()
    handle = watched.watch(task)
    assert handle.join(5.0)
    watched.wait_for(lambda: handle.state is TaskState.FINISHED)
    handle.replace("it hangs")
    assert task.runs == 1


# The supervisor's own stop


def test_all_are_asked_to_stop_before_any_is_waited_for(watched: Watched) -> None:
    """Ten tasks that take 0.1 s each to end are gone after 0.1 s, not after 1 s."""

    def run() -> None:
        wait_to_be_stopped()
        watched.runtime.sleep(0.1)

    for number in range(10):
        watched.watch(run, name=f"task-{number}")
    began_at = clock()
    assert watched.supervisor.stop(5.0, is_internal=False) == []
    assert clock() - began_at < 0.8


def test_tasks_that_ignore_a_stop_are_named_after_one_deadline(runtime: Runtime) -> None:
    watched = Watched(runtime)
    release = runtime.flag()
    for number in range(5):
        watched.watch(release.wait, name=f"deaf-{number}")
    good = watched.watch(wait_to_be_stopped, name="good")
    watched.wait_for(lambda: good.state is TaskState.RUNNING)
    began_at = clock()
    late = watched.supervisor.stop(0.2, is_internal=False)
    assert 0.15 <= clock() - began_at < 0.9
    assert late == [f"deaf-{number}" for number in range(5)]
    assert good.state is TaskState.STOPPED
    release.set()


def test_greenlets_that_ignore_a_stop_are_interrupted(nothing_left_behind: None) -> None:
    watched = Watched(GeventRuntime())
    release = watched.runtime.flag()
    handle = watched.watch(release.wait)
    watched.runtime.sleep(0)
    assert watched.supervisor.stop(0.05, is_internal=False) == ["task"]
    assert handle.state is TaskState.STOPPED
    assert watched.failures == []


def test_greenlets_that_cannot_even_be_interrupted_do_not_hold_up_the_stop(
    nothing_left_behind: None,
) -> None:
    """It catches everything and waits on; the stop goes on without it."""
    watched = Watched(GeventRuntime())
    release = watched.runtime.flag()

    def stubborn() -> None:
        while not release.is_set():
            try:
                release.wait()
            except BaseException:
                continue

    watched.watch(stubborn)
    watched.runtime.sleep(0)
    began_at = clock()
    assert watched.supervisor.stop(0.05, is_internal=False) == ["task"]
    assert clock() - began_at < 3.0
    release.set()


def test_nothing_can_be_started_while_the_supervisor_stops(watched: Watched) -> None:
    watched.supervisor.stop(0.1, is_internal=False)
    with pytest.raises(TaskError) as caught:
        watched.watch(boom, name="late")
    assert str(caught.value) == "cannot start task 'late': the process is stopping"


def test_tasks_of_the_application_stop_before_those_of_the_guard(watched: Watched) -> None:
    """What an application says last still has to get out."""
    internal = watched.watch(wait_to_be_stopped, name="outbox", is_internal=True)
    own = watched.watch(wait_to_be_stopped, name="own")
    watched.wait_for(lambda: own.state is TaskState.RUNNING)
    watched.supervisor.stop(5.0, is_internal=False)
    assert own.state is TaskState.STOPPED
    assert internal.state is TaskState.RUNNING
    watched.supervisor.stop(5.0, is_internal=True)
    assert internal.state is TaskState.STOPPED


def test_a_failed_task_does_not_hold_up_the_stop(watched: Watched) -> None:
    handle = watched.watch(boom)
    watched.wait_for(lambda: handle.state is TaskState.FAILED)
    began_at = clock()
    assert watched.supervisor.stop(5.0, is_internal=False) == []
    assert clock() - began_at < 1.0
    assert handle.state is TaskState.FAILED


def test_a_task_with_a_wait_of_its_own_is_woken_to_stop(watched: Watched) -> None:
    """As the writer of the outbox, which waits for work."""
    work = watched.runtime.flag()

    def run() -> None:
        while not is_stopping():
            work.wait()
            work.clear()

    handle = watched.watch(run, wake=work.set)
    watched.wait_for(lambda: handle.state is TaskState.RUNNING)
    handle.stop()
    assert handle.join(5.0)


def test_marks_of_a_task_are_kept(watched: Watched) -> None:
    handle = watched.watch(wait_to_be_stopped, is_critical=True, is_internal=True)
    assert handle.is_critical
    assert handle.is_internal
    assert not watched.watch(wait_to_be_stopped, name="plain").is_critical


# Sleep


def test_a_sleep_lasts_its_time_in_a_task_and_outside(watched: Watched) -> None:
    slept: list[object] = []

    def run() -> None:
        began_at = clock()
        slept.append(sleep(watched.runtime, 0.05))
        slept.append(clock() - began_at >= 0.045)

    assert watched.watch(run).join(5.0)
    run()
    assert slept == [True, True, True, True]


def test_a_sleep_ends_early_when_its_task_shall_stop(watched: Watched) -> None:
    slept: list[bool] = []
    handle = watched.watch(lambda: slept.append(sleep(watched.runtime, 60.0)))
    watched.runtime.sleep(0.01)
    handle.stop()
    assert handle.join(5.0)
    assert slept == [False]


@pytest.mark.parametrize("seconds", [0, 0.0, -1.0])
def test_a_sleep_of_no_time_gives_way_and_tells_of_a_stop(watched: Watched, seconds: float) -> None:
    slept: list[bool] = []

    def run() -> None:
        slept.append(sleep(watched.runtime, seconds))
        wait_to_be_stopped()
        slept.append(sleep(watched.runtime, seconds))

    handle = watched.watch(run)
    watched.wait_for(lambda: slept)
    handle.stop()
    assert handle.join(5.0)
    assert slept == [True, False]


def test_a_sleep_of_no_time_lets_others_run(nothing_left_behind: None) -> None:
    """A task that never waits otherwise would keep every greenlet from running."""
    watched = Watched(GeventRuntime())
    steps: list[str] = []

    def greedy() -> None:
        while sleep(watched.runtime, 0):
            steps.append("greedy")

    first = watched.watch(greedy, name="greedy")
    second = watched.watch(lambda: steps.append("other"), name="other")
    assert second.join(5.0)
    first.stop()
    assert first.join(5.0)
    assert "other" in steps


def test_nobody_is_a_task_outside_of_tasks(watched: Watched) -> None:
    seen: list[object] = []
    handle = watched.watch(lambda: seen.append(current_task()))
    assert handle.join(5.0)
    assert seen == [handle]
    assert current_task() is None
    assert not is_stopping()

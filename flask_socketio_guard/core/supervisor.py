"""Runs tasks, restarts them according to their policy, and stops them all in order.

There is no watcher loop that could die: the runtime reports the end of each task, even of one
that was killed.
"""

from __future__ import annotations

import threading
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from ..backoff import backoff_delay
from ..errors import DuplicateTask, TaskError
from ..states import TASK_TRANSITIONS, StateMachine, TaskEvent, TaskState
from .runtime import Flag, Job, Runtime, Timer, clock

if TYPE_CHECKING:
    from collections.abc import Callable

_current: ContextVar[TaskHandle | None] = ContextVar("socketio_guard_task", default=None)

_CRASHES = 3  # within _CRASH_WINDOW: the task is flapping
_CRASH_WINDOW = 60.0  # seconds
_MAX_FAILED = 100  # failed tasks that are kept for health


class Restart(Enum):
    """When a task that has ended is restarted."""

    NEVER = "never"
    ON_FAILURE = "on-failure"
    """After an exception, not after a return."""
    ALWAYS = "always"


@dataclass(frozen=True)
class RestartPolicy:
    """How a task is restarted.

    Attributes:
        restart: When.
        first_delay: Delay before the first restart, in seconds; with 0, a task
            that had run for *max_delay* is restarted at once.
        max_delay: Cap of the delay, in seconds.
        max_restarts: Restart intensity: a task that needs more restarts than this
            within *restart_window* has failed for good. ``None``: no limit.
        restart_window: In seconds.

    Source:
        Erlang/OTP supervisor: restart types and maximum restart intensity.
    """

    restart: Restart = Restart.NEVER
    first_delay: float = 0.1
    max_delay: float = 5.0
    max_restarts: int | None = 10
    restart_window: float = 60.0


_INTERNAL: Final = RestartPolicy(
    restart=Restart.ALWAYS, first_delay=0.0, max_delay=1.0, max_restarts=None
)


class TaskHandle:
    """One supervised task, as its owner sees it.

    Attributes:
        name: Unique per supervisor.
        policy: When and how it is restarted.
        is_critical: Whether its failure makes the process unready.
        restarts: How often it was restarted.
        last_error: The latest exception that ended it, or ``None``.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        name: str,
        target: Callable[[], object],
        policy: RestartPolicy,
        *,
        is_critical: bool,
        is_internal: bool,
        wake: Callable[[], object] | None,
    ) -> None:
        self.name = name
        self.is_critical = is_critical
        self.is_internal = is_internal
        self.restarts = 0
        self.last_error: BaseException | None = None
        self.stopping: Flag = supervisor.runtime.flag()
        self._ended: Flag = supervisor.runtime.flag()
        self._supervisor = supervisor
        self._target = target
        self._wake = wake
        self.policy = policy
        self._machine: StateMachine[TaskState, TaskEvent] = StateMachine(
            TaskState.STARTING, TASK_TRANSITIONS, on_change=self._changed
        )
        self._lock = threading.RLock()
        self._job: Job | None = None
        self._timer: Timer | None = None
        self._started_at = 0.0
        self._attempt = 0
        self._restarted_at: deque[float] = deque()
        self._crashed_at: deque[float] = deque(maxlen=_CRASHES)

    @property
    def state(self) -> TaskState:
        """The current state of the task."""
        return self._machine.state

    @property
    def is_flapping(self) -> bool:
        """Whether it has crashed three times within the last minute, whatever its state is now.

        A task that is restarted at once is hardly ever seen backing off.
        """
        crashed_at = self._crashed_at
        return len(crashed_at) == _CRASHES and clock() - crashed_at[0] <= _CRASH_WINDOW

    def stop(self) -> None:
        """Ask the task to end; :meth:`join` waits for it.

        ``guard.sleep`` in the task returns at once. Idempotent.
        """
        with self._lock:
            self.stopping.set()
            if self._wake is not None:
                self._wake()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._job is None:
                self._end(TaskEvent.STOP)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the task has ended for good.

        Args:
            timeout: Longest wait in seconds; ``None`` waits forever.

        Returns:
            Whether it has ended.
        """
        return self._ended.wait(timeout)

    def kill(self) -> None:
        """Interrupt the task where it waits, under gevent; its policy then decides.

        Threads cannot be interrupted: nothing happens.
        """
        if self._job is not None:
            self._job.kill()

    def replace(self, reason: str) -> None:
        """Abandon the present run and start a fresh one at once.

        For a run that hangs. Under gevent it is killed; a thread keeps running, and its end is
        ignored.
        """
        with self._lock:
            if self.stopping.is_set() or self.state is not TaskState.RUNNING:
                return
            abandoned, self._job = self._job, None
            self._machine.send(TaskEvent.CRASHED, reason)
            self.restarts += 1
            self.start()
        if abandoned is not None:
            abandoned.kill()

    def abandon(self) -> None:
        """Drop the task in a forked child: it belongs to the parent.

        A fork does not copy threads. It copies greenlets, which would run in both processes.
        """
        self.stopping.set()
        if self._timer is not None:
            self._timer.cancel()
        self.kill()

    def start(self) -> None:
        """Start a run; called by the supervisor only."""
        with self._lock:
            self._timer = None
            if self.stopping.is_set():
                return
            if self.state is TaskState.BACKING_OFF:
                self._machine.send(TaskEvent.RETRY)
            self._started_at = clock()
            self._machine.send(TaskEvent.STARTED)
            job: list[Job] = []
            self._job = self._supervisor.runtime.spawn(
                self._run, name=self.name, on_exit=lambda exc: self._exited(job, exc)
            )
            job.append(self._job)

    def _run(self) -> None:
        token = _current.set(self)
        try:
            self._target()
        finally:
            _current.reset(token)

    def _exited(self, job: list[Job], exc: BaseException | None) -> None:
        with self._lock:
            if not job or job[0] is not self._job:
                return  # abandoned by replace()
            self._job = None
            if exc is not None and not self.stopping.is_set():
                self.last_error = exc
                self._crashed_at.append(clock())
                self._supervisor.on_failure(self, exc)
            # The on_failure hook may have stopped the task.
            if self.stopping.is_set():
                self._end(TaskEvent.STOP)
            elif exc is None and self.policy.restart is not Restart.ALWAYS:
                self._end(TaskEvent.RETURNED)
            elif self.policy.restart is Restart.NEVER or self._is_intensity_exceeded():
                self._end(TaskEvent.GAVE_UP, _describe(exc))
            else:
                self._back_off(_describe(exc))

    def _back_off(self, reason: str) -> None:
        self.restarts += 1
        self._machine.send(TaskEvent.CRASHED, reason)
        if not self.stopping.is_set():
            self._timer = self._supervisor.runtime.call_later(self._delay(), self.start)

    def _delay(self) -> float:
        policy = self.policy
        if clock() - self._started_at > policy.max_delay:
            self._attempt = 0
        attempt, self._attempt = self._attempt, self._attempt + 1
        if policy.first_delay == 0:
            if attempt == 0:
                return 0.0
            attempt -= 1
        return backoff_delay(
            attempt, first_delay=policy.first_delay or 0.1, max_delay=policy.max_delay
        )

    def _is_intensity_exceeded(self) -> bool:
        if self.policy.max_restarts is None:
            return False
        now = clock()
        self._restarted_at.append(now)
        while self._restarted_at[0] < now - self.policy.restart_window:
            self._restarted_at.popleft()
        return len(self._restarted_at) > self.policy.max_restarts

    def _end(self, event: TaskEvent, reason: str = "") -> None:
        self._machine.send(event, reason)
        self._ended.set()
        self._supervisor.forget(self)

    def _changed(self, old: TaskState, new: TaskState, reason: str) -> None:
        self._supervisor.on_change(self, old, new, reason)


class Supervisor:
    """Owns the tasks of one application.

    Args:
        runtime: Where tasks run.
        on_failure: Called as ``on_failure(handle, exception)`` for each crash.
        on_change: Called as ``on_change(handle, old, new, reason)``.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        on_failure: Callable[[TaskHandle, BaseException], None],
        on_change: Callable[[TaskHandle, TaskState, TaskState, str], None],
    ) -> None:
        self.runtime = runtime
        self.on_failure = on_failure
        self.on_change = on_change
        self._tasks: dict[str, TaskHandle] = {}
        self._is_stopping = False

    @property
    def tasks(self) -> list[TaskHandle]:
        """The tasks that run, wait for a restart, or have failed for good."""
        return list(self._tasks.values())

    def watch(
        self,
        name: str,
        target: Callable[[], object],
        *,
        policy: RestartPolicy,
        is_critical: bool = False,
        is_internal: bool = False,
        wake: Callable[[], object] | None = None,
    ) -> TaskHandle:
        """Run *target* and restart it as *policy* says.

        Returns at once; the task runs in a greenlet or thread of its own.

        Args:
            name: Unique among the tasks that have not ended; appears in logs and health.
            target: Called without arguments.
            policy: When and how to restart.
            is_critical: Whether its failure makes the process unready.
            is_internal: Whether it belongs to the guard and not to the application.
            wake: Called when the task is asked to stop, to interrupt a wait.

        Raises:
            DuplicateTask: *name* is already watched.
            TaskError: The supervisor is stopping.
        """
        if self._is_stopping:
            raise TaskError(f"cannot start task {name!r}: the process is stopping")
        if self.is_running(name):
            raise DuplicateTask(f"a task named {name!r} is already running")
        handle = TaskHandle(
            self,
            name,
            target,
            policy,
            is_critical=is_critical,
            is_internal=is_internal,
            wake=wake,
        )
        self._tasks[name] = handle
        handle.start()
        return handle

    def watch_internal(
        self,
        name: str,
        target: Callable[[], object],
        wake: Callable[[], object] | None = None,
    ) -> TaskHandle:
        """Run a task of the guard itself: always restarted, and at once after a long run."""
        return self.watch(name, target, policy=_INTERNAL, is_internal=True, wake=wake)

    def is_running(self, name: str) -> bool:
        """Return whether a task of that name exists that has not ended."""
        known = self._tasks.get(name)
        return known is not None and known.state is not TaskState.FAILED

    def forget(self, handle: TaskHandle) -> None:
        """Drop a task that has ended, unless it failed and health should show that.

        A task that is neither critical nor ever restarted may fail: that is logged and counted
        like any failure, but not shown in health.
        """
        is_shown = handle.state is TaskState.FAILED and (
            handle.is_critical or handle.policy.restart is not Restart.NEVER
        )
        if not is_shown:
            if self._tasks.get(handle.name) is handle:
                del self._tasks[handle.name]
            return
        failed = [
            task for task in self.tasks if task.state is TaskState.FAILED and not task.is_critical
        ]
        for task in failed[:-_MAX_FAILED]:
            self._tasks.pop(task.name, None)

    def abandon(self) -> None:
        """Drop all tasks, silently, in a forked child: they belong to the parent."""
        self._is_stopping = True
        self.on_failure = lambda *_: None
        self.on_change = lambda *_: None
        if self.runtime.can_kill:  # threads that no longer exist may still hold the locks
            for handle in self.tasks:
                handle.abandon()

    def stop(self, timeout: float, *, is_internal: bool) -> list[str]:
        """End tasks: ask every one, then wait for all against one deadline.

        Tasks that have not ended by then are interrupted if the runtime can do that. No task
        can be started afterwards.

        Args:
            timeout: In seconds, >= 0.
            is_internal: Whether to end the guard's own tasks, or the application's.

        Returns:
            The names of the tasks that had to be interrupted or left running.
        """
        self._is_stopping = True
        handles = [handle for handle in self.tasks if handle.is_internal is is_internal]
        for handle in handles:
            handle.stop()
        deadline = clock() + timeout
        late = [
            handle
            for handle in handles
            if handle.state is not TaskState.FAILED
            and not handle.join(max(0.0, deadline - clock()))
        ]
        for handle in late:
            handle.kill()
        for handle in late:
            handle.join(1.0 if self.runtime.can_kill else 0.0)
        return [handle.name for handle in late]


def current_task() -> TaskHandle | None:
    """Return the supervised task that the caller runs in, if any."""
    return _current.get()


def sleep(runtime: Runtime, seconds: float) -> bool:
    """Sleep; return early if the calling task is asked to stop.

    Returns:
        ``True`` after *seconds*, ``False`` as soon as the task has been asked to stop.
    """
    task = _current.get()
    if task is None:
        runtime.sleep(seconds)
        return True
    if seconds <= 0:
        runtime.sleep(0)  # yields control
        return not task.stopping.is_set()
    return not task.stopping.wait(seconds)


def is_stopping() -> bool:
    """Return whether the calling task has been asked to stop."""
    task = _current.get()
    return task is not None and task.stopping.is_set()


def _describe(exc: BaseException | None) -> str:
    return "returned" if exc is None else type(exc).__name__

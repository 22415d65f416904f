"""Background tasks of the application."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from ..core.tasks import RestartName, task_name, task_spec
from .guards import Capability

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    from ..core.supervisor import TaskHandle
    from ..core.tasks import StartOptions

    Ts = TypeVarTuple("Ts")

A = TypeVar("A")
B = TypeVar("B")
P = ParamSpec("P")
TaskT = TypeVar("TaskT", bound=Callable[[], Any])


class Tasks(Capability):
    """Runs functions in supervised tasks, which are logged, restarted and reported in health."""

    @overload
    def task(
        self,
        target: TaskT,
        /,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: RestartName = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> TaskT: ...

    @overload
    def task(
        self,
        target: None = None,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: RestartName = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> Callable[[TaskT], TaskT]: ...

    def task(
        self,
        target: Callable[[], Any] | None = None,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: RestartName = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> Any:
        """Run a function in the background for as long as the application runs.

        It runs in every worker, and never in a gunicorn master that preloads the
        application. Works with and without parentheses::

            @guard.task(every=1.0)
            def tick(): guard.emit("tick")

        Args:
            target: The function; called without arguments in the application context.
            every: Seconds between the starts of two runs, > 0; starts that are missed
                because a run takes longer are skipped. ``None``: the function runs once.
            name: Unique per application; default ``module.function``.
            restart: ``"never"``, ``"on-failure"`` or ``"always"``. The backoff grows
                from 0.1 s to ``SOCKETIO_GUARD_RESTART_MAX_DELAY``, with jitter.
            critical: Whether readiness fails once the task has failed permanently.
            max_restarts: The task fails permanently if it needs more restarts than
                this within *restart_window* seconds; ``None`` means no limit.
            restart_window: Seconds, > 0.

        Raises:
            ConfigError: An option is out of range.
            DuplicateTask: A task with that name exists.
        """

        def decorator(function: TaskT) -> TaskT:
            spec = task_spec(
                function,
                name=name,
                every=every,
                restart=restart,
                critical=critical,
                max_restarts=max_restarts,
                restart_window=restart_window,
            )
            self._guards.register_task(spec)
            return function

        return decorator if target is None else decorator(target)

    # The overloads let a type checker compare the arguments with the target's parameters. Options
    # can be combined with positional arguments; to pass keywords to the target as well, use
    # functools.partial(target, ...).

    @overload
    def start_background_task(
        self, target: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle: ...

    @overload
    def start_background_task(
        self, target: Callable[[], object], **options: Unpack[StartOptions]
    ) -> TaskHandle: ...

    @overload
    def start_background_task(
        self, target: Callable[[A], object], a: A, /, **options: Unpack[StartOptions]
    ) -> TaskHandle: ...

    @overload
    def start_background_task(
        self, target: Callable[[A, B], object], a: A, b: B, /, **options: Unpack[StartOptions]
    ) -> TaskHandle: ...

    @overload
    def start_background_task(
        self,
        target: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        **options: Unpack[StartOptions],
    ) -> TaskHandle: ...

    def start_background_task(  # type: ignore[misc]  # it accepts everything that the fifth overload does
        self,
        target: Callable[..., Any],
        *args: Any,
        name: Any = None,
        restart: Any = "never",
        critical: Any = False,
        max_restarts: Any = 10,
        restart_window: Any = 60.0,
        **kwargs: Any,
    ) -> TaskHandle:
        """Start a supervised background task now, like ``SocketIO.start_background_task``.

        Args:
            target: The function; runs in the application context.
            args: Passed to *target*.
            name: Unique among the running tasks; by default the name of the function
                with a number.
            restart: See :meth:`task`.
            critical: See :meth:`task`.
            max_restarts: See :meth:`task`.
            restart_window: See :meth:`task`.
            kwargs: Passed to *target*.

        Returns:
            A handle with ``state``, ``restarts``, ``last_error``, ``stop()`` and
            ``join(timeout)``.

        Raises:
            ConfigError: An option is out of range.
            DuplicateTask: A task with that name is running, or will start with the application.
            TaskError: The process is stopping.
        """
        guard = self._guards.current()
        spec = task_spec(
            partial(target, *args, **kwargs),
            name=name or guard.tasks.unique_name(task_name(target)),
            every=None,
            restart=restart,
            critical=critical,
            max_restarts=max_restarts,
            restart_window=restart_window,
        )
        return guard.tasks.run(spec)

    def sleep(self, seconds: float = 0) -> bool:
        """Sleep like ``SocketIO.sleep``, but wake up when the task or process is stopped.

        Args:
            seconds: >= 0; 0 only yields to other tasks.

        Returns:
            ``True`` after the full time, ``False`` if woken early.
        """
        return self._guards.current().tasks.sleep(seconds)

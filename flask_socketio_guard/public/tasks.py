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
    """Runs functions in supervised tasks: logged, restarted, and seen in health."""

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

        It starts in the worker, never in a preloading master, and in every
        worker. Usable with and without parentheses::

            @guard.task(every=1.0)
            def tick(): guard.emit("tick")

        Args:
            target: The function; it gets no arguments and runs in the application context.
            every: Seconds between the starts of two runs, > 0; a run that takes
                longer skips what it missed. ``None``: one run, from start to end.
            name: Unique per application; default ``module.function``.
            restart: ``"never"``, ``"on-failure"`` or ``"always"``; delays grow from
                0.1 s to ``SOCKETIO_GUARD_RESTART_MAX_DELAY``, with jitter.
            critical: Whether the process is unready once the task has failed for good.
            max_restarts: More restarts than this within *restart_window* seconds
                fail the task for good; ``None``: it never gives up.
            restart_window: In seconds, > 0.

        Raises:
            ConfigError: An option is out of range.
            DuplicateTask: There is a task of that name.
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

    # A type checker holds the arguments against the target. Options go with positional arguments;
    # with keywords for the target, too, write functools.partial(target, ...).

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

    def start_background_task(  # type: ignore[misc]  # it does accept all of the fifth
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
        """Start a supervised background task now; as ``SocketIO.start_background_task``.

        Args:
            target: The function; runs in the application context.
            args: Passed to *target*.
            name: Unique among the running tasks; by default the function's name
                and a number.
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
            DuplicateTask: A task of that name is running, or will start with the application.
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
        """Sleep; as ``SocketIO.sleep``, but wake up when the task or process stops.

        Args:
            seconds: >= 0; 0 only gives way to other tasks.

        Returns:
            ``True`` after the whole time, ``False`` when woken early.
        """
        return self._guards.current().tasks.sleep(seconds)

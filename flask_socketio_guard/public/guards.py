"""The applications of one ``SocketIOGuard``, and what is registered with all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from flask import Flask, current_app, has_app_context

from ..errors import ConfigError, DuplicateTask
from ..registry import Registry

if TYPE_CHECKING:
    from ..app_guard import AppGuard
    from ..core.tasks import TaskSpec
    from ..events.pipeline import HandlerEntry


class Guards:
    """Finds the guard of an application, and registers handlers and tasks with every guard.

    Attributes:
        registry: Everything registered so far; replayed for each application added later.
        write_only: The guard of a process without an application.
    """

    def __init__(self) -> None:
        self.registry = Registry()
        self.write_only: AppGuard | None = None
        # An application keeps its guard alive, through its middleware; weak references here let
        # both be garbage collected.
        self._by_app: WeakKeyDictionary[Flask, ref[AppGuard]] = WeakKeyDictionary()
        self._references: list[ref[AppGuard]] = []  # its values, which every emit iterates over

    def add(self, app: Flask, guard: AppGuard) -> None:
        """Record *guard* as the guard of *app*."""
        self._by_app[app] = ref(guard)
        self._references = list(self._by_app.values())

    def remove(self, app: Flask) -> None:
        """Remove the guard of *app*; idempotent."""
        self._by_app.pop(app, None)
        self._references = list(self._by_app.values())

    def of(self, app: Flask) -> AppGuard | None:
        """Return the guard of *app*; ``None`` if it has none."""
        reference = self._by_app.get(app)
        return None if reference is None else reference()

    def all(self) -> list[AppGuard]:
        """Return all guards, except those whose ``SocketIO`` serves another application now."""
        guards = [reference() for reference in self._references]
        guards.append(self.write_only)
        return [guard for guard in guards if guard is not None and not guard.is_superseded]

    def current(self) -> AppGuard:
        """Return the guard of the current application, or the only guard.

        Raises:
            RuntimeError: There is no guard, or several and no application context.
        """
        if has_app_context():
            # The key is the application itself, not its proxy.
            app = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001
            guard = self.of(app)
            if guard is not None:
                return guard
        guards = self.all()
        if len(guards) == 1:
            return guards[0]
        if not guards:
            raise RuntimeError("this SocketIOGuard guards no app yet: call guard.init_app(app)")
        raise RuntimeError(
            "this SocketIOGuard guards several apps: use it inside `with app.app_context():`"
        )

    def register_handler(self, entry: HandlerEntry) -> None:
        """Register a handler with every application."""
        self.registry.handlers.append(entry)
        for guard in self.all():
            guard.register(entry)

    def register_handshake(self, namespace: str, timeout: float) -> None:
        """Require clients of *namespace* to complete a handshake within *timeout* seconds.

        Raises:
            ConfigError: The namespace already has a handshake.
        """
        if namespace in self.registry.handshakes:
            raise ConfigError(f"namespace {namespace!r} already has a handshake")
        self.registry.handshakes[namespace] = timeout
        for guard in self.all():
            guard.handshakes.require(namespace, timeout)

    def register_task(self, spec: TaskSpec) -> None:
        """Register a task with every application.

        Raises:
            DuplicateTask: The name is taken; nothing has changed.
        """
        if any(known.name == spec.name for known in self.registry.tasks):
            raise DuplicateTask(f"a task named {spec.name!r} exists already: give one a name=")
        guards = self.all()
        for guard in guards:
            guard.tasks.require_free(spec.name)
        for guard in guards:
            guard.tasks.add(spec)
        self.registry.tasks.append(spec)


class Capability:
    """One part of a ``SocketIOGuard``; all parts have the same :class:`Guards`."""

    _guards: Guards

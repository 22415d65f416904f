"""Everything registered with a ``SocketIOGuard``, for all applications that it guards."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.component import Component
    from .core.tasks import TaskSpec
    from .delivery.records import DeadLetter
    from .events.handlers import HandlerCall
    from .events.pipeline import HandlerEntry
    from .settings import Settings
    from .telemetry.records import Failure


@dataclass
class Registry:
    """Handlers, handshakes, tasks, hooks and components, registered before or after ``init_app``.

    All guards share the lists of hooks, and see what is appended later. Handlers, handshakes and
    tasks are copied when a guard is created; :class:`.Guards` passes later ones to it. Components
    must be registered before ``init_app``.
    """

    handlers: list[HandlerEntry] = field(default_factory=list)
    handshakes: dict[str, float] = field(default_factory=dict)
    tasks: list[TaskSpec] = field(default_factory=list)
    before_event: list[Callable[[HandlerCall], object]] = field(default_factory=list)
    on_failure: list[Callable[[Failure], object]] = field(default_factory=list)
    components: list[Callable[[Any], Component]] = field(default_factory=list)
    on_dead_letter: list[Callable[[DeadLetter], object]] = field(default_factory=list)

    def settings(self) -> list[type[Settings]]:
        """Return the settings classes that the components declare, without duplicates."""
        declared = [_settings_of(make) for make in self.components]
        return list(dict.fromkeys(each for each in declared if each is not None))


def _settings_of(make: Callable[..., Component]) -> type[Settings] | None:
    """Return the ``settings`` attribute of a component's class or factory, if any."""
    while isinstance(make, partial):
        make = make.func
    return getattr(make, "settings", None)

"""What was registered with a ``SocketIOGuard``, for each application that it guards."""

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
    """Handlers, tasks and hooks, before ``init_app`` and after.

    The lists of hooks are shared: what is appended is seen by every guard. Of the rest a guard
    takes what is there when it is made, and is told what comes later; components are made with it.
    """

    handlers: list[HandlerEntry] = field(default_factory=list)
    handshakes: dict[str, float] = field(default_factory=dict)
    tasks: list[TaskSpec] = field(default_factory=list)
    before_event: list[Callable[[HandlerCall], object]] = field(default_factory=list)
    on_failure: list[Callable[[Failure], object]] = field(default_factory=list)
    components: list[Callable[[Any], Component]] = field(default_factory=list)
    on_dead_letter: list[Callable[[DeadLetter], object]] = field(default_factory=list)

    def settings(self) -> list[type[Settings]]:
        """Return the classes of settings that the components declare, each once."""
        declared = [_settings_of(make) for make in self.components]
        return list(dict.fromkeys(each for each in declared if each is not None))


def _settings_of(make: Callable[..., Component]) -> type[Settings] | None:
    """Return what a component, or a function that makes one, says of its settings."""
    while isinstance(make, partial):
        make = make.func
    return getattr(make, "settings", None)

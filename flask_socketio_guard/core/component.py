"""Base class of the guard's capabilities: hooks for lifecycle, health checks and gauges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..settings import Settings

Watch = Callable[[str, Callable[[], object], Callable[[], object] | None], object]
"""Starts a supervised task: its name, its function, and a function that interrupts its waits."""


class Status(IntEnum):
    """The status of a check; the worst status of all checks is that of the process.

    Source:
        draft-inadarei-api-health-check-06, section 3.1.
    """

    PASS = 0
    WARN = 1
    FAIL = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Check:
    """One health check, reported under the key ``component:measurement``."""

    status: Status
    value: object
    unit: str = ""
    output: str = ""

    def as_json(self, time: str) -> list[dict[str, object]]:
        """Return the array, here of one object, that the draft requires (section 4)."""
        entry: dict[str, object] = {
            "status": str(self.status),
            "observedValue": self.value,
            "time": time,
        }
        if self.unit:
            entry["observedUnit"] = self.unit
        if self.output:
            entry["output"] = self.output
        return [entry]


def implementations_of(hook: str, components: Iterable[Component]) -> list[Any]:
    """Return the bound method *hook* of each component that overrides it.

    Hooks that run for every client skip the empty defaults this way.
    """
    default = getattr(Component, hook)
    return [
        getattr(component, hook)
        for component in components
        if getattr(type(component), hook) is not default
    ]


class Component:
    """One capability of a process, an entry in the list of components of its lifecycle.

    Components start in order and stop in reverse order. A forked child creates new ones. Every
    method has an empty default. Events, emits and queue messages do not go through the list: the
    hot paths call the components that they need directly.

    Attributes:
        settings: The class of the component's settings, if any; ``guard.config.of`` returns them.
    """

    settings: ClassVar[type[Settings] | None] = None

    def start(self, watch: Watch) -> None:
        """Start what a process needs to emit or deliver, even if it never serves a client.

        Args:
            watch: Starts a supervised task; see :data:`Watch`.
        """

    def serve(self, watch: Watch) -> None:
        """Start what serving clients needs; called after :meth:`start`, if at all."""

    def tick(self) -> None:
        """Do periodic work; called every second."""

    def poll(self) -> None:
        """Do periodic work that cannot wait for a tick; called ten times a second."""

    def connected(self, client: Any) -> None:
        """Handle a new client, a :class:`~..clients.connections.Connection`.

        Called after its connect handler has accepted it.
        """

    def entered(self, client: Any, room: str) -> None:
        """Handle an accepted client that has entered *room*."""

    def disconnected(self, client: Any) -> None:
        """Handle a client that has disconnected; called after its disconnect handler.

        Must not wait: with threads, the caller holds locks.
        """

    def drain(self, timeout: float) -> bool:
        """Disconnect the clients within about *timeout* seconds; return whether all have gone."""
        del timeout
        return True

    def flush(self, timeout: float) -> bool:
        """Send what is queued within *timeout* seconds; return whether everything was sent."""
        del timeout
        return True

    def stop(self, timeout: float) -> None:
        """Release everything within about *timeout* seconds; its tasks have already ended."""

    def abandon(self) -> None:
        """Drop all state in a forked child: tasks and connections belong to the parent."""

    def checks(self) -> Mapping[str, Check]:
        """Return the health checks of the component, by ``component:measurement``."""
        return {}

    def gauges(self) -> Mapping[str, int]:
        """Return current amounts, by ``component:measurement``; they never fail a check."""
        return {}

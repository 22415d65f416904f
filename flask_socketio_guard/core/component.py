"""What a capability of a process is: it starts, ticks, ends, and says how it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..settings import Settings

Watch = Callable[[str, Callable[[], object], Callable[[], object] | None], object]
"""Starts a supervised task: name, what it does, what ends its waits."""


class Status(IntEnum):
    """The status of a check; the worst of all is the status of the process.

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
    """One measured thing, by the key ``component:measurement``."""

    status: Status
    value: object
    unit: str = ""
    output: str = ""

    def as_json(self, time: str) -> list[dict[str, object]]:
        """Return the array of one object that the draft asks for (section 4)."""
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


def those_that(hook: str, components: Iterable[Component]) -> list[Any]:
    """Return the method *hook* of each component that has one of its own."""
    default = getattr(Component, hook)
    return [
        getattr(component, hook)
        for component in components
        if getattr(type(component), hook) is not default
    ]


class Component:
    """One capability of a process, in the list that its lifecycle holds.

    The list is started in order and stopped in reverse. A forked child makes a new one. Every
    method may be left out. Events, emits and messages of the queue do not go through the list:
    what takes part in them is called directly.

    Attributes:
        settings: The class of its own settings, if it has any; ``guard.config.of`` returns them.
    """

    settings: ClassVar[type[Settings] | None] = None

    def start(self, watch: Watch) -> None:
        """Begin: the process emits, or delivers; it may never serve a client.

        Args:
            watch: Starts a supervised task: its name, what it does, and what lets it see at
                once that it shall stop.
        """

    def serve(self, watch: Watch) -> None:
        """Begin to serve clients; called after :meth:`start`, if at all."""

    def tick(self) -> None:
        """Do what is due every second."""

    def poll(self) -> None:
        """Do what is due ten times a second."""

    def connected(self, client: Any) -> None:
        """A connect handler has let a client in, a :class:`~..clients.connections.Connection`."""

    def entered(self, client: Any, room: str) -> None:
        """A client that was let in has entered a room."""

    def disconnected(self, client: Any) -> None:
        """A client has left, and its disconnect handler has run.

        With threads, whoever calls holds locks: nothing may be waited for.
        """

    def drain(self, timeout: float) -> bool:
        """Let go of those who are here, within about *timeout* seconds; say whether all went."""
        del timeout
        return True

    def flush(self, timeout: float) -> bool:
        """Have what is on its way out there within *timeout* seconds; say whether it is."""
        del timeout
        return True

    def stop(self, timeout: float) -> None:
        """End, within about *timeout* seconds; its tasks have ended."""

    def abandon(self) -> None:
        """Have no part in it, in a forked child: what there is belongs to the parent."""

    def checks(self) -> Mapping[str, Check]:
        """Return what health tells of it, by ``component:measurement``."""
        return {}

    def gauges(self) -> Mapping[str, int]:
        """Return amounts, by ``component:measurement``."""
        return {}

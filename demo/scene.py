"""What a fault of the check is given, and what it gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from demo.clients import Watcher
    from demo.runner import Demo


class Scene(NamedTuple):
    """The running demo, and a client on each of its two processes."""

    demo: Demo
    a: Watcher
    b: Watcher


class Seen(NamedTuple):
    """What injecting a fault showed.

    Attributes:
        note: For the last column.
        over_at: When the fault was over; by default, when its injection returned.
        down_at: Since when the broker was away, for a fault of the broker; what was sent from then
            until `over_at` must arrive.
    """

    note: str
    over_at: float | None = None
    down_at: float | None = None


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        name: What the table calls it.
        inject: Makes it happen, and returns once it has; raises `Failed` if the guard did not do
            what it must.
        needs_own_broker: It stops, pauses or disconnects the broker.
    """

    name: str
    inject: Callable[[Scene], Seen]
    needs_own_broker: bool = False


class Failed(Exception):
    """The guard did not do what it must; the text says what."""

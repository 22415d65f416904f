"""The parameters and results of the faults."""

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
    """The result of injecting a fault. Instants are Unix time.

    Attributes:
        note: Text for the last column.
        over_at: When the fault ended; by default, when its injection returned.
        down_at: For a fault of the broker, when it began; events sent between then and `over_at`
            must arrive.
    """

    note: str
    over_at: float | None = None
    down_at: float | None = None


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        name: Name in the table.
        inject: Causes the fault and returns after it; raises `Failed` if the guard did not handle
            it.
        needs_own_broker: Whether it stops, pauses or disconnects the broker.
    """

    name: str
    inject: Callable[[Scene], Seen]
    needs_own_broker: bool = False


class Failed(Exception):
    """The guard did not handle a fault; the message says what went wrong."""

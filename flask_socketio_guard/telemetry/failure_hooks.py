"""Failure hooks: functions of the application that are called with each failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.component import Component
from .records import Failure, failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .records import Telemetry


class FailureHooks(Component):
    """Calls each hook with each failure; an exception of a hook is recorded as a failure, too.

    Args:
        telemetry: Source of the failures.
        hooks: May be extended at any time.
    """

    def __init__(self, telemetry: Telemetry, hooks: Sequence[Callable[[Failure], object]]) -> None:
        self._telemetry = telemetry
        self._hooks = hooks
        self._subscription: object = telemetry.subscribe(failed, self._call)

    def abandon(self) -> None:
        """Unsubscribe in a forked child, which has its own instance."""
        self._subscription = None

    def _call(self, failure: Failure) -> None:
        for hook in self._hooks:
            try:
                hook(failure)
            except BaseException as exc:  # noqa: BLE001 - a failure like any other; see bus.send
                if failure.kind != "hook":  # a hook that always raises must not call itself
                    name = getattr(hook, "__qualname__", repr(hook))
                    self._telemetry.send(Failure("hook", exc, name))

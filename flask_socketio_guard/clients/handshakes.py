"""The application's own handshake: clients that do not complete it in time are disconnected."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import flask

from ..core.component import Component
from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..clients.connections import Connection
    from ..core.deadlines import Deadlines


def completing(
    handler: Callable[..., Any], find: Callable[[str], Connection | None]
) -> Callable[..., Any]:
    """Wrap *handler* so that its client is ready unless *handler* returns ``False`` or raises.

    Args:
        handler: An event handler of the application.
        find: Returns the connection with a session id, if it is in this process.
    """

    @wraps(handler)
    def complete(*args: Any) -> Any:
        answer = handler(*args)
        if answer is not False:
            connection = find(flask.request.sid)  # type: ignore[attr-defined]
            if connection is not None:
                connection.shake_hands()
        return answer

    return complete


class Handshakes(Component):
    """Disconnects clients that are not ready in time, in the namespaces that require it.

    Args:
        timeouts: Seconds, by namespace; the dict is kept and extended.
        deadlines: Schedules the timeouts.
        disconnect: Disconnects a client, in a task of its own.
    """

    def __init__(
        self,
        timeouts: dict[str, float],
        deadlines: Deadlines,
        *,
        disconnect: Callable[[Connection], None],
    ) -> None:
        self._timeouts = timeouts
        self._deadlines = deadlines
        self._disconnect = disconnect

    def require(self, namespace: str, timeout: float) -> None:
        """Close connections to *namespace* that are not ready *timeout* seconds after they opened.

        Raises:
            ConfigError: The namespace already has a handshake.
        """
        if namespace in self._timeouts:
            raise ConfigError(f"namespace {namespace!r} already has a handshake")
        self._timeouts[namespace] = timeout

    def connected(self, client: Connection) -> None:
        """Start the timeout of a client if its namespace requires a handshake."""
        timeout = self._timeouts.get(client.namespace)
        if timeout is not None:
            close = partial(self._disconnect, client)
            client.expect_handshake(self._deadlines.call_later(timeout, close))

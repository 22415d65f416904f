"""The application's own handshake: who does not complete it in time is disconnected."""

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
    """Return *handler* such that its client is ready once it has returned anything but ``False``.

    Args:
        handler: The application's.
        find: Returns the connection of a session id, if it is here.
    """

    @wraps(handler)
    def shaking(*args: Any) -> Any:
        answer = handler(*args)
        if answer is not False:
            connection = find(flask.request.sid)  # type: ignore[attr-defined]
            if connection is not None:
                connection.shake_hands()
        return answer

    return shaking


class Handshakes(Component):
    """Gives each client of some namespaces so long until it is ready.

    Args:
        timeouts: Seconds by namespace; kept, and added to.
        deadlines: For the timeouts.
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
            ConfigError: The namespace has one already.
        """
        if namespace in self._timeouts:
            raise ConfigError(f"namespace {namespace!r} already has a handshake")
        self._timeouts[namespace] = timeout

    def connected(self, client: Connection) -> None:
        """Expect the handshake of a client, if there is one in its namespace."""
        timeout = self._timeouts.get(client.namespace)
        if timeout is not None:
            close = partial(self._disconnect, client)
            client.expect_handshake(self._deadlines.call_later(timeout, close))

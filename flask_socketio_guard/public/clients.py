"""The clients of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConnectionClosed
from .guards import Capability

if TYPE_CHECKING:
    from ..clients.connections import Connections


class Clients(Capability):
    """Tells who is here, and lets clients go."""

    @property
    def connections(self) -> Connections:
        """The connections of this process, by session id."""
        return self._guards.current().connections

    def is_connected(self, sid: str) -> bool:
        """Say whether a client of this process is connected: let in, and not closing."""
        connection = self._guards.current().connections.find(sid)
        return connection is not None and connection.is_open

    def checkpoint(self, sid: str) -> None:
        """Give way to other tasks, then make sure that a client is still there.

        For a long loop that sends to it, which would otherwise notice at its end.

        Args:
            sid: Session id of a client of this process.

        Raises:
            ConnectionClosed: It is gone.
        """
        self._guards.current().runtime.sleep(0)
        if not self.is_connected(sid):
            raise ConnectionClosed("the client has left")

    def disconnect(self, sid: str, namespace: str | None = None) -> bool:
        """Disconnect a client of this or another process; idempotent, from any thread.

        Args:
            sid: Its session id.
            namespace: ``None``: the one that the session id belongs to.

        Returns:
            Whether a client of this process is being disconnected because of
            this call. ``False`` for one that is gone, or elsewhere; with a message
            queue the other processes are asked.
        """
        guard = self._guards.current()
        known = guard.connections.find(sid)
        if namespace is None and known is not None:
            namespace = known.namespace
        return bool(guard.server.end(sid, namespace=namespace))

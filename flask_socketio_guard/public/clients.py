"""The clients of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConnectionClosed
from .guards import Capability

if TYPE_CHECKING:
    from ..clients.connections import Connections


class Clients(Capability):
    """Finds and disconnects clients."""

    @property
    def connections(self) -> Connections:
        """The connections of this process, by session id."""
        return self._guards.current().connections

    def is_connected(self, sid: str) -> bool:
        """Return whether a client of this process is connected: accepted, and not closing."""
        connection = self._guards.current().connections.find(sid)
        return connection is not None and connection.is_open

    def checkpoint(self, sid: str) -> None:
        """Yield to other tasks, then check that a client is still connected.

        Call it in a long loop that sends to a client, which otherwise continues after the client
        has disconnected.

        Args:
            sid: Session id of a client of this process.

        Raises:
            ConnectionClosed: The client has disconnected.
        """
        self._guards.current().runtime.sleep(0)
        if not self.is_connected(sid):
            raise ConnectionClosed("the client has left")

    def disconnect(self, sid: str, namespace: str | None = None) -> bool:
        """Disconnect a client of this or another process; idempotent, from any thread.

        Args:
            sid: Session id of the client.
            namespace: ``None`` means the namespace that the session id belongs to.

        Returns:
            Whether this call disconnects a client of this process. ``False`` for a client
            that is gone or connected to another process; with a message queue, the other
            processes are told to disconnect it.
        """
        guard = self._guards.current()
        known = guard.connections.find(sid)
        if namespace is None and known is not None:
            namespace = known.namespace
        return bool(guard.server.end(sid, namespace=namespace))

"""The clients of this process: who they are, and how to send events to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...states import ConnectionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...clients.connections import Connections
    from ...events.acknowledgements import Question
    from ...events.callbacks import CallbackTable


class LocalClients:
    """The clients of this process, as seen by code that needs acknowledgements from them.

    Args:
        connections: All connections of this process.
        manager: The guarded manager, which holds the rooms and sends.
        callbacks: The table of pending acknowledgements.
    """

    def __init__(self, connections: Connections, manager: Any, callbacks: CallbackTable) -> None:
        self._connections = connections
        self._find = connections.find
        self._manager = manager
        self._callbacks = callbacks

    def present(self) -> Iterator[tuple[str, str]]:
        """Yield (room, namespace) for each room of each client; session ids are rooms, too."""
        for connection in self._connections.values():
            for room in self.rooms_of(connection.sid, connection.namespace):
                yield room, connection.namespace

    def rooms_of(self, sid: str, namespace: str) -> Iterator[str]:
        """Yield the rooms of one client whose names are strings, with its session id."""
        for room in self._manager.get_rooms(sid, namespace):
            if isinstance(room, str):
                yield room

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return the session ids of open connections that have that id or are in that room."""
        clients = self._manager.clients_in(namespace, recipient)
        return [sid for sid, _ in clients if self.is_open(sid)]

    def is_open(self, sid: str) -> bool:
        """Return whether a client has been accepted and is not closing."""
        connection = self._find(sid)
        return connection is not None and connection.is_open

    def is_here(self, sid: str) -> bool:
        """Return whether this process has the client; it may still be connecting or closing."""
        connection = self._find(sid)
        return connection is not None and connection.state is not ConnectionState.CLOSED

    def transport_of(self, sid: str) -> str | None:
        """Return the id of a client's transport, or ``None`` if either has ended."""
        connection = self._find(sid)
        return None if connection is None else connection.surviving_transport()

    def ask(self, sid: str, question: Question) -> int | None:
        """Send an event that the client must acknowledge; see the manager's ``ask``."""
        connection = self._find(sid)
        if connection is None:
            return None
        asked: int | None = self._manager.ask(sid, connection.eio_sid, question)
        return asked

    def forget(self, ack_id: int, sid: str) -> None:
        """Stop waiting for an acknowledgement; its callback is not called."""
        self._callbacks.discard(ack_id, sid)

"""Who of this process's clients a message is for, and the way to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...states import ConnectionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...clients.connections import Connections
    from ...events.acknowledgements import Question
    from ...events.callbacks import CallbackTable


class LocalClients:
    """The clients of this process, as those who ask them see them.

    Args:
        connections: All of them.
        manager: Knows their rooms, and sends.
        callbacks: Where answers are waited for.
    """

    def __init__(self, connections: Connections, manager: Any, callbacks: CallbackTable) -> None:
        self._connections = connections
        self._find = connections.find
        self._manager = manager
        self._callbacks = callbacks

    def present(self) -> Iterator[tuple[str, str]]:
        """Yield what clients can be reached by, with namespaces: session ids and rooms."""
        for connection in self._connections.values():
            for room in self.rooms_of(connection.sid, connection.namespace):
                yield room, connection.namespace

    def rooms_of(self, sid: str, namespace: str) -> Iterator[str]:
        """Yield what one client can be reached by."""
        for room in self._manager.get_rooms(sid, namespace):
            if isinstance(room, str):
                yield room

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return those who have that session id or are in that room, and are let in."""
        clients = self._manager.clients_in(namespace, recipient)
        return [sid for sid, _ in clients if self.is_open(sid)]

    def is_open(self, sid: str) -> bool:
        """Say whether a client is let in, and not leaving."""
        connection = self._find(sid)
        return connection is not None and connection.is_open

    def is_here(self, sid: str) -> bool:
        """Say whether a client is here; it may not be let in yet, or be leaving."""
        connection = self._find(sid)
        return connection is not None and connection.state is not ConnectionState.CLOSED

    def transport_of(self, sid: str) -> str | None:
        """Return what the transport of a client is known by, unless that has ended."""
        connection = self._find(sid)
        return None if connection is None else connection.surviving_transport()

    def ask(self, sid: str, question: Question) -> int | None:
        """Send an event to a client that is to acknowledge it; see the manager's ``ask``."""
        connection = self._find(sid)
        if connection is None:
            return None
        asked: int | None = self._manager.ask(sid, connection.eio_sid, question)
        return asked

    def forget(self, ack_id: int, sid: str) -> None:
        """Wait for that acknowledgement no longer."""
        self._callbacks.discard(ack_id, sid)

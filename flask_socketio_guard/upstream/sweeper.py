"""Finds what upstream races left behind, and removes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..hooks import Hooks

_Leftover = tuple[str, str, str]


class Sweeper:
    """Compares the tables of python-socketio and python-engineio with the live sockets.

    What does not fit twice in a row is removed; once may be a client that is
    coming or going right now.

    Args:
        server: A guarded ``socketio.Server``.
        guard: For its connections.
    """

    def __init__(self, server: Any, guard: Hooks) -> None:
        self._server = server
        self._guard = guard
        self._suspects: frozenset[_Leftover] = frozenset()

    def sweep(self) -> dict[str, int]:
        """Remove what was a leftover the last time too.

        Returns:
            How many were removed, by table.
        """
        found = frozenset(() if self._server.takes_packets else self._leftovers())
        certain = found & self._suspects
        self._suspects = found - certain
        removed: dict[str, int] = {}
        for table, key, namespace in sorted(certain):
            self._removers[table](self, key, namespace)
            removed[table] = removed.get(table, 0) + 1
        return removed

    def _leftovers(self) -> Iterator[_Leftover]:
        server, connections = self._server, self._guard.connections
        sockets = server.eio.sockets
        for eio_sid, socket in list(sockets.items()):
            if socket.closed:
                yield "sockets", eio_sid, ""
        for eio_sid in list(server.environ):
            if eio_sid not in sockets and not connections.of(eio_sid):
                yield "environ", eio_sid, ""
        for namespace, rooms in list(server.manager.rooms.items()):
            for sid in list(rooms.get(None, ())):
                if sid not in connections:
                    yield "rooms", sid, namespace
        for sid in connections:
            connection = connections.find(sid)
            if connection is not None and connection.is_open:
                is_known = server.manager.eio_sid_from_sid(sid, connection.namespace)
                if connection.eio_sid not in sockets or not is_known:
                    yield "connections", sid, connection.namespace

    def _remove_socket(self, eio_sid: str, _namespace: str) -> None:
        socket = self._server.eio.sockets.get(eio_sid)
        if socket is not None:
            self._server.eio.forget(socket)

    def _remove_environ(self, eio_sid: str, _namespace: str) -> None:
        self._server.environ.pop(eio_sid, None)

    def _remove_from_rooms(self, sid: str, namespace: str) -> None:
        self._server.manager.basic_disconnect(sid, namespace)

    def _remove_connection(self, sid: str, _namespace: str) -> None:
        self._guard.spawn("disconnect", lambda: self._server.drop(sid))

    _removers: dict[str, Callable[[Sweeper, str, str], None]] = {
        "sockets": _remove_socket,
        "environ": _remove_environ,
        "rooms": _remove_from_rooms,
        "connections": _remove_connection,
    }

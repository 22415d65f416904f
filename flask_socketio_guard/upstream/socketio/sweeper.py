"""Finds and removes entries that leak from upstream's tables because of races."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from websockets.frames import CloseCode

from ...core.component import Component
from ...telemetry.records import Sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...ports import Ports

_SWEEP_TICKS = 5
_Leftover = tuple[str, str, str]


class Sweeper(Component):
    """Compares the tables of python-socketio and python-engineio with the live sockets.

    An entry is removed if it is inconsistent in two consecutive sweeps. In the first one, its
    client may just be connecting or disconnecting.

    Args:
        server: A guarded ``socketio.Server``.
        guard: Gives access to the connections, the handlers and the telemetry.
    """

    def __init__(self, server: Any, guard: Ports) -> None:
        self._server = server
        self._guard = guard
        self._recording = guard.handlers.recording
        self._suspects: frozenset[_Leftover] = frozenset()
        self._ticks = 0

    def tick(self) -> None:
        """Check whether anything observes each packet, and sweep on every fifth call."""
        self._server.check_observers()
        self._ticks += 1
        if self._ticks % _SWEEP_TICKS == 0:
            removed = self.sweep()
            if removed:
                self._guard.telemetry.send(Sweep(sum(removed.values()), tuple(removed)))

    def sweep(self) -> dict[str, int]:
        """Remove the leftovers that the previous sweep found as well.

        Returns:
            The number of removed entries by table: ``"sockets"``, ``"environ"``, ``"rooms"``,
            ``"connections"``. Tables without one are omitted.
        """
        found: set[_Leftover] = set()
        if not self._server.takes_packets:
            for find in self._finders:
                # A fault in one table must not hide leftovers in the others.
                self._recording(self._look)(find, found)
        certain = found & self._suspects
        self._suspects = frozenset(found - certain)
        removed: dict[str, int] = {}
        for table, key, namespace in sorted(certain, key=str):
            if self._recording(self._removers[table])(self, key, namespace):
                removed[table] = removed.get(table, 0) + 1
        return removed

    def _look(self, find: Callable[[Sweeper], Iterator[_Leftover]], found: set[_Leftover]) -> None:
        found.update(find(self))  # keeps what *find* yields before it raises

    def _closed_sockets(self) -> Iterator[_Leftover]:
        for eio_sid, socket in list(self._server.eio.sockets.items()):
            if socket.closed:
                yield "sockets", eio_sid, ""

    def _stray_environs(self) -> Iterator[_Leftover]:
        sockets, connections = self._server.eio.sockets, self._guard.connections
        for eio_sid in list(self._server.environ):
            if eio_sid not in sockets and not connections.of(eio_sid):
                yield "environ", eio_sid, ""

    def _strangers_in_rooms(self) -> Iterator[_Leftover]:
        for namespace, rooms in list(self._server.manager.rooms.items()):
            for sid in list(rooms.get(None, ())):
                if sid not in self._guard.connections:
                    yield "rooms", sid, namespace

    def _lost_connections(self) -> Iterator[_Leftover]:
        server, connections = self._server, self._guard.connections
        for sid in connections:
            connection = connections.find(sid)
            if connection is not None and connection.is_open:
                is_known = server.manager.eio_sid_from_sid(sid, connection.namespace)
                if connection.eio_sid not in server.eio.sockets or not is_known:
                    yield "connections", sid, connection.namespace

    _finders: tuple[Callable[[Sweeper], Iterator[_Leftover]], ...] = (
        _closed_sockets,
        _stray_environs,
        _strangers_in_rooms,
        _lost_connections,
    )

    def _remove_socket(self, eio_sid: str, _namespace: str) -> bool:
        socket = self._server.eio.sockets.get(eio_sid)
        if socket is not None:
            self._server.eio.forget(socket)
        return True

    def _remove_environ(self, eio_sid: str, _namespace: str) -> bool:
        self._server.environ.pop(eio_sid, None)
        return True

    def _remove_from_rooms(self, sid: str, namespace: str) -> bool:
        self._server.manager.basic_disconnect(sid, namespace)
        return True

    def _remove_connection(self, sid: str, _namespace: str) -> bool:
        """Close a connection and its transport, if there still is one.

        Only the transport is closed, because clients do not reconnect by themselves after a
        DISCONNECT packet. The client's other namespaces reconnect as well.
        """
        connection = self._guard.connections.find(sid)
        socket = None if connection is None else self._server.eio.sockets.get(connection.eio_sid)
        if socket is None:
            self._guard.spawn("disconnect", lambda: self._server.drop(sid))
        else:
            socket.close(
                reason=self._server.reason.TRANSPORT_ERROR,
                code=CloseCode.SERVICE_RESTART,
                text="service restart",
            )
        return True

    _removers: dict[str, Callable[[Sweeper, str, str], bool]] = {
        "sockets": _remove_socket,
        "environ": _remove_environ,
        "rooms": _remove_from_rooms,
        "connections": _remove_connection,
    }

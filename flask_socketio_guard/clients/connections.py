"""The connections of one application: the state of each, and a registry of all."""

from __future__ import annotations

import sys
import threading
from _thread import RLock
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from functools import partial
from typing import TYPE_CHECKING

from ..core.component import Component
from ..core.forks import renew_after_fork
from ..core.runtime import Flag, clock
from ..states import CONNECTION_TRANSITIONS, ConnectionEvent, ConnectionState, StateMachine

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.deadlines import Deadline

_LIVING = (ConnectionState.OPEN, ConnectionState.READY)
_ENDING = (ConnectionState.CLOSING, ConnectionState.CLOSED)
_counting = RLock()  # not gevent's, which costs a dozen calls: no holder ever blocks
renew_after_fork(sys.modules[__name__], _counting=RLock)


class Connection:
    """One client's connection to one namespace.

    Attributes:
        sid: Session id, unique among all namespaces.
        namespace: Socket.IO namespace.
        eio_sid: Id of the transport session that it shares with the client's
            connections to other namespaces.
        opened_at: Time of the CONNECT packet, in seconds of the monotonic clock.
        reason: Why it closed: ``"client disconnect"``, ``"server disconnect"``,
            ``"ping timeout"``, ``"transport close"`` or ``"transport error"``;
            ``""`` before that.
        is_accepted: Whether its connect handler accepted it, even if it has closed since.
        is_left_to_connect: Whether it was closed while its connect handler was running,
            which leaves the cleanup to the code that called the handler.
        unbegun: Number of received events and acknowledgements whose processing has not
            started.
    """

    __slots__ = (
        "_all_begun",
        "_call_apart",
        "_cleanups",
        "_handshake",
        "_lock",
        "_machine",
        "_on_change",
        "_on_failure",
        "eio_sid",
        "is_accepted",
        "is_left_to_connect",
        "namespace",
        "opened_at",
        "reason",
        "sid",
        "unbegun",
    )

    def __init__(
        self,
        sid: str,
        namespace: str,
        eio_sid: str,
        *,
        lock: threading.RLock,
        on_change: Callable[[Connection, ConnectionState, ConnectionState], None],
        on_failure: Callable[[Connection, BaseException], None],
        call_apart: Callable[[Callable[[], None]], None],
    ) -> None:
        self.sid = sid
        self.namespace = namespace
        self.eio_sid = eio_sid
        self.opened_at = clock()
        self.reason = ""
        self.is_accepted = False
        self.is_left_to_connect = False
        self.unbegun = 0
        self._all_begun: Flag | None = None
        self._lock = lock
        self._machine: StateMachine[ConnectionState, ConnectionEvent] = StateMachine(
            ConnectionState.CONNECTING, CONNECTION_TRANSITIONS
        )
        self._cleanups: list[Callable[[], object]] | None = None
        self._handshake: Deadline | None = None
        self._on_change = on_change
        self._on_failure = on_failure
        self._call_apart = call_apart

    def __repr__(self) -> str:
        return f"<Connection {self.state} in {self.namespace!r}>"

    @property
    def state(self) -> ConnectionState:
        """The current state of the connection."""
        return self._machine.state

    def surviving_transport(self) -> str | None:
        """Return the id of its transport session; ``None`` if that ended with the connection."""
        is_alone = self.reason in ("", "client disconnect", "server disconnect")
        return self.eio_sid if is_alone else None

    @property
    def is_open(self) -> bool:
        """Whether its connect handler accepted it and it has not started to close since."""
        return self._machine.state in _LIVING

    @property
    def is_connecting(self) -> bool:
        """Whether its connect handler is running and it has not started to close."""
        return self._machine.state is ConnectionState.CONNECTING

    @property
    def is_ready(self) -> bool:
        """Whether the application's own handshake is done."""
        return self._machine.state is ConnectionState.READY

    def defer(self, cleanup: Callable[[], object]) -> None:
        """Call *cleanup* once when the connection has closed.

        Cleanups run after the disconnect handler, the last one added first. An
        exception is recorded, and the remaining cleanups run. On a connection that
        has already closed, *cleanup* is called immediately.
        """
        with self._lock:
            is_late = self.state is ConnectionState.CLOSED
            if not is_late:
                if self._cleanups is None:
                    self._cleanups = []
                self._cleanups.append(cleanup)
        if is_late:
            self._release([cleanup])

    # Internal: the methods below are for the guard, not for applications.

    def accept(self) -> bool:
        """Record that the connect handler has accepted the connection.

        Returns:
            Whether it is open; ``False`` if it was closed meanwhile.
        """
        with self._lock:
            self.is_accepted = True
            return self._move(ConnectionEvent.ACCEPTED) is ConnectionState.OPEN

    def refuse(self) -> None:
        """Record that the connect handler has refused the connection."""
        self._end(ConnectionEvent.REFUSED)

    def expect_handshake(self, timer: Deadline) -> None:
        """Keep *timer*, which closes the connection, until its handshake or its end."""
        with self._lock:
            if self._machine.state in (ConnectionState.CONNECTING, ConnectionState.OPEN):
                self._handshake = timer
                return
        timer.cancel()

    def shake_hands(self) -> bool:
        """Record that the application's own handshake is complete.

        Returns:
            Whether it is ready; ``False`` if it has closed.
        """
        with self._lock:
            if not self.is_open:
                return False
            self._move(ConnectionEvent.HANDSHAKE)
            self._forget_handshake()
        return True

    def begin_close(self, reason: str) -> bool:
        """Start to close the connection.

        Returns:
            Whether this call is the first one.
        """
        with self._lock:
            is_first = self._machine.state not in _ENDING
            if is_first:
                self.reason = reason
                self.is_left_to_connect = not self.is_accepted
            self._move(ConnectionEvent.CLOSE)
            self._forget_handshake()
        return is_first

    def finish(self) -> None:
        """Complete the close, and run the deferred cleanups."""
        self._end(ConnectionEvent.FINISHED)

    def expect(self) -> None:
        """Count a received event or acknowledgement whose processing has not started."""
        with _counting:
            self.unbegun += 1

    def begun(self) -> None:
        """Count one of these as started, or as dropped."""
        with _counting:
            self.unbegun -= 1
            all_begun = None if self.unbegun else self._all_begun
        if all_begun is not None:
            all_begun.set()

    def wait_until_begun(self, all_begun: Flag, patience: float) -> bool:
        """Wait until the processing of everything received has started.

        Args:
            all_begun: A new flag to wait on.
            patience: Longest time without any start, in seconds.

        Returns:
            Whether everything has started; ``False`` after *patience* without a start.
        """
        with _counting:
            self._all_begun = all_begun
            left = self.unbegun
        while left and not all_begun.wait(patience):
            if self.unbegun >= left:
                return False
            left = self.unbegun
        return True

    def _move(self, event: ConnectionEvent) -> ConnectionState:
        """Apply *event*, report a change, and return the state; called with the lock held."""
        old = self._machine.state
        new = self._machine.send(event)
        if new is not old:
            self._on_change(self, old, new)
        return new

    def _end(self, event: ConnectionEvent) -> None:
        with self._lock:
            self._move(event)
            cleanups, self._cleanups = self._cleanups, None
        if cleanups:
            self._call_apart(partial(self._release, cleanups))

    def _forget_handshake(self) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None

    def _release(self, cleanups: list[Callable[[], object]]) -> None:
        for cleanup in reversed(cleanups):
            try:
                cleanup()
            except BaseException as exc:  # noqa: BLE001 - code of the application; recorded
                self._on_failure(self, exc)


class Connections(Mapping[str, Connection], Component):
    """All connections of this process that are not closed, by session id.

    A read-only mapping; it can be iterated while clients connect and disconnect.

    Args:
        on_change: Called as ``on_change(connection, old, new)`` after each change
            of state; *old* is ``None`` for a new connection.
        on_failure: Called as ``on_failure(connection, exc)`` with the exception of a
            deferred cleanup.
        call_apart: Runs the deferred cleanups of one connection in a task of their own, and
            waits for it.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[Connection, ConnectionState | None, ConnectionState], None],
        on_failure: Callable[[Connection, BaseException], None],
        call_apart: Callable[[Callable[[], None]], None],
    ) -> None:
        self._on_change = on_change
        self._on_failure = on_failure
        self._call_apart = call_apart
        self._lock = threading.RLock()
        self._by_sid: dict[str, Connection] = {}
        self._by_eio_sid: dict[str, tuple[Connection, ...]] = {}
        self._counts: dict[tuple[str, ConnectionState], int] = {}

    def gauges(self) -> dict[str, int]:
        """Return the number of connections that are closing."""
        return {"connections:closing": self.count(ConnectionState.CLOSING)}

    def __getitem__(self, sid: str) -> Connection:
        return self._by_sid[sid]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._by_sid))

    def __len__(self) -> int:
        return len(self._by_sid)

    def __contains__(self, sid: object) -> bool:
        return sid in self._by_sid

    def values(self) -> ValuesView[Connection]:
        """Return a snapshot of the connections."""
        return self._by_sid.copy().values()

    def items(self) -> ItemsView[str, Connection]:
        """Return a snapshot of the connections with their session ids."""
        return self._by_sid.copy().items()

    def count(
        self, state: ConnectionState | str | None = None, namespace: str | None = None
    ) -> int:
        """Return the number of connections.

        Args:
            state: Count only those in this state, such as ``"open"``.
            namespace: Count only those in this namespace.

        Raises:
            ValueError: There is no such state.
        """
        wanted = None if state is None else ConnectionState(state)
        with self._lock:
            return sum(
                count
                for (where, what), count in self._counts.items()
                if wanted in (None, what) and namespace in (None, where)
            )

    # Internal

    def find(self, sid: object) -> Connection | None:
        """Return the connection of *sid*, or ``None``; accepts unhashable values, too."""
        return self._by_sid.get(sid) if isinstance(sid, str) else None

    def transport_session(self, sid: str) -> str | None:
        """Return the id of a client's transport session; ``None`` if it is gone."""
        connection = self.find(sid)
        return None if connection is None else connection.eio_sid

    def of(self, eio_sid: str) -> tuple[Connection, ...]:
        """Return the connections that share one transport session."""
        return self._by_eio_sid.get(eio_sid, ())

    def add(self, sid: str, namespace: str, eio_sid: str) -> Connection:
        """Register a new connection, in state ``connecting``."""
        connection = Connection(
            sid,
            namespace,
            eio_sid,
            lock=self._lock,
            on_change=self._changed,
            on_failure=self._on_failure,
            call_apart=self._call_apart,
        )
        with self._lock:
            self._by_sid[sid] = connection
            self._by_eio_sid[eio_sid] = (*self.of(eio_sid), connection)
            self._count(namespace, ConnectionState.CONNECTING, +1)
            self._on_change(connection, None, ConnectionState.CONNECTING)
        return connection

    def _changed(self, connection: Connection, old: ConnectionState, new: ConnectionState) -> None:
        # Called with the lock held, which all connections share.
        self._count(connection.namespace, old, -1)
        if new is ConnectionState.CLOSED:
            self._forget(connection)
        else:
            self._count(connection.namespace, new, +1)
        self._on_change(connection, old, new)

    def _count(self, namespace: str, state: ConnectionState, step: int) -> None:
        key = namespace, state
        count = self._counts.get(key, 0) + step
        if count:
            self._counts[key] = count
        else:  # clients may choose the names of namespaces: no entry may stay behind
            self._counts.pop(key, None)

    def _forget(self, connection: Connection) -> None:
        self._by_sid.pop(connection.sid, None)
        others = self.of(connection.eio_sid)
        if len(others) > 1:
            rest = tuple(other for other in others if other is not connection)
            self._by_eio_sid[connection.eio_sid] = rest
        elif others == (connection,):
            del self._by_eio_sid[connection.eio_sid]

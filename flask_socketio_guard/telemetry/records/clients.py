"""Records of clients: connections, refusals, protocol violations and lost messages."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...states import ConnectionState
from .base import NOTHING, Entry, Fold, Record, in_brackets, safe, signals

if TYPE_CHECKING:
    from collections.abc import Mapping

_REFUSAL_LEVELS = {
    "full": logging.WARNING,
    "address": logging.WARNING,
    "rate": logging.WARNING,
    "origin": logging.WARNING,
    "version": logging.WARNING,
    "elsewhere": logging.WARNING,
    "unjoined": logging.WARNING,
    "application": logging.INFO,
    "draining": logging.INFO,
}
"""Other reasons, such as an expired session or a malformed request, are logged at DEBUG."""


@dataclass(frozen=True)
class ConnectionChange(Record):
    """A client's connection to a namespace moved from *old* to *new*.

    Attributes:
        sid: Session id of the client in the namespace.
        namespace: Socket.IO namespace.
        old: The previous state; ``None`` for a new connection.
        new: The current state.
        reason: Why the connection closes; empty otherwise.
    """

    signal = signals.signal("connection-changed")
    counters = ("connections_opened", "connections_closed")
    level = logging.DEBUG  # there are four of these for every client

    sid: str
    namespace: str
    old: ConnectionState | None
    new: ConnectionState
    reason: str = ""

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count a connection that has opened, or that has closed after it was open."""
        if self.new is ConnectionState.OPEN:
            memory.add(self.sid)
            return {"connections_opened": 1}
        # A client that leaves during its connect handler is closed without having been open.
        if self.new is ConnectionState.CLOSED and self.sid in memory:
            memory.remove(self.sid)
            return {"connections_closed": 1}
        return NOTHING

    def entry(self) -> Entry:
        """Return a line with the old and the new state."""
        namespace = safe(self.namespace)
        was = "" if self.old is None else f", was {self.old}"
        return Entry(
            "connection [%s]: %s%s%s",
            (namespace, self.new, was, in_brackets(self.reason)),
            extra={
                "sid": self.sid,
                "namespace": namespace,
                "state": str(self.new),
                "reason": self.reason,
            },
        )


connection_changed = ConnectionChange.signal
"""A :class:`ConnectionChange`."""


@dataclass(frozen=True)
class HandshakeRefusal(Record):
    """A client was refused during its handshake.

    Attributes:
        reason: ``"full"``, ``"address"`` (too many clients of one address), ``"rate"``,
            ``"unjoined"`` (had not joined a namespace, and made room for a new client),
            ``"application"`` (its connect handler refused it), ``"draining"``, ``"upgrade"``
            (malformed headers), ``"session"`` (expired or unknown), ``"elsewhere"`` (its session
            was never in this process), ``"origin"``, ``"version"`` or ``"request"`` (otherwise
            invalid).
        detail: For people; never contains input of the client.
    """

    signal = signals.signal("handshake-refused")
    counters = ("handshakes_refused", "sessions_elsewhere")

    reason: str
    detail: str = ""

    @property
    def level(self) -> int:
        """WARNING if a limit or a setting of the server is the cause."""
        return _REFUSAL_LEVELS.get(self.reason, logging.DEBUG)

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count the refusal, and separately one for a session of another process."""
        if self.reason == "elsewhere":
            return {"handshakes_refused": 1, "sessions_elsewhere": 1}
        return {"handshakes_refused": 1}

    def entry(self) -> Entry:
        """Return a line with the reason; repeats are folded, except at DEBUG."""
        fold = None
        if self.level != logging.DEBUG:
            fold = Fold(("refused", self.reason), f"clients not let in: {self.reason}")
        arguments = (self.reason, in_brackets(self.detail))
        return Entry("a client was not let in: %s%s", arguments, fold, {"reason": self.reason})


handshake_refused = HandshakeRefusal.signal
"""A :class:`HandshakeRefusal`: a client was not let in."""


@dataclass(frozen=True)
class Violation(Record):
    """A client violated the protocol, and was disconnected for it.

    Attributes:
        reason: ``"websocket"``, ``"size"`` (too many bytes, or too many lists and objects),
            ``"packet"`` (undecodable), ``"payload"`` (of a polling request),
            ``"attachments"`` or ``"connects"`` (too many CONNECT packets).
        detail: For people; at most 200 characters are logged.
    """

    signal = signals.signal("protocol-violated")
    counters = ("protocol_violations",)
    level = logging.WARNING

    reason: str
    detail: str = ""

    def entry(self) -> Entry:
        """Return a line with the reason."""
        return Entry(
            "a client broke the protocol and was closed: %s%s",
            (self.reason, in_brackets(self.detail)),
            Fold(("violated", self.reason), f"clients broke the protocol: {self.reason}"),
            {"reason": self.reason},
        )


protocol_violated = Violation.signal
"""A :class:`Violation`: a client violated the Engine.IO, Socket.IO or WebSocket protocol."""


@dataclass(frozen=True)
class SendLoss(Record):
    """Messages to one client were dropped.

    Attributes:
        count: Number of messages.
        reason: ``"slow"`` (the send queue is full), ``"volatile"`` (volatile messages to a
            client that did not keep up) or ``"closed"`` (the client is gone).
    """

    signal = signals.signal("send-lost")
    counters = ("sends_dropped",)

    count: int
    reason: str

    @property
    def level(self) -> int:
        """WARNING if the client is too slow; other losses are expected."""
        return logging.WARNING if self.reason == "slow" else logging.DEBUG

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count the messages."""
        return {"sends_dropped": self.count}

    def entry(self) -> Entry:
        """Return a line with the number of messages and the reason."""
        fold = None
        if self.reason == "slow":
            repeated = f"message(s) to clients dropped: {self.reason}"
            fold = Fold(("send", self.reason), repeated, self.count)
        return Entry(
            "%d message(s) to a client dropped: %s",
            (self.count, self.reason),
            fold,
            {"count": self.count, "reason": self.reason},
        )


send_lost = SendLoss.signal
"""A :class:`SendLoss`: messages to a client were dropped."""


@dataclass(frozen=True)
class Sweep(Record):
    """Leftovers of connections that are gone were removed.

    Attributes:
        count: Number of entries removed.
        tables: Names of the tables that held them.
    """

    signal = signals.signal("connections-swept")
    counters = ("connections_swept",)
    level = logging.WARNING

    count: int
    tables: tuple[str, ...]

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Count the entries."""
        return {"connections_swept": self.count}

    def entry(self) -> Entry:
        """Return a line with the number of entries and the tables."""
        return Entry(
            "%d leftover(s) of connections removed from %s",
            (self.count, ", ".join(self.tables)),
            Fold("swept", "leftover(s) of connections removed", self.count),
            {"count": self.count, "tables": self.tables},
        )


connections_swept = Sweep.signal
"""A :class:`Sweep`: leftovers of connections were removed."""

"""A TCP proxy that can lose its connections without telling anyone."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.ports import free_port

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_CHUNK = 65_536
_JOIN_TIMEOUT = 5.0


@dataclass(eq=False)
class _Link:
    """Two sockets, and whether bytes still pass between them."""

    client: socket.socket
    server: socket.socket
    is_lost: threading.Event = field(default_factory=threading.Event)
    is_mute: threading.Event = field(default_factory=threading.Event)

    def shut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class TcpProxy:
    """Forwards TCP connections to a port on the loopback interface.

    Each connection has two threads. All methods may be called from any thread.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = free_port()
        self._listening: socket.socket | None = None
        self._links: set[_Link] = set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._fatal: bytes | None = None
        self._muting: bytes | None = None
        self.muted = 0

    def start(self) -> None:
        """Begin to accept connections."""
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._spawn(self._accept, self._listening)

    def black_hole(self) -> int:
        """Let the connections that exist now swallow everything, without FIN or RST.

        What either side sends from now on is taken and thrown away, and that a side closes is
        not passed on, as when a firewall forgets a connection. New connections work.

        Returns:
            How many connections were lost.
        """
        with self._lock:
            lost = [link for link in self._links if not link.is_lost.is_set()]
            for link in lost:
                link.is_lost.set()
        return len(lost)

    def swallow(self, words: bytes | None) -> None:
        """From now on let each connection on which the client sends *words* get lost.

        It is lost as with :meth:`black_hole`, and *words* are not passed on. ``None`` ends that
        for connections to come.
        """
        self._fatal = words

    def swallow_answers(self, words: bytes | None) -> None:
        """From now on close each connection on which the client sends *words*, without an answer.

        *words* are passed on, and :attr:`muted` counts them: the server does what they ask for.
        ``None`` ends that.
        """
        self._muting = words

    def drop(self) -> int:
        """Close the connections that exist now, visibly for both sides; return their number."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.shut()
        return len(links)

    def stop(self) -> None:
        """Close everything and wait for the threads."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        self.drop()
        for thread in list(self._threads):
            thread.join(_JOIN_TIMEOUT)
        for end in self._sockets:
            end.close()

    def __enter__(self) -> Self:
        """Start the proxy."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the proxy."""
        self.stop()

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5.0)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            with self._lock:
                self._links.add(link)
                self._sockets += [client, server]
            self._spawn(self._pump, link, client, server)
            self._spawn(self._pump, link, server, client)

    def _pump(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        while True:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            if source is link.client and self._fatal is not None and self._fatal in data:
                link.is_lost.set()
            if source is link.client and self._muting is not None and self._muting in data:
                self.muted += 1
                link.is_mute.set()
            if source is link.server and link.is_mute.is_set():
                break
            if link.is_lost.is_set():
                if not data:
                    return
                continue
            if not data:
                break
            try:
                target.sendall(data)
            except OSError:
                break
        with self._lock:
            self._links.discard(link)
        link.shut()

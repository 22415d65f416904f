"""Real servers and clients in this process: gevent's, Werkzeug's, and the other end of a WebSocket.

A client works on any socket, gevent's or the standard library's, and has no task of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
import gevent.socket
import pytest
from flask import Flask
from flask_socketio import SocketIO
from gevent import pywsgi
from geventwebsocket.handler import WebSocketHandler
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri
from werkzeug.serving import make_server

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import AppGuard, all_guards
from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, ThreadRuntime
from flask_socketio_guard.telemetry import records as signals
from tests.support.unit_support import wait_for
from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from websockets.extensions import ClientExtensionFactory, Extension

_TIMEOUT = USUAL_TIMEOUT
_PATH = "/socket.io/?EIO=4&transport="


class Ended(Exception):
    """The server has closed the WebSocket, or ended the connection."""


class Peer:
    """The client's end of a WebSocket.

    Args:
        sock: Connected.
        extensions: What both ends have agreed on.
        is_answering: Whether a close frame is answered, and a ping.
    """

    def __init__(
        self, sock: Any, *, extensions: list[Extension] | None = None, is_answering: bool = True
    ) -> None:
        self.sock = sock
        self.is_answering = is_answering
        self.has_ended = False
        """Whether the server has ended the TCP connection, as far as was read."""
        self.response: Response | None = None
        self.frames: list[Frame] = []
        """What was received, control frames too, and not yet read."""
        self.protocol = ClientProtocol(
            parse_uri("ws://test/"), state=State.OPEN, max_size=None, logger=_quiet
        )
        self.protocol.extensions = extensions or []

    def shake_hands(
        self,
        path: str,
        headers: dict[str, str] | None = None,
        extensions: list[ClientExtensionFactory] | None = None,
    ) -> None:
        """Ask for a WebSocket and wait for the answer, which is in :attr:`response`."""
        self.protocol = ClientProtocol(
            parse_uri(f"ws://test{path}"), max_size=None, extensions=extensions, logger=_quiet
        )
        request = self.protocol.connect()
        for name, value in (headers or {}).items():
            if name in request.headers:
                del request.headers[name]
            request.headers[name] = value
        self.protocol.send_request(request)
        self._flush()
        while self.response is None and self._receive():
            pass

    @property
    def closed(self) -> tuple[int, str] | None:
        """Code and reason of the server's close frame, once it was read."""
        close = self.protocol.close_rcvd
        return None if close is None else (close.code, close.reason)

    def send(self, *messages: str | bytes) -> None:
        """Send messages, all at once."""
        for message in messages:
            if isinstance(message, str):
                self.protocol.send_text(message.encode())
            else:
                self.protocol.send_binary(message)
        self._flush()

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def send_close(self, code: int = 1000, reason: str = "") -> None:
        """Begin to close."""
        self.protocol.send_close(code, reason)
        self._flush()

    def read(self) -> str | bytes:
        """Return the next message.

        Raises:
            Ended: There is none.
        """
        while True:
            while self.frames:
                frame = self.frames.pop(0)
                if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
                    data = bytes(frame.data)
                    return data.decode() if frame.opcode is Opcode.TEXT else data
            if not self._receive():
                raise Ended

    def read_until(self, prefix: str) -> str:
        """Return the next text that begins with *prefix*; others are dropped."""
        while True:
            message = self.read()
            if isinstance(message, str) and message.startswith(prefix):
                return message

    def read_rest(self) -> list[str | bytes]:
        """Return all messages until the server has ended the connection."""
        messages = []
        with contextlib.suppress(Ended):
            while True:
                messages.append(self.read())
        return messages

    def read_frame(self) -> Frame:
        """Return the next frame, whatever it is.

        Raises:
            Ended: There is none.
        """
        while not self.frames:
            if not self._receive():
                raise Ended
        return self.frames.pop(0)

    def join(self, namespace: str = "/") -> str:
        """Join *namespace* and return the session id in it."""
        prefix = "40" if namespace == "/" else f"40{namespace},"
        self.send(prefix)
        return str(json.loads(self.read_until(prefix)[len(prefix) :])["sid"])

    def vanish(self) -> None:
        """End the TCP connection without a word."""
        self.sock.close()

    def _receive(self) -> bool:
        if self.has_ended:
            return False
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.has_ended = True
            self.protocol.receive_eof()
            return False
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            if isinstance(event, Frame):
                self.frames.append(event)
            elif isinstance(event, Response):
                self.response = event
        if self.protocol.handshake_exc is not None:
            self.response = getattr(self.protocol.handshake_exc, "response", self.response)
        if self.is_answering:
            with contextlib.suppress(OSError):
                self._flush()
        return True

    def _flush(self) -> None:
        self.sock.sendall(b"".join(self.protocol.data_to_send()))


_quiet = logging.getLogger("tests.support.unit_websocket")
_quiet.setLevel(logging.CRITICAL)


@dataclass
class Answer:
    """The answer to an HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body."""
        return self.body.decode()


@dataclass
class Served:
    """An application on a real server in this process."""

    app: Flask
    socketio: SocketIO
    guard: SocketIOGuard | None
    runtime: Runtime
    address: tuple[str, int]
    errors: io.StringIO = field(default_factory=io.StringIO)
    """What the server says of exceptions."""

    @property
    def inner(self) -> AppGuard:
        """What guards the application."""
        return next(guard for guard in all_guards() if guard.app is self.app)

    @property
    def engine(self) -> Any:
        """The Engine.IO server."""
        return self.socketio.server.eio

    def counter(self, name: str) -> int:
        """Return a counter of the guard."""
        assert self.guard is not None
        return self.guard.counters[name]

    def collect(self, signal: Any) -> list[Any]:
        """Return a list that the records of *signal* are appended to from now on."""
        records: list[Any] = []
        # The application lives longer than the subscription is needed.
        self.app.extensions.setdefault("collected", []).append(
            signals.subscribe(signal, self.app, records.append)
        )
        return records

    def wait_for(self, condition: Callable[[], object], message: str = "it did not happen") -> None:
        """Wait until *condition* holds."""
        wait_for(self.runtime, condition, message=message)

    def connect(self) -> Any:
        """Return a connected socket."""
        module: Any = gevent.socket if isinstance(self.runtime, GeventRuntime) else socket
        sock = module.create_connection(self.address, timeout=_TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open_sockets.append(sock)
        return sock

    def websocket(
        self,
        query: str = "",
        *,
        headers: dict[str, str] | None = None,
        extensions: list[ClientExtensionFactory] | None = None,
    ) -> Peer:
        """Return a client after its handshake; the Engine.IO OPEN packet waits to be read."""
        peer = Peer(self.connect())
        peer.shake_hands(f"{_PATH}websocket{query}", headers, extensions)
        return peer

    def joined(self, namespace: str = "/") -> Peer:
        """Return a client over WebSocket that has joined *namespace*."""
        peer = self.websocket()
        peer.read_until("0{")
        peer.join(namespace)
        return peer

    def polling(self, query: str = "", headers: dict[str, str] | None = None) -> Polling:
        """Return a client over long polling that has a session."""
        client = Polling(self, query)
        client.open(headers)
        return client

    def request(
        self, method: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request over a connection of its own, and return the answer."""
        sock = self.connect()
        fields = {"Host": "test", "Content-Length": str(len(body)), **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {fields[key]}" for key in fields)]
        sock.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)
        return read_answer(sock, method)


def read_answer(sock: Any, method: str = "GET") -> Answer:
    """Read an HTTP response, and close the socket."""
    with contextlib.closing(http.client.HTTPResponse(sock, method=method)) as response:
        response.begin()
        answer = Answer(response.status, dict(response.getheaders()), response.read())
    sock.close()
    return answer


class Polling:
    """A client over long polling."""

    def __init__(self, served: Served, query: str = "") -> None:
        self.served = served
        self.sid = ""
        self.packets: list[str] = []
        """What was received and not yet read."""
        self._query = query

    @property
    def path(self) -> str:
        """Path and query of the session."""
        sid = f"&sid={self.sid}" if self.sid else ""
        return f"{_PATH}polling{sid}{self._query}"

    def open(self, headers: dict[str, str] | None = None) -> Answer:
        """Make a session."""
        answer = self.served.request("GET", self.path, headers=headers)
        assert answer.status == 200, answer.text
        first, *self.packets = answer.text.split("\x1e")
        if first.startswith("0"):
            self.sid = json.loads(first[1:])["sid"]
        return answer

    def join(self, namespace: str = "/") -> str:
        """Join *namespace* and return the session id in it."""
        prefix = "40" if namespace == "/" else f"40{namespace},"
        self.post(prefix)
        return str(json.loads(self.read_until(prefix)[len(prefix) :])["sid"])

    def get(self) -> Answer:
        """Ask for packets."""
        return self.served.request("GET", self.path)

    def begin_get(self) -> Any:
        """Ask for packets and do not wait; :func:`read_answer` does."""
        sock = self.served.connect()
        lines = [f"GET {self.path} HTTP/1.1", "Host: test", "Connection: close", "", ""]
        sock.sendall("\r\n".join(lines).encode())
        return sock

    def post(self, *packets: str, headers: dict[str, str] | None = None) -> Answer:
        """Send packets."""
        body = "\x1e".join(packets).encode()
        return self.served.request("POST", self.path, body=body, headers=headers)

    def read_until(self, prefix: str) -> str:
        """Return the next packet that begins with *prefix*; others are dropped."""
        while True:
            while self.packets:
                packet = self.packets.pop(0)
                if packet.startswith(prefix):
                    return packet
            answer = self.get()
            assert answer.status == 200, answer.text
            self.packets += answer.text.split("\x1e")


class PlainHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """Hands the socket to the application and takes no answer, as gunicorn's gevent worker does."""

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ["gunicorn.socket"] = self.socket
        return environ

    def run_application(self) -> None:
        try:
            super().run_application()
        except StopIteration:
            self.close_connection = True


_KINDS: dict[str, type[pywsgi.WSGIHandler]] = {
    "gevent-websocket": WebSocketHandler,
    "gevent": PlainHandler,
}
KINDS = (*_KINDS, "threads")
"""The servers that there are."""

_open_sockets: list[Any] = []


@contextlib.contextmanager
def serve(app: Any, kind: str, errors: io.StringIO) -> Iterator[tuple[str, int]]:
    """Serve a WSGI application on the server *kind*; what it says of exceptions goes to *errors*.

    Yields its address.
    """
    if kind in _KINDS:
        server = pywsgi.WSGIServer(
            ("127.0.0.1", 0), app, handler_class=_KINDS[kind], log=None, error_log=errors
        )
        server.start()
        hub: Any = gevent.get_hub()
        before, hub.exception_stream = hub.exception_stream, errors
        try:
            yield server.address[:2]
        finally:
            server.stop(timeout=1.0)
            hub.exception_stream = before
        return
    logger = logging.getLogger("werkzeug")
    handler = logging.StreamHandler(errors)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.ERROR)
    threaded = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=threaded.serve_forever, args=[0.02], name="server")
    thread.start()
    try:
        yield threaded.server_address[:2]  # type: ignore[misc]
    finally:
        threaded.shutdown()
        thread.join()
        threaded.server_close()
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def make_served(nothing_left_behind: None) -> Iterator[Callable[..., Served]]:
    """Return a function that serves an application.

    It takes a *kind* of server, *options* for ``SocketIO``, and settings of the guard;
    with ``is_guarded=False`` there is none.
    """
    stack = contextlib.ExitStack()
    made: list[Served] = []

    def make(
        kind: str = "gevent-websocket",
        *,
        options: dict[str, Any] | None = None,
        is_guarded: bool = True,
        **settings: Any,
    ) -> Served:
        app = Flask("served")
        mode = "threading" if kind == "threads" else "gevent"
        socketio = SocketIO(app, async_mode=mode, **(options or {}))
        socketio.on_event("echo", lambda *args: args)
        guard = None
        if is_guarded:
            guard = SocketIOGuard(app, socketio, **{"blocking_timeout": None, **settings})
        errors = io.StringIO()
        address = stack.enter_context(serve(app, kind, errors))
        runtime: Runtime = ThreadRuntime() if kind == "threads" else GeventRuntime()
        made.append(Served(app, socketio, guard, runtime, address, errors))
        return made[-1]

    with stack:
        yield make
        while _open_sockets:
            _open_sockets.pop().close()
        for served in made:
            if served.guard is not None:
                served.socketio.server.eio.disconnect()
                served.wait_for(served.inner.is_quiet, "clients that are gone leave work behind")
                served.inner.stop(2.0)
    for served in made:
        if served.guard is not None:
            assert "Traceback" not in served.errors.getvalue(), served.errors.getvalue()

"""Patches for gevent's and gevent-websocket's handlers; imported only if both are installed."""

from __future__ import annotations

import contextlib
import socket as sockets
from functools import partial
from io import BufferedReader, RawIOBase
from typing import TYPE_CHECKING, Any

from geventwebsocket.handler import WebSocketHandler
from geventwebsocket.websocket import WebSocket

from ...telemetry.records import logger
from .websocket import (
    EXTENSIONS,
    Silence,
    agree_on_extensions,
    is_answer_held,
    is_compression_offered,
    is_too_long,
    taken_classes,
    upgrade_problem,
    wants_websocket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class _TakenWebSocket(WebSocket):
    """A WebSocket whose socket the guard has taken over; there is nothing left to close.

    gevent-websocket's own ``__del__`` would build two classes and two exceptions to find that out.
    """

    __slots__ = ()

    def __del__(self) -> None:
        pass


class _NoAddress(str):
    """The address of a client behind a Unix socket: empty, yet equal to no other address."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class _BoundedReader(RawIOBase):
    """Reads the requests of a connection and ends it when a read times out.

    Source:
        nginx, ``client_header_timeout``, ``client_body_timeout`` and ``keepalive_timeout``:
        the time between two reads.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.is_bounded = True
        self._has_ended = False

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` requires."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the bytes that are available into *buffer* and return their number.

        Raises:
            TimeoutError: Nothing arrived in time. Later reads return 0, so the rest of this
                request cannot be mistaken for the next one.
        """
        if self._has_ended:
            return 0
        timeout = Silence.timeout
        sock = self._sock
        if timeout is None or not self.is_bounded or sock.gettimeout() is not None:
            return int(sock.recv_into(buffer))
        sock.settimeout(timeout)  # nothing is written meanwhile
        try:
            return int(sock.recv_into(buffer))
        except TimeoutError:
            self._has_ended = True
            raise
        finally:
            sock.settimeout(None)


class _Reset(BaseException):
    """The client disconnected before its request was read."""


def patch_gevent_websocket() -> None:
    """Make gevent-websocket's handler tolerate malformed requests and early disconnects.

    If ``Sec-WebSocket-Key`` is not base64, and for some other headers, the original raises
    where it should answer 400. It stores its clients by address, and all clients behind a Unix
    socket share one. gevent itself prints a traceback or two for each client that resets its
    connection during a request, and closes connections without announcing it.
    """
    if not _originals:
        # gevent's own handler closes the connection, with or without gevent-websocket.
        base = next(cls for cls in WebSocketHandler.__mro__ if "finalize_headers" in vars(cls))
        _originals["finalize_headers"] = base.finalize_headers
        base.finalize_headers = _finalize_headers
        _originals["__init__"] = base.__init__
        base.__init__ = _init
        for name, replacement in (
            ("upgrade_websocket", _upgrade_websocket),
            ("read_request", _read_request),
            ("handle", _handle),
            ("run_websocket", _run_websocket),
        ):
            _originals[name] = getattr(WebSocketHandler, name)
            setattr(WebSocketHandler, name, replacement)
        taken_classes[WebSocket] = _TakenWebSocket


_originals: dict[str, Callable[..., Any]] = {}


def _init(handler: Any, sock: Any, address: Any, server: Any, rfile: Any = None) -> None:
    if rfile is None:
        rfile = BufferedReader(_BoundedReader(sock))
        with contextlib.suppress(OSError):
            sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    _originals["__init__"](handler, sock, address, server, rfile)


def _read_request(handler: Any, requestline: Any) -> Any:
    try:
        is_valid = _originals["read_request"](handler, requestline)
    except OSError as exc:
        raise _Reset from exc  # gevent prints any Exception and sends no response
    # Check before anything parses these headers, as every later stage does. The connection
    # is closed after a request that is refused here.
    if is_valid and is_too_long(
        *handler.headers.get_all("Connection", ()), *handler.headers.get_all("Upgrade", ())
    ):
        # The application is not known yet, so the refusal is logged but not counted.
        logger.debug("a request was refused: its Connection or Upgrade header is too long")
        return False
    return is_valid


def _handle(handler: Any) -> None:
    try:
        _originals["handle"](handler)
    except (_Reset, ConnectionError):
        logger.debug("a client disconnected before its request was answered")


def _finalize_headers(handler: Any) -> None:
    """Announce that the connection will be closed.

    Otherwise a client reuses the connection for its next request, which fails.

    Source:
        RFC 9112, section 9.6: a server that receives the "close" option SHOULD send it in
        its final response on that connection. Section 9.3: it is one of a list.
    """
    _originals["finalize_headers"](handler)
    asked = handler.environ.get("HTTP_CONNECTION", "")
    if "," in asked and "close" in [option.strip().lower() for option in asked.split(",")]:
        handler.close_connection = True
    if handler.close_connection and not any(
        name.lower() == b"connection" for name, _ in handler.response_headers
    ):
        handler.response_headers.append((b"Connection", b"close"))


def _run_websocket(handler: Any) -> None:
    if not handler.client_address:
        handler.client_address = _NoAddress()
    if "write" in vars(handler):
        handler.application = partial(_run_held, handler, handler.application)
    _originals["run_websocket"](handler)


def _run_held(
    handler: Any, application: Any, environ: dict[str, Any], start_response: object
) -> Iterable[bytes]:
    """Call the application and send its response if it did not accept the WebSocket.

    A client that is refused after it has received the 101 waits for its own timeout.
    """
    del start_response
    answer: list[Any] = []

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        del exc_info
        answer[:] = [status, headers]
        return lambda data: None

    try:
        result = application(environ, start)
        try:
            body = b"".join(result)
        finally:
            if hasattr(result, "close"):
                result.close()
    finally:
        is_held = vars(handler).pop("write", None) is not None
        if is_held:
            handler.websocket.closed = True  # it was never opened
    if is_held and answer:
        _answer(handler, answer[0], answer[1], body)
    return []


def _answer(handler: Any, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
    """Send a response in place of the prepared 101."""
    own = [each for each in headers if each[0].lower() not in ("content-length", "connection")]
    own += [("Content-Length", str(len(body))), ("Connection", "close")]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in own), "", ""]
    handler.headers_sent = True
    handler.status, handler._orig_status = status.encode("latin-1"), status
    handler._sendall("\r\n".join(lines).encode("latin-1") + body)


def _write_later(data: bytes) -> None:
    """Hold back the 101 response."""


def _upgrade_websocket(handler: Any) -> Any:
    environ = handler.environ
    if not wants_websocket(environ) or environ.get("REQUEST_METHOD") != "GET":
        return None
    environ.setdefault("SERVER_PROTOCOL", handler.request_version)
    if upgrade_problem(environ) is not None:
        handler.start_response("400 Bad Request", [("Content-Type", "text/plain")])
        return [b"Bad Request"]
    is_compressing = is_compression_offered(environ.get("PATH_INFO", ""))
    header, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    result = _originals["upgrade_websocket"](handler)
    if environ.get("wsgi.websocket") is not None:
        # Frames follow, and the code that reads them has its own deadlines.
        getattr(handler.rfile, "raw", handler).is_bounded = False
    if environ.get("wsgi.websocket") is not None and is_answer_held(environ.get("PATH_INFO", "")):
        handler.write = _write_later
    if header is not None and environ.get("wsgi.websocket") is not None:
        handler.response_headers.append((b"Sec-WebSocket-Extensions", header.encode()))
        environ[EXTENSIONS] = extensions
    return result

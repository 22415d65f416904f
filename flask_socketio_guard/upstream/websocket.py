"""WebSocket handshakes: what is asked for, and the socket underneath.

Under gevent-websocket the handshake has been answered before the application is
called; under gunicorn's plain gevent worker it is answered here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from io import BufferedReader, BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from geventwebsocket.handler import WebSocketHandler
from geventwebsocket.websocket import Stream, WebSocket
from websockets.exceptions import InvalidHeader, NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.headers import parse_connection, parse_extension, parse_upgrade
from websockets.utils import accept_key

from ..signals import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment
    from websockets.extensions import Extension

_VERSION = "13"
_KEY = re.compile("[A-Za-z0-9+/]{22}==")  # 16 bytes
_USUAL = frozenset({("websocket", "Upgrade"), ("websocket", "keep-alive, Upgrade")})
_MAX_REASON = 123  # bytes; a control frame holds 125, and two are the code
_EXTENSIONS = "guard.websocket_extensions"
_UNREAD = "guard_unread"


class RawSocket(NamedTuple):
    """A connection on which WebSocket frames follow.

    Attributes:
        sock: The socket.
        read_first: Reads what is there, like ``recv``; the HTTP parser may have
            read more than the request.
        extensions: What was agreed on.
        websocket: gevent-websocket's object, or ``None`` where there is none.
    """

    sock: Any
    read_first: Callable[[int], bytes]
    extensions: list[Extension]
    websocket: Any


def upgrade_problem(environ: WSGIEnvironment) -> str | None:
    """Say what is wrong with a request for a WebSocket, or ``None``.

    Source:
        RFC 6455, section 4.2.1.
    """
    if environ.get("REQUEST_METHOD") != "GET":
        return "the method is not GET"
    if environ.get("SERVER_PROTOCOL") != "HTTP/1.1":
        return "the protocol is not HTTP/1.1"
    upgrade = environ.get("HTTP_UPGRADE", "")
    connection = environ.get("HTTP_CONNECTION", "")
    if (upgrade, connection) not in _USUAL:
        try:
            upgrades = [word.lower() for word in parse_upgrade(upgrade)]
            connections = [word.lower() for word in parse_connection(connection)]
        except InvalidHeader:
            return "Upgrade or Connection cannot be read"
        # A choice of protocols, which the RFC allows, is nothing that the servers understand.
        if upgrades != ["websocket"] or "upgrade" not in connections:
            return "Upgrade or Connection asks for no WebSocket"
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION", "").strip() != _VERSION:
        return "Sec-WebSocket-Version is not 13"
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "").strip()
    if _KEY.fullmatch(key):
        return None
    try:
        base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        return "Sec-WebSocket-Key is not base64"
    return "Sec-WebSocket-Key is not 16 bytes"


def wants_websocket(environ: WSGIEnvironment) -> bool:
    """Say whether a request asks for a WebSocket, rightly or not."""
    return "websocket" in environ.get("HTTP_UPGRADE", "").lower()


def take_socket(environ: WSGIEnvironment, *, is_compressing: bool) -> RawSocket | None:
    """Take the connection of a request over from its server.

    The handshake is complete afterwards.

    Returns:
        ``None`` if the server does not let go of it.
    """
    websocket = environ.get("wsgi.websocket")
    if websocket is not None:
        handler = websocket.handler
        extensions = environ.get(_EXTENSIONS, [])
        read_first = handler.rfile.read1
        is_read = vars(handler).get(_UNREAD) == 0
        if is_read:
            # Its buffer is larger than all else that a connection keeps of its request.
            handler.rfile.close()
            read_first = handler.socket.recv
        if is_read or not environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"] = BytesIO()
        return RawSocket(handler.socket, read_first, extensions, websocket)
    sock = environ.get("gunicorn.socket")
    if sock is None:
        return None
    header, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    environ.pop("eventlet.input", None)  # Engine.IO makes a class for it
    if not environ.get("CONTENT_LENGTH"):
        environ["wsgi.input"] = BytesIO()  # what follows are frames, and no handler's to read
    sock.sendall(_acceptance(environ, header))
    return RawSocket(sock, sock.recv, extensions, None)


def _acceptance(environ: WSGIEnvironment, extensions: str | None) -> bytes:
    """Return the answer to a handshake.

    Source:
        RFC 6455, section 4.2.2.
    """
    key = accept_key(environ["HTTP_SEC_WEBSOCKET_KEY"].strip())
    more = "" if extensions is None else f"Sec-WebSocket-Extensions: {extensions}\r\n"
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {key}\r\n{more}\r\n"
    ).encode("latin-1")


def agree_on_extensions(
    environ: WSGIEnvironment, *, is_compressing: bool
) -> tuple[str | None, list[Extension]]:
    """Choose from the extensions that a client offers.

    Returns:
        The header that says so, and the extensions.

    Source:
        RFC 7692, section 5: the first acceptable offer of permessage-deflate.
    """
    offered = environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS", "")
    if not is_compressing or not offered:
        return None, []
    factory = ServerPerMessageDeflateFactory()
    with contextlib.suppress(InvalidHeader):
        for name, parameters in parse_extension(offered):
            if name != factory.name:
                continue
            with contextlib.suppress(NegotiationError):
                agreed, extension = factory.process_request_params(parameters, [])
                words = [name, *(key if not value else f"{key}={value}" for key, value in agreed)]
                return "; ".join(words), [extension]
    return None, []


def close_frame(code: int, reason: str) -> bytes:
    """Return a close frame.

    Source:
        RFC 6455, section 5.5.1: code, then a reason of at most 123 bytes.
    """
    body = Close(CloseCode(code), cut_reason(reason)).serialize()
    return Frame(Opcode.CLOSE, body).serialize(mask=False)


def cut_reason(reason: str) -> str:
    """Return as much of *reason* as a close frame holds."""
    return reason.encode()[:_MAX_REASON].decode(errors="ignore")


def refuse_websocket(websocket: Any, reason: str) -> None:
    """Close a WebSocket that gevent-websocket has accepted, with "try again later".

    gevent-websocket's own ``close`` takes a code and leaves it out of the frame.

    Args:
        websocket: ``environ["wsgi.websocket"]``.
        reason: At most 123 bytes; the client sees it.
    """
    with contextlib.suppress(OSError):
        websocket.handler.socket.sendall(close_frame(CloseCode.TRY_AGAIN_LATER, reason))
    websocket.closed = True  # the handler would send a second close frame


_compressing_paths: set[str] = set()


def offer_compression(path: str) -> None:
    """Agree to permessage-deflate on requests below *path*, in this process."""
    _compressing_paths.add(path)


class _Reset(BaseException):
    """The client is gone before its request was read."""


def mend_gevent_websocket() -> None:
    """Let gevent-websocket's handler bear clients that are odd or leave early, and be quick.

    On a ``Sec-WebSocket-Key`` that is no base64, and on some other headers, it
    raises where it should answer 400. And gevent prints a traceback or two for each client
    that resets its connection within a request.

    Half of what it costs to connect is spent before the application is called, most of
    it on parsing the headers as if they were those of an e-mail.
    """
    if not _originals:
        for name, mended in (
            ("upgrade_websocket", _upgrade_websocket),
            ("read_request", _read_request),
            ("handle", _handle),
            ("MessageClass", _read_headers),
        ):
            _originals[name] = getattr(WebSocketHandler, name)
            setattr(WebSocketHandler, name, mended)


_originals: dict[str, Callable[..., Any]] = {}


def _read_request(handler: Any, requestline: Any) -> Any:
    try:
        return _originals["read_request"](handler, requestline)
    except OSError as exc:
        raise _Reset from exc  # gevent prints any Exception, and then answers nobody


def _handle(handler: Any) -> None:
    try:
        _originals["handle"](handler)
    except (_Reset, ConnectionError):
        logger.debug("a client was gone before its request was answered")


def _upgrade_websocket(handler: Any) -> Any:
    environ = handler.environ
    if not wants_websocket(environ) or environ.get("REQUEST_METHOD") != "GET":
        return None
    environ.setdefault("SERVER_PROTOCOL", handler.request_version)
    if upgrade_problem(environ) is not None:
        handler.start_response("400 Bad Request", [("Content-Type", "text/plain")])
        return [b"Bad Request"]
    is_compressing = any(environ.get("PATH_INFO", "").startswith(p) for p in _compressing_paths)
    header, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    if _is_plain(handler):
        _accept(handler, header, extensions)
        return None
    result = _originals["upgrade_websocket"](handler)
    if header is not None and environ.get("wsgi.websocket") is not None:
        handler.response_headers.append((b"Sec-WebSocket-Extensions", header.encode()))
        environ[_EXTENSIONS] = extensions
    return result


_ANSWERING = ("upgrade_connection", "start_response", "write", "finalize_headers")


def _is_plain(handler: Any) -> bool:
    """Say whether the handler would add nothing of its own to the answer."""
    cls = type(handler)
    return "HTTP_SEC_WEBSOCKET_PROTOCOL" not in handler.environ and (
        cls is WebSocketHandler
        or all(getattr(cls, name) is getattr(WebSocketHandler, name) for name in _ANSWERING)
    )


def _accept(handler: Any, header: str | None, extensions: list[Extension]) -> None:
    """Answer a handshake that has been looked at, and leave all as gevent-websocket does."""
    environ = handler.environ
    answer = _acceptance(environ, header)
    handler.websocket = environ["wsgi.websocket"] = _WebSocket(environ, Stream(handler), handler)
    environ["wsgi.websocket_version"] = _VERSION
    if header is not None:
        environ[_EXTENSIONS] = extensions
    handler.status = b"101 Switching Protocols"
    handler.code = 101
    handler.response_headers = []
    handler.provided_date = True
    handler.provided_content_length = False
    handler.connection_upgraded = True
    handler.close_connection = True
    handler.headers_sent = True
    handler.response_length = len(answer)
    handler.socket.sendall(answer)


class _WebSocket(WebSocket):
    """gevent-websocket's, which makes two classes to close what is closed already."""

    __slots__ = ()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            super().__del__()


_HEADERS = re.compile(r"(?:[A-Za-z0-9-]+: [!-~][ -~]*\r\n)+\r\n")
_MAX_HEADERS = 100  # as http.client's

_Headers: Any = type(WebSocketHandler.headers)


def _read_headers(handler: Any, rfile: Any, *args: Any) -> Any:
    """Read the headers of a request.

    Those that have arrived as a whole, and in which there is nothing odd, are taken as
    they are. All others are left to gevent.
    """
    setattr(handler, _UNREAD, None)
    plain = _plain_lines(rfile)
    if plain is None:
        return _originals["MessageClass"](handler, rfile, *args)
    lines, unread = plain
    setattr(handler, _UNREAD, unread)
    headers = _Headers()
    for line in lines:
        name, _, value = line.partition(": ")
        headers.set_raw(name, value)
    return headers


def _plain_lines(rfile: Any) -> tuple[list[str], int] | None:
    """Return the lines of headers, and how much has arrived after them."""
    if type(rfile) is not BufferedReader:
        return None
    arrived = rfile.peek()
    length = arrived.find(b"\r\n\r\n") + 4
    head = arrived[:length].decode("latin-1")
    if length < 4 or not _HEADERS.fullmatch(head):
        return None
    lines = head[:-4].split("\r\n")
    if len(lines) >= _MAX_HEADERS:
        return None
    rfile.read(length)
    return lines, len(arrived) - length

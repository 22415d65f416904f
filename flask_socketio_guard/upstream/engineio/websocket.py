"""WebSocket handshakes: checks of the request, the response, and access to the socket.

Under gevent-websocket the handshake is complete before the application is called; under
gunicorn's plain gevent worker it is completed here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import sys
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from websockets.exceptions import InvalidHeader, NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.headers import parse_connection, parse_extension, parse_upgrade
from websockets.utils import accept_key

from ...core.runtime import gevent_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from websockets.extensions import Extension

_VERSION = "13"
_LONGEST_USUAL = 64  # characters; longer headers are not cached, as strangers choose them
_LONGEST = 1024  # characters
_MAX_REASON = 123  # bytes; a control frame holds 125, two of them for the code
EXTENSIONS = "guard.websocket_extensions"
"""Environ key of the extensions that were agreed on before the application is called."""

_LEFT = "guard.has_left"

taken_classes: dict[type, type] = {}
"""The class that a server's WebSocket object gets when its socket is taken over, by its class."""


class RawSocket(NamedTuple):
    """A connection that carries WebSocket frames from now on.

    Attributes:
        sock: The socket.
        read_first: Reads like ``recv``, but returns bytes first that the HTTP parser has read
            beyond the request.
        extensions: The negotiated extensions, in order.
        websocket: gevent-websocket's object, or ``None`` under other servers.
    """

    sock: Any
    read_first: Callable[[int], bytes]
    extensions: list[Extension]
    websocket: Any


def upgrade_problem(environ: WSGIEnvironment) -> str | None:
    """Return what is wrong with a WebSocket handshake, or ``None`` if it is valid.

    Source:
        RFC 6455, section 4.2.1.
    """
    if environ.get("REQUEST_METHOD") != "GET":
        return "the method is not GET"
    if environ.get("SERVER_PROTOCOL") != "HTTP/1.1":
        return "the protocol is not HTTP/1.1"
    upgrade = environ.get("HTTP_UPGRADE", "")
    connection = environ.get("HTTP_CONNECTION", "")
    if is_too_long(upgrade, connection):
        return "Upgrade or Connection is too long"
    is_usual = len(upgrade) + len(connection) <= _LONGEST_USUAL
    look = _upgrade_headers_problem if is_usual else _upgrade_headers_problem.__wrapped__
    problem = look(upgrade, connection)
    if problem is not None:
        return problem
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION", "").strip() != _VERSION:
        return "Sec-WebSocket-Version is not 13"
    try:
        key = base64.b64decode(environ.get("HTTP_SEC_WEBSOCKET_KEY", "").strip(), validate=True)
    except (binascii.Error, ValueError):
        return "Sec-WebSocket-Key is not base64"
    return None if len(key) == 16 else "Sec-WebSocket-Key is not 16 bytes"


@lru_cache(maxsize=64)
def _upgrade_headers_problem(upgrade: str, connection: str) -> str | None:
    """Check two headers that are the same for nearly all clients, hence the cache."""
    try:
        protocols = [word.lower() for word in parse_upgrade(upgrade)]
        options = [word.lower() for word in parse_connection(connection)]
    except InvalidHeader:
        return "Upgrade or Connection cannot be read"
    # The RFC allows a list of protocols in Upgrade, but the servers do not support one.
    if protocols != ["websocket"] or "upgrade" not in options:
        return "Upgrade or Connection does not ask for a WebSocket"
    return None


def is_too_long(*headers: str) -> bool:
    """Return whether ``Upgrade`` and ``Connection`` together are longer than any client needs.

    Servers and applications parse them, and 60 kB of commas cost each parser 3 to 6 ms.
    """
    return sum(map(len, headers)) > _LONGEST


def wants_websocket(environ: WSGIEnvironment) -> bool:
    """Return whether a request asks for a WebSocket, even in an invalid way."""
    return "websocket" in environ.get("HTTP_UPGRADE", "").lower()


def take_socket(environ: WSGIEnvironment, *, is_compressing: bool) -> RawSocket | None:
    """Take over the connection of a request from its server and complete the handshake.

    Returns:
        ``None`` if the server gives no access to its socket.
    """
    websocket = environ.get("wsgi.websocket")
    if websocket is not None:
        handler = websocket.handler
        if vars(handler).pop("write", None) is not None:
            handler.write(b"")  # sends the 101 that was held back
        extensions = environ.get(EXTENSIONS, [])
        _forget_body(environ)
        websocket.__class__ = taken_classes.get(type(websocket), type(websocket))
        return RawSocket(handler.socket, handler.rfile.read1, extensions, websocket)
    sock = environ.get("gunicorn.socket") or _socket_of_uwsgi(environ) or _socket_of_gevent(environ)
    if sock is None:
        return None
    header, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    environ.pop("eventlet.input", None)  # Engine.IO creates a class for each
    _forget_body(environ)
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(environ['HTTP_SEC_WEBSOCKET_KEY'].strip())}",
    ]
    if header is not None:
        lines.append(f"Sec-WebSocket-Extensions: {header}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    return RawSocket(sock, sock.recv, extensions, None)


def _socket_of_uwsgi(environ: WSGIEnvironment) -> Any:
    """Return the connection of a request that uWSGI serves, or ``None`` under other servers.

    uWSGI's own WebSocket functions are missing from some of its builds and hide close codes.

    Source:
        uWSGI, "The uWSGI Python module": ``connection_fd()``.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None or "uwsgi.version" not in environ:
        return None
    return gevent_socket(os.dup(uwsgi.connection_fd()))


def _socket_of_gevent(environ: WSGIEnvironment) -> Any:
    """Return the connection of a request that gevent's own handler serves, or ``None``.

    Source:
        simple-websocket, ``Server.__init__``, which gets the socket in the same way.
    """
    if not environ.get("SERVER_SOFTWARE", "").startswith("gevent/"):
        return None
    reader: Any = environ["wsgi.input"]
    reader = getattr(reader, "rfile", reader)
    return getattr(getattr(reader, "raw", None), "_sock", None)


def leave_uwsgi(environ: WSGIEnvironment) -> None:
    """Make uWSGI close the connection of a request without a response; no-op elsewhere."""
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is not None and "uwsgi.version" in environ:
        uwsgi.disconnect()
        environ[_LEFT] = True


def answer_once(environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
    """Wrap *start_response* to ignore a response after :func:`leave_uwsgi` closed the connection.

    Upstream sends a response when a WebSocket ends, which uWSGI would report as an error.
    """
    if "uwsgi.version" not in environ:
        return start_response

    def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Callable[[bytes], object]:
        if _LEFT in environ:
            return lambda body: None
        return start_response(status, headers, *args)

    return start


def _forget_body(environ: WSGIEnvironment) -> None:
    """Replace the body reader of a request without a body, to save memory.

    A WebSocket keeps its environ for as long as it is open.
    """
    if not environ.get("CONTENT_LENGTH"):
        environ["wsgi.input"] = BytesIO()


def agree_on_extensions(
    environ: WSGIEnvironment, *, is_compressing: bool
) -> tuple[str | None, list[Extension]]:
    """Choose from the extensions that a client offers.

    Returns:
        The value of the ``Sec-WebSocket-Extensions`` header, or ``None``, and the extensions.

    Source:
        RFC 7692, section 5: the first acceptable offer of permessage-deflate.
    """
    offered = environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS", "")
    if not is_compressing or not 0 < len(offered) <= _LONGEST:
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
    """Return an unmasked close frame.

    Source:
        RFC 6455, section 5.5.1: a code, then a reason of at most 123 bytes.
    """
    body = Close(CloseCode(code), cut_reason(reason)).serialize()
    return Frame(Opcode.CLOSE, body).serialize(mask=False)


def cut_reason(reason: str) -> str:
    """Return *reason* shortened to the 123 bytes of UTF-8 that a close frame can hold."""
    return reason.encode()[:_MAX_REASON].decode(errors="ignore")


def refuse_websocket(websocket: Any, reason: str) -> None:
    """Close a WebSocket that gevent-websocket has accepted, with "try again later".

    gevent-websocket's own ``close`` accepts a code but omits it from the frame.

    Args:
        websocket: ``environ["wsgi.websocket"]``.
        reason: Sent to the client, cut to 123 bytes.
    """
    with contextlib.suppress(OSError):
        websocket.handler.socket.sendall(close_frame(CloseCode.TRY_AGAIN_LATER, reason))
    websocket.closed = True  # the handler would send a second close frame


class Silence:
    """The read timeout of HTTP connections in this process.

    Attributes:
        timeout: Seconds; ``None`` for no limit.
    """

    timeout: float | None = None


def bound_silence(timeout: float) -> None:
    """Close HTTP connections that send nothing for *timeout* seconds when a request is read."""
    Silence.timeout = timeout


_compressing_paths: set[str] = set()
_own_paths: set[str] = set()


def hold_answers(path: str) -> None:
    """Delay the 101 response to WebSocket requests below *path* until the application decides.

    gevent-websocket sends it before it calls the application, and still does for other paths.
    """
    _own_paths.add(path)


def is_answer_held(path: str) -> bool:
    """Return whether the 101 for WebSocket requests at *path* waits for the application."""
    return any(path.startswith(each) for each in _own_paths)


def is_refusable(environ: WSGIEnvironment) -> bool:
    """Return whether a request can still get an HTTP response, as no 101 has been sent."""
    websocket = environ.get("wsgi.websocket")
    return websocket is None or "write" in vars(websocket.handler)


def offer_compression(path: str) -> None:
    """Accept permessage-deflate for requests below *path*, in this process."""
    _compressing_paths.add(path)


def is_compression_offered(path: str) -> bool:
    """Return whether requests for *path* may negotiate permessage-deflate."""
    return any(path.startswith(each) for each in _compressing_paths)

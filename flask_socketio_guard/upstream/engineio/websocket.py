"""WebSocket handshakes: what is asked for, and the socket underneath.

Under gevent-websocket the handshake has been answered before the application is
called; under gunicorn's plain gevent worker it is answered here.
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
_LONGEST_USUAL = 64  # characters: what is remembered of strangers is not for them to choose
_LONGEST = 1024  # characters
_MAX_REASON = 123  # bytes; a control frame holds 125, and two are the code
EXTENSIONS = "guard.websocket_extensions"
"""Where the environ of a request says what was agreed on before the application is asked."""

_LEFT = "guard.has_left"

taken_classes: dict[type, type] = {}
"""What becomes of a server's objects once their sockets are served here."""


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
    """Look at two headers that are the same for nearly all clients."""
    try:
        protocols = [word.lower() for word in parse_upgrade(upgrade)]
        options = [word.lower() for word in parse_connection(connection)]
    except InvalidHeader:
        return "Upgrade or Connection cannot be read"
    # A choice of protocols, which the RFC allows, is nothing that the servers understand.
    if protocols != ["websocket"] or "upgrade" not in options:
        return "Upgrade or Connection asks for no WebSocket"
    return None


def is_too_long(*headers: str) -> bool:
    """Say whether ``Upgrade`` and ``Connection`` are together longer than any client needs.

    Servers and applications take them apart: 60 kB of commas take each of them 3 to 6 ms.
    """
    return sum(map(len, headers)) > _LONGEST


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
        if vars(handler).pop("write", None) is not None:
            handler.write(b"")  # 101, which was held back
        extensions = environ.get(EXTENSIONS, [])
        _forget_body(environ)
        websocket.__class__ = taken_classes.get(type(websocket), type(websocket))
        return RawSocket(handler.socket, handler.rfile.read1, extensions, websocket)
    sock = environ.get("gunicorn.socket") or _socket_of_uwsgi(environ) or _socket_of_gevent(environ)
    if sock is None:
        return None
    header, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    environ.pop("eventlet.input", None)  # Engine.IO makes a class of its own for it
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
    """Return the connection of a request that uWSGI serves, or ``None``.

    uWSGI's own functions for WebSockets are not in each of its builds, and hide close codes.

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
        simple-websocket, ``Server.__init__``: the same way to it.
    """
    if not environ.get("SERVER_SOFTWARE", "").startswith("gevent/"):
        return None
    reader: Any = environ["wsgi.input"]
    reader = getattr(reader, "rfile", reader)
    return getattr(getattr(reader, "raw", None), "_sock", None)


def leave_uwsgi(environ: WSGIEnvironment) -> None:
    """Have uWSGI, if it is that, close its connection of a request without an answer."""
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is not None and "uwsgi.version" in environ:
        uwsgi.disconnect()
        environ[_LEFT] = True


def answer_once(environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
    """Return *start_response* such that uWSGI answers no request that :func:`leave_uwsgi` ended.

    Upstream answers one at the end of its WebSocket, which uWSGI takes for an error then.
    """
    if "uwsgi.version" not in environ:
        return start_response

    def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Callable[[bytes], object]:
        if _LEFT in environ:
            return lambda body: None
        return start_response(status, headers, *args)

    return start


def _forget_body(environ: WSGIEnvironment) -> None:
    """Keep nothing of what a request's body is read with, unless it has one.

    A connection keeps its environ as long as it lives, and what follows are frames.
    """
    if not environ.get("CONTENT_LENGTH"):
        environ["wsgi.input"] = BytesIO()


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


class Silence:
    """For how long HTTP clients may send nothing, in this process.

    Attributes:
        timeout: Seconds; ``None`` for ever.
    """

    timeout: float | None = None


def bound_silence(timeout: float) -> None:
    """Close connections over which no more of a request comes for *timeout* seconds."""
    Silence.timeout = timeout


_compressing_paths: set[str] = set()
_own_paths: set[str] = set()


def hold_answers(path: str) -> None:
    """Have requests for WebSockets below *path* answered once the application has decided.

    gevent-websocket answers 101 before it asks; what it answers elsewhere is not changed.
    """
    _own_paths.add(path)


def is_answer_held(path: str) -> bool:
    """Say whether the application decides about requests for WebSockets at *path*."""
    return any(path.startswith(each) for each in _own_paths)


def is_refusable(environ: WSGIEnvironment) -> bool:
    """Say whether a request can still be answered: no WebSocket has been accepted for it."""
    websocket = environ.get("wsgi.websocket")
    return websocket is None or "write" in vars(websocket.handler)


def offer_compression(path: str) -> None:
    """Agree to permessage-deflate on requests below *path*, in this process."""
    _compressing_paths.add(path)


def is_compression_offered(path: str) -> bool:
    """Say whether requests for *path* may agree on permessage-deflate."""
    return any(path.startswith(each) for each in _compressing_paths)

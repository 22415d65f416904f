"""WebSocket handshakes, pure and on gevent's own server."""

from __future__ import annotations

import base64
import io
import socket
import struct
from typing import TYPE_CHECKING, Any

import gevent
import gevent.socket
import pytest
from gevent import pywsgi
from gevent.pywsgi import WSGIHandler
from geventwebsocket.handler import WebSocketHandler
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode
from websockets.protocol import CLIENT, SERVER, Protocol

from flask_socketio_guard.upstream.engineio import websocket
from flask_socketio_guard.upstream.engineio.gevent_websocket import patch_gevent_websocket
from flask_socketio_guard.upstream.engineio.websocket import (
    agree_on_extensions,
    close_frame,
    offer_compression,
    refuse_websocket,
    take_socket,
    upgrade_problem,
    wants_websocket,
)
from tests.support import unit_support, unit_websocket
from tests.support.cases import in_turn
from tests.support.scale import examples
from tests.support.unit_websocket import Answer, Peer, read_answer

if TYPE_CHECKING:
    from collections.abc import Iterator

nothing_left_behind = unit_support.nothing_left_behind

KEY = base64.b64encode(b"sixteen bytes !!").decode()
GOOD = {
    "REQUEST_METHOD": "GET",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "HTTP_UPGRADE": "websocket",
    "HTTP_CONNECTION": "Upgrade",
    "HTTP_SEC_WEBSOCKET_VERSION": "13",
    "HTTP_SEC_WEBSOCKET_KEY": KEY,
}
MISSING = None
NOT_16_BYTES = "Sec-WebSocket-Key is not 16 bytes"
NOT_BASE64 = "Sec-WebSocket-Key is not base64"


# What is wrong with a request


@in_turn(
    "changes",
    [
        {},
        {"HTTP_UPGRADE": "WebSocket"},
        {"HTTP_CONNECTION": "keep-alive, Upgrade"},
        {"HTTP_CONNECTION": "upgrade,keep-alive"},
        {"HTTP_SEC_WEBSOCKET_VERSION": " 13 "},
        {"HTTP_SEC_WEBSOCKET_KEY": f" {KEY} "},
        {"HTTP_SEC_WEBSOCKET_EXTENSIONS": "rubbish; ; ="},
    ],
)
def test_a_request_that_follows_the_rules_has_no_problem(changes: dict[str, str]) -> None:
    assert upgrade_problem({**GOOD, **changes}) is None


@in_turn(
    ("changes", "problem"),
    [
        ({"REQUEST_METHOD": "POST"}, "the method is not GET"),
        ({"REQUEST_METHOD": MISSING}, "the method is not GET"),
        ({"SERVER_PROTOCOL": "HTTP/1.0"}, "the protocol is not HTTP/1.1"),
        ({"SERVER_PROTOCOL": MISSING}, "the protocol is not HTTP/1.1"),
        ({"HTTP_UPGRADE": MISSING}, "Upgrade or Connection cannot be read"),
        ({"HTTP_UPGRADE": ""}, "Upgrade or Connection cannot be read"),
        ({"HTTP_UPGRADE": "websocket;"}, "Upgrade or Connection cannot be read"),
        ({"HTTP_UPGRADE": "\x80"}, "Upgrade or Connection cannot be read"),
        ({"HTTP_UPGRADE": "h2c"}, "Upgrade or Connection does not ask for a WebSocket"),
        ({"HTTP_UPGRADE": "h2c, websocket"}, "Upgrade or Connection does not ask for a WebSocket"),
        ({"HTTP_UPGRADE": "websockets"}, "Upgrade or Connection does not ask for a WebSocket"),
        ({"HTTP_CONNECTION": MISSING}, "Upgrade or Connection cannot be read"),
        ({"HTTP_CONNECTION": "keep-alive"}, "Upgrade or Connection does not ask for a WebSocket"),
        ({"HTTP_CONNECTION": "Upgraded"}, "Upgrade or Connection does not ask for a WebSocket"),
        ({"HTTP_SEC_WEBSOCKET_VERSION": MISSING}, "Sec-WebSocket-Version is not 13"),
        ({"HTTP_SEC_WEBSOCKET_VERSION": ""}, "Sec-WebSocket-Version is not 13"),
        ({"HTTP_SEC_WEBSOCKET_VERSION": "8"}, "Sec-WebSocket-Version is not 13"),
        ({"HTTP_SEC_WEBSOCKET_VERSION": "13, 8"}, "Sec-WebSocket-Version is not 13"),
        ({"HTTP_SEC_WEBSOCKET_KEY": MISSING}, NOT_16_BYTES),
        ({"HTTP_SEC_WEBSOCKET_KEY": "AAAA"}, NOT_16_BYTES),
        ({"HTTP_SEC_WEBSOCKET_KEY": base64.b64encode(b"x" * 15).decode()}, NOT_16_BYTES),
        ({"HTTP_SEC_WEBSOCKET_KEY": base64.b64encode(b"x" * 17).decode()}, NOT_16_BYTES),
        ({"HTTP_SEC_WEBSOCKET_KEY": KEY + "AAAA"}, NOT_BASE64),
        ({"HTTP_SEC_WEBSOCKET_KEY": "!" * 24}, NOT_BASE64),
        ({"HTTP_SEC_WEBSOCKET_KEY": "A"}, NOT_BASE64),
        ({"HTTP_SEC_WEBSOCKET_KEY": "\xe9" * 24}, NOT_BASE64),
        ({"HTTP_SEC_WEBSOCKET_KEY": KEY.replace("=", " =")}, NOT_BASE64),
    ],
)
def test_a_request_that_does_not_is_told_what_is_wrong(
    changes: dict[str, str | None], problem: str
) -> None:
    environ = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    assert upgrade_problem(environ) == problem


def test_only_usual_headers_are_remembered() -> None:
    """What strangers send is not to fill the memory."""
    look = websocket._upgrade_headers_problem
    look.cache_clear()
    for number in range(1000):
        assert upgrade_problem(GOOD) is None
        long = f"keep-alive, Upgrade, {number:060}"
        assert upgrade_problem({**GOOD, "HTTP_CONNECTION": long}) is None
        short = f"Upgrade, {number:010}"
        assert upgrade_problem({**GOOD, "HTTP_CONNECTION": short}) is None
    known = look.cache_info()
    assert known.misses == 1001
    assert known.currsize <= 64


header_values = st.text(st.characters(max_codepoint=255), max_size=30) | st.sampled_from(
    [*GOOD.values(), ",", "websocket, ", ' "', "\x00", "upgrade, upgrade"]
)


@settings(max_examples=examples(100), deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), header_values))
def test_no_header_raises(changes: dict[str, str]) -> None:
    """Whatever it holds: the answer is a sentence of ours, and nothing of the client's."""
    problem = upgrade_problem({**GOOD, **changes})
    assert problem is None or problem.isascii()
    wants_websocket(changes)


@in_turn(
    ("header", "is_wanted"),
    [
        (None, False),
        ("", False),
        ("h2c", False),
        ("websocket", True),
        ("WebSocket", True),
        ("h2c, websocket", True),
        ("xwebsocketx", True),
    ],
)
def test_who_asks_for_a_websocket_rightly_or_not_wants_one(
    header: str | None, is_wanted: bool
) -> None:
    environ = {} if header is None else {"HTTP_UPGRADE": header}
    assert wants_websocket(environ) is is_wanted


# Extensions


def offer(header: str | None, *, is_compressing: bool = True) -> tuple[str | None, int]:
    """Return what is answered to an offer, and how many extensions were agreed on."""
    environ = {} if header is None else {"HTTP_SEC_WEBSOCKET_EXTENSIONS": header}
    answer, extensions = agree_on_extensions(environ, is_compressing=is_compressing)
    return answer, len(extensions)


@in_turn(
    ("header", "answer"),
    [
        ("permessage-deflate", "permessage-deflate"),
        ("permessage-deflate; client_max_window_bits", "permessage-deflate"),
        (
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        ),
        (
            "permessage-deflate; server_max_window_bits=10; client_max_window_bits=11",
            "permessage-deflate; server_max_window_bits=10; client_max_window_bits=11",
        ),
        (
            "x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=99, "
            "permessage-deflate; server_max_window_bits=12, permessage-deflate",
            "permessage-deflate; server_max_window_bits=12",
        ),
    ],
)
def test_the_first_offer_that_is_acceptable_is_taken(header: str, answer: str) -> None:
    assert offer(header) == (answer, 1)


@in_turn(
    "header",
    [
        None,
        "",
        "x-webkit-deflate-frame",
        "permessage-deflate; unknown",
        "permessage-deflate; server_max_window_bits=7",
        "permessage-deflate; server_no_context_takeover=1",
        "; ; =",
        "permessage-deflate; ;",
    ],
)
def test_what_is_not_acceptable_is_passed_over(header: str | None) -> None:
    assert offer(header) == (None, 0)


def test_nothing_is_agreed_to_unless_compression_is_wanted() -> None:
    assert offer("permessage-deflate", is_compressing=False) == (None, 0)


# Close frames


def closed_with(data: bytes) -> tuple[int, str]:
    """Return code and reason that a client reads."""
    protocol = Protocol(CLIENT)
    protocol.receive_data(data)
    assert protocol.close_rcvd is not None
    return protocol.close_rcvd.code, protocol.close_rcvd.reason


@in_turn(
    ("reason", "received"),
    [
        ("", ""),
        ("slow consumer", "slow consumer"),
        ("x" * 123, "x" * 123),
        ("x" * 124, "x" * 123),
        ("\N{EURO SIGN}" * 50, "\N{EURO SIGN}" * 41),
        ("x" + "\N{EURO SIGN}" * 50, "x" + "\N{EURO SIGN}" * 40),
        ("\N{GRINNING FACE}" * 50, "\N{GRINNING FACE}" * 30),
    ],
)
def test_a_close_frame_holds_as_much_of_the_reason_as_it_can(reason: str, received: str) -> None:
    frame = close_frame(1008, reason)
    assert closed_with(frame) == (1008, received)
    assert len(frame) <= 2 + 125


# The handshake


def test_a_server_that_does_not_let_go_of_its_socket_has_none_to_take() -> None:
    assert take_socket(dict(GOOD), is_compressing=False) is None


@pytest.mark.parametrize("is_compressing", [False, True])
def test_under_the_plain_gevent_worker_the_handshake_is_answered(is_compressing: bool) -> None:
    server, client = gevent.socket.socketpair()
    with server, client:
        environ = {
            **GOOD,
            "HTTP_SEC_WEBSOCKET_KEY": " dGhlIHNhbXBsZSBub25jZQ== ",
            "HTTP_SEC_WEBSOCKET_EXTENSIONS": "permessage-deflate; server_max_window_bits=10",
            "gunicorn.socket": server,
        }
        raw = take_socket(environ, is_compressing=is_compressing)
        assert raw is not None
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            "Upgrade: websocket",
            "Connection: Upgrade",
            # the example of RFC 6455, section 1.3
            "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
        ]
        if is_compressing:
            lines.append("Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=10")
        assert client.recv(4096).decode() == "\r\n".join([*lines, "", ""])
        assert (raw.sock, raw.websocket) == (server, None)
        assert len(raw.extensions) == is_compressing
        client.sendall(b"frame")
        assert raw.read_first(100) == b"frame"


# gevent-websocket


class GeventWebSocketServer:
    """gevent's server with gevent-websocket's handler, and an application that takes sockets."""

    def __init__(self, address: tuple[str, int], errors: io.StringIO) -> None:
        self.errors = errors
        self._address = address

    def connect(self) -> Any:
        return gevent.socket.create_connection(self._address, timeout=5.0)

    def ask(self, head: str) -> Answer:
        """Send a request of these lines and return the answer."""
        sock = self.connect()
        sock.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
        return read_answer(sock)


def application(environ: Any, start_response: Any) -> list[bytes]:
    """Echo the frames of a WebSocket, and say hello otherwise."""
    if environ.get("wsgi.websocket") is None:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"hello"]
    if environ["PATH_INFO"] == "/refused":
        refuse_websocket(environ["wsgi.websocket"], "the server is full")
        return []
    raw = take_socket(environ, is_compressing=True)
    assert raw is not None
    protocol = Protocol(SERVER)
    protocol.extensions = raw.extensions
    read = raw.read_first
    while data := read(4096):
        read = raw.sock.recv
        protocol.receive_data(data)
        for frame in protocol.events_received():
            if frame.opcode is Opcode.TEXT:  # type: ignore[union-attr]
                protocol.send_text(frame.data)  # type: ignore[union-attr]
        raw.sock.sendall(b"".join(protocol.data_to_send()))
    raw.websocket.closed = True
    return []


@pytest.fixture
def server(
    nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GeventWebSocketServer]:
    """A server whose handler is mended."""
    monkeypatch.setattr(websocket, "_compressing_paths", set())
    patch_gevent_websocket()
    errors = io.StringIO()
    with unit_websocket.serve(application, "gevent-websocket", errors) as address:
        yield GeventWebSocketServer(address, errors)
    assert "Traceback" not in errors.getvalue(), errors.getvalue()


GOOD_HEAD = f"""GET /path HTTP/1.1
Host: test
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Version: 13
Sec-WebSocket-Key: {KEY}"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"Key: {KEY}", "Key: !!!"),
        (f"Key: {KEY}", "Key: A"),
        (f"Key: {KEY}", "Key: AAAA"),
        (f"Key: {KEY}", "Key: \xe9\xe9\xe9\xe9"),
        (f"Key: {KEY}", "Key:"),
        (f"\nSec-WebSocket-Key: {KEY}", ""),
        ("Version: 13", "Version: 12"),
        ("Version: 13", "Version: 8"),
        ("\nSec-WebSocket-Version: 13", ""),
        ("Connection: Upgrade", "Connection: keep-alive"),
        ("\nConnection: Upgrade", ""),
        ("Connection: Upgrade", "Connection: ;"),
        ("Upgrade: websocket", "Upgrade: websocket;"),
        ("Upgrade: websocket", "Upgrade: xwebsocket"),
        ("HTTP/1.1", "HTTP/1.0"),
    ],
)
def test_an_odd_upgrade_request_is_answered_with_400(
    server: GeventWebSocketServer, old: str, new: str
) -> None:
    """No traceback; the fixture looks."""
    assert old in GOOD_HEAD
    answer = server.ask(GOOD_HEAD.replace(old, new, 1))
    assert (answer.status, answer.text) == (400, "Bad Request")


@pytest.mark.parametrize(
    "headers",
    [
        "Connection: " + "a," * 30_000 + "close",
        "Connection: " + "a," * 30_000 + "\nConnection: close",
        "Connection: close" + 20 * ("\nConnection: " + "a" * 60),
        "Upgrade: " + "a," * 30_000 + "\nConnection: close",
    ],
    ids=["one", "long and usual", "many", "upgrade"],
)
def test_long_headers_are_refused_before_anything_takes_them_apart(
    server: GeventWebSocketServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    headers: str,
) -> None:
    """Of any request: the application and Flask's routing would take as long as the server."""
    caplog.set_level("DEBUG", "flask_socketio_guard")
    environs: list[Any] = []
    make = WSGIHandler.get_environ
    monkeypatch.setattr(WSGIHandler, "get_environ", lambda self: environs.append(1) or make(self))
    assert server.ask(f"GET / HTTP/1.1\nHost: test\n{headers}").status == 400
    assert environs == []
    said = "a request was refused: its Connection or Upgrade header is too long"
    assert [(record.levelname, record.message) for record in caplog.records] == [("DEBUG", said)]
    usual = "GET / HTTP/1.1\nHost: test\nConnection: keep-alive, close"
    assert server.ask(usual).status == 200
    assert environs == [1]


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\nHost: test\nConnection: close",
        "GET / HTTP/1.1\nHost: test\nUpgrade: h2c\nConnection: Upgrade, close",
        GOOD_HEAD.replace("GET", "HEAD"),
    ],
)
def test_other_requests_are_none_of_its_business(server: GeventWebSocketServer, head: str) -> None:
    assert server.ask(head + "\nConnection: close").status == 200


def test_a_good_upgrade_request_is_answered_with_a_websocket(
    server: GeventWebSocketServer,
) -> None:
    peer = Peer(server.connect())
    peer.shake_hands("/path", extensions=[ClientPerMessageDeflateFactory()])
    assert peer.response is not None
    assert peer.response.status_code == 101
    assert "Sec-WebSocket-Extensions" not in peer.response.headers
    peer.send("hello")
    assert peer.read() == "hello"
    peer.vanish()


def test_what_comes_with_the_request_is_not_lost(server: GeventWebSocketServer) -> None:
    """A client in a hurry sends its first frame before the answer is there."""
    sock = server.connect()
    peer = Peer(sock)
    peer.protocol.send_text(b"hello")
    frame = b"".join(peer.protocol.data_to_send())
    sock.sendall(GOOD_HEAD.replace("\n", "\r\n").encode() + b"\r\n\r\n" + frame)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert peer.read() == "hello"
    peer.vanish()


@pytest.mark.parametrize(("path", "is_compressed"), [("/path/x", True), ("/other", False)])
def test_compression_is_agreed_to_below_the_path_that_offers_it(
    server: GeventWebSocketServer, path: str, is_compressed: bool
) -> None:
    offer_compression("/path")
    peer = Peer(server.connect())
    peer.shake_hands(path, extensions=[ClientPerMessageDeflateFactory()])
    assert peer.response is not None
    assert peer.response.status_code == 101
    assert len(peer.protocol.extensions) == is_compressed
    text = "hello" * 1000
    for _ in range(3):
        peer.send(text)
        assert peer.read() == text
    peer.vanish()


def test_a_websocket_that_is_refused_is_told_so_once(server: GeventWebSocketServer) -> None:
    """gevent-websocket's own close would add a frame without a code."""
    peer = Peer(server.connect(), is_answering=False)
    peer.shake_hands("/refused")
    frame = peer.read_frame()
    assert (frame.opcode, bytes(frame.data)) == (Opcode.CLOSE, b"\x03\xf5the server is full")
    assert peer.read_rest() == []
    assert peer.frames == []
    peer.vanish()


def test_a_client_that_is_gone_can_be_refused() -> None:
    class Handler:
        socket, client = gevent.socket.socketpair()

    class WebSocket:
        handler = Handler
        closed = False

    Handler.client.close()
    Handler.socket.close()
    refuse_websocket(WebSocket, "full")
    assert WebSocket.closed


def test_gevent_websocket_is_mended_once() -> None:
    """Else its methods would call themselves."""
    patch_gevent_websocket()
    methods = dict(vars(WebSocketHandler))
    patch_gevent_websocket()
    assert dict(vars(WebSocketHandler)) == methods


@pytest.mark.parametrize(
    "part",
    [
        "",
        "GET",
        "GET / HTTP/1.1\r\nHost:",
        GOOD_HEAD[:60],
        "POST / HTTP/1.1\nContent-Length: 9\n\nx",
    ],
    ids=["nothing", "word", "header", "upgrade", "body"],
)
def test_a_client_that_resets_its_request_is_nothing_to_talk_about(
    server: GeventWebSocketServer, part: str
) -> None:
    """Gevent prints a traceback for each; the fixture looks."""
    sock = server.connect()
    sock.sendall(part.encode())
    gevent.sleep(0.01)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    answer = server.ask("GET / HTTP/1.1\nHost: test\nConnection: close")
    assert answer.status == 200


def test_a_socket_is_taken_from_gevents_own_handler_too() -> None:
    """As where gevent is installed without gevent-websocket."""

    def serve(environ: Any, start_response: Any) -> list[bytes]:
        raw = take_socket(environ, is_compressing=False)
        assert raw is not None
        raw.sock.sendall(raw.read_first(100))
        raw.sock.shutdown(socket.SHUT_RDWR)
        return []

    server = pywsgi.WSGIServer(("127.0.0.1", 0), serve, log=None)
    server.start()
    try:
        with gevent.socket.create_connection(server.address, timeout=5.0) as client:
            client.sendall(GOOD_HEAD.replace("\n", "\r\n").encode() + b"\r\n\r\n")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            assert head.startswith(b"HTTP/1.1 101 ")
            client.sendall(b"frame")
            assert client.recv(100) == b"frame"
    finally:
        server.stop()

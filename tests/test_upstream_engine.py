"""The guarded Engine.IO server and its sockets: real servers, real clients.

Where upstream does something well its behaviour is the measure: the same client program runs
against an application without the guard and gets the same packets.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote_plus

import pytest
import socketio as python_socketio
from flask import request
from flask_socketio import emit
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidState
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from flask_socketio_guard.clients import send_queue as sending
from flask_socketio_guard.clients.send_queue import SendOutcome, SendQueue
from flask_socketio_guard.events import pieces
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream.engineio import receiving, violations
from flask_socketio_guard.upstream.engineio import socket as engine_socket
from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from tests.support import unit_support, unit_websocket
from tests.support.raw_websocket import TEXT, encode_frame
from tests.support.scale import examples
from tests.support.unit_websocket import KINDS, Answer, Ended, Peer, Polling, read_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
make_served = unit_websocket.make_served

LOOPBACK = "127.0.0.1"
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "c2l4dGVlbiBieXRlcyAhIQ==",
}
BOTH = ("gevent-websocket", "threads")
every_server = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("kind", BOTH)


@pytest.fixture
def served(make_served: Callable[..., Served]) -> Served:
    """An application under gevent, with short times."""
    return make_served(options={"ping_interval": 60}, close_timeout=0.3)


class Watch:
    """Notes what becomes of the clients of an application.

    Attributes:
        reasons: With which the disconnect handler was called.
    """

    def __init__(self, served: Served) -> None:
        self.reasons: list[str] = []
        self.violations: list[signals.Violation] = []
        self.refusals: list[signals.HandshakeRefusal] = []
        self.losses: list[signals.SendLoss] = []
        served.socketio.on_event("disconnect", self.reasons.append)
        if served.guard is not None:
            self.violations = served.collect(signals.protocol_violated)
            self.refusals = served.collect(signals.handshake_refused)
            self.losses = served.collect(signals.send_lost)
        self._served = served

    def expect(self, *reasons: str) -> None:
        """Wait until the disconnect handler was called with these, and no session is left."""
        served = self._served
        served.wait_for(
            lambda: len(self.reasons) >= len(reasons), f"no disconnect, but {self.reasons}"
        )
        served.wait_for(lambda: not served.engine.sockets, "a session is left")
        if served.guard is not None:
            served.wait_for(served.inner.is_quiet, "something is left")
            assert served.inner.admission.count(LOOPBACK) == 0
        assert self.reasons == list(reasons)


def eio_sid_of(served: Served, sid: str, namespace: str = "/") -> str:
    """Return the id of the transport session of a client."""
    return str(served.socketio.server.manager.eio_sid_from_sid(sid, namespace))


def only_socket(served: Served) -> Any:
    """Return the one session that there is."""
    (socket,) = served.engine.sockets.values()
    return socket


# What upstream does, too


def without_ids(text: str) -> str:
    """Return *text* with all session ids alike."""
    return re.sub(r'"sid":"[^"]+"|(?<=io=)[^;]+|[A-Za-z0-9_-]{20}', "<sid>", text)


class Transcript(list[Any]):
    """What a client was told, in a form that two servers can agree on."""

    def note(self, answer: Answer) -> None:
        """Add the answer to a request."""
        names = ("Content-Type", "Set-Cookie", "Content-Encoding", "Access-Control-Allow-Origin")
        headers = {name: without_ids(answer.headers.get(name, "")) for name in names}
        is_text = not headers["Content-Encoding"]
        self.append((answer.status, headers, without_ids(answer.text) if is_text else "..."))

    def read(self, client: Peer | Polling, *prefixes: str) -> None:
        """Add the next packets that begin so."""
        self.extend(without_ids(client.read_until(prefix)) for prefix in prefixes)


HANDSHAKE = "/socket.io/?EIO=4&transport=polling"


def handshake(served: Served, seen: Transcript) -> None:
    seen.note(served.request("GET", HANDSHAKE))
    seen.note(served.request("GET", HANDSHAKE, headers={"Origin": "http://test"}))
    seen.note(served.request("GET", HANDSHAKE + "&j=3"))
    seen.note(served.request("OPTIONS", HANDSHAKE))
    seen.note(served.request("PUT", HANDSHAKE))
    peer = served.websocket()
    seen.read(peer, "0")


def refusals(served: Served, seen: Transcript) -> None:
    sid = served.polling().sid
    for method, query in (
        ("GET", "EIO=4&transport=polling&sid=unknown"),
        ("POST", "EIO=4&transport=polling&sid=unknown"),
        ("POST", "EIO=4&transport=polling"),
        ("GET", "EIO=4&transport=carrier-pigeon"),
        ("GET", "EIO=3&transport=polling"),
        ("GET", "transport=polling"),
        ("GET", "EIO=4&transport=polling&j=x"),
        ("GET", "EIO=4&transport=websocket"),
        ("GET", f"EIO=4&transport=websocket&sid={sid}"),
    ):
        seen.note(served.request(method, f"/socket.io/?{query}"))
    seen.note(served.request("GET", HANDSHAKE, headers={"Origin": "http://elsewhere"}))


def conversation(served: Served, seen: Transcript) -> None:
    clients: list[Peer | Polling] = [served.polling(), served.websocket()]
    for client in clients:
        send = client.post if isinstance(client, Polling) else client.send
        send("40")
        seen.read(client, "40")
        send("40/nowhere,")
        # Upstream's words are no object, as they have to be; see test_protocol.py.
        assert client.read_until("44/nowhere")
        send("40/strict,")
        seen.read(client, "44/strict")
        send('421["echo",1,{"a":[true,null,"\N{EURO SIGN}"]}]')
        seen.read(client, "431")
        send('42["unknown"]')
        send('422["echo"]')
        seen.read(client, "432")
        if isinstance(client, Polling):
            send('451-3["echo",{"_placeholder":true,"num":0}]', "bAP8=")
            seen.read(client, "461-3", "b")
        else:
            send('451-3["echo",{"_placeholder":true,"num":0}]', b"\x00\xff")
            seen.read(client, "461-3")
            seen.append(client.read())
        served.socketio.emit("news", "x" * 3000)
        seen.read(client, "42")
        send("41")
        send("40")
        seen.read(client, "40")


def upgrade(served: Served, seen: Transcript) -> None:
    client = served.polling()
    client.join()
    poll = client.begin_get()
    only = next(socket for socket in served.engine.sockets.values() if socket.sid == client.sid)
    served.wait_for(lambda: getattr(only, "_poll", True))
    peer = served.websocket(f"&sid={client.sid}")
    peer.send("2probe")
    seen.append(peer.read())
    seen.note(read_answer(poll))
    seen.note(client.get())
    peer.send("5")
    peer.send('421["echo"]')
    seen.read(peer, "431")
    served.socketio.emit("news")
    seen.read(peer, "42")
    seen.note(client.get())
    seen.note(client.post('42["echo"]'))


def jsonp(served: Served, seen: Transcript) -> None:
    client = Polling(served, "&j=0")
    answer = served.request("GET", client.path)
    seen.note(answer)
    match = re.search(r'sid\\":\\"([^\\]+)', answer.text)
    assert match is not None
    client.sid = match[1]
    seen.note(client.post("d=40"))
    seen.note(client.get())
    seen.note(client.post("d=421%5B%22echo%22%2C%22a%20b%22%5D"))
    seen.note(client.get())


def disconnect(served: Served, seen: Transcript) -> None:
    client = served.polling()
    sid = client.join()
    served.socketio.server.disconnect(sid)
    seen.read(client, "41")
    peer = served.websocket()
    sid = peer.join()
    served.socketio.server.disconnect(sid)
    seen.read(peer, "41")


def compression(served: Served, seen: Transcript) -> None:
    client = served.polling()
    client.join()
    for accepted in ("gzip", "deflate", "br", ""):
        served.socketio.emit("news", "x" * 5000)
        headers = {"Accept-Encoding": accepted}
        seen.note(served.request("GET", client.path, headers=headers))


PROGRAMS = [handshake, refusals, conversation, upgrade, jsonp, disconnect, compression]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_client_is_told_what_upstream_tells(
    make_served: Callable[..., Served], program: Callable[[Served, Transcript], None]
) -> None:
    seen = {}
    for kind, is_guarded in (
        ("threads", False),
        ("threads", True),
        ("gevent-websocket", True),
        ("gevent", True),
    ):
        options = {
            "monitor_clients": False,
            "cookie": "io",
            "ping_interval": (60, 5),
            "cors_allowed_origins": ["http://test"],
        }
        served = make_served(kind, is_guarded=is_guarded, options=options)

        @served.socketio.on("connect", namespace="/strict")
        def refuse() -> bool:
            return False

        transcript = seen[kind, is_guarded] = Transcript()
        program(served, transcript)
    stock = seen.pop(("threads", False))
    assert stock
    for transcript in seen.values():
        assert transcript == stock


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "io",
        {"name": "sid", "path": "/", "HttpOnly": True, "Max-Age": lambda: "60"},
    ],
    ids=["none", "name", "attributes"],
)
def test_the_cookie_is_upstreams(make_served: Callable[..., Served], cookie: object) -> None:
    cookies = []
    for is_guarded in (False, True):
        options = {"monitor_clients": False, "cookie": cookie}
        served = make_served("threads", is_guarded=is_guarded, options=options)
        answer = served.request("GET", HANDSHAKE)
        sid = json.loads(answer.text[1:])["sid"]
        cookies.append(answer.headers.get("Set-Cookie", "").replace(sid, "<sid>"))
    assert cookies[0] == cookies[1]
    assert bool(cookies[1]) is (cookie is not None)


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({}, {"pingInterval": 25000, "pingTimeout": 20000, "maxPayload": 1_000_000}),
        ({"ping_interval": (20, 5)}, {"pingInterval": 25000}),
        ({"ping_interval": 0.25, "ping_timeout": 0.5}, {"pingInterval": 250, "pingTimeout": 500}),
        ({"max_http_buffer_size": 1234}, {"maxPayload": 1234}),
        ({"allow_upgrades": False}, {"upgrades": []}),
        ({}, {"upgrades": ["websocket"]}),
    ],
)
def test_the_first_packet_says_what_is_configured(
    make_served: Callable[..., Served], options: dict[str, Any], content: dict[str, Any]
) -> None:
    """Also intervals of parts of a second, which upstream cuts off."""
    served = make_served(options=options)
    told = json.loads(served.request("GET", HANDSHAKE).text[1:])
    assert told.keys() == {"sid", "upgrades", "pingTimeout", "pingInterval", "maxPayload"}
    assert {key: told[key] for key in content} == content
    peer = served.websocket()
    assert json.loads(peer.read_until("0")[1:])["upgrades"] == []


@both_modes
def test_transports_may_be_restricted(make_served: Callable[..., Served], kind: str) -> None:
    served = make_served(kind, options={"transports": ["websocket"]})
    answer = served.request("GET", HANDSHAKE)
    assert (answer.status, answer.text) == (400, '"Invalid transport"')
    served.joined()


# Sessions


@both_modes
def test_the_user_session_lives_as_long_as_upstreams(
    make_served: Callable[..., Served], kind: str
) -> None:
    """In the disconnect handler it can still be read."""
    served = make_served(kind)
    server = served.socketio.server
    last: list[object] = []

    @served.socketio.on("connect")
    def connect() -> None:
        server.save_session(request.sid, {"name": "x"})  # type: ignore[attr-defined]

    @served.socketio.on("count")
    def count() -> int:
        with server.session(request.sid) as session:  # type: ignore[attr-defined]
            session["count"] = session.get("count", 0) + 1
            return int(session["count"])

    @served.socketio.on("disconnect")
    def gone() -> None:
        sid = request.sid  # type: ignore[attr-defined]
        last.append((dict(server.get_session(sid)), server.transport(sid)))

    polling, peer = served.polling(), served.websocket()
    sids = polling.join(), peer.join()
    for number in (1, 2):
        polling.post(f'42{number}["count"]')
        assert polling.read_until("43") == f"43{number}[{number}]"
        peer.send(f'42{number}["count"]')
        assert peer.read_until("43") == f"43{number}[{number}]"
    assert [server.transport(sid) for sid in sids] == ["polling", "websocket"]
    assert server.get_session(sids[0]) == {"name": "x", "count": 2}
    peer.vanish()
    served.wait_for(lambda: len(last) == 1)
    polling.post("1")
    served.wait_for(lambda: len(last) == 2)
    assert last == [
        ({"name": "x", "count": 2}, "websocket"),
        ({"name": "x", "count": 2}, "polling"),
    ]
    served.wait_for(served.inner.is_quiet)
    assert not served.engine.departing
    with pytest.raises(KeyError):
        served.engine.get_session(polling.sid)


def test_the_engine_has_a_session_of_its_own(served: Served) -> None:
    client = served.polling()
    served.engine.save_session(client.sid, {"a": 1})
    with served.engine.session(client.sid) as session:
        session["b"] = 2
    assert served.engine.get_session(client.sid) == {"a": 1, "b": 2}
    assert served.engine.transport(client.sid) == "polling"
    for call in (served.engine.get_session, served.engine.transport):
        with pytest.raises(KeyError):
            call("unknown")


@both_modes
def test_the_engine_sends_what_upstreams_sends(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind)
    polling, peer = served.polling(), served.websocket()
    (sid,) = served.engine.sockets.keys() - {polling.sid}
    for data, text in (("x", "4x"), ({"a": 1}, '4{"a":1}'), ([1], "4[1]")):
        served.engine.send(polling.sid, data)
        served.engine.send(sid, data)
        assert polling.read_until("4") == text
        assert peer.read_until("4") == text
    served.engine.send(sid, b"\x00")
    assert peer.read() == b"\x00"
    served.engine.send("unknown", "x")
    packet = ClientMessage.of_socketio("2[]").packets()[0]
    assert served.engine.send_packet("unknown", packet) is SendOutcome.DROPPED_CLOSED
    assert served.engine.send_packet(sid, packet) is SendOutcome.QUEUED
    assert peer.read() == "42[]"


@every_server
def test_all_clients_may_be_disconnected_at_once(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind)
    watch = Watch(served)
    polling, polling_now, peer = served.polling(), served.polling(), served.websocket()
    for client in (polling, polling_now, peer):
        client.join()
    poll = polling_now.begin_get()
    served.wait_for(lambda: served.engine.sockets[polling_now.sid]._poll)
    served.engine.disconnect()
    assert read_answer(poll).text == "1"
    assert polling.get().status == 400
    assert [message for message in peer.read_rest() if message != "1"] == []
    assert peer.closed == (1000, "")
    watch.expect(*["server disconnect"] * 3)
    served.engine.disconnect()
    served.engine.disconnect("unknown")


def test_a_client_that_is_disconnected_does_not_come_back_by_itself(served: Served) -> None:
    """Clients of python-socketio take a close frame alone for a broken connection.

    Source:
        Engine.IO protocol v4, "close": a packet of its own says that the session is over.
    """
    peer = served.joined()
    served.engine.disconnect(only_socket(served).sid)
    assert peer.read_rest() == ["1"]
    assert peer.closed == (1000, "")


def test_a_handler_may_emit_to_many_clients_what_together_is_too_much_at_a_time(
    make_served: Callable[..., Served],
) -> None:
    """It leaves as soon as others have their turn."""
    served = make_served("gevent", event_output_max_bytes=100_000)
    players = [served.joined() for _ in range(5)]

    @served.socketio.on("start")
    def start() -> None:
        for sid in served.inner.connections:
            served.socketio.emit("state", sid + "x" * 40_000, to=sid)

    players[0].send('421["start"]')
    assert players[0].read_until("431") == "431[]"
    for player in players[1:]:
        assert player.read_until('42["state"')


# Polling


def test_a_poll_waits_for_the_first_packet(served: Served) -> None:
    client = served.polling()
    client.join()
    poll = client.begin_get()
    socket = only_socket(served)
    served.wait_for(lambda: socket._poll)
    served.socketio.emit("one")
    assert read_answer(poll).text == '42["one"]'
    assert socket._poll is None
    served.socketio.emit("two")
    served.socketio.emit("three")
    assert client.get().text == '42["two"]\x1e42["three"]'
    assert (len(socket.queue), socket.queue.size) == (0, 0)


def test_jsonp_runs_nothing_that_a_client_has_written(served: Served) -> None:
    """Upstream's answer is a script in which a text can end the string that it stands in."""
    client = Polling(served, "&j=7")
    answer = served.request("GET", client.path).text
    client.sid = json.loads(json.loads(answer[len("___eio[7](") : -len(");")])[1:])["sid"]
    client.post("d=40")
    client.get()
    text = '");alert(1);//\\\u2028\n\x1e\u00e4'
    served.socketio.emit("chat", text)
    answer = client.get().text
    assert answer.isascii()
    assert (answer[:10], answer[-2:]) == ("___eio[7](", ");")
    packet = json.loads(answer[10:-2])  # JSON is JavaScript, where it is ASCII
    assert json.loads(packet[2:]) == ["chat", text]


@both_modes
def test_a_poll_that_nothing_comes_for_ends(make_served: Callable[..., Served], kind: str) -> None:
    served = make_served(kind, options={"ping_interval": 0.1, "ping_timeout": 20})
    client = served.polling()
    client.join()
    client.post("3")  # should a ping have come on the way
    began_at = time.monotonic()
    assert client.get().text == "2"
    assert time.monotonic() - began_at < 10.0


def test_the_answer_to_a_poll_is_bounded_and_the_rest_follows(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(options={"max_http_buffer_size": 1000})
    client = served.polling()
    client.join()
    for number in range(5):
        served.socketio.emit(f"{number}", "x" * 300)
    served.socketio.emit("large", "x" * 5000)
    counts = []
    while sum(counts) < 6:
        counts.append(len(client.get().text.split("\x1e")))
    assert counts == [2, 2, 1, 1]


@both_modes
def test_two_polls_at_a_time_cost_the_session(
    make_served: Callable[..., Served], kind: str
) -> None:
    """What would be answered to one would be lost to the other."""
    served = make_served(kind)
    watch = Watch(served)
    client = served.polling()
    client.join()
    poll = client.begin_get()
    socket = only_socket(served)
    served.wait_for(lambda: socket._poll)
    assert client.get().status == 400
    assert read_answer(poll).status == 400
    watch.expect("transport error")
    assert watch.violations == [signals.Violation("payload", "two polling requests at a time")]


@both_modes
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"x" * 10_001, "size"),
        (b"\xff", "payload"),
        (b'42["x"]\x1e', "payload"),
        (b"9", "packet"),
        (b"x", "payload"),
        (b"d=", "payload"),
        (b"bA", "payload"),
        (b"0{}", "packet"),
        (b"2", "packet"),
    ],
)
def test_a_payload_that_is_none_costs_the_session(
    make_served: Callable[..., Served], kind: str, body: bytes, reason: str
) -> None:
    """Whatever is wrong with it."""
    served = make_served(kind, options={"max_http_buffer_size": 10_000})
    watch = Watch(served)
    client = served.polling()
    client.join()
    answer = served.request("POST", client.path, body=body)
    assert (answer.status, answer.text) == (400, '"Bad Request"')
    assert [violation.reason for violation in watch.violations] == [reason]
    watch.expect("transport error")
    assert client.get().status == 400


def test_a_payload_may_hold_any_number_of_packets_of_the_largest_size_together(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(options={"max_http_buffer_size": 1000})
    client = served.polling()
    client.join()
    packets = [f'42{number:02}["echo"]' for number in range(10, 50)]
    missing = 1000 - len("\x1e".join(packets)) - len(',""')
    packets[0] = packets[0].replace('"echo"', f'"echo","{"x" * missing}"')
    assert len("\x1e".join(packets)) == 1000
    assert client.post(*packets).status == 200
    served.wait_for(lambda: len(only_socket(served).queue) == 40)
    assert client.post("x" * 1001).status == 400


@pytest.mark.parametrize("length", ["", "0"])
def test_an_empty_payload_is_none_but_no_harm(served: Served, length: str) -> None:
    client = served.polling()
    client.join()
    assert client.post(headers={"Content-Length": length} if length else None).status == 200
    client.post('421["echo"]')
    client.read_until("431")


@pytest.mark.parametrize("length", ["x", "-1", "1e3", "99999999999999999999999"])
def test_a_content_length_that_is_none_costs_the_session(served: Served, length: str) -> None:
    """Whatever a server lets through."""
    watch = Watch(served)
    client = served.polling()
    client.join()
    with pytest.raises(violations.ProtocolViolation):
        only_socket(served).handle_post_request({"CONTENT_LENGTH": length})
    watch.expect("transport error")


def test_packets_after_a_close_are_not_acted_upon(served: Served) -> None:
    watch = Watch(served)
    ran: list[object] = []
    served.socketio.on_event("late", ran.append)
    client = served.polling()
    client.join()
    assert client.post("1", '42["late",1]', "9").status == 200
    watch.expect("client disconnect")
    assert ran == []
    assert watch.violations == []


def test_packets_that_need_no_answer_get_none(served: Served) -> None:
    """An upgrade packet without an upgrade is answered with NOOP, as upstream does."""
    client = served.polling()
    client.join()
    assert client.post("3", "3x", "6", "5").status == 200
    assert client.get().text == "6"
    socket = only_socket(served)
    assert (socket.upgraded, socket.upgrading) == (False, False)


# Malformed packets


@every_server
@pytest.mark.parametrize(
    "message", ["", "x", "7", "9", "0{}", "2", "2probe", "bA", "4" + "[" * 100_000, "41x{"]
)
def test_a_packet_that_is_none_costs_the_connection(
    make_served: Callable[..., Served], kind: str, message: str
) -> None:
    served = make_served(kind, close_timeout=0.3)
    watch = Watch(served)
    peer = served.joined()
    peer.send('421["echo"]', message, '422["echo"]')
    assert peer.read_rest() in (["431[]"], [])
    assert peer.closed == (1002, "protocol error")
    watch.expect("transport error")
    assert [violation.reason for violation in watch.violations] == ["packet"]


@both_modes
@pytest.mark.parametrize("message", ["4null", "4false", "4true", "4-0", "4{}", "4[]", "41-[]", "4"])
@pytest.mark.parametrize("is_attachment", [False, True])
def test_json_instead_of_a_packet_costs_at_most_the_connection(
    make_served: Callable[..., Served],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    message: str,
    is_attachment: bool,
) -> None:
    """Engine.IO decodes it, and hands on what is neither text nor bytes. No exception leaves."""
    served = make_served(kind, close_timeout=0.3)
    ran: list[object] = []
    served.socketio.on_event("binary", ran.append)
    for client in (served.joined(), served.polling()):
        send = client.send if isinstance(client, Peer) else client.post
        if isinstance(client, Polling):
            client.join()
        if is_attachment:
            send('451-["binary",{"_placeholder":true,"num":0}]')
        with contextlib.suppress(OSError):
            send(message)
        if isinstance(client, Peer):
            with contextlib.suppress(Ended, OSError):
                client.send('429["echo"]')
                client.read_until("439")
    served.engine.disconnect()
    served.wait_for(served.inner.is_quiet)
    assert all(isinstance(item, bytes) for item in ran)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    # Werkzeug takes the answer to a close frame for the next request.
    assert [text for text in errors if "code 400" not in text] == []


# Stale sessions and odd requests


@both_modes
def test_a_stale_session_is_answered_400_and_nobody_is_alarmed(
    make_served: Callable[..., Served], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    served = make_served(kind)
    watch = Watch(served)
    client = served.polling()
    client.join()
    client.post("1")
    watch.expect("client disconnect")
    for answer in (client.get(), client.post("42[]")):
        assert answer.status == 400
        assert answer.text == f'"Invalid session {client.sid}"'
    path = f"/socket.io/?EIO=4&transport=websocket&sid={client.sid}"
    # The handler of gevent-websocket would answer before the application is asked.
    assert served.request("GET", path, headers=UPGRADE).status == 400
    assert [refusal.reason for refusal in watch.refusals] == ["session"] * 3
    assert client.sid not in str(watch.refusals)
    assert [r for r in caplog.records if r.levelno > logging.INFO and "werk" not in r.name] == []


@every_server
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-WebSocket-Key": "!!!"},
        {"Sec-WebSocket-Version": "12"},
        {"Connection": "keep-alive"},
        {"Upgrade": "websocket;"},
        {"Upgrade": "h2c, websocket"},
    ],
    ids=lambda headers: "-".join(headers.values()),
)
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_an_odd_upgrade_request_is_answered_400_and_the_session_goes_on(
    make_served: Callable[..., Served], kind: str, headers: dict[str, str], transport: str
) -> None:
    """No traceback, for which the fixture looks, and no session for nobody."""
    served = make_served(kind)
    watch = Watch(served)
    client = served.polling()
    client.join()
    fields = {**UPGRADE, **headers}
    for sid in (f"&sid={client.sid}", ""):
        if transport == "polling" and not sid:
            continue
        path = f"/socket.io/?EIO=4&transport={transport}{sid}"
        assert served.request("GET", path, headers=fields).status == 400
    assert served.engine.sockets.keys() == {client.sid}
    if kind != "gevent-websocket":  # whose handler answers before the application is asked
        assert {refusal.reason for refusal in watch.refusals} <= {"upgrade", "request"}
    client.post('421["echo"]')
    assert client.read_until("43") == "431[]"


def test_a_server_without_websockets_is_named(make_served: Callable[..., Served]) -> None:
    """The developer has to see it."""
    served = make_served("gevent")
    environ: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="does not hand over its sockets"):
        engine_socket.GuardedSocket(served.engine, "sid", {})._serve_raw(environ)


@pytest.mark.parametrize(
    ("allowed", "headers", "is_let_in"),
    [
        (None, {"Sec-Fetch-Site": "cross-site", "Referer": "https://evil.example/page"}, False),
        (None, {"Sec-Fetch-Site": "cross-site"}, False),
        (None, {"Sec-Fetch-Site": "same-site", "Referer": "http://other.test/"}, False),
        (None, {"Sec-Fetch-Site": "same-site", "Referer": "http://test/page"}, True),
        (None, {"Sec-Fetch-Site": "same-origin"}, True),
        (None, {}, True),
        (["https://ok.example"], {"Sec-Fetch-Site": "cross-site"}, False),
        (
            ["https://ok.example"],
            {"Sec-Fetch-Site": "cross-site", "Referer": "https://ok.example/"},
            True,
        ),
        ("*", {"Sec-Fetch-Site": "cross-site"}, True),
        ([], {"Sec-Fetch-Site": "cross-site"}, True),
    ],
)
def test_no_page_from_elsewhere_opens_a_session_by_a_script(
    make_served: Callable[..., Served], allowed: Any, headers: dict[str, str], is_let_in: bool
) -> None:
    """JSONP tells it the id of a session with the cookies of its visitor; there is no Origin."""
    served = make_served(options={"cors_allowed_origins": allowed})
    watch = Watch(served)
    answer = served.request("GET", HANDSHAKE + "&j=0", headers=headers)
    assert answer.status == (200 if is_let_in else 400)
    assert [each.reason for each in watch.refusals] == ([] if is_let_in else ["origin"])
    # What JSONP does not carry cannot be read there.
    assert served.request("GET", HANDSHAKE, headers=headers).status == 200


@both_modes
def test_foreign_origins_and_old_versions_are_named(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Most often they are a mistake of the developer's."""
    served = make_served(kind)
    watch = Watch(served)
    served.request("GET", HANDSHAKE, headers={"Origin": "http://elsewhere.example"})
    served.request("GET", HANDSHAKE.replace("EIO=4", "EIO=3"))
    served.request("GET", HANDSHAKE + "&j=x")
    served.request("GET", HANDSHAKE.replace("polling", "x"))
    served.request("GET", HANDSHAKE.replace("polling", "websocket"))
    assert [(refusal.reason, refusal.detail) for refusal in watch.refusals] == [
        ("origin", "http://elsewhere.example is not an accepted origin."),
        ("version", watch.refusals[1].detail),
        ("request", "bad-jsonp-index"),
        ("request", "bad-transport"),
        ("upgrade", "bad-upgrade"),
    ]
    assert "unsupported version" in watch.refusals[1].detail
    served.request("GET", HANDSHAKE, headers={"Origin": "http://" + "x" * 500})
    assert len(watch.refusals[-1].detail) == 200


def test_what_upstream_logs_else_is_logged(
    make_served: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = make_served()
    served.engine._log_error_once("something else", "unheard-of")
    assert "something else" in caplog.text


# Upgrades


class Upgrade:
    """A client over polling, with a WebSocket that it may change to.

    Args:
        served: The application.
        is_polling: Whether a poll is under way before it asks for the WebSocket.
    """

    def __init__(self, served: Served, *, is_polling: bool = False) -> None:
        self.served = served
        self.watch = Watch(served)
        self.polling = served.polling()
        self.sid = self.polling.join()
        self.socket = only_socket(served)
        self.poll: Any = None
        if is_polling:
            self.poll = self.polling.begin_get()
            served.wait_for(lambda: self.socket._poll)
        self.peer = served.websocket(f"&sid={self.polling.sid}")

    def probe(self) -> None:
        self.peer.send("2probe")
        assert self.peer.read() == "3probe"

    def emit(self, *names: str) -> None:
        for name in names:
            self.served.socketio.emit(name)

    def expect_broken_off(self, *names: str) -> None:
        """The session goes on over polling, as if nothing had happened."""
        served = self.served
        self.peer.read_rest()
        served.wait_for(lambda: not self.socket.upgrading)
        assert not self.socket.upgraded
        assert served.socketio.server.transport(self.sid) == "polling"
        for name in names:
            assert self.polling.read_until("4") == f'42["{name}"]'
        self.polling.post('421["echo"]')
        assert self.polling.read_until("4") == "431[]"
        assert self.watch.reasons == []
        again = served.websocket(f"&sid={self.polling.sid}")
        again.send("2probe")
        assert again.read() == "3probe"
        again.send("5")
        self.emit("upgraded")
        assert again.read_until("4") == '42["upgraded"]'


@pytest.fixture(params=KINDS)
def change(make_served: Callable[..., Served], request: pytest.FixtureRequest) -> Upgrade:
    """A client that is about to upgrade, on each server in turn."""
    return Upgrade(make_served(request.param, close_timeout=0.3))


@every_server
def test_an_upgrade_loses_no_message_and_keeps_their_order(
    make_served: Callable[..., Served], kind: str
) -> None:
    change = Upgrade(make_served(kind, close_timeout=0.3), is_polling=True)
    change.emit("one")
    assert read_answer(change.poll).text == '42["one"]'
    change.probe()
    change.emit("two", "three")
    assert change.polling.get().text == "6"
    assert change.served.socketio.server.transport(change.sid) == "polling"
    change.polling.post('421["echo"]')
    change.peer.send("5")
    change.emit("four")
    received = [change.peer.read() for _ in range(4)]
    assert [m for m in received if m != "431[]"] == ['42["two"]', '42["three"]', '42["four"]']
    assert change.served.socketio.server.transport(change.sid) == "websocket"
    assert change.polling.get().status == 400
    change.peer.vanish()
    change.watch.expect("transport close")


@every_server
def test_a_poll_ends_when_its_client_probes(make_served: Callable[..., Served], kind: str) -> None:
    change = Upgrade(make_served(kind, close_timeout=0.3), is_polling=True)
    change.probe()
    assert read_answer(change.poll).text == "6"
    change.peer.send("5", '421["echo"]')
    assert change.peer.read() == "431[]"


def test_what_follows_an_upgrade_at_once_is_not_lost(change: Upgrade) -> None:
    """Clients send what has waited right behind it, in one packet of TCP."""
    change.probe()
    change.peer.send("5", '421["echo",1]', '422["echo",2]')
    assert {change.peer.read(), change.peer.read()} == {"431[1]", "432[2]"}


def test_probe_and_upgrade_may_come_together(change: Upgrade) -> None:
    change.peer.send("2probe", "5", '421["echo"]')
    assert [change.peer.read(), change.peer.read()] == ["3probe", "431[]"]


@pytest.mark.parametrize(
    "message", ["2", "5", "2prob", b"2probe", "x", "42[]", ""], ids=lambda message: str(message)
)
def test_an_upgrade_that_begins_wrongly_is_broken_off(
    change: Upgrade, message: str | bytes
) -> None:
    change.emit("one", "two")
    change.peer.send(message)
    change.expect_broken_off("one", "two")


@pytest.mark.parametrize("message", ["2probe", "4", "", b"5"], ids=lambda message: str(message))
def test_an_upgrade_that_goes_on_wrongly_is_broken_off(
    change: Upgrade, message: str | bytes
) -> None:
    change.probe()
    change.emit("one", "two")
    change.peer.send(message)
    change.expect_broken_off("one", "two")


@pytest.mark.parametrize("is_probed", [False, True])
@pytest.mark.parametrize("how", ["vanish", "close", "rubbish"])
def test_a_websocket_that_ends_breaks_the_upgrade_off(
    change: Upgrade, how: str, is_probed: bool
) -> None:
    if is_probed:
        change.probe()
    change.emit("one", "two")
    if how == "vanish":
        change.peer.sock.shutdown(2)
    elif how == "close":
        change.peer.send_close()
    else:
        change.peer.send_raw(b"\xff" * 20)
    change.expect_broken_off("one", "two")


@every_server
@pytest.mark.parametrize("is_probed", [False, True])
def test_a_websocket_that_says_nothing_breaks_the_upgrade_off(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, kind: str, is_probed: bool
) -> None:
    monkeypatch.setattr(engine_socket, "_UPGRADE_TIMEOUT", 0.2)
    change = Upgrade(make_served(kind))
    if is_probed:
        change.probe()
    change.emit("one", "two")
    change.expect_broken_off("one", "two")


def test_only_one_upgrade_is_made_at_a_time(change: Upgrade) -> None:
    change.probe()
    for is_upgraded in (False, True):
        if is_upgraded:
            change.peer.send("5", '421["echo"]')
            change.peer.read_until("431")
        peer = change.served.websocket(f"&sid={change.polling.sid}")
        with contextlib.suppress(OSError, InvalidState):  # it may have been refused
            peer.send("2probe")
            assert peer.read_rest() == []
    change.peer.send('422["echo"]')
    assert change.peer.read() == "432[]"


def test_a_session_may_end_while_it_is_upgraded(change: Upgrade) -> None:
    change.probe()
    change.polling.post("1")
    assert change.peer.read_rest() == []
    change.watch.expect("client disconnect")
    change.served.wait_for(lambda: not change.served.engine.websocket_transports)


# Heartbeat


def play(client: Peer | Polling, seconds: float, *, is_answering: bool = True) -> list[float]:
    """Receive for a while; return when pings came, in seconds from the beginning."""
    began_at = time.monotonic()
    pings = []
    while time.monotonic() - began_at < seconds:
        with contextlib.suppress(TimeoutError):
            if isinstance(client, Polling):
                client.read_until("2")
                pings.append(time.monotonic() - began_at)
                if is_answering:
                    client.post("3")
            else:
                client.sock.settimeout(max(0.01, began_at + seconds - time.monotonic()))
                client.read_until("2")
                pings.append(time.monotonic() - began_at)
                if is_answering:
                    client.send("3")
    return pings


@pytest.mark.alone
@both_modes
def test_a_client_that_answers_pings_stays(make_served: Callable[..., Served], kind: str) -> None:
    served = make_served(kind, options={"ping_interval": 0.15, "ping_timeout": 0.3})
    watch = Watch(served)
    for connect in (served.joined, served.polling):
        client = connect()
        if isinstance(client, Polling):
            client.join()
        pings = play(client, 0.6)
        assert 2 <= len(pings) <= 5
        assert all(b - a > 0.13 for a, b in itertools.pairwise(pings))
        assert watch.reasons == []
        if isinstance(client, Peer):
            client.vanish()
            watch.expect("transport close")
            watch.reasons.clear()


@pytest.mark.alone
@both_modes
def test_pongs_that_nobody_asked_for_change_nothing(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Neither do they bring more pings, nor put the next one off."""
    served = make_served(kind, options={"ping_interval": 0.2, "ping_timeout": 0.3})
    watch = Watch(served)
    peer = served.joined()
    for _ in range(2):
        began_at = time.monotonic()
        peer.send("3", "3", "3")
        served.runtime.sleep(0.1)
        peer.send("3")
        peer.read_until("2")
        assert time.monotonic() - began_at < 0.29
        peer.send("3", "3")
    pings = play(peer, 0.5)
    assert len(pings) <= 3
    assert watch.reasons == []


@every_server
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_a_client_that_answers_no_ping_is_cut_off(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    """Its socket is shut, not only forgotten."""
    served = make_served(kind, options={"ping_interval": 0.15, "ping_timeout": 0.25})
    watch = Watch(served)
    began_at = time.monotonic()
    if transport == "websocket":
        peer = served.joined()
        assert peer.read_rest() == ["2"]
        assert peer.closed is None
    else:
        client = served.polling()
        client.join()
        assert client.get().text == "2"
        assert client.get().text == "6"
        assert client.get().status == 400
    took = time.monotonic() - began_at
    watch.expect("ping timeout")
    assert 0.38 < took < 10.0


@pytest.mark.alone
@both_modes
def test_a_client_whose_pong_is_behind_much_else_stays(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Until nothing more comes from it."""
    served = make_served(kind, options={"ping_interval": 0.1, "ping_timeout": 0.2})
    watch = Watch(served)
    peer = served.joined()
    for number in range(10):
        served.runtime.sleep(0.08)
        peer.send(f'42{number}["echo"]')
        peer.read_until(f"43{number}[")
    assert watch.reasons == []
    began_at = time.monotonic()
    assert peer.read_rest() in ([], ["2"])
    assert time.monotonic() - began_at < 1.0
    watch.expect("ping timeout")


@pytest.mark.alone
def test_a_client_whose_pong_is_late_is_gone(make_served: Callable[..., Served]) -> None:
    served = make_served(options={"ping_interval": 0.1, "ping_timeout": 0.1})
    watch = Watch(served)
    client = served.polling()
    client.join()
    socket = only_socket(served)
    assert socket.check_ping_timeout()
    served.wait_for(lambda: not served.engine.sockets)
    assert client.post("3").status == 400
    assert not socket.check_ping_timeout()
    watch.expect("ping timeout")


# Who joins nothing


@every_server
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_a_client_that_joins_nothing_is_closed(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, join_timeout=1.0)  # a thread may begin late
    watch = Watch(served)
    began_at = time.monotonic()
    if transport == "websocket":
        peer = served.websocket()
        peer.send("40/nowhere,")
        rest = peer.read_rest()
        assert [m for m in rest if m != "1"][1:] == ['44/nowhere,{"message":"Invalid namespace"}']
        assert peer.closed == (1000, "")
    else:
        assert served.polling().get().text == "1"
    assert 0.9 < time.monotonic() - began_at < 10.0
    watch.expect()


@both_modes
def test_a_client_that_is_let_in_has_joined_before_it_is_sent_what_was_held_for_it(
    make_served: Callable[..., Served], kind: str
) -> None:
    """What its connect handler has emitted may take longer than a client may take to join."""
    served = make_served(kind, **BOUNDS)

    @served.socketio.on("connect")
    def connect() -> None:
        for number in range(60):
            emit("news", number)

    client = served.polling()
    socket = only_socket(served)
    poster = served.runtime.spawn(lambda: client.post("40"), name="poster")
    served.wait_for(lambda: socket.queue.is_full)
    assert socket._join is None
    for number in range(60):
        assert client.read_until("42") == f'42["news",{number}]'
    served.wait_for(lambda: not poster.is_alive())


@both_modes
def test_a_client_that_has_joined_stays(make_served: Callable[..., Served], kind: str) -> None:
    served = make_served(kind, join_timeout=0.15)
    peer, client = served.joined(), served.polling()
    client.join()
    served.runtime.sleep(0.3)
    peer.send('421["echo"]')
    assert peer.read() == "431[]"
    assert len(served.engine.sockets) == 2


# The end of a connection


def leave(peer: Peer) -> None:
    peer.send("41")
    peer.vanish()


WAYS_OVER_WEBSOCKET: dict[str, tuple[Callable[[Served, Peer], object], str]] = {
    "leave": (lambda _, peer: leave(peer), "client disconnect"),
    "close-packet": (lambda _, peer: peer.send("1"), "client disconnect"),
    "close-frame": (lambda _, peer: peer.send_close(), "transport close"),
    "vanish": (lambda _, peer: peer.vanish(), "transport close"),
    "half-a-frame": (
        lambda _, peer: (peer.send_raw(encode_frame(TEXT, b"x" * 9)[:8]), peer.vanish()),
        "transport close",
    ),
    "rubbish": (lambda _, peer: peer.send("x"), "transport error"),
    "bad-frame": (
        lambda _, peer: (setattr(peer, "is_answering", False), peer.send_raw(b"\xff" * 20)),
        "transport close",
    ),
    "all": (lambda served, _: served.engine.disconnect(), "server disconnect"),
}


@every_server
@pytest.mark.parametrize("way", list(WAYS_OVER_WEBSOCKET))
def test_however_a_websocket_ends_the_disconnect_handler_runs_once(
    make_served: Callable[..., Served], kind: str, way: str
) -> None:
    served = make_served(kind, close_timeout=0.3)
    watch = Watch(served)
    peer = served.joined()
    end, reason = WAYS_OVER_WEBSOCKET[way]
    end(served, peer)
    watch.expect(reason)


@both_modes
def test_whoever_disconnects_at_the_same_time_the_handler_runs_once(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind)
    watch = Watch(served)
    for number in range(1, 11):
        peer = served.joined()
        socket = only_socket(served)
        tasks = [
            lambda peer=peer: peer.send("41", "1"),
            lambda socket=socket: served.engine.disconnect(socket.sid),
            lambda socket=socket: socket.close(abort=True, reason="ping timeout"),
            lambda peer=peer: peer.sock.shutdown(2),
        ]
        jobs = []
        for task in tasks[number % 4 :] + tasks[: number % 4]:

            def run(task: Callable[[], object] = task) -> None:
                with contextlib.suppress(OSError):
                    task()

            jobs.append(served.runtime.spawn(run, name="ending"))
        for job in jobs:
            job.join(5.0)
        served.wait_for(lambda number=number: len(watch.reasons) >= number)
        served.wait_for(served.inner.is_quiet)
    assert len(watch.reasons) == 10
    assert served.inner.admission.count(LOOPBACK) == 0


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@both_modes
def test_an_address_is_counted_no_longer_than_its_sessions(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    """Also where those who are told of the end take their time, or ask after the session."""
    served = make_served(kind, max_in_flight=1)
    watch = Watch(served)
    release = served.inner.runtime.flag()

    @served.socketio.on("wait")
    def wait() -> None:
        release.wait(5.0)

    def told(_rejection: object) -> None:
        served.runtime.sleep(0.1)
        with contextlib.suppress(KeyError):
            served.engine.transport(sid)

    subscription = signals.subscribe(signals.rejected, served.app, told)
    client = served.polling() if transport == "polling" else served.websocket()
    client.join()
    sid = only_socket(served).sid
    send = client.post if isinstance(client, Polling) else client.send
    send('42["wait"]', '42["wait"]')
    socket = only_socket(served)
    served.wait_for(lambda: socket._dispatcher is not None and socket._dispatcher.waiting == 1)
    poll = None
    if isinstance(client, Polling):
        poll = client.begin_get()
        served.wait_for(lambda: served.engine.sockets[sid]._poll)
    assert served.inner.admission.count(LOOPBACK) == 1
    closing = served.runtime.spawn(lambda: served.engine.disconnect(sid), name="closing")
    if poll is not None:
        read_answer(poll)
    closing.join(5.0)
    release.set()
    watch.expect("server disconnect")
    del subscription


def test_a_closed_session_takes_and_starts_nothing(served: Served) -> None:
    client = served.polling()
    client.join()
    socket = only_socket(served)
    socket.close(reason="server disconnect")
    size = len(socket.queue)
    assert socket.put(ClientMessage.of_socketio("2[]")) is SendOutcome.DROPPED_CLOSED
    socket.schedule_ping()
    socket._send_ping()
    assert len(socket.queue) == size
    socket.close(abort=True, reason="again")
    served.wait_for(served.inner.is_quiet)
    targets = [deadline.target for *_, deadline in served.inner.deadlines._heap]
    assert not any(getattr(target, "__self__", None) is socket for target in targets)


# Slow consumers

BOUNDS = {"send_queue_max_packets": 20, "send_queue_max_bytes": 10**9, "close_timeout": 0.3}


class _SlowQueue(SendQueue):
    """One of a client that has taken nothing for long."""

    __slots__ = ()

    def is_slow(self, timeout: float, *, is_shared: bool) -> bool:
        return True


class Slow:
    """A client that does not take what it is sent, and the application that sends."""

    def __init__(self, served: Served, transport: str, *, is_idle: bool = True) -> None:
        self.served = served
        self.watch = Watch(served)
        self.transport = transport
        self.is_idle = is_idle
        if transport == "websocket":
            self.peer = served.joined()
        else:
            self.polling = served.polling()
            self.polling.join()
        (self.sid,) = served.inner.connections
        self.socket = only_socket(served)
        self.number = 0
        self.fill_kernel()

    def fill_kernel(self) -> None:
        """Send until what is sent next has to wait here."""
        if self.transport == "websocket":
            self.served.engine.put(self.socket.sid, ClientMessage.of_socketio(b"x" * 20_000_000))
            self.served.wait_for(lambda: self.socket._transport.is_stuck)
            self.served.wait_for(lambda: not self.socket.queue)
        self.socket.queue.__class__ = _SlowQueue if self.is_idle else SendQueue

    def emit(self, count: int = 1, *, size: int = 10, volatile: bool = False) -> list[SendOutcome]:
        """Emit numbers and return what became of them."""
        assert self.served.guard is not None
        outcomes = []
        for _ in range(count):
            self.number += 1
            payload = [self.number, "x" * size]
            outcomes.append(self.served.guard.emit("news", payload, to=self.sid, volatile=volatile))
        return outcomes

    def read_numbers(self, *, count: int | None = None) -> list[int]:
        """Take everything, or all up to the number *count*, and return the numbers."""
        if count is None:
            self.emit(1, size=20)
        last = count or self.number
        numbers: list[int] = []
        while not numbers or numbers[-1] != last:
            if self.transport == "websocket":
                text = self.peer.read_until('42["news"')
            else:
                text = self.polling.read_until('42["news"')
            numbers.append(json.loads(text[2:])[1][0])
        return numbers

    @property
    def lost(self) -> list[tuple[int, str]]:
        """What was lost, and why."""
        return [(loss.count, loss.reason) for loss in self.watch.losses]


@pytest.fixture(params=["polling", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@both_modes
def test_a_slow_client_is_closed_and_told_why(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, **{**BOUNDS, "close_timeout": 5.0})
    slow = Slow(served, transport)
    outcomes = slow.emit(30)
    assert SendOutcome.DROPPED_SLOW in outcomes
    first = outcomes.index(SendOutcome.DROPPED_SLOW)
    assert outcomes[:first] == [SendOutcome.QUEUED] * first
    assert 18 <= first <= 20
    assert set(outcomes[first + 1 :]) == {SendOutcome.DROPPED_CLOSED}
    assert slow.lost == [(first + 1, "slow")]
    if transport == "websocket":
        if kind != "threads":
            slow.peer.read_rest()
            assert slow.peer.closed == (1008, "slow consumer")
    else:
        assert slow.polling.get().status == 400
    slow.watch.expect("transport error")
    assert served.counter("sends_dropped") == first + 1


def test_a_slow_client_is_closed_by_bytes_too(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(**{**BOUNDS, "send_queue_max_bytes": 10_000})
    slow = Slow(served, "polling")
    outcomes = slow.emit(12, size=1000)
    assert outcomes.index(SendOutcome.DROPPED_SLOW) == 9
    slow.watch.expect("transport error")


@both_modes
def test_the_oldest_may_be_dropped_instead(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    """What somebody waits for is not dropped, and the newest always gets through."""
    served = make_served(kind, slow_consumer="drop_oldest", **BOUNDS)
    slow = Slow(served, transport)
    outcomes = slow.emit(100)
    assert set(outcomes) == {SendOutcome.QUEUED}
    numbers = slow.read_numbers()
    assert numbers[-18:] == list(range(84, 102))
    assert numbers == sorted(numbers)
    assert len(numbers) <= 21
    assert sum(count for count, _ in slow.lost) == 101 - len(numbers)
    assert {reason for _, reason in slow.lost} == {"slow"}
    assert slow.watch.reasons == []


@both_modes
def test_the_volatile_may_be_dropped_first(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, slow_consumer="drop_volatile", **BOUNDS)
    slow = Slow(served, transport)
    assert set(slow.emit(5)) == {SendOutcome.QUEUED}
    if transport == "polling":
        # before half of the bound is reached they wait like all others
        assert set(slow.emit(3, volatile=True)) == {SendOutcome.QUEUED}
        assert set(slow.emit(14)) == {SendOutcome.QUEUED}
        assert slow.emit(1, volatile=True) == [SendOutcome.DROPPED_SLOW]
        assert slow.lost == [(1, "slow"), (1, "slow"), (1, "volatile")]
        assert slow.read_numbers() == [*range(1, 6), *range(9, 23), 24]
        assert slow.lost[3:] == [(1, "slow")]
    else:
        assert slow.emit(1, volatile=True) == [SendOutcome.DROPPED_SLOW]
        assert slow.lost == [(1, "volatile")]
        assert slow.read_numbers()[-6:] == [1, 2, 3, 4, 5, 7]
    assert slow.watch.reasons == []
    slow.fill_kernel()
    slow.emit(30)
    slow.watch.expect("transport error")


@both_modes
def test_a_client_that_keeps_up_gets_what_is_volatile(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, **BOUNDS)
    client = served.polling() if transport == "polling" else served.websocket()
    sid = client.join()
    assert served.guard is not None
    for number in range(50):
        outcome = served.guard.emit("news", number, to=sid, volatile=True)
        assert outcome is SendOutcome.QUEUED
        assert client.read_until("42") == f'42["news",{number}]'
        served.wait_for(lambda: not len(only_socket(served).queue))
        if isinstance(client, Peer):
            served.wait_for(lambda: not only_socket(served)._transport.is_stuck)


def test_a_burst_goes_through_where_the_client_takes_it(
    make_served: Callable[..., Served],
) -> None:
    """The queue may be full only because the event loop has not had its turn."""
    served = make_served(**BOUNDS)
    peer = served.joined()
    for number in range(500):
        served.socketio.emit("news", number)
    for number in range(500):
        assert peer.read() == f'42["news",{number}]'
    assert served.counter("sends_dropped") == 0


# Emitters that wait


class Emitting:
    """A handler of a client, or a task with others to serve, that emits to the client."""

    def __init__(self, served: Served, client: Slow, *, is_own: bool, count: int) -> None:
        self.client = client
        self.outcomes: list[SendOutcome] = []
        environ = client.socket._environ
        context = served.app.request_context(environ) if is_own else contextlib.nullcontext()

        def emit() -> None:
            with context:
                for _ in range(count):
                    self.outcomes += client.emit()

        self.job = served.runtime.spawn(emit, name="emitter")


@both_modes
@pytest.mark.parametrize(("is_own", "at_once"), [(True, 20), (False, 40)])
def test_an_emitter_waits_for_a_client_that_makes_progress(
    make_served: Callable[..., Served], kind: str, transport: str, is_own: bool, at_once: int
) -> None:
    """It goes on when the client reads, and the client gets everything."""
    served = make_served(kind, **BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    emitting = Emitting(served, slow, is_own=is_own, count=150)
    served.wait_for(lambda: len(emitting.outcomes) >= at_once - 2)
    served.runtime.sleep(0.05)
    assert at_once - 2 <= len(emitting.outcomes) <= at_once
    assert slow.read_numbers(count=150) == list(range(1, 151))
    served.wait_for(lambda: not emitting.job.is_alive())
    assert set(emitting.outcomes) == {SendOutcome.QUEUED}
    assert slow.lost == []


def test_a_client_that_takes_a_large_message_makes_progress(
    make_served: Callable[..., Served],
) -> None:
    """However long it takes, and who emits meanwhile waits for it."""
    served = make_served(slow_consumer_timeout=1.0, **BOUNDS)
    slow = Slow(served, "websocket", is_idle=False)
    emitting = Emitting(served, slow, is_own=True, count=30)
    began_at = time.monotonic()
    received = 0
    while received < 20_000_000 and time.monotonic() < began_at + 2.0:
        received += len(slow.peer.sock.recv(200_000))
        served.runtime.sleep(0.05)
    assert slow.lost == []
    assert emitting.job.is_alive()


def test_a_client_that_has_come_for_packets_is_not_slow(make_served: Callable[..., Served]) -> None:
    """Its request only has not had its turn yet."""
    served = make_served(**BOUNDS)
    slow = Slow(served, "polling", is_idle=False)
    waiting = slow.polling.begin_get()
    served.wait_for(lambda: slow.socket._poll is not None)
    slow.socket.queue.__class__ = _SlowQueue
    assert set(slow.emit(50)) == {SendOutcome.QUEUED}
    assert read_answer(waiting).status == 200
    assert slow.lost == []


@both_modes
def test_answers_wait_for_a_client_that_makes_progress(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    """More of them than what cannot wait may be."""
    served = make_served(kind, **BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    send = slow.peer.send if transport == "websocket" else slow.polling.post
    for first in range(0, 400, 10):
        events = [f'42{number}["echo",{number}]' for number in range(first, first + 10)]
        send(*events)
    client = slow.peer if transport == "websocket" else slow.polling
    answers = {int(client.read_until("43").split("[")[0][2:]) for _ in range(400)}
    assert answers == set(range(400))
    assert slow.lost == []


class _BehindQueue(SendQueue):
    """One of a client that takes too little for emitters with others to serve."""

    __slots__ = ()

    def is_slow(self, timeout: float, *, is_shared: bool) -> bool:
        return is_shared


class _Own(python_socketio.Server):  # type: ignore[misc]
    """A server of an application."""

    sent = 0

    def note(self) -> None:
        _Own.sent += 1


class _OwnPackets(_Own):
    def _send_packet(self, eio_sid: str, pkt: Any) -> None:
        self.note()
        super()._send_packet(eio_sid, pkt)


class _OwnEnginePackets(_Own):
    def _send_eio_packet(self, eio_sid: str, eio_pkt: Any) -> None:
        self.note()
        super()._send_eio_packet(eio_sid, eio_pkt)


@pytest.mark.parametrize(
    ("own", "how"),
    [
        (None, "emit"),
        (None, "ask"),
        (None, "answer"),
        (_OwnPackets, "ask"),
        (_OwnPackets, "answer"),
        (_OwnEnginePackets, "emit"),
    ],
)
def test_what_a_client_has_asked_for_waits_for_it_whoever_sends_it(
    make_served: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
    own: type[_Own] | None,
    how: str,
) -> None:
    """Its events, questions and answers are for itself alone, and hold up nobody else."""
    if own is not None:
        monkeypatch.setattr("flask_socketio.socketio.Server", own)
    served = make_served(**BOUNDS)
    slow = Slow(served, "polling", is_idle=False)
    slow.socket.queue.__class__ = _BehindQueue
    before = _Own.sent
    total = 350  # more than what cannot wait may be

    @served.socketio.on("ask")
    def ask() -> None:
        options = {"callback": lambda *_: None} if how == "ask" else {}
        for number in range(total):
            emit("news", number, **options)

    if how == "answer":
        slow.polling.post(*(f'42{number}["echo"]' for number in range(total)))
    else:
        slow.polling.post('42["ask"]')
    served.wait_for(lambda: len(slow.socket.queue) >= 18 or slow.socket.closed)
    for _ in range(total):
        slow.polling.read_until("43" if how == "answer" else "42")
    assert slow.lost == []
    assert own is None or _Own.sent - before >= total


def test_a_client_that_downloads_a_large_answer_is_not_slow(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for more when it has read that."""
    served = make_served(**BOUNDS)
    slow = Slow(served, "polling", is_idle=False)
    slow.emit(1, size=800_000)
    assert len(slow.polling.get().text) > 800_000
    slow.emit(19)
    monkeypatch.setattr(sending, "clock", lambda: time.monotonic() + 20.0)
    assert set(slow.emit(10)) == {SendOutcome.QUEUED}
    assert slow.lost == []


@both_modes
def test_an_emitter_waits_no_longer_once_the_client_is_slow(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, slow_consumer_timeout=0.2, **BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    emitting = Emitting(served, slow, is_own=True, count=30)
    served.wait_for(lambda: not emitting.job.is_alive())
    assert SendOutcome.DROPPED_SLOW in emitting.outcomes
    assert emitting.outcomes[-1] is SendOutcome.DROPPED_CLOSED
    slow.watch.expect("transport error")


@both_modes
def test_an_emitter_waits_no_longer_once_the_client_is_gone(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, **BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    emitting = Emitting(served, slow, is_own=True, count=30)
    served.wait_for(lambda: len(emitting.outcomes) >= 18)
    slow.socket.close(abort=True, reason="gone")
    served.wait_for(lambda: not emitting.job.is_alive())
    assert emitting.outcomes[-1] is SendOutcome.DROPPED_CLOSED


def test_what_cannot_wait_passes_within_a_wider_bound(
    make_served: Callable[..., Served], transport: str
) -> None:
    """The event loop itself waits for nobody, and the memory for one client stays bounded."""
    served = make_served(**BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    outcomes: list[SendOutcome] = []
    served.runtime.call_soon(lambda: outcomes.extend(slow.emit(400)))
    served.wait_for(lambda: len(outcomes) == 400)
    assert 318 <= outcomes.index(SendOutcome.DROPPED_SLOW) <= 320
    slow.watch.expect("transport error")


@both_modes
def test_who_broadcasts_waits_for_those_who_are_far_behind(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    served = make_served(kind, **BOUNDS)
    slow = Slow(served, transport, is_idle=False)
    other = served.joined()
    numbers = []

    def broadcast() -> None:
        for number in range(1, 301):
            served.socketio.emit("news", [number, ""])
            numbers.append(number)

    job = served.runtime.spawn(broadcast, name="broadcaster")
    for number in range(1, 159):
        assert other.read() == f'42["news",[{number},""]]'
    assert len(numbers) <= 161
    assert slow.read_numbers(count=300) == list(range(1, 301))
    served.wait_for(lambda: not job.is_alive())
    for number in range(159, 301):
        assert other.read() == f'42["news",[{number},""]]'
    served.wait_for(lambda: not served.engine.behind)


@both_modes
def test_answers_to_a_client_that_does_not_take_them_are_bounded(
    make_served: Callable[..., Served], kind: str, transport: str
) -> None:
    """Every event that it sends makes one, and no bound of events holds them back."""
    served = make_served(kind, **BOUNDS)
    slow = Slow(served, transport)
    send = slow.peer.send if transport == "websocket" else slow.polling.post
    with contextlib.suppress(OSError, AssertionError):
        for number in range(200):
            send(f'42{number}["echo","{"x" * 1000}"]')
            served.runtime.sleep(0)
            if slow.socket.closed:
                break
    served.wait_for(lambda: slow.socket.closed, f"{len(slow.socket.queue)} answers wait")
    assert len(slow.socket.queue) < 100


def test_a_form_of_very_many_fields_is_refused_before_it_is_taken_apart(served: Served) -> None:
    client = served.polling()
    assert client.post("d=3" + "&d=" * 100_000).status == 400
    assert served.counter("protocol_violations") == 1


# How much in one turn


class Turns:
    """How much is acted upon in each turn of the event loop."""

    def __init__(self, served: Served) -> None:
        self.sizes: dict[float, int] = {}
        self.count = 0
        handlers = served.engine.handlers
        act = handlers["message"]

        def counted(sid: str, data: str | bytes) -> object:
            now = served.runtime.loop_iteration()
            self.sizes[now] = self.sizes.get(now, 0) + len(data)
            self.count += 1
            return act(sid, data)

        handlers["message"] = counted


@pytest.mark.parametrize("is_compressing", [False, True])
def test_large_messages_are_acted_upon_one_by_one(
    make_served: Callable[..., Served], is_compressing: bool
) -> None:
    """However small they are on the transport: a kilobyte inflates to a megabyte."""
    served = make_served(websocket_compression=True)
    served.socketio.on_event("ignore", lambda *args: None)
    peer = served.websocket(
        extensions=[ClientPerMessageDeflateFactory()] if is_compressing else None
    )
    assert bool(peer.protocol.extensions) == is_compressing
    peer.read_until("0{")
    peer.join("/")
    turns = Turns(served)
    for _ in range(20):
        peer.protocol.send_text(b'42["ignore","' + b"x" * 300_000 + b'"]')
    data = b"".join(peer.protocol.data_to_send())
    assert (len(data) < 20_000) == is_compressing
    peer.send_raw(data)
    served.wait_for(lambda: turns.count == 20)
    assert max(turns.sizes.values()) < 600_000


def test_packets_of_one_request_are_acted_upon_in_portions(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    served.socketio.on_event("ignore", lambda *args: None)
    client = served.polling()
    client.join()
    turns = Turns(served)
    packet = f'42["ignore","{"x" * 30_000}"]'
    assert client.post(*[packet] * 30).status == 200
    assert turns.count == 30
    assert max(turns.sizes.values()) < 150_000


@both_modes
def test_events_that_take_much_memory_run_a_few_at_a_time(
    make_served: Callable[..., Served], kind: str
) -> None:
    """A small event after them waits for its turn, and nothing is lost."""
    served = make_served(kind, max_in_flight_bytes=300_000)
    release = served.runtime.flag()
    running: list[int] = []
    most: list[int] = []

    def slow(number: int, *args: Any) -> int:
        running.append(number)
        most.append(len(running))
        release.wait(10.0)
        running.remove(number)
        return number

    served.socketio.on_event("slow", slow)
    peer = served.joined()
    heavy = "[" + "[]," * 999 + "[]]"
    for number in range(8):
        peer.send(f'42{number}["slow",{number},"{"x" * 20_000}",{heavy}]')
    served.wait_for(lambda: len(running) == 1)
    (dispatcher,) = [socket._dispatcher for socket in served.engine.sockets.values()]
    served.wait_for(lambda: dispatcher.waiting == 7)
    assert dispatcher.running_size <= 300_000
    release.set()
    assert [peer.read_until("43") for _ in range(8)] == [f"43{n}[{n}]" for n in range(8)]
    assert max(most) == 1


# Others' turn


@pytest.mark.parametrize("head", ['2["large",', "37", "0/none,", "POST"])
def test_others_are_served_while_a_large_packet_is_decoded(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """Events, answers and CONNECT packets, and requests."""
    monkeypatch.setattr(pieces, "TIME_SLICE", 0.0)
    served = make_served()
    other = served.joined()
    begun, ended = served.runtime.flag(), served.runtime.flag()
    decode = pieces.PieceDecoder.decode

    def noting(decoder: Any) -> Any:
        begun.set()
        try:
            return decode(decoder)
        finally:
            ended.set()

    monkeypatch.setattr(pieces.PieceDecoder, "decode", noting)
    table = f"[{'1,' * 450_000}1]"
    if head == "POST":
        client = served.polling()
        client.join()
        send = partial(client.post, f'42["large",{table}]')
    else:
        send = partial(served.joined().send, f"4{head}{table}{']' if '[' in head else ''}")
    served.runtime.spawn(send, name="sender")
    assert begun.wait(5.0)
    trips = 0
    while not ended.is_set():
        other.send(f'420["echo",{trips}]')
        assert other.read_until("43") == f"430[{trips}]"
        trips += 1
    assert trips > 4


def test_what_is_no_message_is_not_decoded(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ping or a pong may carry JSON, by upstream's decoder; nobody asks for it."""
    sizes: list[int] = []

    class Json:
        dumps = staticmethod(json.dumps)

        @staticmethod
        def loads(text: str) -> object:
            sizes.append(len(text))
            return json.loads(text)

    monkeypatch.setattr(receiving.Packet, "json", Json)
    served = make_served()
    peer = served.joined()
    table = f"[{'1,' * 400_000}1]"
    peer.send(f"3{table}", f"6{table}", '420["echo",1]')
    assert peer.read_until("43") == "430[1]"
    assert max(sizes, default=0) <= 64
    peer.send(f"4{table}")
    peer.read_rest()
    assert peer.closed == (1002, "protocol error")
    assert max(sizes, default=0) <= 64


@settings(deadline=None, max_examples=examples(100))
@given(
    st.text(alphabet="a%+&=;€41", max_size=60) | st.text(max_size=20).map(quote_plus),
    st.sampled_from([3, 4, 7]),
)
def test_forms_are_read_as_upstream_reads_them(text: str, size: int) -> None:
    if text.startswith("&") or not text or text.count("&") > 15:
        with pytest.raises(violations.ProtocolViolation):
            receiving._form_value(f"d={text}", lambda: None)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receiving, "_ESCAPED", size)
        turns: list[int] = []
        found = receiving._form_value(f"d={text}", lambda: turns.append(1))
    assert found == parse_qs(f"d={text}")["d"][0]
    assert len(turns) >= len(text.partition("&")[0]) / size


def test_few_connect_packets_are_acted_upon_in_one_turn(
    make_served: Callable[..., Served],
) -> None:
    """They are the smallest packets, and cost more than others."""
    served = make_served()
    peer = served.joined()
    turns = Turns(served)
    peer.send(*["41", "40"] * 100)
    served.wait_for(lambda: turns.count == 200)
    assert max(turns.sizes.values()) <= 16

"""``rate=``: whose events are counted together; joining a namespace again renews nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import flask
import pytest

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.clients.admission import websockets_of
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream.engineio import server as engine_server
from flask_socketio_guard.upstream.engineio.websocket import (
    Silence,
    agree_on_extensions,
    upgrade_problem,
)
from tests.support import unit_support, unit_websocket
from tests.support.unit_websocket import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import RedisServer
    from tests.support.unit_websocket import Peer, Served

pytestmark = [pytest.mark.timeout(30)]
nothing_left_behind = unit_support.nothing_left_behind
make_served = unit_websocket.make_served


def rated(make_served: Callable[..., Served], kind: str = KINDS[0], **options: Any) -> Served:
    """Return an application with an event ``tick`` that is let through twice an hour."""
    storage = options.pop("rate_storage", "memory://")
    served = make_served(kind, rate_storage=storage)
    assert served.guard is not None
    served.guard.on("tick", rate="2/hour", **options)(lambda: "done")

    @served.guard.on("identify")
    def identify(name: str) -> None:
        assert served.guard is not None
        served.guard.identify(flask.request.sid, name)  # type: ignore[attr-defined]

    return served


def ticks(client: Peer, count: int) -> int:
    """Send so many events; return how many were let through."""
    found = []
    for _ in range(count):
        client.send('421["tick"]')
        found.append(json.loads(client.read_until("431")[3:]))
    return found.count(["done"])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_a_client_that_joins_again_has_no_new_rate(
    make_served: Callable[..., Served], kind: str
) -> None:
    client = rated(make_served, kind).joined()
    let_through = ticks(client, 3)
    for _ in range(3):
        client.send("41")
        client.join()
        let_through += ticks(client, 3)
    assert let_through == 2


def test_rates_are_those_of_a_session_an_identity_or_an_address(
    make_served: Callable[..., Served],
) -> None:
    for per, expected in ("session", [2, 2, 2]), ("identity", [2, 0, 2]), ("address", [2, 0, 0]):
        served = rated(make_served, rate_per=per)
        found = []
        for name in "ann", "ann", "bob":
            client = served.joined()
            client.send(f'422["identify","{name}"]')
            client.read_until("432")
            found.append(ticks(client, 3))
        assert found == expected, per


def test_a_rate_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard().on("tick", rate="2/hour", rate_per="room")
    assert str(caught.value) == (
        "rate_per must be one of 'session', 'identity', 'address', not 'room'"
    )


def test_applications_on_one_redis_share_no_counts(
    make_served: Callable[..., Served], redis_server: RedisServer
) -> None:
    served = rated(make_served, rate_storage=redis_server.url)
    assert ticks(served.joined(), 3) == 2
    keys = redis_server.command("KEYS", "*")
    assert keys
    assert all(b"socketio-guard:served/" in key for key in keys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_joins_without_end_is_told_and_closed(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Whatever becomes of it: refused by a handler, unknown, or accepted and left again."""
    served = make_served(kind, max_joins_per_minute=6)
    calls: list[object] = []

    def refuse(auth: object) -> bool:
        calls.append(auth)
        return False

    served.socketio.on_event("connect", calls.append, namespace="/guess")
    served.socketio.on_event("connect", refuse, namespace="/no")
    violations = served.collect(signals.protocol_violated)
    refusals = served.collect(signals.handshake_refused)
    client = served.websocket()
    client.send(*["40/no,{}", "40/nowhere", "40/guess", "41/guess"] * 200)
    received = [text for text in client.read_rest() if isinstance(text, str)]
    assert len(calls) == 4
    assert [text for text in received if "rate_limited" in text] == [
        '44/no,{"message":"Connection rejected by server",'
        '"data":{"code":"rate_limited","message":"too many connects"}}'
    ]
    assert client.closed == (1008, "too many connects")
    assert [violation.reason for violation in violations] == ["connects"]
    assert [refusal.reason for refusal in refusals] == ["application"] * 2
    assert served.counter("handshakes_refused") == 2
    assert served.joined().protocol.state.name == "OPEN"


def test_a_polling_client_that_joins_without_end_is_closed(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(max_joins_per_minute=6)
    client = served.polling()
    assert client.post(*["40/nowhere"] * 500).status == 400
    assert client.get().status == 400
    assert not served.engine.sockets


def test_joins_from_one_address_are_limited(make_served: Callable[..., Served]) -> None:
    served = make_served(join_rate_per_address="3/hour")
    clients = [served.websocket() for _ in range(3)]
    answers = []
    for _ in range(2):
        for client in clients:
            client.send("40")
            answers.append(client.read_until("4")[1:])  # 0 is OPEN, 40 and 44 are answers
            client.send("41")
    assert [text[:1] for text in answers] == ["0", "0", "0", "4", "4", "4"]
    assert "rate_limited" in answers[-1]


def test_one_address_does_not_use_up_the_rate_of_all(make_served: Callable[..., Served]) -> None:
    served = make_served(connection_rate="10/hour", connection_rate_per_address="3/hour")
    admission = served.inner.admission
    found = [served.inner.admission.refusal("192.0.2.1") for _ in range(20)]
    assert found.count(None) == 3
    assert [admission.refusal(f"192.0.2.{each}") for each in range(2, 9)] == [None] * 7
    assert admission.refusal("192.0.2.9") == "rate"


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_refused_hears_of_it_before_the_websocket_is_there(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind, max_connections=2)
    clients = [served.joined(), served.joined()]
    refused = served.websocket()
    assert refused.response is not None
    assert refused.response.status_code == 503
    assert refused.response.headers["Retry-After"] == "5"
    unknown = served.websocket("&sid=unknown")
    # The client of websockets 14 reads no answer in chunks.
    if not isinstance(unknown.protocol.handshake_exc, NotImplementedError):
        assert unknown.response is not None
        assert unknown.response.status_code == 400
    clients[0].send('420["echo",1]')
    assert clients[0].read_until("430") == "430[1]"
    clients[1].send_close()
    served.wait_for(lambda: len(served.engine.sockets) == 1)
    assert served.joined().response.status_code == 101  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_who_has_not_joined_goes_for_who_comes(
    make_served: Callable[..., Served], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that nobody follows up hold no place for longer than a client takes to join."""
    served = make_served(kind, max_connections=4)
    joined = served.joined()
    idle = [served.polling() for _ in range(3)]
    assert served.websocket().response.status_code == 503  # type: ignore[union-attr]
    monkeypatch.setattr(engine_server, "_JOIN_GRACE", 0.0)
    refusals = served.collect(signals.handshake_refused)
    newer = [served.joined() for _ in range(3)]
    assert [refusal.reason for refusal in refusals] == ["unjoined"] * 3
    assert {client.get().status for client in idle} == {400}
    assert served.websocket().response.status_code == 503  # type: ignore[union-attr]
    for client in [joined, *newer]:
        client.send('420["echo",1]')
        assert client.read_until("430") == "430[1]"
    assert not served.engine.unjoined


def test_clients_that_fall_silent_within_http_are_let_go(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each place where a server waits for a client; and nobody else is."""
    monkeypatch.setattr(Silence, "timeout", None)
    served = make_served(http_timeout=0.3, max_connections=10)
    joined = served.joined()
    polling = served.polling()
    body = f"POST {polling.path} HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n40"
    parts = {
        "nothing": "",
        "a request line": "GET / HT",
        "headers": "GET / HTTP/1.1\r\nHost: te",
        "a body": body,
        "a body that nobody reads": "POST /no HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n1",
        "no second request": "GET /livez HTTP/1.1\r\nHost: test\r\n\r\n",
    }
    sockets = {name: served.connect() for name in parts}
    for name, part in parts.items():
        sockets[name].sendall(part.encode())
    answers = {}
    for name, sock in sockets.items():
        data = b""
        while more := sock.recv(65536):
            data += more
        answers[name] = data.split(b"\r\n")[0][9:12].decode()
    assert answers == {
        "nothing": "",
        "a request line": "",
        "headers": "",
        "a body": "400",
        "a body that nobody reads": "404",
        "no second request": "200",
    }
    joined.send('420["echo",1]')  # it has been silent for as long
    assert joined.read_until("430") == "430[1]"


def test_websockets_leave_threads_for_others(make_served: Callable[..., Served]) -> None:
    served = make_served("threads")
    served.inner.admission.max_websockets = websockets_of(3)
    clients = [served.joined() for _ in range(2)]
    assert served.websocket().response.status_code == 503  # type: ignore[union-attr]
    polling = served.polling()
    upgrade = served.websocket(f"&sid={polling.sid}")
    assert upgrade.response is not None
    assert upgrade.response.status_code == 503
    polling.join()  # goes on polling
    clients[0].send_close()
    served.wait_for(lambda: len(served.engine.websocket_transports) == 1)
    assert served.joined().response.status_code == 101  # type: ignore[union-attr]


def test_long_headers_of_a_websocket_are_not_taken_apart() -> None:
    environ = {
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_UPGRADE": "websocket",
        "HTTP_CONNECTION": "a," * 32_000 + "Upgrade",
    }
    assert upgrade_problem(environ) == "Upgrade or Connection is too long"
    offer = {"HTTP_SEC_WEBSOCKET_EXTENSIONS": "permessage-deflate," * 3_000}
    assert agree_on_extensions(offer, is_compressing=True) == (None, [])


def test_few_threads_are_kept_from_websockets() -> None:
    assert [websockets_of(threads) for threads in (1, 2, 8, 16, 100)] == [1, 1, 7, 14, 96]

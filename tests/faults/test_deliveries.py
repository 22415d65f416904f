"""Acknowledged delivery: clients that are away, drop, answer late or never."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.delivery_app import DELIVERY_APP, IN_REDIS
from tests.faults.fleet import health_details
from tests.support import wait_until
from tests.support.raw_clients import RawWebSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer, RawClient, SocketIOClient

pytestmark = pytest.mark.timeout(60)

sampled = pytest.mark.sampled(2)


@pytest.fixture(params=["gevent", "threading"])
def async_mode(request: pytest.FixtureRequest) -> str:
    """Both."""
    return str(request.param)


@pytest.fixture(params=["memory", "redis"])
def fleet(request: pytest.FixtureRequest, make_fleet: Callable[..., Fleet]) -> Fleet:
    """One process that keeps messages in its memory, or two that share a store."""
    is_shared = request.param == "redis"
    return make_fleet(
        app=DELIVERY_APP,
        processes=2 if is_shared else 1,
        has_queue=is_shared,
        config={"SOCKETIO_GUARD_DELIVERY_ACK_TIMEOUT": 0.5, IN_REDIS: is_shared},
    )


@pytest.fixture
def server(fleet: Fleet) -> GunicornServer:
    """Where messages are handed in."""
    return fleet.a


@pytest.fixture
def other(fleet: Fleet) -> GunicornServer:
    """Where clients are: another process, if there is one."""
    return fleet.servers[-1]


def deliver(server: GunicornServer, *values: object, **options: Any) -> list[str]:
    """Have the server deliver values; return the ids."""
    return list(server.post("/deliver", values=list(values), **options))


def states(server: GunicornServer, ids: list[str]) -> list[str]:
    """Return where messages are."""
    return [state for state, _ in server.post("/receipts", ids=ids)]


@sampled
def test_a_client_that_comes_later_gets_what_waits_for_it(
    server: GunicornServer, other: GunicornServer, sio_client: Callable[..., SocketIOClient]
) -> None:
    ids = deliver(server, *range(20), to="ann")
    assert set(states(server, ids)) == {"pending"}
    client = sio_client(other, query="identity=ann")
    wait_until(lambda: set(states(server, ids)) == {"delivered"})
    assert sorted(item.args[0] for item in client.events("news")) == list(range(20))


@sampled
def test_a_client_that_does_not_answer_gets_it_again_and_knows_it(
    server: GunicornServer, other: GunicornServer, raw_client: Callable[..., RawClient]
) -> None:
    client = raw_client(other, query="identity=bob")
    (id,) = deliver(server, "x", to="bob", with_id=True)
    wait_until(lambda: len([text for text, _ in client.frames if "news" in text]) >= 2, timeout=10)
    texts = [text for text, _ in client.frames if "news" in text]
    assert all(f'"delivery_id":"{id}"' in text for text in texts)
    assert '"attempt":1' in texts[0]
    assert '"attempt":2' in texts[1]
    ack_id = texts[1][2 : texts[1].index("[")]
    client.send(f"43{ack_id}[]")
    assert server.post("/wait", id=id, seconds=5) == "delivered"


@sampled
def test_the_sender_may_wait_and_is_told(
    server: GunicornServer, other: GunicornServer, sio_client: Callable[..., SocketIOClient]
) -> None:
    (id,) = deliver(server, "x", to="eve", hooks=True)
    waited: list[Any] = []
    waiting = threading.Thread(
        target=lambda: waited.append(server.post("/wait", id=id, seconds=10))
    )
    waiting.start()
    sio_client(other, query="room=eve")
    waiting.join(10.0)
    assert waited == ["delivered"]
    wait_until(lambda: ["delivered", id, "delivered"] in server.state()["calls"])


@sampled
def test_what_expires_is_a_dead_letter(server: GunicornServer) -> None:
    (id,) = deliver(server, {"a": 1}, to="nobody", ttl=0.3, hooks=True)
    assert server.post("/wait", id=id, seconds=5) == "expired"
    assert [id, "expired", [{"a": 1}]] in server.get("/dead-letters").json()
    wait_until(lambda: ["expired", id, "expired"] in server.state()["calls"])


@sampled
def test_a_message_for_a_connection_is_gone_with_it(
    server: GunicornServer, other: GunicornServer, raw_client: Callable[..., RawClient]
) -> None:
    client = raw_client(other)
    (id,) = deliver(server, "x", to=client.sid)
    client.close()
    assert server.post("/wait", id=id, seconds=5) == "gone"


@sampled
def test_a_client_may_refuse(
    server: GunicornServer, other: GunicornServer, sio_client: Callable[..., SocketIOClient]
) -> None:
    sio_client(other, query="identity=joe", answer=lambda *_: {"error": {"code": "no"}})
    (id,) = deliver(server, "x", to="joe")
    assert server.post("/wait", id=id, seconds=5) == "refused"


@sampled
def test_cancelled_and_replaced_ones_are_not_sent(
    server: GunicornServer, other: GunicornServer, sio_client: Callable[..., SocketIOClient]
) -> None:
    first, second = deliver(server, 1, 2, to="kim", key="price")
    (third,) = deliver(server, 3, to="kim")
    assert server.post("/cancel", id=third) is True
    assert server.post("/cancel", id=third) is False
    client = sio_client(other, query="identity=kim")
    assert server.post("/wait", id=second, seconds=5) == "delivered"
    assert states(server, [first, second, third]) == ["replaced", "delivered", "cancelled"]
    assert [item.args[0] for item in client.events("news")] == [2]


@sampled
def test_ordered_ones_arrive_in_order_through_reconnections(
    server: GunicornServer, other: GunicornServer, sio_client: Callable[..., SocketIOClient]
) -> None:
    got: list[int] = []

    def answer(_event: str, value: int) -> str:
        got.append(value)
        return "ok"

    ids = deliver(server, *range(100), to="lea", ordered=True)

    def is_over(more: int) -> bool:
        return len(got) >= more or set(states(server, ids)) == {"delivered"}

    while set(states(server, ids)) != {"delivered"}:
        client = sio_client(other, query="identity=lea", answer=answer)
        wait_until(partial(is_over, len(got) + 30))
        client.close()
    assert list(dict.fromkeys(got)) == list(range(100))


def test_a_store_that_is_away_is_told_and_nothing_in_it_is_lost(
    make_fleet: Callable[..., Fleet], sio_client: Callable[..., SocketIOClient]
) -> None:
    fleet = make_fleet(
        app=DELIVERY_APP,
        processes=1,
        is_durable=True,
        config={IN_REDIS: True, "SOCKETIO_GUARD_BROKER_TIMEOUT": 1.0},
    )
    ids = deliver(fleet.a, *range(10), to="ann")
    fleet.redis.kill()

    def is_reachable() -> bool:
        (check,) = health_details(fleet.a)["checks"]["deliveries:store"]
        return bool(check["observedValue"])

    wait_until(lambda: not is_reachable(), timeout=15)
    refused = fleet.a.request("POST", "/deliver", json={"values": [10], "to": "ann"}, timeout=30)
    assert refused.status_code == 500, "the sender knows that it is not stored"
    client = sio_client(fleet.a, query="identity=ann")
    fleet.redis.start()
    wait_until(is_reachable, timeout=15)
    wait_until(lambda: set(states(fleet.a, ids)) == {"delivered"}, timeout=15)
    assert sorted(item.args[0] for item in client.events("news")) == list(range(10))
    messages = [record.message for record in fleet.a.records()]
    lines = [message for message in messages if message.startswith("the delivery store")]
    assert "does not answer" in lines[0]
    assert "answers again" in lines[-1]


@sampled
def test_who_only_enters_a_namespace_again_does_not_get_all_anew(
    server: GunicornServer, other: GunicornServer
) -> None:
    """One WebSocket leaves and enters, and acknowledges nothing; 60 messages of 20 kB wait."""
    deliver(server, *["x" * 20_000] * 60, to="pat", retry=[60, 0.5, 30])
    with RawWebSocket(other.port).open(query="identity=pat") as client:
        for _ in range(100):
            client.join().send("41")
        client.join().call("echo", 1, ack_id=1)
        if not any('"news"' in text for text in client.received):
            # Who comes and goes so often waits until ten seconds are over, if nothing was quicker.
            client.read_until("42", timeout=20.0)
        sent = [text for text in client.received if '"news"' in text]
    assert 1 <= len(sent) <= 48, f"{len(sent)} messages, {sum(map(len, sent))} bytes"
    with RawWebSocket(other.port).open(query="identity=pat") as client:
        client.join().read_until("42")  # over another transport, at once


def test_a_message_that_cannot_be_read_keeps_nobody_from_delivering(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(app=DELIVERY_APP, processes=1, config={IN_REDIS: True})
    server = fleet.a
    (broken,) = deliver(server, 1, to="ann")
    (key,) = [name for name in fleet.redis.command("KEYS", "*") if broken.encode() in name][:1]
    assert fleet.redis.command("DEL", key) == 1
    fleet.redis.command("SET", key, "rubbish")
    is_over = threading.Event()
    looks: list[int] = []

    def look() -> None:
        while not is_over.wait(0.01):
            answer = server.request("POST", "/receipts", json={"ids": [broken]}, timeout=30)
            looks.append(answer.status_code)

    looking = [threading.Thread(target=look) for _ in range(3)]
    for each in looking:
        each.start()
    answers = [
        server.request("POST", "/deliver", json={"values": [1] * 20, "to": "ann"}, timeout=30)
        for _ in range(10)
    ]
    is_over.set()
    for each in looking:
        each.join(30.0)
    assert [answer.status_code for answer in answers] == [200] * 10
    assert set(looks) == {500}, "who asks for it is told"
    unknown = server.request("POST", "/wait", json={"id": "\ud800", "seconds": 1}, timeout=30)
    assert unknown.status_code == 500
    (line,) = [each for each in server.records() if "ended too long ago" in str(each)][:1]
    assert "UnicodeEncodeError" not in str(server.records())
    del line


def test_a_message_names_its_devices_when_the_process_of_another_was_frozen(
    make_fleet: Callable[..., Fleet], sio_client: Callable[..., SocketIOClient]
) -> None:
    """It then ends without the other device, which nobody can tell from the state."""
    fleet = make_fleet(
        app=DELIVERY_APP, config={IN_REDIS: True, "SOCKETIO_GUARD_DELIVERY_LEASE": 1.0}
    )
    here, there = (sio_client(server, query="identity=ann") for server in fleet.servers)
    sids = [here.sid, there.sid]
    (id,) = deliver(fleet.a, 1, to="ann", require="all")
    wait_until(lambda: states(fleet.a, [id]) == ["delivered"])
    by, count = fleet.a.post("/acknowledged", id=id)
    assert (sorted(by), count) == (sorted(sids), 2)
    pids = fleet.b.worker_pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        (id,) = deliver(fleet.a, 2, to="ann", require="all")
        wait_until(lambda: states(fleet.a, [id]) == ["delivered"], timeout=20)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    for server in fleet.servers:
        wait_until(lambda server=server: server.post("/acknowledged", id=id) == [sids[:1], 1])

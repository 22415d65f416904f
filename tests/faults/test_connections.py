"""What the guard says and does of connections that end under an application's hands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.connections import CONNECTION_APP, assert_departed_once, ghosts, happenings
from tests.faults.fleet import NOISE, Fleet
from tests.faults.watches import LogWatch
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer
    from tests.support.raw_clients import RawClients

    MakeServer = Callable[..., GunicornServer]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server(make_connection_server: MakeServer) -> GunicornServer:
    """One process that notices soon when a client does not answer."""
    return make_connection_server()


def look(server: GunicornServer, sid: str) -> dict[str, Any]:
    """Return what the guard says of one session id."""
    found: dict[str, Any] = server.post("/connections/look", sid=sid)
    return found


def test_connection_is_found_as_long_as_it_lasts(
    server: GunicornServer, clients: RawClients
) -> None:
    """By its session id, among all, and in the counts by state and namespace."""
    client = clients.websocket(server.port).open().join()
    other = clients.websocket(server.port).open().join("/calm")
    assert look(server, client.sid) == {"is_connected": True, "is_known": True, "state": "open"}
    listed = {entry["sid"]: entry for entry in server.get("/connections").json()}
    assert listed.keys() == {client.sid, other.sid}
    assert listed[other.sid]["namespace"] == "/calm"
    assert listed[other.sid]["is_open"]
    assert server.post("/connections/count") == 2
    assert server.post("/connections/count", namespace="/calm") == 1
    assert server.post("/connections/count", namespace="/nowhere") == 0
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    assert not look(server, client.sid)["is_connected"]
    assert server.post("/connections/count") == 1


def test_disconnect_of_the_unknown_is_an_answer(
    server: GunicornServer, clients: RawClients
) -> None:
    """Neither who was never there nor who has gone costs an exception or a log line."""
    log = LogWatch(server)
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/disconnect", sid="nobody") is False
    assert server.post("/guard/disconnect", sid=client.sid, namespace="/calm") is False
    assert server.post("/guard/disconnect", sid=client.sid) is True
    client.read_until("41")
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    assert server.post("/guard/disconnect", sid=client.sid) is False
    assert assert_departed_once(server, client.sid) == ["server disconnect"]
    assert not log.lines()


def test_emit_says_what_became_of_it(server: GunicornServer, clients: RawClients) -> None:
    """To who is there, to who has gone, and with the wish for an exception."""
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/emit", event="news", to=client.sid) == ["queued"]
    client.read_until('42["news"')
    assert server.post("/guard/emit", event="news", to=client.sid, strict=True) == ["queued"]
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    log = LogWatch(server)
    assert server.post("/guard/emit", event="news", to=client.sid) == ["dropped_closed"]
    assert server.post("/guard/emit", event="news", to=client.sid, strict=True) == [
        "ConnectionClosed"
    ]
    assert not log.lines()


def test_emit_says_that_a_client_does_not_keep_up(
    make_connection_server: MakeServer, clients: RawClients
) -> None:
    """It reads nothing, and its queue is full at some time."""
    server = make_connection_server(ping_interval=300)
    client = clients.websocket(server.port, receive_buffer=4096).open().join()
    outcomes = server.post("/guard/emit", event="news", to=client.sid, size=100_000, count=100)
    first_loss = next(index for index, outcome in enumerate(outcomes) if outcome != "queued")
    assert 10 <= first_loss < 90
    assert outcomes[first_loss] == "dropped_slow"
    assert set(outcomes[first_loss:]) <= {"dropped_slow", "dropped_closed"}
    wait_until(lambda: not ghosts(server), message="the client stays")


def test_emit_to_who_is_not_here_is_handed_to_the_queue(
    make_fleet: Callable[..., Fleet], clients: RawClients
) -> None:
    """Another process may know the session id."""
    server = make_fleet(app=CONNECTION_APP, processes=1).a
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/emit", event="news", to=client.sid) == ["queued"]
    assert server.post("/guard/emit", event="news", to="nobody") == ["handed_to_queue"]
    assert server.post("/guard/emit", event="news", to="nobody", strict=True) == ["handed_to_queue"]


def test_long_loop_ends_at_the_checkpoint_after_the_client_left(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The handler sends step by step; meanwhile others are served."""
    walker, other = (clients.websocket(server.port).open().join() for _ in range(2))
    steps = 1_000_000
    walker.emit("walk", steps)
    walker.read_until('42["step",10')
    asked_at = time.monotonic()
    assert other.call("echo", "meanwhile", ack_id=1) == ["meanwhile"]
    measured("another was answered after", time.monotonic() - asked_at)
    walker.reset()
    left_at = time.time()
    wait_until(lambda: happenings(server, "walk ended", sids={walker.sid}), timeout=5)
    (ended,) = happenings(server, "walk ended", sids={walker.sid})
    measured("ended after", ended["at"] - left_at)
    assert ended["error"] == "ConnectionClosed"
    assert ended["steps"] < steps
    assert ended["at"] - left_at < 1.0 + NOISE


def test_handshake_makes_a_connection_ready(server: GunicornServer, clients: RawClients) -> None:
    """Only who said hello receives what is for the ready."""
    ready, other = (clients.websocket(server.port).open().join("/shaking") for _ in range(2))
    assert other.call("enter", "shaken", ack_id=1, namespace="/shaking") == ["shaken"]
    assert look(server, ready.sid)["state"] == "open"
    assert ready.call("hello", "world", ack_id=1, namespace="/shaking") == ["hello, world"]
    assert look(server, ready.sid)["state"] == "ready"
    assert server.post("/connections/count", state="ready", namespace="/shaking") == 1
    for event, is_for_ready in (("for-the-ready", True), ("for-all", False)):
        server.post(
            "/guard/emit",
            event=event,
            to="shaken",
            namespace="/shaking",
            ready_only=is_for_ready,
        )
    for client in (ready, other):
        client.read_until('42/shaking,["for-all"')
    assert any("for-the-ready" in text for text in ready.received)
    assert not any("for-the-ready" in text for text in other.received)


def test_who_does_not_complete_the_handshake_is_closed(
    server: GunicornServer, clients: RawClients
) -> None:
    """One says nothing, one fails; both get the time that was set, and no more."""
    silent, failing, quick = (
        clients.websocket(server.port).open().join("/shaking") for _ in range(3)
    )
    joined_at = time.time()
    quick.emit("hello", "world", namespace="/shaking")
    failing.emit("hello", "raise", namespace="/shaking")
    sids = {silent.sid, failing.sid}
    wait_until(lambda: len(happenings(server, "departed", sids=sids)) == len(sids), timeout=4)
    for seen in happenings(server, "departed", sids=sids):
        assert 0.7 < seen["at"] - joined_at < 2.0 + NOISE
    assert quick.call("enter", "room", ack_id=1, namespace="/shaking") == ["room"]
    for client in (silent, failing, quick):
        client.shut()
    assert_departed_once(server, silent.sid, failing.sid, quick.sid)


def test_leaving_before_the_handshake_is_normal(
    server: GunicornServer, clients: RawClients
) -> None:
    """It costs no log line."""
    polling = clients.polling(server.port).open().join("/shaking")
    opened = clients.websocket(server.port).open().join("/shaking")
    # What is attached to them fails when it is released, which is logged; so nothing else is.
    log = LogWatch(server)
    polling.post("1")
    opened.shut()
    assert_departed_once(server, polling.sid, opened.sid)
    assert len(log.errors()) == 2
    assert len(log.tracebacks()) == 2


def test_resources_are_released_once_in_reverse_order(
    server: GunicornServer, clients: RawClients
) -> None:
    """However the connection ends, and although one of them cannot be released."""
    opened = [clients.websocket(server.port).open().join("/shaking") for _ in range(4)]
    for client in opened:
        client.emit("hello", "world", namespace="/shaking")
    sids = [client.sid for client in opened]
    opened[0].send("41/shaking,")
    server.post("/guard/disconnect", sid=sids[1], namespace="/shaking")
    opened[2].reset()
    assert_departed_once(server, *sids)
    for sid in sids:
        released = [seen["name"] for seen in happenings(server, "released", sids={sid})]
        assert released == ["third", "second", "first"]

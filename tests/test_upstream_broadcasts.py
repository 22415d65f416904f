"""Broadcasts from the call to real sockets: order, bounds, and who is in the way of whom."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from flask_socketio import join_room

from flask_socketio_guard import SendOutcome
from flask_socketio_guard.clients.fan_out import LEAST_RECIPIENTS, Batch
from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from flask_socketio_guard.upstream.socketio.emission import best_of
from tests.support import unit_support, unit_websocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_websocket import Peer, Served

nothing_left_behind = unit_support.nothing_left_behind
make_served = unit_websocket.make_served

CLIENTS = LEAST_RECIPIENTS + 4


def crowd(served: Served, count: int = CLIENTS) -> tuple[list[str], list[Peer]]:
    """Return clients that have joined, with their session ids."""
    peers = []
    sids = []
    for _ in range(count):
        peer = served.websocket()
        peer.read_until("0{")
        sids.append(peer.join())
        peers.append(peer)
    return sids, peers


def text(name: str) -> str:
    return f'42["news","{name}"]'


def test_what_is_sent_to_one_comes_between_the_broadcasts_where_it_was_sent(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    sids, peers = crowd(served)
    emit = served.socketio.emit
    for number in range(5):
        emit("news", f"all {number}")
        for sid in sids[::3]:
            emit("news", f"one {number}", to=sid)
    everything = [text(f"{who} {number}") for number in range(5) for who in ("all", "one")]
    for position, peer in enumerate(peers):
        wanted = everything if position % 3 == 0 else everything[::2]
        assert [peer.read() for _ in wanted] == wanted


def test_an_answer_comes_behind_the_broadcasts_before_it(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()

    @served.socketio.on("publish")
    def publish() -> str:
        served.socketio.emit("news", "x")
        return "done"

    _, peers = crowd(served)
    peers[3].send('420["publish"]')
    assert [peers[3].read(), peers[3].read()] == [text("x"), '430["done"]']


def test_a_disconnected_client_gets_what_was_broadcast_before(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    sids, peers = crowd(served)
    served.socketio.emit("news", "last")
    served.socketio.server.disconnect(sids[0])
    served.socketio.emit("news", "later")
    assert [peers[0].read(), peers[0].read()] == [text("last"), "41"]
    assert [peers[1].read(), peers[1].read()] == [text("last"), text("later")]


def test_a_session_that_ends_gets_what_was_broadcast_before(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    _, peers = crowd(served)
    served.socketio.emit("news", "last")
    served.engine.disconnect()
    for peer in peers:
        assert peer.read_rest() == [text("last"), "1"]


def test_clients_that_poll_get_broadcasts_too(make_served: Callable[..., Served]) -> None:
    served = make_served()
    _, peers = crowd(served)
    poller = served.polling()
    poller.join()
    for number in range(3):
        served.socketio.emit("news", str(number))
    for number in range(3):
        assert poller.read_until("42") == text(str(number))
    assert [peers[0].read() for _ in range(3)] == [text(str(number)) for number in range(3)]


def test_attachments_travel_with_their_event(make_served: Callable[..., Served]) -> None:
    served = make_served()
    _, peers = crowd(served)
    served.socketio.emit("news", b"\x00\x01")
    served.socketio.emit("news", "text")
    for peer in peers:
        assert [peer.read() for _ in range(3)] == [
            '451-["news",{"_placeholder":true,"num":0}]',
            b"\x00\x01",
            text("text"),
        ]


def test_rooms_and_who_is_skipped_are_those_of_the_call(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()

    @served.socketio.on("connect")
    def connect() -> None:
        join_room("room")

    sids, peers = crowd(served)
    server = served.socketio.server
    served.socketio.emit("news", "first", to="room", skip_sid=sids[0])
    for sid in sids[1:]:
        server.leave_room(sid, "room", "/")
    served.socketio.emit("news", "second", to="room")
    assert peers[0].read() == text("second")
    served.socketio.emit("news", "third")
    assert [peers[1].read(), peers[1].read()] == [text("first"), text("third")]


def test_who_does_not_read_costs_no_memory_and_keeps_nobody_waiting(
    make_served: Callable[..., Served],
) -> None:
    served = make_served(
        send_queue_max_bytes=300_000, slow_consumer_timeout=0.5, close_timeout=10.0
    )
    sids, peers = crowd(served)
    lazy, others = peers[0], peers[1:]
    outcomes: list[Any] = []
    body = "x" * 100_000
    for number in range(120):  # more than the buffers of the kernel take
        outcomes.append(served.guard.emit("news", (number, body)))  # type: ignore[union-attr]
        for peer in others:
            assert str(peer.read()).startswith(f'42["news",{number},')
    assert set(outcomes) == {SendOutcome.QUEUED}
    served.wait_for(lambda: sids[0] not in served.inner.connections)
    assert served.counter("sends_dropped") > 0
    lazy.read_rest()
    assert lazy.closed == (1008, "slow consumer")


def test_everybody_leaving_at_once_leaves_nothing(make_served: Callable[..., Served]) -> None:
    served = make_served()
    _, peers = crowd(served)
    for number in range(20):
        served.socketio.emit("news", str(number))
    for peer in peers:
        peer.vanish()
    served.wait_for(lambda: not served.engine.sockets)
    assert served.inner.fan_out is not None
    served.wait_for(lambda: not served.inner.fan_out.is_busy)
    assert len(served.inner.fan_out) == 0


class Patient:
    """A recipient that takes its time."""

    def write(self, batch: Batch) -> None:
        del batch
        time.sleep(0.00001)


def test_broadcasts_of_others_come_as_fast_as_they_are_written(
    make_served: Callable[..., Served],
) -> None:
    """What the listener reads ahead is bounded, and Redis keeps the rest."""
    served = make_served()
    inner = served.inner
    fan_out = inner.fan_out
    assert fan_out is not None
    message = ClientMessage.of_socketio("2[]", is_event=True)
    everybody = [Patient() for _ in range(15_000)]
    left = []
    served.socketio.server.manager.deliver = lambda arrival: fan_out.add(
        message, everybody[arrival:]
    )
    for number in range(4):  # one after the other, for none has the same recipients
        inner._take_message(number)  # type: ignore[arg-type]
        left.append(len(fan_out))
    assert left[0] == 15_000
    assert 0 < max(left[1:]) <= 20_000
    served.wait_for(lambda: not fan_out.is_busy)


@pytest.mark.parametrize("kind", ["gevent-websocket", "threads"])
def test_broadcasts_may_take_the_way_through_the_queues(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind, fast=kind == "threads")
    assert served.inner.fan_out is None
    _, peers = crowd(served)
    for number in range(5):
        served.socketio.emit("news", str(number))
    for peer in peers:
        assert [peer.read() for _ in range(5)] == [text(str(number)) for number in range(5)]


def test_the_outcome_is_the_best_that_became_of_it() -> None:
    closed, slow, queued = (
        SendOutcome.DROPPED_CLOSED,
        SendOutcome.DROPPED_SLOW,
        SendOutcome.QUEUED,
    )
    assert best_of([]) is closed
    assert best_of([closed, slow]) is best_of([slow, closed]) is slow
    assert best_of([closed, slow, queued]) is queued


def test_few_recipients_have_it_in_their_queues(make_served: Callable[..., Served]) -> None:
    """It is written with what else they get in this turn."""
    served = make_served()
    _, peers = crowd(served, 3)
    served.socketio.emit("news", "x")
    assert served.inner.fan_out is not None
    assert not served.inner.fan_out.is_busy
    assert [peer.read() for peer in peers] == [text("x")] * 3

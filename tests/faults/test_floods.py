"""Clients that send more, faster or other than a server can or wants to handle."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import counter
from tests.faults.watches import (
    FLOOD_APP,
    EchoWatch,
    crowding,
    milliseconds,
)
from tests.support import wait_until
from tests.support.raw_clients import RawWebSocket
from tests.support.raw_websocket import text_frame
from tests.support.scale import IS_WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

IN_FLIGHT = "a client sends more events than can be handled"
MAX_IN_FLIGHT = 64


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process without a message queue."""
    return make_fleet(app=FLOOD_APP, processes=1, has_queue=False).a


def burst(event: str, count: int, *args: Any) -> bytes:
    """Return *count* events with numbers and acknowledgements, as frames."""
    return b"".join(
        text_frame(f"42{number}{json.dumps([event, number, *args])}") for number in range(count)
    )


def read_acks(client: RawWebSocket, count: int, *, timeout: float = 20.0) -> dict[int, Any]:
    """Read *count* acknowledgements; return the first argument of each by its number.

    Questions of the server are answered meanwhile with their own argument.
    """
    acks: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(acks) < count:
        frame = client.read_frame(max(deadline - time.monotonic(), 0.0))
        assert frame is not None, f"the connection has ended after {len(acks)} of {count} answers"
        kind, text = frame.text[:2], frame.text[2:]
        number, bracket, rest = text.partition("[")
        if kind == "43":
            arguments = json.loads(bracket + rest)
            acks[int(number)] = arguments[0] if arguments else None
        elif kind == "42" and rest.startswith('"question"'):
            client.send(f"43{number}{json.dumps(json.loads(bracket + rest)[1:])}")
    return acks


def codes(acks: dict[int, Any]) -> Counter[str]:
    """Return how many acknowledgements carry which error code; ``done`` is none."""
    return Counter(
        ack["error"]["code"] if isinstance(ack, dict) and "error" in ack else "done"
        for ack in acks.values()
    )


@pytest.fixture
def joined(server: GunicornServer) -> Iterator[RawWebSocket]:
    """A client that has joined, and gauges that show nothing yet."""
    server.post("/gauges/reset")
    with RawWebSocket(server.port, timeout=20.0) as client:
        client.open().join()
        yield client


both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])


@pytest.mark.alone
@both_modes
@pytest.mark.faults(
    IN_FLIGHT, stock="all run at a time: 700 to 2,000", because=r"\d{3,4} handlers ran at a time"
)
def test_client_cannot_have_more_events_running_than_the_limit(
    server: GunicornServer, joined: RawWebSocket, measured: Measured
) -> None:
    """Many slow events in a burst: 64 run at a time, the others wait."""
    with EchoWatch(server) as idle:
        wait_until(lambda: len(idle.latencies()) >= 100)
    rejected = counter(server, "events_rejected")
    count = 2000 if IS_WHOLE else 1000
    with EchoWatch(server) as others:
        began_at = time.monotonic()
        joined.write(burst("slow", count, 0.1))
        acks = read_acks(joined, count)
        measured("took", time.monotonic() - began_at)
    gauge = server.get("/gauge/slow").json()
    found = codes(acks)
    measured("at a time", gauge["most"])
    measured("answers", dict(found))
    measured("p99 of others", f"{milliseconds(others.p99())}, idle {milliseconds(idle.p99())}")
    assert gauge["most"] <= MAX_IN_FLIGHT, f"{gauge['most']} handlers ran at a time"
    assert found["done"] == len(gauge["ended"]) == count
    assert counter(server, "events_rejected") == rejected
    assert not others.errors
    # Behind all of them it would be the second and more that they take.
    assert others.p99() < max(10 * idle.p99(), crowding()), "others waited for their answers"
    assert joined.call("echo", "still there", ack_id=9999) == ["still there"]


@pytest.mark.alone
@both_modes
@pytest.mark.faults(
    "a client sends more events than its rate", stock="all run", because="100 of 100 were handled"
)
def test_events_beyond_their_rate_are_refused(
    server: GunicornServer, joined: RawWebSocket, measured: Measured
) -> None:
    """100 events in a burst, to a handler that takes 20 per second."""
    count = 100
    joined.write(burst("rated", count))
    acks = read_acks(joined, count)
    gauge = server.get("/gauge/rated").json()
    found = codes(acks)
    measured("answers", dict(found))
    handled = len(gauge["ended"])
    assert handled <= 45, f"{handled} of {count} were handled"
    assert handled == found["done"] >= 20
    assert found["done"] + found["rate_limited"] == count
    # Another client has a rate of its own.
    with RawWebSocket(server.port) as other:
        other.open().join()
        assert other.call("rated", 1, ack_id=1) == [1]
    wait_until(
        lambda: "error" not in str(joined.call("rated", 1, ack_id=count)),
        timeout=3,
        message="it is never let through again",
        interval=0.2,
    )


@both_modes
@pytest.mark.faults(
    "events that depend on their order", stock="they overtake each other", because="at a time"
)
def test_ordered_events_are_handled_one_after_another(
    server: GunicornServer, joined: RawWebSocket, measured: Measured
) -> None:
    """300 events whose handlers take different times, in a burst."""
    count = 300
    joined.write(burst("ordered", count))
    acks = read_acks(joined, count)
    gauge = server.get("/gauge/ordered").json()
    measured("at a time", gauge["most"])
    assert gauge["most"] == 1, f"{gauge['most']} handlers ran at a time"
    assert gauge["began"] == gauge["ended"] == list(range(count))
    assert list(acks.items()) == [(number, number) for number in range(count)]


@both_modes
@pytest.mark.faults(
    IN_FLIGHT,
    stock="all handlers that ask the client run at a time",
    because=r"\d{3} handlers ran at a time",
)
def test_handlers_that_wait_for_answers_of_a_busy_client_get_them(
    server: GunicornServer, joined: RawWebSocket, measured: Measured
) -> None:
    """400 events whose handlers ask their sender: 64 wait for it while its events wait for them."""
    count = 400
    joined.write(burst("asking", count))
    began_at = time.monotonic()
    acks = read_acks(joined, count)
    gauge = server.get("/gauge/asking").json()
    measured("at a time", gauge["most"])
    measured("took", time.monotonic() - began_at)
    assert gauge["most"] <= MAX_IN_FLIGHT, f"{gauge['most']} handlers ran at a time"
    assert acks == {number: number for number in range(count)}


@both_modes
@pytest.mark.faults(
    "a client sends a payload of another shape",
    stock="the handler runs with it",
    because="the handler ran",
)
def test_payload_of_another_shape_is_refused(
    server: GunicornServer, joined: RawWebSocket, measured: Measured
) -> None:
    """Payloads that break the schema are answered with an error, and a right one is handled."""
    payloads: list[list[Any]] = [
        [{"piece": "rook"}],
        [{"piece": "rook", "to": "a1"}],
        [{"piece": "rook", "to": [1]}],
        ["rook"],
        [None],
        [[1, 2, 3]],
        [],
        [{"piece": "rook", "to": [1, 2]}, "more"],
    ]
    answers = []
    for number, payload in enumerate(payloads):
        answers.append(joined.call("move", *payload, ack_id=number))
        handled = len(server.get("/gauge/move").json()["began"])
        assert handled == 0, f"the handler ran with {payload}"
    measured("refused", len(answers))
    assert [answer[0]["error"]["code"] for answer in answers] == ["invalid"] * len(payloads)
    assert "Traceback" not in json.dumps(answers)
    assert joined.call("move", {"piece": "rook", "to": [1, 2]}, ack_id=99) == ["rook"]

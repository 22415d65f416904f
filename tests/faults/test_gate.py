"""What is sent to a client, and by it, while its connect handler runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.arrivals_app import ARRIVALS_APP, GATE
from tests.support import wait_until
from tests.support.raw_clients import PollingClient, RawWebSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])
CONNECTED = f'0{GATE},{{"sid"'
REFUSED = f"4{GATE},"
QUESTIONS = [f"42{GATE},{digit}" for digit in range(1, 10)]
"""How events begin that are to be answered."""


@pytest.fixture
def make_server(make_fleet: Callable[..., Fleet]) -> Callable[..., GunicornServer]:
    """Return a function that provides one process, with nothing noted yet."""

    def make(**socketio: Any) -> GunicornServer:
        server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False, socketio=socketio).a
        server.get("/notes?reset=1")
        return server

    return make


@pytest.fixture
def server(make_server: Callable[..., GunicornServer]) -> GunicornServer:
    """One that tells clients that they are connected when they are let in."""
    return make_server()


@pytest.fixture
def eager(make_server: Callable[..., GunicornServer]) -> GunicornServer:
    """One that tells them before."""
    return make_server(always_connect=True)


def notes(server: GunicornServer, *kinds: str) -> list[list[Any]]:
    """Return what the application has noted."""
    return [found for found in server.get("/notes").json() if found[0] in kinds]


def enter(server: GunicornServer, wants: str, *, until: str) -> list[str]:
    """Knock at the gate; return what comes after the client's session, up to a mark."""
    with RawWebSocket(server.port) as client:
        client.open(query=f"gate={wants}&for=0.3")
        client.send_join(GATE)
        client.read_until(f"4{until}")
        return [text[1:] for text in client.received if text.startswith("4")]


def ack_id_of(question: str) -> str:
    """Return the number that an answer to a question carries."""
    return question.removeprefix(f"42{GATE},").partition("[")[0]


@both_modes
@pytest.mark.faults(
    "a connect handler emits, and then refuses the client",
    stock="it is sent",
    because="before it was refused",
)
def test_a_refused_client_has_been_sent_nothing(server: GunicornServer) -> None:
    received = enter(server, "refuse,slow,ask", until=REFUSED)
    assert len(received) == 1, f"{received[:-1]} came before it was refused"
    # What waits for its answer is told that there will be none.
    wait_until(lambda: not server.state()["guard"]["waiting_callbacks"])
    assert server.get("/held").json() == 0


@both_modes
@pytest.mark.faults(
    "a connect handler emits",
    stock="it comes before the client is connected",
    because="before it was connected",
)
def test_what_a_connect_handler_emits_comes_after_the_client_is_connected(
    server: GunicornServer,
) -> None:
    """To the client, to rooms that it has entered, and what others emit meanwhile; in order."""
    with RawWebSocket(server.port) as client:
        client.open(query="gate=slow&for=0.5")
        client.send_join(GATE)
        wait_until(lambda: notes(server, "enter"))
        assert server.post("/greet")
        client.read_until(f'42{GATE},["news","to the room"]')
        received = [text[1:] for text in client.received if text.startswith("4")]
    assert received[0].startswith(CONNECTED), f"{received[0]} came before it was connected"
    assert received[1:3] == [f'2{GATE},["secret",1]', f'2{GATE},["secret",2]']
    assert server.get("/held").json() == 0
    assert received[3:] == [
        f'2{GATE},["message","secret 3"]',
        f'2{GATE},["news","to all"]',
        f'2{GATE},["news","to the room"]',
    ]


def test_what_another_process_emits_comes_after_the_client_is_connected(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(app=ARRIVALS_APP)
    fleet.a.get("/notes?reset=1")
    with RawWebSocket(fleet.a.port) as client:
        client.open(query="gate=slow&for=0.5")
        client.send_join(GATE)
        wait_until(lambda: notes(fleet.a, "enter"))
        assert fleet.b.post("/greet")
        client.read_until(f'42{GATE},["news","to the room"]')
        received = [text[1:] for text in client.received if text.startswith("4")]
    assert received[0].startswith(CONNECTED)
    assert received[-2:] == [
        f'2{GATE},["news","to all"]',
        f'2{GATE},["news","to the room"]',
    ]


@both_modes
def test_the_callback_of_an_emit_in_a_connect_handler_is_called(server: GunicornServer) -> None:
    with RawWebSocket(server.port) as client:
        client.open(query="gate=ask")
        client.send_join(GATE)
        client.finish_joining(GATE)
        ack_id = ack_id_of(client.read_until(*QUESTIONS))
        client.send(f'43{GATE},{ack_id}["yes"]')
        assert wait_until(lambda: notes(server, "answered")) == [["answered", "yes"]]


@both_modes
@pytest.mark.faults(
    "a connect handler asks its client and waits for the answer",
    stock="it waits until its time is over",
    because=r"waited for \d+ s",
)
@pytest.mark.sampled(2)
@pytest.mark.parametrize("always_connect", [False, True])
def test_a_call_in_a_connect_handler_does_not_wait_in_vain(
    make_server: Callable[..., GunicornServer], always_connect: bool
) -> None:
    """There can be no answer; it is told so, as if the time were over."""
    server = make_server(always_connect=always_connect)
    with RawWebSocket(server.port, timeout=15) as client:
        client.open(query="gate=call")
        client.send_join(GATE)
        client.finish_joining(GATE)
        wait_until(lambda: notes(server, "called"), timeout=15)
    ((_, error, seconds),) = notes(server, "called")
    assert seconds < 1, f"waited for {seconds:.0f} s"
    assert error == "CallTooEarly"


@both_modes
def test_a_call_in_a_connect_handler_is_answered_by_who_is_told_before(
    eager: GunicornServer,
) -> None:
    """Over polling other requests bring the answer."""
    client = PollingClient(eager.port, query="gate=call").open()
    joining = client.begin("POST", f"40{GATE},")
    question = wait_until(
        lambda: next((text for text in client.get().packets if '"question"' in text), None)
    )
    assert question is not None
    ack_id = ack_id_of(question)
    client.post(f'43{GATE},{ack_id}["yes"]')
    joining.read_answer()
    client.vanish()
    assert notes(eager, "called")[0][1] == "yes"


@pytest.mark.sampled(2)
@both_modes
@pytest.mark.parametrize("wants", ["slow", "slow,refuse"])
def test_events_wait_for_the_connect_handler(eager: GunicornServer, wants: str) -> None:
    """They run in order when the client was let in, and are answered when it was refused."""
    client = PollingClient(eager.port, query=f"gate={wants}&for=0.5").open()
    joining = client.begin("POST", f"40{GATE},")
    wait_until(lambda: notes(eager, "enter"))
    for number in range(5):
        assert client.post(f'42{GATE},{number}["early",{number}]').status == 200
    joining.read_answer()
    packets: list[str] = []

    def answers() -> list[str]:
        prefix = f"43{GATE},"
        return [text.removeprefix(prefix) for text in packets if text.startswith(prefix)]

    def has_all() -> bool:
        packets.extend(client.get().packets)
        is_refused = any(text.startswith(f"41{GATE},") for text in packets)
        return len(answers()) == 5 and is_refused == ("refuse" in wants)

    wait_until(has_all)
    client.vanish()
    assert [answer.partition("[")[0] for answer in answers()] == list("01234")
    told = notes(eager, "early", "entered")
    assert told.pop(0)[0] == "entered"
    if "refuse" in wants:
        assert all('"gone"' in answer for answer in answers())
        assert told == []
        # While it still hears them.
        assert packets[-1].startswith(f"41{GATE},")
    else:
        assert told == [["early", number, True] for number in range(5)]


@both_modes
def test_events_in_one_request_with_a_refused_connect_are_answered(
    server: GunicornServer,
) -> None:
    with RawWebSocket(server.port) as client:
        client.open(query="gate=refuse")
        client.send_join(GATE)
        assert "'gone'" in str(client.call("early", 1, ack_id=7, namespace=GATE))
    assert notes(server, "early") == []

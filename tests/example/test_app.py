from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from example_app.app import create_app, guard, socketio, traders
from example_app.market import PITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask import Flask
    from flask_socketio.test_client import SocketIOTestClient

    Enter = Callable[..., SocketIOTestClient]


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    """The application without a message queue, as the test client needs it."""
    app = create_app()
    yield app
    with app.app_context():
        guard.stop(timeout=1.0)


@pytest.fixture
def enter(app: Flask) -> Iterator[Enter]:
    """Return a function that lets a trader in, and into a pit if one is named."""
    entered: list[SocketIOTestClient] = []

    def enter(name: str, pit: str = "") -> SocketIOTestClient:
        client = socketio.test_client(app, auth={"name": name})
        entered.append(client)
        if pit:
            client.emit("join", pit, callback=True)
        return client

    yield enter
    for client in entered:
        if client.is_connected():
            client.disconnect()
    assert not traders


def wait_for(client: SocketIOTestClient, event: str) -> list[Any]:
    """Return the arguments of the first *event* that *client* receives."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        for received in client.get_received():
            if received["name"] == event:
                arguments: list[Any] = received["args"]
                return arguments
        socketio.sleep(0.01)  # lets the greenlets of the guard run
    raise AssertionError(f"{event!r} was not received")


def sid_of(name: str) -> str:
    return next(sid for sid, trader in traders.items() if trader.name == name)


def test_trader_joins_a_pit_and_gets_its_last_minute(enter: Enter) -> None:
    """The acknowledgement of `join` holds a price for each of the last sixty seconds."""
    answer = enter("Ada").emit("join", "Coffee", callback=True)
    assert answer["pit"] == "Coffee"
    seconds = [at for at, _ in answer["prices"]]
    assert seconds == list(range(seconds[0], seconds[0] + 60))
    assert all(0.9 < value / PITS["Coffee"] < 1.1 for _, value in answer["prices"])


def test_trade_reaches_the_pit_and_nobody_else(enter: Enter) -> None:
    """Those who are in the pit hear of the trade, the trader included."""
    ada, bram, chidi = enter("Ada", "Tea"), enter("Bram", "Tea"), enter("Chidi", "Cocoa")
    deal = ada.emit("trade", "buy", 7, callback=True)
    assert deal.items() >= {"who": "Ada", "side": "buy", "lots": 7, "pit": "Tea"}.items()
    assert wait_for(ada, "trade") == wait_for(bram, "trade") == [deal]
    assert "trade" not in [received["name"] for received in chidi.get_received()]


def test_trader_who_changes_the_pit_leaves_the_old_one(enter: Enter) -> None:
    """Being in one pit at a time is what the rooms are for."""
    ada, bram = enter("Ada", "Tea"), enter("Bram", "Tea")
    bram.emit("join", "Saffron", callback=True)
    ada.emit("trade", "sell", 1, callback=True)
    bram.emit("trade", "sell", 2, callback=True)
    assert wait_for(bram, "trade")[0]["pit"] == "Saffron"
    assert traders[sid_of("Bram")].pit == "Saffron"


def test_question_reaches_the_trader_it_is_for(enter: Enter) -> None:
    """It carries who asks, and the price as it is."""
    ada, bram = enter("Ada", "Coffee"), enter("Bram", "Coffee")
    ada.emit("ask", sid_of("Bram"))
    (question,) = wait_for(bram, "question")
    assert question.items() >= {"who": "Ada", "pit": "Coffee"}.items()
    assert set(question) == {"who", "pit", "at", "price"}


def test_pit_hears_that_a_trader_who_left_gave_no_answer(enter: Enter) -> None:
    """A callback that can no longer be called is told so at once, not after its 20 seconds."""
    ada, bram = enter("Ada", "Coffee"), enter("Bram", "Coffee")
    ada.emit("ask", sid_of("Bram"))
    bram.disconnect()
    (answer,) = wait_for(ada, "answer")
    assert answer["who"] == "Ada"
    assert answer["answer"] is None


@pytest.mark.parametrize(
    ("event", "arguments", "code"),
    [
        ("join", ["Copper"], "invalid"),
        ("join", [["Tea"]], "invalid"),
        ("join", [None], "invalid"),
        ("join", [], "invalid"),
        ("trade", ["steal", 1], "invalid"),
        ("trade", ["buy", 0], "invalid"),
        ("trade", ["buy", 101], "invalid"),
        ("trade", ["buy", "5"], "invalid"),
        ("trade", ["buy", True], "invalid"),
        ("trade", ["buy", 1.5], "invalid"),
        ("trade", ["buy"], "invalid"),
        ("ask", [{"room": "all"}], "invalid"),
        ("ask", [3], "invalid"),
        ("ask", [""], "rejected"),
        ("ask", ["Tea"], "rejected"),
    ],
)
def test_bad_input_is_refused(enter: Enter, event: str, arguments: list[Any], code: str) -> None:
    """The client is told by the acknowledgement, and nobody hears of it."""
    ada, bram = enter("Ada", "Tea"), enter("Bram", "Tea")
    answer = ada.emit(event, *arguments, callback=True)
    assert answer["error"]["code"] == code
    assert answer["error"]["message"]
    assert [
        received["name"] for received in bram.get_received() if received["name"] != "tick"
    ] == []


def test_trader_who_trades_too_fast_is_refused(enter: Enter) -> None:
    """Ten trades in a second are enough; the next is not told to anybody."""
    ada = enter("Ada", "Tea")
    answers = [ada.emit("trade", "buy", 1, callback=True) for _ in range(30)]
    codes = [answer["error"]["code"] for answer in answers if "error" in answer]
    assert len(codes) >= 10
    assert set(codes) == {"rate_limited"}


@pytest.mark.parametrize(("event", "arguments"), [("trade", ["buy", 1]), ("ask", ["x"])])
def test_trader_outside_the_pits_is_told_to_join_one(
    enter: Enter, event: str, arguments: list[Any]
) -> None:
    """There is nobody to trade with in no pit."""
    answer = enter("Ada").emit(event, *arguments, callback=True)
    assert answer["error"] == {"code": "rejected", "message": "join a pit first"}


@pytest.mark.parametrize("auth", [None, {}, {"name": 42}, {"name": None}, "Ada", [], 3])
def test_connect_without_a_name_is_refused(app: Flask, auth: object) -> None:
    """The connect handler raises, which must never let anybody in."""
    client = socketio.test_client(app, auth=auth)
    assert not client.is_connected()
    assert not traders


@pytest.mark.parametrize(
    ("given", "name"), [("  Ada ", "Ada"), ("   ", "Nameless"), ("x" * 99, "x" * 24)]
)
def test_name_is_made_fit_to_show(enter: Enter, given: str, name: str) -> None:
    """Names are short and never empty."""
    enter(given)
    assert [trader.name for trader in traders.values()] == [name]


def test_who_has_joined_a_pit_hears_the_ticks_of_the_process(app: Flask, enter: Enter) -> None:
    """A tick tells the prices and who is there; the task runs since the first request."""
    bram, ada = enter("Bram"), enter("Ada", "Cocoa")
    assert app.test_client().get("/healthz").get_json()["listener"] == "absent"
    (tick,) = wait_for(ada, "tick")
    assert tick["process"] == app.config["PROCESS"]
    assert set(tick["prices"]) == set(PITS)
    assert tick["traders"] == [
        {"sid": sid_of("Bram"), "name": "Bram", "pit": None},
        {"sid": sid_of("Ada"), "name": "Ada", "pit": "Cocoa"},
    ]
    assert tick["connections"] == 2
    assert bram.get_received() == []


def test_page_needs_no_other_host_and_no_inline_script(app: Flask) -> None:
    """The policy that the browser enforces, and what the page refers to."""
    response = app.test_client().get("/")
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert "//cdn" not in response.text
    assert "<script>" not in response.text

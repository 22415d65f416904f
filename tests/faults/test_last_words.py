"""What a client sends right before it leaves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.arrivals_app import ARRIVALS_APP
from tests.faults.fleet import counter
from tests.support import wait_until
from tests.support.javascript import run_script
from tests.support.raw_clients import RawWebSocket
from tests.support.raw_websocket import text_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])
MAX_IN_FLIGHT = 64


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process, and nothing noted yet."""
    server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False).a
    server.get("/notes?reset=1")
    return server


def notes(server: GunicornServer, *kinds: str) -> list[list[Any]]:
    """Return what the application has noted."""
    return [found for found in server.get("/notes").json() if found[0] in kinds]


@pytest.mark.parametrize(
    ("async_mode", "transport"),
    [
        pytest.param(
            "gevent",
            "websocket",
            marks=pytest.mark.faults(
                "a client says something and leaves at once",
                stock="most are lost",
                because=r"\d+ of \d+ handled",
            ),
        ),
        ("gevent", "polling"),
        ("threading", "websocket"),
        ("threading", "polling"),
    ],
)
def test_last_events_are_handled_before_the_disconnect(
    server: GunicornServer, transport: str, measured: Measured
) -> None:
    """The event and the departure often are in one TCP segment, or one request."""
    count = 60 if transport == "websocket" else 20
    script = """
    process.on("exit", () => console.log(1));
    for (let i = 0; i < args[2]; i++) {
      const s = io(args[0], { transports: [args[1]], forceNew: true, reconnection: false,
                              query: { name: "n" + i } });
      s.on("connect", () => { s.emit("last", i); s.disconnect(); });
    }
    """
    run_script(script, server.url, transport, count)
    wait_until(lambda: len(notes(server, "left")) >= count, timeout=10)
    told = notes(server, "last", "left")
    handled = [found for found in told if found[0] == "last"]
    measured("handled", f"{len(handled)} of {count}")
    assert len(handled) == count, f"{len(handled)} of {count} handled"
    assert all(name == f"n{number}" and is_in for _, _, number, name, is_in in handled)
    for sid in {found[1] for found in handled}:
        assert [found[0] for found in told if found[1] == sid] == ["last", "left"]


@pytest.mark.sampled(2)
@both_modes
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_the_callback_of_a_client_that_leaves_has_its_request(
    server: GunicornServer, transport: str, measured: Measured
) -> None:
    """``ack(1); socket.disconnect()``."""
    count = 20
    script = """
    process.on("exit", () => console.log(1));
    for (let i = 0; i < args[2]; i++) {
      const s = io(args[0], { transports: [args[1]], forceNew: true, reconnection: false });
      s.on("connect", () => s.emit("ask"));
      s.on("question", (ack) => { ack(1); s.disconnect(); });
    }
    """
    run_script(script, server.url, transport, count)
    wait_until(lambda: len(notes(server, "answered")) >= count, timeout=10)
    answered = notes(server, "answered")
    have_request = sum(sid is not None for _, sid, _ in answered)
    measured("with their request", f"{have_request} of {count}")
    assert have_request == count, f"{have_request} of {count} had their request"


@both_modes
def test_all_that_waits_of_a_client_that_leaves_begins_before_its_farewell(
    server: GunicornServer,
) -> None:
    """So many at a time, as while it was there."""
    count = 200
    with RawWebSocket(server.port) as client:
        client.open().join()
        client.write(
            b"".join(text_frame(f'42["last",{number},0.05]') for number in range(count))
            + text_frame("41")
        )
    wait_until(lambda: notes(server, "left"), timeout=10)
    told = [found[0] for found in notes(server, "last", "done", "left")]
    assert told.index("left") > max(index for index, kind in enumerate(told) if kind == "last")
    assert told.count("last") == count
    running = most = 0
    for kind in told:
        running += {"last": 1, "done": -1, "left": 0}[kind]
        most = max(most, running)
    assert most <= MAX_IN_FLIGHT


@both_modes
def test_handlers_that_do_not_end_hold_a_farewell_up_for_a_while_only(
    make_fleet: Callable[..., Fleet],
) -> None:
    """What has not begun is lost then, and counted."""
    config = {"SOCKETIO_GUARD_MAX_IN_FLIGHT": 2, "SOCKETIO_GUARD_DEPARTURE_TIMEOUT": 0.3}
    server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False, config=config).a
    server.get("/notes?reset=1")
    rejected = counter(server, "events_rejected")
    with RawWebSocket(server.port) as client:
        client.open().join()
        client.write(b"".join(text_frame(f'42["last",{number},3]') for number in range(5)))
        wait_until(lambda: len(notes(server, "last")) == 2)
    left_at = time.monotonic()
    wait_until(lambda: notes(server, "left"))
    assert time.monotonic() - left_at < 2
    assert len(notes(server, "last")) == 2
    assert counter(server, "events_rejected") == rejected + 3


@both_modes
def test_handlers_that_ask_a_client_that_has_left_hold_nothing_up(
    make_fleet: Callable[..., Fleet],
) -> None:
    """There will be no answer; neither for those that run nor for those that wait for them."""
    config = {"SOCKETIO_GUARD_MAX_IN_FLIGHT": 2}
    server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False, config=config).a
    server.get("/notes?reset=1")
    with RawWebSocket(server.port) as client:
        client.open().join()
        client.write(b"".join(text_frame(f'42["call",{number}]') for number in range(8)))
        client.read_until("42")
        client.write(text_frame('42["last",1]') + text_frame("41"))
        wait_until(lambda: notes(server, "left"))
    assert [found[2] for found in notes(server, "last")] == [1]


@both_modes
def test_a_handler_that_disconnects_its_client_lets_those_behind_it_begin(
    make_fleet: Callable[..., Fleet],
) -> None:
    """It does not wait for those that wait for it."""
    config = {"SOCKETIO_GUARD_MAX_IN_FLIGHT": 1}
    server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False, config=config).a
    server.get("/notes?reset=1")
    with RawWebSocket(server.port) as client:
        client.open().join()
        client.write(text_frame('42["kick"]') + text_frame('42["last",1]') * 3)
        client.read_until("41")
    wait_until(lambda: notes(server, "left"))
    told = [found[0] for found in notes(server, "last", "left", "kicked")]
    assert told.count("last") == 3
    assert told.index("left") > max(index for index, kind in enumerate(told) if kind == "last")


@both_modes
def test_a_client_that_leaves_and_comes_again_at_once_is_let_in(server: GunicornServer) -> None:
    """On the same transport, while its last words are still to begin."""
    with RawWebSocket(server.port) as client:
        client.open().join()
        for _ in range(5):
            client.write(text_frame('42["last",1]') + text_frame("41") + text_frame("40"))
            client.finish_joining()
        assert client.call("last", 2, ack_id=1) == [2]
    assert [found[2] for found in notes(server, "last")] == [1, 1, 1, 1, 1, 2]
    assert len(notes(server, "left")) >= 5


@both_modes
def test_events_in_front_of_the_end_of_the_connection_are_handled(server: GunicornServer) -> None:
    """In one TCP segment with it, without a farewell of any protocol."""
    clients = [RawWebSocket(server.port).open().join() for _ in range(20)]
    for client in clients:
        client.write(text_frame('42["last",1]') * 2)
        client.shut()
    wait_until(lambda: len(notes(server, "left")) == len(clients), timeout=10)
    assert len(notes(server, "last")) == 2 * len(clients)

"""Clients that come half: they stop, or say something odd, at some point of their handshake."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.connections import JOIN_TIMEOUT, QUICK, both_workers, ghosts
from tests.faults.fleet import NOISE
from tests.faults.watches import LogWatch, tables
from tests.support import DeadlineExceeded, wait_until
from tests.support.raw_clients import RawClients, ask
from tests.support.raw_websocket import target, upgrade_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.support import GunicornServer

    Departure = Callable[[RawClients, int], None]
    MakeServer = Callable[..., GunicornServer]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

HALF_HANDSHAKES = "200 half handshakes and quick departures"
ODD_UPGRADE = "upgrade requests with missing or odd headers"
UNKNOWN_SESSION = "AAAAAAAAAAAAAAAAAAAA"

_FORGOTTEN_WITHIN = QUICK["ping_interval"] + QUICK["ping_timeout"]
_TIMES = 20


@pytest.fixture
def server(make_connection_server: MakeServer) -> GunicornServer:
    """One process that notices soon when a client does not answer."""
    return make_connection_server()


def poll_once(clients: RawClients, port: int) -> None:
    clients.polling(port).open()


def open_and_go(clients: RawClients, port: int) -> None:
    clients.websocket(port).open().shut()


def reset_after_request(clients: RawClients, port: int) -> None:
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket")))
    connection.reset()


def reset_within_request(clients: RawClients, port: int) -> None:
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket"))[:60])
    connection.reset()


def reset_after_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    client = clients.websocket(port).open(session=session)
    client.send("2probe")
    client.read_until("3probe")
    client.reset()


def go_before_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    clients.websocket(port).open(session=session).close()


def go_instead_of_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    client = clients.websocket(port).open(session=session)
    client.send("hello?")
    client.shut()


def upgrade_oddly(clients: RawClients, port: int) -> None:
    answer_to_upgrade(clients, port, headers={"Connection": "keep-alive"})


def use_stale_session(clients: RawClients, port: int) -> None:
    address = target("polling", session=UNKNOWN_SESSION)
    assert ask(port, "GET", address).status == 400
    assert ask(port, "POST", address, body=b"40").status == 400
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket", session=UNKNOWN_SESSION)))
    connection.reset()


def join_nothing(clients: RawClients, port: int) -> None:
    client = clients.websocket(port).open()
    client.send_join("/unknown")
    client.read_until("44/unknown,")
    client.reset()


def join_and_reset(clients: RawClients, port: int) -> None:
    client = clients.websocket(port).open()
    client.send_join()
    client.reset()


DEPARTURES: tuple[Departure, ...] = (
    poll_once,
    open_and_go,
    reset_after_request,
    reset_within_request,
    reset_after_probe,
    go_before_probe,
    go_instead_of_probe,
    upgrade_oddly,
    use_stale_session,
    join_nothing,
    join_and_reset,
)


def answer_to_upgrade(
    clients: RawClients,
    port: int,
    *,
    headers: Mapping[str, str | None] | None = None,
    session: str | None = None,
    protocol: str = "HTTP/1.1",
) -> str:
    """Return what an upgrade request is answered with: a status, or words."""
    connection = clients.connection(port, timeout=2.0).dial()
    connection.write(
        upgrade_bytes(target("websocket", session=session), headers=headers, protocol=protocol)
    )
    try:
        return str(connection.read_answer().status)
    except TimeoutError:
        return "nothing at all"
    except ConnectionError:
        return "the end of the connection"
    finally:
        connection.shut()


@pytest.mark.faults(
    HALF_HANDSHAKES,
    stock="tracebacks, and mostly sessions without a client",
    because=r"[1-9]\d* tracebacks, [1-9]\d* error lines",
)
@both_workers
def test_half_handshakes_leave_no_log_line_and_no_ghost(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """Clients stop at every point of a handshake, twenty times each."""
    log = LogWatch(server)
    for _ in range(_TIMES):
        for depart in DEPARTURES:
            depart(clients, server.port)
    clients.close()
    gone_at = time.monotonic()
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: not ghosts(server), timeout=_FORGOTTEN_WITHIN + NOISE, interval=0.1)
    forgotten = time.monotonic() - gone_at
    left = ghosts(server)
    measured("log lines", len(log.lines()))
    measured("forgotten after", forgotten)
    found = (
        f"{len(log.tracebacks())} tracebacks, {len(log.errors())} error lines, "
        f"{left} ghosts after the ping timeout"
    )
    measured("found", found)
    assert not log.tracebacks() + log.errors(), found
    assert not left, found
    assert len(log.lines()) <= 10, log.lines()


@pytest.mark.faults(
    ODD_UPGRADE,
    stock="traceback, ghost session, or let in",
    because="answered with (500|101|the end of the connection)",
)
@both_workers
def test_odd_upgrade_request_is_answered_with_400(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """Each header of an upgrade request is missing once and odd once."""
    odd: list[dict[str, Any]] = [
        {"headers": {name: value}}
        for name, value in (
            ("Connection", None),
            ("Connection", "keep-alive"),
            ("Connection", "xupgrade"),
            ("Upgrade", None),
            ("Upgrade", "h2c"),
            ("Sec-WebSocket-Version", None),
            ("Sec-WebSocket-Version", "99"),
            ("Sec-WebSocket-Key", None),
            ("Sec-WebSocket-Key", "no base64!"),
            ("Sec-WebSocket-Key", "AAAA"),
        )
    ]
    odd.append({"protocol": "HTTP/1.0"})
    log = LogWatch(server)
    wrong = []
    for change in odd:
        answer = answer_to_upgrade(clients, server.port, **change)
        if answer != "400":
            wrong.append(f"{change} of a new client: answered with {answer}")
    left = tables(server)["sockets"]
    for change in odd:
        polling = clients.polling(server.port).open()
        answer = answer_to_upgrade(clients, server.port, session=polling.session, **change)
        if answer != "400":
            wrong.append(f"{change} of a client that polls: answered with {answer}")
        elif polling.post("40").status != 200:
            wrong.append(f"{change} of a client that polls: it cannot go on polling")
    measured("wrong answers", f"{len(wrong)} of {2 * len(odd)}")
    measured("ghosts", left)
    assert not wrong, f"{len(wrong)} wrong answers: {'; '.join(wrong)}"
    assert not left, "sessions were made for refused clients"
    assert not log.tracebacks() + log.errors()


@pytest.mark.faults(
    "client opens a connection and never joins a namespace",
    stock="stays forever",
    because="not closed within",
)
def test_client_that_joins_nothing_is_closed(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The client answers pings, and that is all it does."""
    client = clients.websocket(server.port).open()
    opened_at = time.monotonic()
    farewell = client.read_farewell(timeout=JOIN_TIMEOUT + 3.0)
    measured("closed after", farewell.at - opened_at)
    assert farewell.at - opened_at > JOIN_TIMEOUT - NOISE
    wait_until(lambda: not ghosts(server), message="something is left of them")

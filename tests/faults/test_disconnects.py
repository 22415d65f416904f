"""Clients that leave at the wrong moment: their disconnect handler runs, exactly once."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.connections import (
    asked,
    assert_departed_once,
    both_workers,
    departures,
    ghosts,
    happenings,
)
from tests.support import DeadlineExceeded, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer
    from tests.support.raw_clients import RawClients, RawWebSocket

    MakeServer = Callable[..., GunicornServer]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

LEAVES_EARLY = "client leaves while its connect handler runs"
DISCONNECT_RAISES = "`disconnect` raises"

# Stock looks at each client once per ping timeout, and may just have done so.
_LONGER_THAN_PING_TIMEOUT = 4
_TIMES = 20


@pytest.fixture
def server(make_connection_server: MakeServer) -> GunicornServer:
    """One process that notices soon when a client does not answer."""
    return make_connection_server()


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="disconnect handler never run, entry stays forever",
    because=r"the disconnect handler ran \[0, 0, 0\] times",
)
def test_disconnect_runs_once_for_a_client_that_left_during_a_slow_connect(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The connect handler takes longer than the ping timeout, and then accepts."""
    query = f"connect=slow&for={_LONGER_THAN_PING_TIMEOUT}"
    sids = []
    for leave in ("reset", "close frame", "silence"):
        client = clients.websocket(server.port).open(query=query)
        began_at = time.time()
        client.send_join()
        sids.append(asked(server, since=began_at))
        if leave == "reset":
            client.reset()
        elif leave == "close frame":
            client.close()
    reasons = assert_departed_once(server, *sids)
    assert len(happenings(server, "accepted", sids=set(sids))) == len(sids)
    measured("reasons", ", ".join(reasons))


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="disconnect handler never run, entry stays forever",
    because=r"the disconnect handler ran \[0\] times",
)
def test_disconnect_runs_once_for_a_client_that_closed_its_polling_session_during_connect(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """One request runs the connect handler, and a second one closes the session."""
    client = clients.polling(server.port, query="connect=slow&for=1").open()
    began_at = time.time()
    client.begin("POST", "40")
    sid = asked(server, since=began_at)
    client.post("1")
    reasons = assert_departed_once(server, sid)
    measured("reason", reasons[0])


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="with `always_connect`, the disconnect handler runs for a refused client",
    because=r"the disconnect handler ran 1 time",
)
@pytest.mark.parametrize("behaviour", ["slow-refuse", "slow-raise"])
def test_disconnect_never_runs_for_a_client_that_is_refused_after_leaving(
    behaviour: str, make_connection_server: MakeServer, clients: RawClients
) -> None:
    """Everyone is told at once that they are connected, and this one leaves thereupon."""
    server = make_connection_server(always_connect=True)
    client = clients.polling(server.port, query=f"connect={behaviour}&for=0.5").open()
    began_at = time.time()
    client.begin("POST", "40")
    sid = asked(server, since=began_at)
    client.post("1")
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: departures(server, sid), timeout=1)
    times = len(departures(server, sid))
    assert not times, f"the disconnect handler ran {times} time(s)"
    wait_until(lambda: not ghosts(server), timeout=6, message="something is left of the client")
    assert not departures(server, sid)


@pytest.mark.parametrize("behaviour", ["slow-refuse", "slow-raise"])
def test_disconnect_never_runs_for_a_client_that_is_refused(
    behaviour: str, server: GunicornServer, clients: RawClients
) -> None:
    """The first has left before it is refused, the second stays to hear it."""
    sids = []
    query = f"connect={behaviour}&for=0.5"
    leaving = clients.websocket(server.port).open(query=query)
    staying = clients.websocket(server.port).open(query=query)
    for client in (leaving, staying):
        began_at = time.time()
        client.send_join()
        sids.append(asked(server, since=began_at))
    leaving.reset()
    staying.read_until("44")
    staying.shut()
    wait_until(lambda: not ghosts(server), timeout=6, message="something is left of the client")
    assert not departures(server, *sids)
    assert not happenings(server, "accepted", sids=set(sids))


def was_sent_away(client: RawWebSocket) -> bool:
    """Whether the client is told soon that it has to leave its namespace, or is closed."""
    deadline = time.monotonic() + 4.0
    with contextlib.suppress(TimeoutError):
        while (frame := client.read_frame(deadline - time.monotonic())) is not None:
            if frame.text.startswith(("41", "44")):
                break
        return True
    return False


@pytest.mark.faults(
    "server disconnects a client while its connect handler runs",
    stock="ignored: the client comes in and stays",
    because="the client was not closed",
)
def test_disconnect_during_connect_is_not_forgotten(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The server wants a client to go about which the connect handler is still thinking."""
    client = clients.websocket(server.port).open(query="connect=slow&for=1")
    began_at = time.time()
    client.send_join()
    sid = asked(server, since=began_at)
    server.post("/disconnect", sids=[sid])
    assert was_sent_away(client), "the client was not closed"
    client.shut()
    measured("reason", assert_departed_once(server, sid)[0])


@pytest.mark.parametrize("disconnect", ["", "slow"])
def test_disconnect_runs_once_when_both_sides_close_at_once(
    disconnect: str, server: GunicornServer, clients: RawClients
) -> None:
    """Twenty clients leave in four ways while the server ends their connections."""
    query = f"disconnect={disconnect}&for=0.3"
    opened = clients.many(server.port, _TIMES, query=query)
    sids = [client.sid for client in opened]
    server.post("/disconnect", sids=sids[: _TIMES // 2])
    for number, client in enumerate(opened):
        if number % 4 == 0:
            client.send("41")
        elif number % 4 == 1:
            client.send("1")
        elif number % 4 == 2:
            client.reset()
    server.post("/disconnect", sids=sids)
    reasons = assert_departed_once(server, *sids)
    assert len(reasons) == _TIMES


def test_disconnect_runs_once_when_the_ping_times_out_during_it(
    server: GunicornServer, clients: RawClients
) -> None:
    """The client leaves its namespace and is silent while the handler takes its time."""
    query = "disconnect=slow&for=3"
    client = clients.websocket(server.port).open(query=query).join()
    client.send("41")
    wait_until(lambda: departures(server, client.sid))
    wait_until(
        lambda: happenings(server, "farewell done", sids={client.sid}),
        timeout=8,
        message="the disconnect handler did not end",
    )
    assert assert_departed_once(server, client.sid) == ["client disconnect"]


@pytest.mark.faults(
    DISCONNECT_RAISES,
    stock="the other namespaces are not told, the entry stays",
    because=r"the disconnect handler ran \[0, 1\] times",
)
@both_workers
def test_disconnect_runs_in_each_namespace_although_one_raises(
    server: GunicornServer, clients: RawClients
) -> None:
    """A client of two namespaces goes, and the first handler raises."""
    client = clients.websocket(server.port).open().join("/raising")
    first = client.sid
    client.join("/calm")
    second = client.sid
    client.shut()
    assert assert_departed_once(server, first, second) == ["transport close"] * 2


@pytest.mark.faults(
    DISCONNECT_RAISES, stock="a TypeError bug runs it twice", because=r"ran \[2\] times"
)
def test_disconnect_handler_with_a_type_error_is_run_once(
    server: GunicornServer, clients: RawClients
) -> None:
    """A TypeError inside the handler is taken for the wrong number of arguments."""
    client = clients.websocket(server.port).open(query="disconnect=type-error").join()
    client.close()
    assert_departed_once(server, client.sid)


@pytest.mark.parametrize("namespace", ["/legacy", "/legacy-class"])
def test_disconnect_handler_without_a_reason_is_run_once(
    namespace: str, server: GunicornServer, clients: RawClients
) -> None:
    """Applications wrote them without before the reason was there."""
    client = clients.websocket(server.port).open().join(namespace)
    client.send(f"41{namespace},")
    wait_until(lambda: departures(server, client.sid))
    client.close()
    assert_departed_once(server, client.sid)


def test_disconnect_handler_is_told_the_reason(server: GunicornServer, clients: RawClients) -> None:
    """Each way in which a connection ends has a reason of its own."""
    by_reason = {
        "client disconnect": clients.websocket(server.port).open().join(),
        "server disconnect": clients.websocket(server.port).open().join(),
        "transport close": clients.websocket(server.port).open().join(),
        "ping timeout": clients.websocket(server.port).open().join(),
    }
    by_reason["client disconnect"].send("41")
    by_reason["server disconnect"].emit("leave")
    by_reason["transport close"].shut()
    sids = {client.sid: reason for reason, client in by_reason.items()}
    assert_departed_once(server, *sids)
    assert {seen["sid"]: seen["reason"] for seen in departures(server, *sids)} == sids

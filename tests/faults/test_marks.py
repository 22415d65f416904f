"""State of any kind that one event leaves behind, and no other event may find.

A proxy in front of a server sends the requests of many clients over one TCP connection, which
the server handles in one greenlet, or in the threads of a pool.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import wait_until
from tests.support.raw_clients import PollingClient, RawWebSocket
from tests.support.raw_websocket import RawConnection, request_bytes, target, upgrade_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer
    from tests.support.raw_websocket import Answer

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.parametrize("async_mode", ["gevent", "threading"]),
]

MARKS_APP = "tests.faults.marks_app:create_app()"
EVENTS = 12


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process without a message queue."""
    return make_fleet(app=MARKS_APP, processes=1, has_queue=False).a


@pytest.fixture
def proxy(server: GunicornServer) -> Iterator[RawConnection]:
    """A TCP connection on which others have been before."""
    with RawConnection(server.port).dial() as connection:
        leave_mark(connection)
        yield connection


class ThroughProxy(PollingClient):
    """A client whose requests share a TCP connection with those of others."""

    def __init__(self, proxy: RawConnection, who: str) -> None:
        super().__init__(proxy.port, query=f"who={who}")
        self._proxy = proxy
        self._packets: list[str] = []

    def request(self, method: str, body: str = "") -> Answer:
        """Send one request and wait for its answer."""
        address = target("polling", session=self.session, query=self._query)
        headers = {"Content-Type": "text/plain;charset=UTF-8"}
        self._proxy.write(request_bytes(method, address, headers=headers, body=body.encode()))
        return self._proxy.read_answer()

    def wait_for(self, *prefixes: str) -> str:
        """Poll until a packet that begins so has come."""

        def find() -> str | None:
            for packet in self._packets:
                if packet.startswith(prefixes):
                    self._packets.remove(packet)
                    return packet
            self._packets += self.get().packets
            return None

        found = wait_until(find, message=f"{prefixes} did not come")
        assert found is not None
        return found


def leave_mark(connection: RawConnection) -> None:
    """Have an HTTP request on the connection leave a mark."""
    connection.write(request_bytes("GET", "/mark"))
    assert connection.read_answer().status == 200


def packet(ack_id: int | None, *event: Any, namespace: str = "") -> str:
    """Return an event as a packet."""
    return f"42{namespace}{'' if ack_id is None else ack_id}{json.dumps(list(event))}"


def seen_by(server: GunicornServer, *visits: str) -> list[str]:
    """Return what was found when all of *visits* are over."""

    def read() -> dict[str, list[str]]:
        state: dict[str, list[str]] = server.get("/found").json()
        return state

    wait_until(lambda: set(visits) <= set(read()["visits"]), message=f"{visits} did not happen")
    return read()["found"]


def assert_nothing_found(found: list[str], measured: Callable[[str, object], None]) -> None:
    """Assert that nobody has seen anything of anyone."""
    measured("marks found", len(found))
    assert not found, f"{len(found)} marks were found, such as: {found[0]}"


@pytest.mark.faults(
    "an event leaves state behind, polling through a proxy",
    stock="seen by connect and disconnect handlers, and by events with an ident used again",
    because="marks were found",
)
def test_polling_clients_behind_one_proxy_see_nothing_of_each_other(
    server: GunicornServer, proxy: RawConnection, measured: Callable[[str, object], None]
) -> None:
    """All requests of three clients, and pages between them, share a TCP connection."""
    names = [f"poller-{number}" for number in range(3)]
    clients = [ThroughProxy(proxy, name).open() for name in names]
    for client in clients:
        for prefix in ("40", "40/other,"):
            assert client.post(prefix).status == 200
            answer = client.wait_for(prefix + "{")
            client.sid = client.sid or json.loads(answer[len(prefix) :])["sid"]
        leave_mark(proxy)
    for number in range(EVENTS):
        for client in clients:
            assert client.post(packet(number, "mark", number)).status == 200
            client.wait_for(f"43{number}")
    for client in clients:
        client.post(packet(None, "ask"), packet(77, "fail"))
        client.post(f"43{client.wait_for('42')[2:].partition('[')[0]}[]")
        client.wait_for("4377")
    kicked, kicking, leaving = clients
    kicking.post(packet(78, "kick", kicked.sid))
    kicking.wait_for("4378")
    leaving.post("41/other,")
    leaving.post("41")
    expected = [f"{what} of {name}" for what in ("a callback", "a task") for name in names]
    expected += [f"disconnect of {name}" for name in ("poller-0", "poller-2")]
    assert_nothing_found(seen_by(server, *expected), measured)


@pytest.mark.faults(
    "an event leaves state behind, WebSockets on connections that were used before",
    stock="seen by connect handlers, and by events with an ident used again",
    because="marks were found",
)
def test_websockets_on_used_connections_see_nothing_of_earlier_clients(
    server: GunicornServer, measured: Callable[[str, object], None]
) -> None:
    """Their TCP connections have carried HTTP requests of others, as behind a proxy."""
    names = [f"socket-{number}" for number in range(3)]
    clients = []
    for name in names:
        client = RawWebSocket(server.port).dial()
        leave_mark(client)
        client.write(upgrade_bytes(target("websocket", query=f"who={name}")))
        client.finish_opening()
        clients.append(client.join("/other").join())
    for number in range(EVENTS):
        for client in clients:
            assert client.call("mark", number, ack_id=number) == [number]
    for client in clients:  # side by side
        for number in range(EVENTS):
            client.emit("mark", number, ack_id=100 + number)
    for client in clients:
        client.read_ack(100 + EVENTS - 1)
        client.emit("ask")
        client.send(f"43{client.read_until('42')[2:].partition('[')[0]}[]")
        assert client.call("fail", ack_id=77) != []
    kicked, kicking, leaving = clients
    kicking.call("kick", kicked.sid, ack_id=78)
    leaving.send("41/other,")
    leaving.close()
    expected = [f"{what} of {name}" for what in ("a callback", "a task") for name in names]
    expected += [f"disconnect of {name}" for name in ("socket-0", "socket-2")]
    found = seen_by(server, *expected)
    for client in clients:
        client.shut()
    assert_nothing_found(found, measured)

"""Clients that vanish without a word, while the server still has a connection to each."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.faults.connections import both_workers, happenings
from tests.faults.fleet import NOISE
from tests.faults.watches import tables
from tests.support import DeadlineExceeded, TcpProxy, wait_until
from tests.support.raw_clients import RawClients, RawWebSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

VANISHES = "client vanishes without FIN"

PING_INTERVAL = 0.5
PING_TIMEOUT = 0.5
# Stock looks at each client once per ping timeout, and may just have done so.
_DEPARTURE_TIMEOUT = PING_INTERVAL + 4 * PING_TIMEOUT + 3.0
_FREED_WITHIN = 1.0
_LESS_THAN_THE_QUEUE = 900_000
"""Bytes: more than the kernel takes for who does not read, and less than makes a slow consumer."""
_KEEPALIVE_TIMER = 2
_TIME_WAIT_TIMER = 3
"""Linux, Documentation/networking/proc_net_tcp: the timer that is active."""


@pytest.fixture
def server(make_connection_server: Callable[..., GunicornServer]) -> GunicornServer:
    """One process that notices soon when a client does not answer."""
    return make_connection_server(ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT)


@pytest.fixture
def proxy(server: GunicornServer) -> Iterator[TcpProxy]:
    """A proxy in front of the process."""
    with TcpProxy(server.port) as running:
        yield running


class Holdings:
    """What the one worker of a server holds for its clients: descriptors and greenlets."""

    def __init__(self, server: GunicornServer) -> None:
        self._server = server
        (pid,) = server.worker_pids()
        self._process = psutil.Process(pid)
        # Whatever the first client brings about for good is there from here on.
        first = RawWebSocket(server.port).open().join()
        first.send('42["anything"]')
        first.close()
        self._wait_until_nobody_is_here()
        self.greenlets_before = self.greenlets()
        self.descriptors_before = self._resting_descriptors()

    def descriptors(self) -> int:
        """Return the number of open descriptors."""
        return int(self._process.num_fds())

    def _resting_descriptors(self) -> int:
        # The connection of the last request may not be closed yet.
        counts = []
        for _ in range(20):
            counts.append(self.descriptors())
            time.sleep(0.01)
        return min(counts)

    def greenlets(self) -> int:
        """Return the number of greenlets that have not ended."""
        return int(self._server.state()["greenlets"])

    def assert_freed(self, *, departed_at: float, measured: Measured) -> None:
        """Assert that all is back to where it was within a second of an instant (wall clock)."""
        deadline = departed_at + _FREED_WITHIN + NOISE
        with contextlib.suppress(DeadlineExceeded):
            wait_until(
                lambda: self.descriptors() <= self.descriptors_before,
                timeout=max(deadline - time.time(), 0),
            )
        freed_at = time.time()
        kept = self.descriptors() - self.descriptors_before
        measured("descriptors kept", kept)
        assert kept <= 0, f"{kept} descriptors are kept"
        measured("descriptors free after", max(freed_at - departed_at, 0.0))
        with contextlib.suppress(DeadlineExceeded):
            wait_until(
                lambda: self.greenlets() <= self.greenlets_before,
                timeout=max(deadline - time.time(), 0),
                interval=0.05,
            )
        kept = self.greenlets() - self.greenlets_before
        measured("greenlets kept", kept)
        assert kept <= 0, f"{kept} greenlets are kept"
        assert not any(tables(self._server).values()), f"remembered: {tables(self._server)}"

    def _wait_until_nobody_is_here(self) -> None:
        # Earlier tests' clients, and greenlets that sleep until their next ping.
        time_to_forget = _DEPARTURE_TIMEOUT + PING_INTERVAL
        wait_until(
            lambda: not any(tables(self._server).values()),
            timeout=time_to_forget,
            message="earlier clients are still here",
        )
        seen: list[int] = []

        def is_calm() -> bool:
            seen.append(self.greenlets())
            return len(seen) > 4 and len(set(seen[-4:])) == 1

        wait_until(is_calm, timeout=time_to_forget, interval=PING_INTERVAL / 2)


def wait_until_departed(server: GunicornServer, sids: set[str]) -> dict[str, dict[str, object]]:
    """Wait until the disconnect handler ran for each of these; return what it noted."""

    def find() -> dict[str, dict[str, object]] | None:
        departed = {
            str(seen["sid"]): seen for seen in happenings(server, "departed") if seen["sid"] in sids
        }
        return departed if len(departed) == len(sids) else None

    found = wait_until(
        find, timeout=_DEPARTURE_TIMEOUT, message="the disconnect handler did not run"
    )
    assert found is not None
    return found


@pytest.mark.faults(
    VANISHES,
    stock="its descriptor and greenlets are kept forever",
    because=r"(descriptors|greenlets) are kept",
)
@pytest.mark.parametrize(
    ("worker", "count"),
    [
        ("gevent-websocket", 1),
        ("gevent", 20),
        pytest.param("gevent-websocket", 20, marks=pytest.mark.long),
    ],
)
def test_client_that_vanishes_leaves_nothing_behind(
    count: int, server: GunicornServer, proxy: TcpProxy, clients: RawClients, measured: Measured
) -> None:
    """The proxy loses connections: neither side is told, and no ping is answered."""
    holdings = Holdings(server)
    sids = {client.sid for client in clients.many(proxy.port, count)}
    # On a busy machine the first of them may be gone already.
    assert holdings.descriptors() > holdings.descriptors_before
    lost_at = time.time()
    assert proxy.black_hole() == count
    departed = wait_until_departed(server, sids)
    departed_at = max(float(str(seen["at"])) for seen in departed.values())
    measured("disconnect after", departed_at - lost_at)
    holdings.assert_freed(departed_at=departed_at, measured=measured)
    assert {seen["reason"] for seen in departed.values()} == {"ping timeout"}
    assert len(happenings(server, "departed", sids=sids)) == count


@pytest.mark.faults(
    "client stops reading and answering while a message is under way",
    stock="its descriptor and greenlets are kept forever",
    because=r"(descriptors|greenlets) are kept",
)
def test_client_that_stops_reading_leaves_nothing_behind(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The task that writes to the client waits for a buffer that nobody empties."""
    holdings = Holdings(server)
    client = clients.websocket(server.port, receive_buffer=4096).open().join()
    client.emit("fill", _LESS_THAN_THE_QUEUE)
    departed = wait_until_departed(server, {client.sid})
    holdings.assert_freed(departed_at=float(str(departed[client.sid]["at"])), measured=measured)


@pytest.mark.faults(
    "upgrade from polling is left halfway without FIN",
    stock="its descriptor and greenlets are kept forever",
    because=r"(descriptors|greenlets) are kept",
)
@both_workers
def test_half_upgraded_client_that_vanishes_leaves_nothing_behind(
    server: GunicornServer, proxy: TcpProxy, clients: RawClients, measured: Measured
) -> None:
    """The client has probed its new WebSocket and is not heard of again."""
    holdings = Holdings(server)
    polling = clients.polling(proxy.port).open().join()
    client = clients.websocket(proxy.port).open(session=polling.session)
    client.send("2probe")
    client.read_until("3probe")
    assert proxy.black_hole() >= 1
    departed = wait_until_departed(server, {polling.sid})
    holdings.assert_freed(departed_at=float(str(departed[polling.sid]["at"])), measured=measured)


@pytest.mark.faults(
    "client goes silent without pings, between two of them",
    stock="no TCP keepalive",
    because="no keepalive timer runs",
)
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="timers are seen on Linux only")
@both_workers
def test_kernel_looks_after_an_idle_connection(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The kernel keeps a timer for the server's end of an open WebSocket."""
    seen: list[int] = []

    def is_kept() -> bool:
        client = clients.websocket(server.port).open().join()
        client_port = client.sock.getsockname()[1]
        # A client that answers no ping is closed soon: on a busy machine before it is looked at.
        with contextlib.suppress(DeadlineExceeded):
            wait_until(
                lambda: timer_of(server.port, client_port) in (_KEEPALIVE_TIMER, _TIME_WAIT_TIMER),
                timeout=2,
            )
        seen.append(timer_of(server.port, client_port))
        return seen[-1] == _KEEPALIVE_TIMER

    with contextlib.suppress(DeadlineExceeded):
        wait_until(is_kept, timeout=5)
    measured("timer", seen[-1])
    assert seen[-1] == _KEEPALIVE_TIMER, "no keepalive timer runs"


def timer_of(local_port: int, remote_port: int) -> int:
    """Return which timer the kernel runs for one end of a connection; 0 for none."""
    wanted = (f"{local_port:04X}", f"{remote_port:04X}")
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if (fields[1].rpartition(":")[2], fields[2].rpartition(":")[2]) == wanted:
            return int(fields[5].partition(":")[0], 16)
    raise RuntimeError("the kernel does not know of this connection")

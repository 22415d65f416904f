"""Servers that are told to stop while clients are connected."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults.connections import CONNECTION_APP, both_workers, happenings, worker_options
from tests.faults.fleet import NOISE
from tests.faults.watches import HealthWatch, tables
from tests.support import DeadlineExceeded, wait_until
from tests.support.raw_clients import Crowd, ask
from tests.support.raw_websocket import RawConnection, target, upgrade_bytes
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer
    from tests.support.raw_clients import RawClients

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(90)

IDLE_CLIENTS = 1000
SERVICE_RESTART = 1012

_PROMISED = 5.0
_LIMIT = 3 * _PROMISED
"""What is promised, and twice as much again for a machine that is busy with other things."""
_GRACEFUL_TIMEOUT = 18
_WORK = 1.5
# For the clients, and for those who ask whether the server is ready.
_POOL = "1500"


@pytest.fixture
def server(make_fleet: Callable[..., Fleet], worker: str, is_stock: bool) -> GunicornServer:
    """One process that serves a thousand clients, deployed as the project deploys it."""
    options = worker_options(worker, is_stock=is_stock)
    config = () if is_stock else ("--config", str(PROJECT_ROOT / "gunicorn.conf.py"))
    # The configuration of gunicorn admits exactly a thousand.
    options["config"]["SOCKETIO_GUARD_MAX_CONNECTIONS"] = 1200
    options["arguments"] = (
        *config,
        *("--graceful-timeout", str(_GRACEFUL_TIMEOUT)),
        *("--worker-connections", _POOL),
        *(
            options["arguments"]
            or ("--worker-class", "geventwebsocket.gunicorn.workers.GeventWebSocketWorker")
        ),
    )
    return make_fleet(app=CONNECTION_APP, processes=1, has_queue=False, **options).a


@pytest.mark.alone
@pytest.mark.parametrize(
    "worker", ["gevent-websocket", pytest.param("gevent", marks=pytest.mark.long)]
)
@pytest.mark.faults(
    "SIGTERM with 1,000 idle clients",
    stock="clients go on until they are cut off after the whole graceful timeout",
    because="runs on",
)
def test_server_with_a_thousand_clients_ends_soon_and_in_order(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """Nearly all are idle; for one a handler runs, and one does not read."""
    busy = clients.websocket(server.port).open().join()
    stuck = clients.websocket(server.port, receive_buffer=4096).open().join()
    with (
        Crowd(server.port, IDLE_CLIENTS) as crowd,
        HealthWatch(server, "/readyz", interval=0.05, timeout=1.0) as health,
    ):
        stuck.emit("fill", 8 * 1024 * 1024)
        busy.emit("work", _WORK)
        wait_until(lambda: happenings(server, "work began"))
        server.ask_to_stop()
        told_at = time.monotonic()
        with contextlib.suppress(DeadlineExceeded):
            wait_until(lambda: not server.is_alive(), timeout=_LIMIT)
        took = time.monotonic() - told_at
        is_over = not server.is_alive()
        closed = len(crowd.farewells)
        measured("ended after", took)
        assert is_over, f"the server runs on, {closed} of {IDLE_CLIENTS} clients were closed"
        wait_until(lambda: len(crowd.farewells) == IDLE_CLIENTS, message="clients are left")
    codes = Counter(farewell.code for farewell in crowd.farewells)
    spread = crowd.farewells[-1].at - crowd.farewells[0].at
    measured("last client closed after", crowd.farewells[-1].at - told_at)
    measured("codes", dict(codes))
    assert codes == {SERVICE_RESTART: IDLE_CLIENTS}
    assert spread > 0.2, "the clients were not closed one after the other"
    departed = happenings(server, "departed")
    measured("disconnect handlers", len(departed))
    assert len({seen["sid"] for seen in departed}) == len(departed) == IDLE_CLIENTS + 2
    assert happenings(server, "work done", sids={busy.sid}), "the running handler was cut off"
    after = [seen for seen in health.observations("/readyz") if seen.at > told_at]
    refused = next(seen for seen in after if seen.status != 200)
    measured("unready after", refused.at - told_at)
    assert refused.at - told_at < 0.1 + NOISE
    assert 200 not in {seen.status for seen in after if seen.at >= refused.at}
    assert "Traceback" not in server.log(), server.log()
    assert not server.records(matching=lambda record: record.level in {"ERROR", "CRITICAL"})


@both_workers
def test_draining_process_sends_clients_away_and_takes_no_more(
    server: GunicornServer, clients: RawClients
) -> None:
    """The application drains by itself, and goes on to answer requests."""
    opened = clients.many(server.port, 20)
    polling = clients.polling(server.port).open().join()
    poll = polling.begin("GET")
    server.post("/guard/drain")
    wait_until(lambda: server.get("/readyz").status_code == 503, timeout=0.1 + NOISE)
    assert server.get("/livez").status_code == 200
    refused = ask(server.port, "GET", target("polling"))
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) > 0
    with RawConnection(server.port) as late:
        late.dial().write(upgrade_bytes(target("websocket")))
        assert late.read_answer().status == 503, "a new client was let in"
    assert {client.read_farewell().code for client in opened} == {SERVICE_RESTART}
    # A close packet would keep the client away; after an error it comes back by itself.
    assert poll.read_answer().status == 400
    poll.shut()
    wait_until(lambda: happenings(server, "drained"), message="drain() did not return")
    (drained,) = happenings(server, "drained")
    assert drained["is_done"] is True
    assert drained["seconds"] < _PROMISED
    sids = {client.sid for client in opened} | {polling.sid}
    assert sorted(seen["sid"] for seen in happenings(server, "departed")) == sorted(sids)
    assert not any(tables(server).values())
    server.stop()  # nobody else could use it

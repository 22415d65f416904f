"""What HTTP, Engine.IO and Socket.IO ask of a server, seen by clients that rely on it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.connections import CONNECTION_APP, worker_options
from tests.support.javascript import CLIENT_MODULE, require_client
from tests.support.raw_clients import ask
from tests.support.raw_websocket import RawConnection, request_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

pytestmark = pytest.mark.timeout(60)

_CLIENT = Path(__file__).with_name("strict_client.mjs")
_SERVERS = {"gevent-websocket": "gevent", "gevent": "gevent", "gthread": "threading"}


@pytest.fixture
def worker() -> str:
    """The worker of gunicorn."""
    return "gevent-websocket"


@pytest.fixture
def async_mode(worker: str) -> str:
    """The mode that fits the worker."""
    return _SERVERS[worker]


@pytest.fixture
def server(make_fleet: Callable[..., Fleet], worker: str, is_stock: bool) -> GunicornServer:
    """One process, under one of gunicorn's workers."""
    options = {} if worker == "gthread" else worker_options(worker, is_stock=is_stock)
    return make_fleet(app=CONNECTION_APP, processes=1, has_queue=False, **options).a


def seen_by_javascript(server: GunicornServer) -> dict[str, Any]:
    """Return what ``strict_client.mjs`` saw."""
    require_client()
    command = ["node", str(_CLIENT), str(CLIENT_MODULE), server.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True)
    seen: dict[str, Any] = json.loads(result.stdout)
    return seen


@pytest.mark.faults(
    "a client keeps its connections; an unknown namespace",
    stock="requests fail with 'socket hang up'; JavaScript's error has no message",
    because="socket hang up",
)
def test_a_client_learns_of_the_end_of_a_connection_and_why_it_is_refused(
    server: GunicornServer, measured: Callable[[str, object], None]
) -> None:
    seen = seen_by_javascript(server)
    measured("statuses", {name: seen[name] for name in ("page", "poll", "post")})
    measured("message", seen["namespace"])
    assert seen == {
        "page": [200],
        "poll": [200],
        "post": [400],
        "namespace": ["Invalid namespace"] * 2,
    }


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_it_is_told_under_other_workers_too(server: GunicornServer) -> None:
    seen = seen_by_javascript(server)
    assert seen.pop("namespace") == ["Invalid namespace"] * 2
    assert seen == {"page": [200], "poll": [200], "post": [400]}


@pytest.mark.parametrize(
    ("asked", "is_closed"),
    [("close", True), ("Close", True), ("close, TE", True), ("TE,close", True), ("TE", False)],
)
def test_the_end_of_a_connection_is_announced_to_who_asks_for_it(
    server: GunicornServer, asked: str, is_closed: bool
) -> None:
    """Source: RFC 9112, section 9.6; the option may be one of a list."""
    with RawConnection(server.port) as connection:
        connection.dial().write(request_bytes("GET", "/", headers={"Connection": asked}))
        answer = connection.read_answer()
    assert answer.status == 200
    assert (answer.headers.get("connection") == "close") is is_closed


@pytest.mark.faults(
    "a handshake without a transport",
    stock="it is answered as if it had asked for polling",
    because="200",
)
@pytest.mark.parametrize("worker", ["gevent-websocket", "gthread"])
def test_a_handshake_that_leaves_out_what_is_mandatory_is_refused(server: GunicornServer) -> None:
    """Source: Engine.IO protocol v4: without ``EIO`` or ``transport`` the answer is 400."""
    queries = ("EIO=4", "transport=polling", "EIO=3&transport=polling", "EIO=4&transport=x", "")
    answers = {query: ask(server.port, "GET", f"/socket.io/?{query}").status for query in queries}
    assert answers == dict.fromkeys(queries, 400)
    assert ask(server.port, "GET", "/socket.io/?EIO=4&transport=polling").status == 200

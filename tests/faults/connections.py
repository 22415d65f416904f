"""Servers on which clients come and go, and what tests see of their connections."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.connection_app import EVENTS, HIDE
from tests.faults.watches import tables
from tests.support import DeadlineExceeded, wait_until

if TYPE_CHECKING:
    from tests.support import GunicornServer

CONNECTION_APP = "tests.faults.connection_app:create_app()"
WORKERS: dict[str, tuple[str, ...]] = {
    "gevent-websocket": (),
    "gevent": ("--worker-class", "gevent"),
}
"""Arguments of gunicorn for each of its workers under which clients may come by WebSocket."""
both_workers = pytest.mark.parametrize("worker", WORKERS)
JOIN_TIMEOUT = 2.5
QUICK = {"ping_interval": 1, "ping_timeout": 1}
"""Options with which a server notices soon when a client does not answer."""


def worker_options(worker: str, *, is_stock: bool) -> dict[str, Any]:
    """Return how a fleet is made for one of the :data:`WORKERS`.

    Without the guard, who runs the plain gevent worker has simple-websocket instead of
    gevent-websocket, which fails under it.
    """
    config = {HIDE: True} if is_stock and worker == "gevent" else {}
    return {"arguments": WORKERS[worker], "config": config}


def happenings(
    server: GunicornServer, what: str = "", *, sids: set[str] | None = None
) -> list[dict[str, Any]]:
    """Return what a server's application noted of its connections, for the tests.

    Each has ``what``, ``sid``, mostly ``namespace``, and ``at``, an instant of the wall clock.
    """
    noted = [
        {**json.loads(record.message), "at": record.time}
        for record in server.records(matching=lambda record: record.logger == EVENTS)
    ]
    return [
        seen
        for seen in noted
        if (not what or seen["what"] == what) and (sids is None or seen["sid"] in sids)
    ]


def ghosts(server: GunicornServer) -> int:
    """Return the size of the largest table."""
    return max(tables(server).values())


def departures(server: GunicornServer, *sids: str) -> list[dict[str, Any]]:
    """Return the runs of the disconnect handler for these session ids."""
    return happenings(server, "departed", sids=set(sids))


def asked(server: GunicornServer, *, since: float) -> str:
    """Wait until a connect handler runs, and return for which session id."""

    def find() -> str | None:
        return next(
            (str(seen["sid"]) for seen in happenings(server, "asked") if seen["at"] >= since), None
        )

    found = wait_until(find, message="the connect handler was not run")
    assert found is not None
    return found


def assert_departed_once(server: GunicornServer, *sids: str, timeout: float = 8.0) -> list[str]:
    """Assert that the disconnect handler runs once for each, and return the reasons."""
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: len(departures(server, *sids)) >= len(sids), timeout=timeout)
    # A second run would come with the end of the transport, which the tables tell.
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: not ghosts(server), timeout=3)
    times = Counter(seen["sid"] for seen in departures(server, *sids))
    ran = sorted(times[sid] for sid in sids)
    assert ran == [1] * len(sids), f"the disconnect handler ran {ran} times"
    left = {name: size for name, size in tables(server).items() if size}
    assert not left, f"left in the tables: {left}"
    return [str(seen["reason"]) for seen in departures(server, *sids)]

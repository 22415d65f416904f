"""Workers that were forked from a master which had loaded the application."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.fleet import PATCHED_APP
from tests.support import DeadlineExceeded, wait_until
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import SocketIOClient

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

_EVENTS = 20


def clients_by_worker(fleet: Fleet, sio_client: Connect) -> dict[int, SocketIOClient]:
    """Connect one client to each of the two workers; return them by the pid of the worker."""
    first = sio_client(fleet.a)
    pid = first.call("pid")
    # Only the other worker can take the next connection while this one is stopped.
    os.kill(pid, signal.SIGSTOP)
    try:
        second = sio_client(fleet.a)
    finally:
        os.kill(pid, signal.SIGCONT)
    clients = {pid: first, second.call("pid"): second}
    assert sorted(clients) == sorted(fleet.a.worker_pids())
    return clients


@pytest.mark.faults(
    "gunicorn `--preload`, two workers",
    stock="half of each other's messages are dropped (one `host_id`)",
    because="0 of 40 events came from the other worker",
)
@pytest.mark.parametrize("async_mode", ["gevent", "threading"])
def test_preloaded_workers_receive_each_others_events(
    make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """The master loads the application, and both workers inherit what identifies the process."""
    fleet = make_fleet(processes=1, workers=2, arguments=("--preload",))
    clients = clients_by_worker(fleet, sio_client)
    wait_until(lambda: fleet.redis.subscribers() >= 2, message="a worker does not listen")
    for client in clients.values():
        for number in range(_EVENTS):
            client.emit("broadcast", number)

    def foreign() -> int:
        return sum(
            item.args[0]["pid"] != pid
            for pid, client in clients.items()
            for item in client.events("broadcast")
        )

    for client in clients.values():
        wait_until(
            lambda client=client: len(client.events("broadcast")) >= _EVENTS,  # type: ignore[misc]
            message="a worker does not even deliver its own events",
        )
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: foreign() == 2 * _EVENTS, timeout=3)
    measured("from the other worker", f"{foreign()} of {2 * _EVENTS}")
    assert foreign() == 2 * _EVENTS, (
        f"{foreign()} of {2 * _EVENTS} events came from the other worker"
    )
    for client in clients.values():
        client.wait_for("broadcast", count=2 * _EVENTS)
        assert len(client.events("broadcast")) == 2 * _EVENTS


@pytest.mark.faults(
    "gunicorn `--preload` with a monkey-patched master, a worker dies",
    stock="the worker is never replaced",
    because="the dead worker is not replaced",
)
def test_dead_worker_of_a_patched_master_is_replaced(
    make_fleet: Callable[..., Fleet],
    is_stock: bool,
    sio_client: Connect,
    measured: Measured,
) -> None:
    """The application patches the master that preloads it, and a worker is killed."""
    # What mends it is in the project's configuration of gunicorn.
    config = () if is_stock else ("--config", str(PROJECT_ROOT / "gunicorn.conf.py"))
    server = make_fleet(
        app=PATCHED_APP,
        processes=1,
        has_queue=False,
        arguments=("--preload", "--log-level", "debug", *config),
    ).a
    # While the master spawns workers it sleeps, and its event loop still runs.
    wait_until(lambda: "1 workers" in server.log(), message="the master is not done")
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(
        lambda: server.worker_pids() not in ([], [worker]),
        timeout=5,
        message="the dead worker is not replaced",
    )
    server.wait_until_serving()
    measured("serving again after", time.monotonic() - killed_at)
    client = sio_client(server)
    assert client.call("pid") == server.worker_pids()[0] != worker

"""Clients that come and go by the thousand, and must leave nothing behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.faults.connections import ghosts
from tests.faults.watches import tables
from tests.support import wait_until
from tests.support.raw_clients import open_many
from tests.support.raw_websocket import close_frame
from tests.support.scale import IS_WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import GunicornServer

    MakeServer = Callable[..., GunicornServer]
    Measured = Callable[[str, object], None]

_ROUND_TRIPS = 4_000 if IS_WHOLE else 2_000
_WARM_UP = 800
_ROUND = 50
_GROWTH_LIMIT = 8 * 1024
"""KiB."""


def at_times(look: Callable[[], int], *, times: int, interval: float) -> Iterator[int]:
    """Look so many times."""
    for _ in range(times):
        yield look()
        time.sleep(interval)


@pytest.mark.faults(
    "clients come and go, thousands of times",
    stock="each leaves a greenlet that sleeps until its next ping: 12 KiB",
    because=r"left: \d{4,} greenlets, \d{5} KiB",
)
@pytest.mark.timeout(180)
def test_thousands_of_connections_leave_nothing_behind(
    make_connection_server: MakeServer, measured: Measured
) -> None:
    """Clients come, ask something and leave in one of four ways."""
    server = make_connection_server(ping_interval=300, join_timeout=30.0)
    (pid,) = server.worker_pids()
    process = psutil.Process(pid)

    def come_and_go(count: int) -> None:
        for _ in range(count // _ROUND):
            opened = open_many(server.port, _ROUND)
            for client in opened[::4]:
                client.write(close_frame(None))
            for client in opened[1::4]:
                client.send("41")
            for client in opened[2::4]:
                client.reset()
            for client in opened[::4]:
                client.read_farewell()
            for client in opened:
                client.shut()

    def settle() -> tuple[int, int, int]:
        wait_until(
            lambda: not ghosts(server),
            timeout=5,
            message=f"the tables are not empty: {tables(server)}",
        )
        greenlets = server.state()["greenlets"]  # collects what is in cycles, too
        # The connection of the last request may not be closed yet.
        descriptors = min(at_times(process.num_fds, times=20, interval=0.01))
        return greenlets, process.memory_info().rss // 1024, descriptors

    come_and_go(_WARM_UP)
    greenlets_before, memory_before, descriptors_before = settle()
    began_at, used_before = time.monotonic(), sum(process.cpu_times()[:2])
    come_and_go(_ROUND_TRIPS - _WARM_UP)
    took, used = time.monotonic() - began_at, sum(process.cpu_times()[:2]) - used_before
    greenlets, memory, descriptors = settle()
    counted = _ROUND_TRIPS - _WARM_UP
    measured("connections per second", round(counted / took))
    measured("CPU per connection", f"{1000 * used / counted:.2f} ms")
    left = (
        f"{greenlets - greenlets_before} greenlets, {memory - memory_before} KiB, "
        f"{descriptors - descriptors_before} descriptors"
    )
    measured("left", left)
    runs = server.state()["runs"]
    assert (runs["accepted:/"], runs["departed:/"]) == (_ROUND_TRIPS, _ROUND_TRIPS)
    is_flat = memory - memory_before < _GROWTH_LIMIT and descriptors <= descriptors_before
    assert is_flat, f"left: {left}"
    assert greenlets <= greenlets_before + _ROUND, f"left: {left}"

"""The cost of connecting, and of an idle connection."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

from benchmarks.bench import Bench, close_all
from benchmarks.client import Client, Loop, connect
from benchmarks.report import Metric
from benchmarks.servers import running

if TYPE_CHECKING:
    from benchmarks.bench import Plan

_AT_A_TIME = 100
_SETTLE_TIME = 0.5
_LEAVE_TIMEOUT = 5.0


class Visitors:
    """Clients that connect, join the namespace and disconnect; a hundred at any time."""

    def __init__(self, loop: Loop, port: int) -> None:
        self._loop = loop
        self._port = port
        self._stop_at = 0.0
        self._active = 0
        self._count = 0

    def run(self, seconds: float) -> int:
        """Connect and disconnect for *seconds*; return how many clients did."""
        self._count = 0
        self._active = _AT_A_TIME
        self._stop_at = time.perf_counter() + seconds
        for _ in range(_AT_A_TIME):
            self._come()
        while self._active:
            self._loop.run()
        return self._count

    def _come(self) -> None:
        client = Client(self._loop, self._port)
        client.on_open = Client.leave
        client.on_closed = self._on_closed

    def _on_closed(self, _: Client) -> None:
        self._count += 1
        if time.perf_counter() < self._stop_at:
            self._come()
        else:
            self._active -= 1
            if not self._active:
                self._loop.stop()


def connects_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_connects`."""
    title = "connect and leave, WebSocket"
    return [
        Metric("connects:rate", title, "connects/s", target=1.0),
        Metric("connects:cpu", f"{title}, server CPU", "us per connect", is_less_better=True),
    ]


def run_connects(bench: Bench) -> None:
    """Measure handshake, CONNECT, its acknowledgement and the closing handshake."""
    plan = bench.plan
    servers = [bench.server(column, "connects") for column in bench.columns]
    with running(servers):
        clients = bench.connect(bench.columns, servers, 1)
        visitors = {
            column: Visitors(bench.loop, server.port)
            for column, server in zip(bench.columns, servers, strict=True)
        }
        for column in bench.columns:
            visitors[column].run(0.2)  # warms up
        for number in range(plan.slices):
            for column in bench.turns(number):
                control = clients[column][0]
                with bench.watch("connects", column, control) as spell:
                    count = visitors[column].run(plan.connect_seconds)
                add = bench.adder("connects", column)
                add("rate", count / spell.elapsed)
                add("cpu", 1e6 * spell.cpu / count)
        for column in bench.columns:
            left = _wait_until_gone(bench.loop, clients[column][0])
            if left:
                bench.results.notes.append(
                    f"connects, {column.name}: the server still holds {left} sessions "
                    f"{_LEAVE_TIMEOUT:.0f} s after their clients left"
                )
        close_all(clients)


def _wait_until_gone(loop: Loop, control: Client) -> int:
    """Wait for the server's sessions besides *control* to end; return how many are left."""
    give_up_at = time.monotonic() + _LEAVE_TIMEOUT
    while True:
        left = int(control.call("stats", False)["sessions"]) - 1
        if not left or time.monotonic() > give_up_at:
            return left
        loop.rest(0.1)


def memory_metrics(plan: Plan) -> list[Metric]:
    """Return the row of :func:`run_memory`."""
    title = f"memory of an idle connection (of {plan.idle_clients:,})"
    return [Metric("memory:rss", title, "bytes", is_less_better=True, target=0.8)]


def run_memory(bench: Bench) -> None:
    """Measure the resident memory that each further idle connection costs."""
    count = bench.plan.idle_clients
    for column in bench.turns(0):
        server = bench.server(column, "memory")
        with running([server]):
            clients = bench.connect([column], [server], 1 + count // 10)
            control = clients[column][0]
            before = _resident(bench.loop, control)
            clients[column] += connect(bench.loop, server.port, count)
            after = _resident(bench.loop, control)
            bench.adder("memory", column)("rss", (after - before) / count)
            close_all(clients)


def _resident(loop: Loop, control: Client) -> int:
    """Return the resident memory of the worker in bytes, settled and without garbage."""
    loop.rest(_SETTLE_TIME)
    pid = control.call("stats", True)["pid"]
    resident: int = psutil.Process(pid).memory_info().rss
    return resident

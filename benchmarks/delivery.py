"""Acknowledged delivery, compared with events that have only a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.bench import Bench, close_all
from benchmarks.client import Client, request_frame
from benchmarks.report import Column, Metric
from benchmarks.servers import running

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench import Plan

STOCK_EMITTED = Column("stock, emit(callback=)", is_guarded=False, is_alone=True)
EMITTED = Column("emit(callback=)", is_guarded=True, is_alone=True)
IN_MEMORY = Column("deliver, in memory", is_guarded=True, is_alone=True, store="memory")
IN_REDIS = Column("deliver, in Redis", is_guarded=True, store="redis")
COLUMNS = [STOCK_EMITTED, EMITTED, IN_MEMORY, IN_REDIS]
COMPARISONS = [(IN_MEMORY, STOCK_EMITTED), (IN_MEMORY, EMITTED), (IN_REDIS, EMITTED)]

BUSY = 512
"""Messages in flight when the rate is measured."""
CALM = 8
"""Messages in flight when the latency is measured."""


def metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run`."""
    title = f"acknowledged by {plan.delivery_clients} clients"
    bounds = ((IN_MEMORY, STOCK_EMITTED, 0.5), (IN_REDIS, None, 2000.0))
    return [
        Metric("delivery:rate", title, "messages/s", bounds=bounds),
        Metric("delivery:cpu", f"{title}, server CPU", "us per message", is_less_better=True),
        Metric(
            "delivery:p50",
            f"{title}, {CALM} at a time, p50 until the sender knows",
            "ms",
            is_less_better=True,
        ),
        Metric("delivery:p99", "the same, p99", "ms", is_less_better=True),
        Metric("delivery:memory", "a message that waits", "bytes", is_less_better=True),
    ]


def run(bench: Bench) -> None:
    """Measure messages to clients that acknowledge each at once."""
    plan = bench.plan
    servers = [bench.server(column, "delivery") for column in COLUMNS]
    with running(servers):
        clients = bench.connect(COLUMNS, servers, plan.delivery_clients)
        for column in COLUMNS:
            for number, client in enumerate(clients[column]):
                client.on_event = _answerer(client)
                client.call("identify", f"user-{number}")
            clients[column][0].call("deliver_many", column.store, 200, CALM)
        for number in range(plan.slices):
            for column in bench.turns(number, COLUMNS):
                control, add = clients[column][0], bench.adder("delivery", column)
                count = plan.delivery_count
                taken = control.call("deliver_many", column.store, count, BUSY)
                add("rate", count / taken["seconds"])
                add("cpu", 1e6 * taken["cpu"] / count)
                taken = control.call("deliver_many", column.store, count // 4, CALM)
                add("p50", 1000 * taken["p50"])
                add("p99", 1000 * taken["p99"])
        for column in COLUMNS:
            if column.store:
                # Redis reports its memory to the byte; that of a process is rounded to pages.
                count = plan.waiting_count // (10 if column is IN_REDIS else 1)
                size = clients[column][0].call("weigh", count)
                bench.adder("delivery", column)("memory", size)
        close_all(clients)


def _answerer(client: Client) -> Callable[[bytes], None]:
    def acknowledge(packet: bytes) -> None:
        client.send_frame(request_frame(b"43" + packet[2 : packet.index(b"[")] + b"[]"))

    return acknowledge

"""Events that go through the message queue."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from benchmarks.bench import Bench, close_all, no_garbage_collection
from benchmarks.client import Client, Loop, WrongAnswerError
from benchmarks.report import Metric, percentile
from benchmarks.servers import running

if TYPE_CHECKING:
    from benchmarks.bench import Plan
    from benchmarks.report import Column


def emit_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_emit`."""
    title = "emit() with Redis, nobody local"
    return [
        Metric("emit:call", f"{title}, the call", "us", is_less_better=True, target="<= 0.33"),
        Metric("emit:cpu", f"{title}, server CPU", "us per event", is_less_better=True),
        Metric("emit:rate", f"{title}, until published", "events/s"),
    ]


def run_emit(bench: Bench) -> None:
    """Measure ``emit()`` with no recipient in the process; timed in the server."""
    count = bench.plan.emit_count
    servers = [bench.server(column, "emit") for column in bench.columns]
    with running(servers):
        clients = bench.connect(bench.columns, servers, 1)
        for column in bench.columns:
            clients[column][0].call("emit_many", 200)
        for number in range(bench.plan.slices):
            for column in bench.turns(number):
                before = bench.broker.published
                seconds = clients[column][0].call("emit_many", count)
                published = bench.broker.published - before
                if published < count:
                    raise WrongAnswerError(f"{column.name}: {published} of {count} published")
                add = bench.adder("emit", column)
                add("call", 1e6 * seconds["calls"] / count)
                add("cpu", 1e6 * seconds["cpu"] / count)
                add("rate", count / seconds["published"])
        close_all(clients)


class Pair:
    """Two servers of a column: events leave A and are to reach a client on B."""

    def __init__(self, loop: Loop, sender: Client, receiver: Client) -> None:
        self.sender = sender
        self.receiver = receiver
        self.delays: list[float] = []
        self._loop = loop
        self._expected = 0

    def prepare(self) -> None:
        """Return when events flow, that is, when B listens."""
        has_arrived = False

        def on_event(_: bytes) -> None:
            nonlocal has_arrived
            has_arrived = True

        self.receiver.on_event = on_event
        self.receiver.call("join", "far")
        for _ in range(100):
            self.sender.emit("burst", "far", 1)
            self._loop.rest(0.2)
            if has_arrived:
                break
        else:
            raise WrongAnswerError("no event went from A to B within 20 s")

    def run(self, count: int, event: str, *args: Any) -> None:
        """Have A emit *count* numbered events; return when B's client has all, in order."""
        self.receiver.on_event = self._on_event
        self._expected = count
        self.delays = []
        self.sender.emit(event, *args)
        while len(self.delays) < count:
            self._loop.run()

    def _on_event(self, packet: bytes) -> None:
        now = time.monotonic()
        _, number, emitted_at, _ = json.loads(packet[2:])
        if number != len(self.delays):
            raise WrongAnswerError(f"number {number} instead of {len(self.delays)}")
        self.delays.append(now - emitted_at)
        if len(self.delays) == self._expected:
            self._loop.stop()


def cross_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_cross`."""
    steady = f"A to B at {plan.stream_rate:.0f}/s"
    burst = f"A to B, burst of {plan.burst_count:,}"
    return [
        Metric("cross:p50", f"{steady}, p50", "ms", is_less_better=True),
        Metric("cross:p99", f"{steady}, p99", "ms", is_less_better=True, target="<= 1.0"),
        Metric("cross:rate", f"{burst}, all received", "messages/s"),
        Metric("cross:cpu", f"{burst}, CPU of A and B", "us per message", is_less_better=True),
    ]


def run_cross(bench: Bench) -> None:
    """Measure events from process A to a client on process B."""
    at_a = [bench.server(column, "cross") for column in bench.columns]
    at_b = [bench.server(column, "cross", is_second=True) for column in bench.columns]
    with running(at_a + at_b):
        senders = bench.connect(bench.columns, at_a, 1)
        receivers = bench.connect(bench.columns, at_b, 1)
        pairs = {
            column: Pair(bench.loop, senders[column][0], receivers[column][0])
            for column in bench.columns
        }
        for pair in pairs.values():
            pair.prepare()
        bench.loop.rest(0.5)  # whatever else was asked for arrives too, before counting starts
        for pair in pairs.values():
            pair.run(200, "burst", "far", 200)
        _streams(bench, pairs)
        for number in range(bench.plan.burst_slices):
            for column in bench.turns(number):
                _burst(bench, column, pairs[column])
        close_all(senders, receivers)


def _streams(bench: Bench, pairs: dict[Column, Pair]) -> None:
    """Take the delays at a steady rate; a percentile needs all slices of a round together."""
    count = bench.plan.stream_count
    delays: dict[Column, list[float]] = {column: [] for column in bench.columns}
    for number in range(bench.plan.slices):
        for column in bench.turns(number):
            with no_garbage_collection():
                pairs[column].run(count, "stream", "far", bench.plan.stream_rate, count)
            delays[column] += pairs[column].delays
    for column in bench.columns:
        add = bench.adder("cross", column)
        add("p50", 1000 * percentile(delays[column], 50))
        add("p99", 1000 * percentile(delays[column], 99))


def _burst(bench: Bench, column: Column, pair: Pair) -> None:
    count = bench.plan.burst_count
    with no_garbage_collection():
        before = _cpu(pair)
        started_at = time.perf_counter()
        pair.run(count, "burst", "far", count)
        elapsed = time.perf_counter() - started_at
        cpu = _cpu(pair) - before
    add = bench.adder("cross", column)
    add("rate", count / elapsed)
    add("cpu", 1e6 * cpu / count)


def _cpu(pair: Pair) -> float:
    """Return the seconds of CPU that both servers have used so far."""
    clients = (pair.sender, pair.receiver)
    return sum(float(client.call("stats", False)["cpu"]) for client in clients)

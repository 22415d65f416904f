"""Events that go through the message queue."""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

from benchmarks.bench import Bench, close_all, no_garbage_collection
from benchmarks.client import Client, Loop, WrongAnswerError, reply_frame
from benchmarks.report import Metric, percentile
from benchmarks.servers import running

if TYPE_CHECKING:
    from benchmarks.bench import Plan
    from benchmarks.report import Column


def emit_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_emit`."""
    title = "emit() with Redis, nobody local"
    return [
        Metric("emit:call", f"{title}, the call", "us", is_less_better=True, target=0.1),
        Metric("emit:cpu", f"{title}, server CPU", "us per event", is_less_better=True),
        Metric("emit:rate", f"{title}, until published", "events/s"),
    ]


def run_emit(bench: Bench) -> None:
    """Measure ``emit()`` with no recipient in the process; timed in the server."""
    count = bench.plan.emit_count
    servers = [bench.server(column, "emit", needs_redis=True) for column in bench.columns]
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


_TEXT = b"x" * 100


class Pair:
    """Two servers of a column: events are emitted on A, for a client on B."""

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

    def stream(self, rate: float, count: int) -> None:
        """Have A emit *count* events, *rate* per second; return when B's client has all, in order.

        Fills :attr:`delays` with the delays of these events.
        """
        self.delays = []
        self._expected = count
        self.receiver.on_event = self._on_event
        self.sender.emit("stream", "far", rate, count)
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

    def burst(self, count: int) -> None:
        """Have A emit *count* events at once; return when B's client has all, in order.

        Received data is compared with all the expected data, many frames at a time, so that the
        load generator, which may share its core with B, costs next to nothing.
        """
        frames = [reply_frame(b'42["tick",%d,0,"%s"]' % (at, _TEXT)) for at in range(count)]
        expected = b"".join(frames)
        ends = set(itertools.accumulate(len(frame) for frame in frames))
        position = 0

        def on_data(data: bytes) -> bool:
            nonlocal position
            end = position + len(data)
            if end not in ends or data != expected[position:end]:
                return False  # a frame came in pieces, or a ping came too; or it is wrong
            position = end
            if position == len(expected):
                self._loop.stop()
            return True

        on_other_data = self.receiver.on_data
        self.receiver.on_event = _refuse
        self.receiver.on_data = on_data
        self.sender.emit("burst", "far", count)
        while position < len(expected):
            self._loop.run()
        self.receiver.on_data = on_other_data


def _refuse(packet: bytes) -> None:
    raise WrongAnswerError(f"lost, doubled or not in order: {packet[:200]!r}")


def cross_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_cross`."""
    steady = f"A to B at {plan.stream_rate:.0f}/s"
    burst = f"A to B, burst of {plan.burst_count:,}"
    return [
        Metric("cross:p50", f"{steady}, p50", "ms", is_less_better=True, target=0.8),
        Metric("cross:p99", f"{steady}, p99", "ms", is_less_better=True, target=1.0),
        Metric("cross:rate", f"{burst}, all received", "messages/s", target=8.0, node_target=1.0),
        Metric("cross:cpu", f"{burst}, CPU of A and B", "us per message", is_less_better=True),
    ]


def run_cross(bench: Bench) -> None:
    """Measure events from process A to a client on process B."""
    at_a = [bench.server(column, "cross", needs_redis=True) for column in bench.columns]
    at_b = [
        bench.server(column, "cross", needs_redis=True, is_second=True) for column in bench.columns
    ]
    with running(at_a + at_b):
        senders = bench.connect(bench.columns, at_a, 1)
        receivers = bench.connect(bench.columns, at_b, 1)
        pairs = {
            column: Pair(bench.loop, senders[column][0], receivers[column][0])
            for column in bench.columns
        }
        for pair in pairs.values():
            pair.prepare()
        bench.loop.rest(0.5)  # let everything else that was requested arrive before counting starts
        for pair in pairs.values():
            pair.burst(200)
        _streams(bench, pairs)
        for number in range(bench.plan.burst_slices):
            for column in bench.turns(number):
                _burst(bench, column, pairs[column])
        close_all(senders, receivers)


def _streams(bench: Bench, pairs: dict[Column, Pair]) -> None:
    """Measure the delays at a steady rate; a percentile needs all slices of a round."""
    count = bench.plan.stream_count
    delays: dict[Column, list[float]] = {column: [] for column in bench.columns}
    for number in range(bench.plan.stream_slices):
        for column in bench.turns(number):
            with no_garbage_collection():
                pairs[column].stream(bench.plan.stream_rate, count)
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
        pair.burst(count)
        elapsed = time.perf_counter() - started_at
        cpu = _cpu(pair) - before
    add = bench.adder("cross", column)
    add("rate", count / elapsed)
    add("cpu", 1e6 * cpu / count)


def _cpu(pair: Pair) -> float:
    """Return the seconds of CPU that both servers have used so far."""
    clients = (pair.sender, pair.receiver)
    return sum(float(client.call("stats", False)["cpu"]) for client in clients)

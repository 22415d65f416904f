"""Events with an acknowledgement, and the cost of limits on such events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.bench import Bench, EchoCase, close_all
from benchmarks.client import Client, Loop, reply_frame, request_frame
from benchmarks.report import GUARDED, GUARDED_CONTROL, LIMITED, Metric, percentile, size_text
from benchmarks.servers import running

if TYPE_CHECKING:
    from benchmarks.bench import Plan
    from benchmarks.report import Column

LIMITS_COLUMNS = [GUARDED, LIMITED, GUARDED_CONTROL]
TARGETS = {
    EchoCase(60, 50): 1.0,
    # Each event has its own greenlet, as on stock, since code may rely on its identity.
    EchoCase(100, 50): 2.0,
    EchoCase(1_000, 50): 3.5,
    EchoCase(100_000, 5): 20.0,
}

_DIFFERENT = 10  # events in a row that have different numbers and texts
_SMALL = 16_000


class Traffic:
    """Frames to send and the frames that answer them, built in advance."""

    def __init__(self, size: int) -> None:
        self.requests: list[bytes] = []
        self.replies: list[bytes] = []
        for number in range(10, 10 + _DIFFERENT):
            text = b"%d" % number + b"x" * (size - 2)
            self.requests.append(request_frame(b'42%d["echo","%s"]' % (number, text)))
            self.replies.append(reply_frame(b'43%d["%s"]' % (number, text)))


class Echoers:
    """Clients that each send the next event when the last one has been acknowledged."""

    def __init__(self, loop: Loop, clients: list[Client], traffic: Traffic) -> None:
        self.latencies: list[float] = []
        self.stop_at = 0.0
        self._loop = loop
        self._echoers = [Echoer(client, traffic, self) for client in clients]
        self._active = 0

    def run(self, seconds: float) -> list[float]:
        """Echo for *seconds*; return the latency of every event, in seconds."""
        self.latencies = []
        self._active = len(self._echoers)
        self.stop_at = time.perf_counter() + seconds
        for echoer in self._echoers:
            echoer.send()
        while self._active:
            self._loop.run()
        return self.latencies

    def finish(self) -> None:
        """Record that one client has no event in flight any more."""
        self._active -= 1
        if not self._active:
            self._loop.stop()


class Echoer:
    """One of :class:`Echoers`."""

    def __init__(self, client: Client, traffic: Traffic, everyone: Echoers) -> None:
        client.on_data = self._on_data
        self._send = client.send_frame
        self._requests = traffic.requests
        self._replies = traffic.replies
        self._everyone = everyone
        self._number = 0
        self._expected = b""
        self._sent_at = 0.0

    def send(self) -> None:
        """Send the next event."""
        number = self._number = (self._number + 1) % _DIFFERENT
        self._expected = self._replies[number]
        self._sent_at = time.perf_counter()
        self._send(self._requests[number])

    def _on_data(self, data: bytes) -> bool:
        if data != self._expected:
            return False
        now = time.perf_counter()
        everyone = self._everyone
        everyone.latencies.append(now - self._sent_at)
        if now < everyone.stop_at:
            self.send()
        else:
            self._expected = b""  # anything received now was not asked for
            everyone.finish()
        return True


def key_of(case: EchoCase) -> str:
    """Return the name of *case* in keys."""
    return f"echo-{case.size}x{case.clients}"


def metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run`."""
    rows = []
    for case in plan.echo_cases:
        key = key_of(case)
        plural = "s" if case.clients > 1 else ""
        title = f"echo {size_text(case.size)}, {case.clients} client{plural}"
        rows += [
            Metric(f"{key}:rate", title, "events/s", target=TARGETS.get(case)),
            Metric(f"{key}:cpu", f"{title}, server CPU", "us per event", is_less_better=True),
        ]
        if case.size == 100:
            rows += [
                Metric(f"{key}:p50", f"{title}, p50", "ms", is_less_better=True),
                Metric(f"{key}:p99", f"{title}, p99", "ms", is_less_better=True),
            ]
    return rows


def run(bench: Bench) -> None:
    """Measure every case, one event in flight for each client."""
    plan = bench.plan
    servers = [bench.server(column, "echo") for column in bench.columns]
    with running(servers):
        most = max(case.clients for case in plan.echo_cases)
        clients = bench.connect(bench.columns, servers, most)
        for case in plan.echo_cases:
            _measure(bench, key_of(case), case, clients, plan.slices)
        close_all(clients)


def limits_metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run_limits`."""
    case = plan.limits_case
    title = f"echo {size_text(case.size)}, {case.clients} clients"
    return [
        Metric("limits:rate", title, "events/s"),
        Metric("limits:cpu", f"{title}, server CPU", "us per event", is_less_better=True),
    ]


def run_limits(bench: Bench) -> None:
    """Measure echo with a rate limit, order and schema, compared with echo without these."""
    plan = bench.plan
    servers = [bench.server(column, "limits") for column in LIMITS_COLUMNS]
    with running(servers):
        clients = bench.connect(LIMITS_COLUMNS, servers, plan.limits_case.clients)
        _measure(bench, "limits", plan.limits_case, clients, plan.limits_slices)
        close_all(clients)


def _measure(
    bench: Bench,
    key: str,
    case: EchoCase,
    clients: dict[Column, list[Client]],
    slices: int,
) -> None:
    columns = list(clients)
    traffic = Traffic(case.size)
    groups = {}
    for column in columns:
        some = clients[column][: case.clients]
        if case.size > _SMALL:
            for client in some:
                client.expect_large()
        groups[column] = Echoers(bench.loop, some, traffic)
        groups[column].run(0.2)  # warms up
    for number in range(slices):
        for column in bench.turns(number, columns):
            with bench.watch(key, column, clients[column][0]) as spell:
                latencies = groups[column].run(bench.plan.echo_seconds)
            add = bench.adder(key, column)
            add("rate", len(latencies) / spell.elapsed)
            add("cpu", 1e6 * spell.cpu / len(latencies))
            add("p50", 1000 * percentile(latencies, 50))
            add("p99", 1000 * percentile(latencies, 99))

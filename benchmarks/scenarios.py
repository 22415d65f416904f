"""The measurements: each takes all columns side by side, slice by slice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from benchmarks import report
from benchmarks.client import Client, WrongAnswerError, connect, wait_for
from benchmarks.servers import Redis, Server, running

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from benchmarks.report import Column, Results
    from benchmarks.servers import Cores


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: Times that each scenario runs with fresh servers.
        slices: Times in each round that the columns take turns.
        burst_slices: The same for the bursts, which take longer.
    """

    rounds: int = 3
    slices: int = 9
    burst_slices: int = 4
    echo_clients: tuple[int, ...] = (1, 50, 200)
    echo_seconds: float = 0.25
    broadcast_clients: int = 500
    broadcast_seconds: float = 0.3
    emit_count: int = 1000
    stream_rate: float = 200.0
    stream_count: int = 100
    burst_count: int = 5000
    idle_clients: int = 1000


QUICK = Plan(
    rounds=1,
    slices=1,
    burst_slices=1,
    echo_clients=(1, 20),
    echo_seconds=0.3,
    broadcast_clients=50,
    broadcast_seconds=0.3,
    emit_count=500,
    stream_count=100,
    burst_count=500,
    idle_clients=200,
)


class Bench:
    """What every scenario needs, and where it puts its samples."""

    def __init__(
        self, plan: Plan, columns: list[Column], results: Results, broker: Redis, cores: Cores
    ) -> None:
        self.plan = plan
        self.columns = columns
        self.results = results
        self.broker = broker
        self.cores = cores

    def server(self, column: Column, name: str, *, is_second: bool = False) -> Server:
        """Start a server for *column* on the channel that all servers of that column share."""
        return Server(
            is_guarded=column.is_guarded,
            redis_url=self.broker.url,
            channel=f"bench-{name}-{column.name.replace(' ', '-')}",
            core=self.cores.second if is_second else self.cores.server,
        )

    def turns(self, number: int) -> list[Column]:
        """Return the columns in the order of slice *number*, so that each comes first in turn."""
        shift = (self.results.round + number) % len(self.columns)
        return self.columns[shift:] + self.columns[:shift]


class Usage(NamedTuple):
    """What a server has used up to an instant."""

    cpu: float
    at: float

    def since(self, before: Usage) -> tuple[float, float]:
        """Return seconds of CPU and seconds of time since *before*."""
        return self.cpu - before.cpu, self.at - before.at


async def usage(control: Client) -> Usage:
    """Ask the server of *control* for its CPU time."""
    answer = await control.call("stats", False)
    return Usage(answer["cpu"], time.perf_counter())


async def check_column(control: Client, column: Column) -> None:
    """Raise unless the server of *control* is guarded exactly if *column* says so."""
    answer = await control.call("stats", False)
    if answer["guarded"] is not column.is_guarded:
        raise WrongAnswerError(f"{column.name}: guard imported: {answer['guarded']}")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the load generator's collector out of the latencies."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def payload(number: int) -> bytes:
    """Return 100 bytes of text, different for each *number*."""
    return b"%010d" % number + b"x" * 90


class Echoer:
    """One client that sends its next event when the last one has been acknowledged.

    Args:
        client: Is taken over.
        latencies: Where the latency of each event goes, in seconds.
        finish: Called when the time is over and nothing is under way.

    Attributes:
        stop_at: When to send no more, on the clock of :func:`time.perf_counter`.
    """

    def __init__(self, client: Client, latencies: list[float], finish: Callable[[], None]) -> None:
        client.on_ack = self._on_ack
        self.stop_at = 0.0
        self._client = client
        self._latencies = latencies
        self._finish = finish
        self._number = 0
        self._expected = b""
        self._sent_at = 0.0

    def send(self) -> None:
        """Send the next event."""
        self._number += 1
        text = payload(self._number)
        self._expected = b'43%d["%s"]' % (self._number, text)
        self._client.send(b'42%d["echo","%s"]' % (self._number, text))
        self._sent_at = time.perf_counter()

    def _on_ack(self, packet: bytes) -> None:
        now = time.perf_counter()
        if packet != self._expected:
            raise WrongAnswerError(f"{packet[:200]!r} instead of {self._expected!r}")
        self._latencies.append(now - self._sent_at)
        if now < self.stop_at:
            self.send()
        else:
            self._finish()


async def run_echo(clients: list[Client], seconds: float) -> list[float]:
    """Let *clients* echo for *seconds*; return the latency of every event, in seconds."""
    latencies: list[float] = []
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    active = len(clients)

    def finish() -> None:
        nonlocal active
        active -= 1
        if not active:
            done.set_result(None)

    echoers = [Echoer(client, latencies, finish) for client in clients]
    stop_at = time.perf_counter() + seconds
    for echoer in echoers:
        echoer.stop_at = stop_at
        echoer.send()
    await wait_for(done, clients)
    return latencies


async def echo(bench: Bench) -> None:
    """Events with an acknowledgement, one in flight for each client."""
    plan = bench.plan
    servers = [bench.server(column, "echo") for column in bench.columns]
    with running(servers):
        clients = await _connect_all(bench, servers, max(plan.echo_clients))
        for column in bench.columns:
            await run_echo(clients[column], 0.3)
        for count in plan.echo_clients:
            for number in range(plan.slices):
                for column in bench.turns(number):
                    some = clients[column][:count]
                    with no_garbage_collection():
                        before = await usage(some[0])
                        latencies = await run_echo(some, plan.echo_seconds)
                        cpu, elapsed = (await usage(some[0])).since(before)
                    add = _adder(bench, f"echo-{count}", column)
                    add("rate", len(latencies) / elapsed)
                    add("p50", 1000 * report.percentile(latencies, 50))
                    add("p99", 1000 * report.percentile(latencies, 99))
                    add("cpu", 10_000 * cpu / len(latencies))
                    add("busy", cpu / elapsed)
        _close_all(clients)


class Audience:
    """Clients that receive every broadcast, and ask for the next ones: two are under way."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients = clients
        self._asked = 0
        self._missing: list[int] = []  # by broadcast, how many have yet to receive it
        self._packets: list[bytes] = []
        self._stop_at = 0.0
        self._done: asyncio.Future[None]
        for client in clients:
            client.on_event = self._receiver()

    async def run(self, seconds: float) -> int:
        """Broadcast for *seconds*; return the number of deliveries."""
        self._done = asyncio.get_running_loop().create_future()
        self._stop_at = time.perf_counter() + seconds
        already = self._asked
        self._ask()
        self._ask()
        await wait_for(self._done, self._clients)
        return (self._asked - already) * len(self._clients)

    def _ask(self) -> None:
        self._packets.append(b'42["news",%d,"%s"]' % (self._asked, b"x" * 100))
        self._missing.append(len(self._clients))
        self._clients[0].emit("publish", self._asked)  # always the same: one sender, one order
        self._asked += 1

    def _receiver(self) -> Callable[[bytes], None]:
        received = 0

        def on_event(packet: bytes) -> None:
            nonlocal received
            if packet != self._packets[received]:
                raise WrongAnswerError(f"{packet[:200]!r} instead of number {received}")
            self._missing[received] -= 1
            received += 1
            if not self._missing[received - 1]:
                self._all_have(received - 1)

        return on_event

    def _all_have(self, number: int) -> None:
        if time.perf_counter() < self._stop_at:
            self._ask()
        elif number == self._asked - 1:
            self._done.set_result(None)


async def broadcast(bench: Bench) -> None:
    """One event to every client."""
    plan = bench.plan
    servers = [bench.server(column, "broadcast") for column in bench.columns]
    with running(servers):
        clients = await _connect_all(bench, servers, plan.broadcast_clients)
        audiences = {column: Audience(clients[column]) for column in bench.columns}
        for column in bench.columns:
            await audiences[column].run(0.2)
        for number in range(plan.slices):
            for column in bench.turns(number):
                control = clients[column][0]
                with no_garbage_collection():
                    before = await usage(control)
                    count = await audiences[column].run(plan.broadcast_seconds)
                    cpu, elapsed = (await usage(control)).since(before)
                add = _adder(bench, "broadcast", column)
                add("rate", count / elapsed)
                add("cpu", 1e6 * cpu / count)
                add("busy", cpu / elapsed)
        _close_all(clients)


async def emit(bench: Bench) -> None:
    """``emit()`` with a message queue and no recipient in the process; timed in the server."""
    count = bench.plan.emit_count
    servers = [bench.server(column, "emit") for column in bench.columns]
    with running(servers):
        clients = await _connect_all(bench, servers, 1)
        for column in bench.columns:
            await clients[column][0].call("emit_many", 200)
        for number in range(bench.plan.slices):
            for column in bench.turns(number):
                before = bench.broker.published
                seconds = await clients[column][0].call("emit_many", count)
                published = bench.broker.published - before
                if published < count:
                    raise WrongAnswerError(f"{column.name}: {published} of {count} published")
                add = _adder(bench, "emit", column)
                add("call", 1e6 * seconds["calls"] / count)
                add("cpu", 1e6 * seconds["cpu"] / count)
                add("rate", count / seconds["published"])
        _close_all(clients)


class Pair:
    """Two servers of a column: events leave A and are to reach a client on B."""

    def __init__(self, sender: Client, receiver: Client) -> None:
        self.sender = sender
        self.receiver = receiver
        self.delays: list[float] = []
        self._done: asyncio.Future[None]
        self._expected = 0
        receiver.on_event = self._on_event

    async def prepare(self) -> None:
        """Return when events flow, that is, when B listens."""
        await self.receiver.call("join", "far")
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_event(_: bytes) -> None:
            if not arrived.done():
                arrived.set_result(None)

        self.receiver.on_event = on_event
        for _ in range(100):
            self.sender.emit("burst", "far", 1)
            await asyncio.wait({arrived}, timeout=0.2)
            if arrived.done():
                break
        else:
            raise WrongAnswerError("no event went from A to B within 20 s")
        await asyncio.sleep(0.5)  # whatever else was asked for arrives too, before counting starts
        self.receiver.on_event = self._on_event

    async def run(self, count: int, event: str, *args: Any) -> None:
        """Have A emit *count* numbered events; return when B's client has all, in order."""
        self._expected = count
        self.delays = []
        self._done = asyncio.get_running_loop().create_future()
        self.sender.emit(event, *args)
        await wait_for(self._done, [self.sender, self.receiver])

    def _on_event(self, packet: bytes) -> None:
        now = time.monotonic()
        _, number, emitted_at, _ = json.loads(packet[2:])
        if number != len(self.delays):
            raise WrongAnswerError(f"number {number} instead of {len(self.delays)}")
        self.delays.append(now - emitted_at)
        if len(self.delays) == self._expected:
            self._done.set_result(None)


async def cross(bench: Bench) -> None:
    """Events from process A to a client on process B."""
    plan = bench.plan
    at_a = [bench.server(column, "cross") for column in bench.columns]
    at_b = [bench.server(column, "cross", is_second=True) for column in bench.columns]
    with running(at_a + at_b):
        senders = await _connect_all(bench, at_a, 1)
        receivers = await _connect_all(bench, at_b, 1)
        pairs = {column: Pair(senders[column][0], receivers[column][0]) for column in bench.columns}
        for pair in pairs.values():
            await pair.prepare()
            await pair.run(200, "burst", "far", 200)
        await _streams(bench, pairs)
        for number in range(plan.burst_slices):
            for column in bench.turns(number):
                await _burst(bench, column, pairs[column])
        _close_all(senders, receivers)


async def _streams(bench: Bench, pairs: dict[Column, Pair]) -> None:
    """Take the delays at a steady rate; a percentile needs all slices of a round together."""
    count = bench.plan.stream_count
    delays: dict[Column, list[float]] = {column: [] for column in bench.columns}
    for number in range(bench.plan.slices):
        for column in bench.turns(number):
            with no_garbage_collection():
                await pairs[column].run(count, "stream", "far", bench.plan.stream_rate, count)
            delays[column] += pairs[column].delays
    for column in bench.columns:
        add = _adder(bench, "cross", column)
        add("p50", 1000 * report.percentile(delays[column], 50))
        add("p99", 1000 * report.percentile(delays[column], 99))


async def _burst(bench: Bench, column: Column, pair: Pair) -> None:
    count = bench.plan.burst_count
    with no_garbage_collection():
        before = await usage(pair.sender), await usage(pair.receiver)
        started_at = time.perf_counter()
        await pair.run(count, "burst", "far", count)
        elapsed = time.perf_counter() - started_at
        after = await usage(pair.sender), await usage(pair.receiver)
    cpu = sum(late.since(early)[0] for early, late in zip(before, after, strict=True))
    add = _adder(bench, "cross", column)
    add("rate", count / elapsed)
    add("cpu", 1e6 * cpu / count)


async def memory(bench: Bench) -> None:
    """Resident memory that each further idle connection costs."""
    count = bench.plan.idle_clients
    for column in bench.turns(0):
        server = bench.server(column, "memory")
        with running([server]):
            control, *first = await connect(server.port, 1 + count // 10)
            before = await _resident(control)
            more = await connect(server.port, count)
            after = await _resident(control)
            everyone = [control, *first, *more]
            for client in everyone:
                if client.failure.done():
                    client.failure.result()
            _adder(bench, "memory", column)("rss", (after - before) / count / 1024)
            _close_all({column: everyone})


async def _resident(control: Client) -> int:
    """Return the resident memory of the worker in bytes, after a garbage collection."""
    pid = (await control.call("stats", True))["pid"]
    resident: int = psutil.Process(pid).memory_info().rss
    return resident


async def _connect_all(
    bench: Bench, servers: list[Server], count: int
) -> dict[Column, list[Client]]:
    """Connect *count* clients to each column's server."""
    clients = {}
    for column, server in zip(bench.columns, servers, strict=True):
        clients[column] = await connect(server.port, count)
        await check_column(clients[column][0], column)
    return clients


def _close_all(*groups: dict[Column, list[Client]]) -> None:
    for group in groups:
        for clients in group.values():
            for client in clients:
                client.close()


def _adder(bench: Bench, scenario: str, column: Column) -> Callable[[str, float], None]:
    def add(what: str, value: float) -> None:
        bench.results.add(f"{scenario}:{what}", column, value)

    return add


SCENARIOS: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
    "echo": echo,
    "broadcast": broadcast,
    "emit": emit,
    "cross": cross,
    "memory": memory,
}


def metrics(plan: Plan, names: list[str]) -> list[report.Metric]:
    """Return the rows of the scenarios *names*."""
    of_scenario = {
        "echo": [row for count in plan.echo_clients for row in report.echo_metrics(count)],
        "broadcast": report.broadcast_metrics(plan.broadcast_clients),
        "emit": report.emit_metrics(),
        "cross": report.cross_metrics(plan.stream_rate, plan.burst_count),
        "memory": report.memory_metrics(plan.idle_clients),
    }
    return [row for name in names for row in of_scenario[name]]

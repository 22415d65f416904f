"""Shared by all measurements: how much is measured, on which servers, and how busy they are."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.client import Client, Loop, WrongAnswerError, connect
from benchmarks.servers import Redis, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.report import Column, Results
    from benchmarks.servers import Cores


@dataclass(frozen=True)
class EchoCase:
    """Echo of texts of *size* bytes by *clients* clients."""

    size: int
    clients: int


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: Times that each scenario runs with fresh servers.
        slices: Times in each round that the columns take turns.
        burst_slices: The same for the bursts, which take longer.
        stream_slices: The same for the latencies from A to B, which need many short slices: a
            99th percentile shows the machine's worst moments, and all columns should share them.
        attacks: Names of the attacks that ``abuse`` measures.
    """

    rounds: int = 3
    slices: int = 5
    burst_slices: int = 2
    echo_cases: tuple[EchoCase, ...] = (
        EchoCase(100, 1),
        EchoCase(100, 50),
        EchoCase(100, 200),
        EchoCase(60, 50),
        EchoCase(1_000, 50),
        EchoCase(10_000, 20),
        EchoCase(100_000, 5),
    )
    echo_seconds: float = 0.2
    broadcast_clients: tuple[int, ...] = (100, 500, 1000)
    broadcast_seconds: float = 0.25
    emit_count: int = 1000
    stream_rate: float = 200.0
    stream_slices: int = 64
    stream_count: int = 25
    burst_count: int = 5000
    connect_seconds: float = 0.4
    idle_clients: int = 1000
    delivery_clients: int = 20
    delivery_count: int = 3000
    waiting_count: int = 20_000
    limits_case: EchoCase = EchoCase(60, 50)
    limits_slices: int = 10
    abuse_seconds: float = 2.0
    attacks: frozenset[str] = frozenset()


QUICK = Plan(
    rounds=1,
    slices=4,
    echo_cases=tuple(case for case in Plan.echo_cases if case.clients <= 50),
    echo_seconds=0.15,
    broadcast_clients=(500, 1000),
    broadcast_seconds=0.15,
    emit_count=500,
    stream_slices=16,
    burst_count=2000,
    connect_seconds=0.2,
    idle_clients=500,
    delivery_count=1000,
    limits_slices=4,
    abuse_seconds=1.0,
)


class Spell:
    """What a server did while it was watched.

    Attributes:
        cpu: Seconds of CPU.
        elapsed: Seconds of time.
    """

    cpu: float
    elapsed: float


def check(column: Column, server: Server, stats: dict[str, Any]) -> None:
    """Raise unless the server's report about itself is what *column* claims."""
    claimed = {
        "runtime": "node" if column.is_node else "python",
        "guarded": column.is_guarded,
        "limited": column.is_limited,
    }
    if column.is_node:
        claimed["adapter"] = "RedisAdapter" if server.has_redis else "Adapter"
        claimed["engine"] = "WebSocketServer"  # the name of the class in ws
        claimed["deflate"] = False
    wrong = {what: stats.get(what) for what, value in claimed.items() if stats.get(what) != value}
    if server.core is not None:
        cores = psutil.Process(stats["pid"]).cpu_affinity()
        if cores != [server.core]:
            wrong["cores"] = cores
    if wrong:
        raise WrongAnswerError(f"{column.name}: the server is not what it should be: {wrong}")


class Bench:
    """Starts servers and clients for the scenarios, and collects their samples."""

    def __init__(
        self, plan: Plan, columns: list[Column], results: Results, broker: Redis, cores: Cores
    ) -> None:
        self.plan = plan
        self.columns = columns
        self.results = results
        self.broker = broker
        self.loop = Loop()
        self.cores = cores

    def server(
        self,
        column: Column,
        name: str,
        *,
        needs_redis: bool = False,
        is_second: bool = False,
        **options: Any,
    ) -> Server:
        """Start a server for *column* on the channel that all servers of that column share.

        Node's has its Redis adapter only where *needs_redis*; the others have the queue, unless
        they stand alone. The *options* are those of :class:`~benchmarks.servers.Server`.
        """
        is_alone = column.is_node or column.is_alone
        return Server(
            column,
            redis_url=self.broker.url if needs_redis or not is_alone else None,
            channel=f"bench-{name}-{column.name.replace(' ', '-')}",
            core=self.cores.second if is_second else self.cores.server,
            **options,
        )

    def connect(
        self, columns: list[Column], servers: list[Server], count: int
    ) -> dict[Column, list[Client]]:
        """Connect *count* clients to the server of each of *columns*."""
        clients = {}
        for column, server in zip(columns, servers, strict=True):
            clients[column] = connect(self.loop, server.port, count)
            check(column, server, clients[column][0].call("stats", False))
        return clients

    def turns(self, number: int, columns: list[Column] | None = None) -> list[Column]:
        """Return the columns in the order of slice *number*, so that each comes first in turn."""
        columns = columns or self.columns
        shift = (self.results.round + number) % len(columns)
        return columns[shift:] + columns[:shift]

    def adder(self, scenario: str, column: Column) -> Callable[[str, float], None]:
        """Return a function that keeps one sample of what it names, of *scenario*."""

        def add(what: str, value: float) -> None:
            self.results.add(f"{scenario}:{what}", column, value)

        return add

    @contextlib.contextmanager
    def watch(self, scenario: str, column: Column, control: Client) -> Iterator[Spell]:
        """Watch the server of *control* while the body runs.

        Records which share of their cores the server and the load generator had, and which share
        of the server's core was idle.

        Yields:
            A record that is filled in at the end.
        """
        spell = Spell()
        with no_garbage_collection():
            own_cpu = time.process_time()
            idle = self._idle()
            cpu = control.call("stats", False)["cpu"]
            started_at = time.perf_counter()
            yield spell
            spell.cpu = control.call("stats", False)["cpu"] - cpu
            spell.elapsed = time.perf_counter() - started_at
            own_cpu = time.process_time() - own_cpu
            idle = self._idle() - idle
        add = self.adder(scenario, column)
        add("busy", spell.cpu / spell.elapsed)
        add("load", own_cpu / spell.elapsed)
        add("idle", idle / spell.elapsed)

    def _idle(self) -> float:
        """Return the seconds that the servers' core has been idle so far; 0 if they have none."""
        if self.cores.server is None:
            return 0.0
        idle: float = psutil.cpu_times(percpu=True)[self.cores.server].idle
        return idle


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the load generator's collector out of the latencies."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def close_all(*groups: dict[Column, list[Client]]) -> None:
    """Disconnect all clients."""
    for group in groups:
        for clients in group.values():
            for client in clients:
                client.close()

"""One event to every client."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.bench import Bench, close_all
from benchmarks.client import Client, Loop, WrongAnswerError, connect, reply_frame
from benchmarks.report import Metric
from benchmarks.servers import running

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench import Plan
    from benchmarks.report import Column

TARGETS = {100: 1.2, 500: 4.5, 1000: 4.5}
NODE_TARGETS = {500: 1.5, 1000: 1.5}

_FIRST = 1_000_000  # numbers of one length, so that all frames have one length
_TEXT = b"x" * 100


class Audience:
    """Clients that receive every broadcast, and ask for the next; two are in flight at a time."""

    def __init__(self, loop: Loop, clients: list[Client]) -> None:
        self._loop = loop
        self._clients = clients
        self._frames: list[bytes] = []  # by broadcast
        self._missing: list[int] = []  # by broadcast, how many have yet to receive it
        self._stop_at = 0.0
        self._is_done = True
        for client in clients:
            client.on_data = self._receiver()

    def run(self, seconds: float) -> int:
        """Broadcast for *seconds*; return the number of deliveries."""
        self._is_done = False
        self._stop_at = time.perf_counter() + seconds
        already = len(self._frames)
        self._ask()
        self._ask()
        while not self._is_done:
            self._loop.run()
        return (len(self._frames) - already) * len(self._clients)

    def _ask(self) -> None:
        number = _FIRST + len(self._frames)
        self._frames.append(reply_frame(b'42["news",%d,"%s"]' % (number, _TEXT)))
        self._missing.append(len(self._clients))
        self._clients[0].emit("publish", number)  # always the same: one sender, one order

    def _receiver(self) -> Callable[[bytes], bool]:
        received = 0
        frames = self._frames
        missing = self._missing
        size = len(reply_frame(b'42["news",%d,"%s"]' % (_FIRST, _TEXT)))

        def on_data(data: bytes) -> bool:
            nonlocal received
            if received < len(frames) and data == frames[received]:
                missing[received] -= 1
                received += 1
                if not missing[received - 1]:
                    self._all_have(received - 1)
                return True
            if len(data) != size:
                whole, rest = divmod(len(data), size)
                if rest or not whole:
                    return False  # a frame came in pieces, or a ping came too
                pieces = (data[at : at + size] for at in range(0, len(data), size))
                return all(on_data(piece) for piece in pieces)
            raise WrongAnswerError(f"{data[:200]!r} instead of number {received}")

        return on_data

    def _all_have(self, number: int) -> None:
        if time.perf_counter() < self._stop_at:
            self._ask()
        elif number == len(self._frames) - 1:
            self._is_done = True
            self._loop.stop()


def metrics(plan: Plan) -> list[Metric]:
    """Return the rows of :func:`run`."""
    rows = []
    for count in plan.broadcast_clients:
        key = f"broadcast-{count}"
        title = f"broadcast 100 B to {count:,}"
        rows += [
            Metric(
                f"{key}:rate",
                title,
                "deliveries/s",
                target=TARGETS.get(count),
                node_target=NODE_TARGETS.get(count),
            ),
            Metric(f"{key}:cpu", f"{title}, server CPU", "us per delivery", is_less_better=True),
        ]
    return rows


def run(bench: Bench) -> None:
    """Measure broadcasts to increasing numbers of clients."""
    plan = bench.plan
    servers = [bench.server(column, "broadcast") for column in bench.columns]
    with running(servers):
        clients = bench.connect(bench.columns, servers, 1)
        for count in plan.broadcast_clients:
            for column, server in zip(bench.columns, servers, strict=True):
                missing = count - len(clients[column])
                clients[column] += connect(bench.loop, server.port, missing)
            _measure(bench, f"broadcast-{count}", clients)
        close_all(clients)


def _measure(bench: Bench, key: str, clients: dict[Column, list[Client]]) -> None:
    plan = bench.plan
    audiences = {column: Audience(bench.loop, clients[column]) for column in bench.columns}
    for audience in audiences.values():
        audience.run(0.2)  # warms up
    for number in range(plan.slices):
        for column in bench.turns(number):
            with bench.watch(key, column, clients[column][0]) as spell:
                count = audiences[column].run(plan.broadcast_seconds)
            add = bench.adder(key, column)
            add("rate", count / spell.elapsed)
            add("cpu", 1e6 * spell.cpu / count)

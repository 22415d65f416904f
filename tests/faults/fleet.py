"""Processes of the application under test, on one Redis, and what flows between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests

from tests.faults.app import HEALTH_TOKEN
from tests.support import DeadlineExceeded, GunicornServer, RedisServer, TcpProxy, wait_until
from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tests.support import Received, SocketIOClient

APP = "tests.faults.app:create_app()"
PATCHED_APP = "tests.faults.patched_app:create_app()"
NOISE = 1.5
"""Seconds that a busy machine may add to a figure before a test takes it for a failure."""

_flow_numbers = itertools.count()


@dataclass(frozen=True)
class FleetOptions:
    """What distinguishes one fleet from another."""

    app: str = APP
    async_mode: str = "gevent"
    is_guarded: bool = True
    processes: int = 2
    has_queue: bool = True
    is_proxied: bool = False
    queue: str = ""
    error_handler: bool = False
    socketio: str = "{}"
    config: str = "{}"
    workers: int = 1
    arguments: tuple[str, ...] = ()
    is_durable: bool = False


class Fleet:
    """One or more servers on one Redis, each behind a proxy of its own if so wished."""

    def __init__(self, options: FleetOptions) -> None:
        self.options = options
        self.redis = RedisServer(is_durable=options.is_durable)
        self.proxies: list[TcpProxy] = []
        self.servers: list[GunicornServer] = []

    @property
    def a(self) -> GunicornServer:
        """The first process."""
        return self.servers[0]

    @property
    def b(self) -> GunicornServer:
        """The second process."""
        return self.servers[1]

    def start(self) -> None:
        """Start everything and wait until the servers serve."""
        if self.options.has_queue:
            self.redis.start()
        for _ in range(self.options.processes):
            port = self.redis.port
            if self.options.is_proxied:
                proxy = TcpProxy(self.redis.port)
                proxy.start()
                self.proxies.append(proxy)
                port = proxy.port
            server = GunicornServer(
                self.options.app,
                async_mode=self.options.async_mode,
                env=self._env(port),
                workers=self.options.workers,
                arguments=self.options.arguments,
            )
            self.servers.append(server)
            server.launch()
        for server in self.servers:
            server.wait_until_serving()

    def is_usable(self) -> bool:
        """Whether everything runs that a test expects to run."""
        try:
            for server in self.servers:
                if not server.is_alive() or not server.get("/", timeout=2.0).ok:
                    return False
        except requests.RequestException:
            return False
        return self.redis.pid is not None or not self.options.has_queue

    def close(self) -> None:
        """Stop everything."""
        for server in self.servers:
            server.close()
        for proxy in self.proxies:
            proxy.stop()
        self.redis.close()

    def environment(self) -> dict[str, str]:
        """Return the environment in which a further process belongs to this fleet."""
        return self._env(self.redis.port)

    def _env(self, redis_port: int) -> dict[str, str]:
        options = self.options
        env = {
            "GUARD": "1" if options.is_guarded else "0",
            "ASYNC_MODE": options.async_mode,
            "SOCKETIO_OPTIONS": options.socketio,
            "APP_CONFIG": options.config,
            "QUEUE": options.queue,
            "ERROR_HANDLER": "1" if options.error_handler else "0",
        }
        if options.has_queue:
            env["REDIS_URL"] = self.redis.url_through(redis_port)
        return env


def sleep_until(instant: float) -> None:
    """Wait for an instant (monotonic) of the timeline that a test injects."""
    time.sleep(max(0.0, instant - time.monotonic()))


def counter(server: GunicornServer, name: str) -> int:
    """Return one of the guard's counters; without the guard nothing is ever counted."""
    guard = server.state()["guard"]
    return int(guard["counters"].get(name, 0)) if guard else 0


def runs(server: GunicornServer, name: str) -> int:
    """Return how often the application ran the handler, callback or task of that name."""
    return int(server.state()["runs"].get(name, 0))


def wait_until_delivering(
    source: GunicornServer,
    client: SocketIOClient,
    *,
    timeout: float = USUAL_TIMEOUT,
    message: str = "the listener is deaf",
) -> float:
    """Emit from *source* until *client* receives one of those events.

    Returns:
        How long it took, in seconds.
    """
    event = f"flow-{next(_flow_numbers)}"
    began_at = time.monotonic()
    next_at = began_at

    def has_arrived() -> bool:
        nonlocal next_at
        if time.monotonic() >= next_at:
            source.post("/emit", event=event)
            next_at = time.monotonic() + 0.05
        return bool(client.events(event))

    wait_until(has_arrived, timeout=timeout, message=message)
    return client.events(event)[0].at - began_at


def count_delivered(
    source: GunicornServer, client: SocketIOClient, *, count: int, timeout: float
) -> int:
    """Emit *count* events from *source* and return how many reach *client* in time."""
    event = f"flow-{next(_flow_numbers)}"
    source.post("/emit", event=event, count=count)
    with contextlib.suppress(DeadlineExceeded):
        client.wait_for(event, count=count, timeout=timeout)
    return len(client.events(event))


class Flow:
    """Numbered events from one process to a client of another, at a steady rate.

    The server stops by itself after *seconds*.
    """

    def __init__(
        self,
        source: GunicornServer,
        client: SocketIOClient,
        *,
        rate: float,
        seconds: float = 120.0,
    ) -> None:
        self.name = f"flow-{next(_flow_numbers)}"
        self._source = source
        self._client = client
        self._rate = rate
        self._count = int(rate * seconds)

    def start(self) -> None:
        """Begin to emit, and wait until the first event has arrived."""
        self._source.post("/series", name=self.name, count=self._count, rate=self._rate)
        self._client.wait_for(self.name, message="the flow did not begin")

    def stop(self) -> tuple[int, float]:
        """Stop emitting; return the number of events and the time the slowest emit took."""
        progress = self._source.post("/series/stop", name=self.name)
        return int(progress["emitted"]), float(progress["slowest"])

    def received(self) -> list[Received]:
        """Return what has arrived."""
        return self._client.events(self.name)

    def numbers(self) -> list[int]:
        """Return the numbers of the events in the order in which they arrived."""
        return [item.args[0]["number"] for item in self.received()]

    def missing(self, emitted: int) -> list[int]:
        """Return the numbers below *emitted* that have not arrived."""
        return sorted(set(range(emitted)) - set(self.numbers()))

    def wait_for_all(self, emitted: int, *, timeout: float) -> int:
        """Wait for all events up to *emitted*; return how many are lost after *timeout*."""
        with contextlib.suppress(DeadlineExceeded):
            wait_until(lambda: not self.missing(emitted), timeout=timeout, interval=0.05)
        return len(self.missing(emitted))

    def wait_for_arrival_after(self, instant: float, *, timeout: float, message: str) -> float:
        """Return how long after *instant* the next event arrived, in seconds."""

        def find() -> Received | None:
            return next((item for item in self.received() if item.at > instant), None)

        found = wait_until(find, timeout=timeout, message=message)
        assert found is not None
        return found.at - instant

    def wait_for_emission_after(self, instant: float, *, timeout: float, message: str) -> float:
        """Return how long after *instant* an event arrived that was emitted after it."""

        def find() -> Received | None:
            return next(
                (item for item in self.received() if item.args[0]["emitted_at"] > instant), None
            )

        found = wait_until(find, timeout=timeout, message=message)
        assert found is not None
        return found.at - instant

    def longest_silence(self, *, since: float, until: float) -> float:
        """Return the longest time without an event between two instants."""
        instants = [item.at for item in self.received() if since <= item.at <= until]
        return max(
            after - before for before, after in itertools.pairwise([since, *instants, until])
        )

    def __enter__(self) -> Self:
        """Begin to emit."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop emitting, as far as the server still answers."""
        try:
            self.stop()
        except requests.RequestException:
            if error is None:
                raise


def health_details(server: GunicornServer) -> dict[str, Any]:
    """Return all that ``/healthz`` tells those who have the token."""
    answer = server.get("/healthz", headers={"Authorization": f"Bearer {HEALTH_TOKEN}"})
    details: dict[str, Any] = json.loads(answer.text)
    return details

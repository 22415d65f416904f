"""Fleets of guarded, or in stock mode unguarded, processes.

With the guard a fault leaves the servers usable, so the tests of one module share them. Without
it, or after a failure, the next test gets new ones.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.connections import CONNECTION_APP, JOIN_TIMEOUT, QUICK, worker_options
from tests.faults.fleet import Fleet, FleetOptions
from tests.faults.watches import tables
from tests.support import wait_until
from tests.support.raw_clients import RawClients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import GunicornServer


class FleetPool:
    """The fleets that run, by what distinguishes them."""

    def __init__(self) -> None:
        self._fleets: dict[FleetOptions, Fleet] = {}

    def get(self, options: FleetOptions) -> Fleet:
        """Return a running fleet with these options, a new one if need be."""
        fleet = self._fleets.get(options)
        if fleet is not None and fleet.is_usable():
            return fleet
        if fleet is not None:
            self.discard(fleet)
        fleet = Fleet(options)
        self._fleets[options] = fleet
        fleet.start()
        return fleet

    def discard(self, fleet: Fleet) -> None:
        """Stop a fleet."""
        self._fleets.pop(fleet.options, None)
        fleet.close()

    def close(self) -> None:
        """Stop all fleets."""
        for fleet in list(self._fleets.values()):
            self.discard(fleet)


@pytest.fixture(scope="module")
def _fleet_pool() -> Iterator[FleetPool]:
    pool = FleetPool()
    yield pool
    pool.close()


@pytest.fixture
def async_mode() -> str:
    """The async mode, unless a test is parametrised with others."""
    return "gevent"


@pytest.fixture
def make_fleet(
    _fleet_pool: FleetPool,
    is_stock: bool,
    async_mode: str,
    guard_config: dict[str, Any],
    has_failed: Callable[[], bool],
) -> Iterator[Callable[..., Fleet]]:
    """Return a function that provides a fleet.

    It takes the fields of :class:`FleetOptions`; ``socketio`` and ``config`` as dictionaries.
    """
    used: list[Fleet] = []

    def make(
        *,
        socketio: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Fleet:
        fleet = _fleet_pool.get(
            FleetOptions(
                async_mode=async_mode,
                is_guarded=not is_stock,
                socketio=json.dumps(socketio or {}),
                config=json.dumps(guard_config | (config or {})),
                **options,
            )
        )
        used.append(fleet)
        return fleet

    yield make
    if is_stock or has_failed():
        for fleet in used:
            _fleet_pool.discard(fleet)


@pytest.fixture
def worker() -> str:
    """The worker of gunicorn, unless a test is parametrised with others."""
    return "gevent-websocket"


@pytest.fixture
def make_connection_server(
    make_fleet: Callable[..., Fleet], worker: str, is_stock: bool
) -> Callable[..., GunicornServer]:
    """Return a function that provides one process that remembers no client.

    It takes options of ``SocketIO``.
    """

    def make(*, join_timeout: float = JOIN_TIMEOUT, **socketio: Any) -> GunicornServer:
        options = worker_options(worker, is_stock=is_stock)
        options["config"]["SOCKETIO_GUARD_JOIN_TIMEOUT"] = join_timeout
        server = make_fleet(
            app=CONNECTION_APP,
            processes=1,
            has_queue=False,
            socketio=QUICK | socketio,
            **options,
        ).a
        wait_until(lambda: not any(tables(server).values()), timeout=10)
        return server

    return make


@pytest.fixture
def clients() -> Iterator[RawClients]:
    """The raw clients of one test."""
    of_this_test = RawClients()
    yield of_this_test
    of_this_test.close()


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """Two processes on one Redis."""
    return make_fleet()

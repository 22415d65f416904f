"""Fleets of guarded, or in stock mode unguarded, processes.

With the guard a fault leaves the servers usable, so the tests that run in one process share them,
whatever their module. Without it, or after a failure, the next test gets new ones.
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


_TOGETHER = {
    "arrivals": ("test_backpressure", "test_gate", "test_last_words"),
    "connections": ("test_connections", "test_disconnects", "test_half_handshakes"),
    "floods": ("test_floods", "test_packets"),
    "one_process": ("test_handlers", "test_tasks"),
    "two_processes": ("test_broker", "test_callbacks", "test_listener", "test_outbox"),
}
"""The modules that share servers, and so run in one process."""
_MOST_FLEETS = 6
"""More than one test uses at a time."""


@pytest.hookimpl(tryfirst=True)  # who has a group gets no other
def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests together that share servers."""
    for group, modules in _TOGETHER.items():
        if item.path.stem in modules and item.get_closest_marker("alone") is None:
            item.add_marker(pytest.mark.xdist_group(group))


class FleetPool:
    """The fleets that run, by what distinguishes them; the one used last at the end."""

    def __init__(self) -> None:
        self._fleets: dict[FleetOptions, Fleet] = {}

    def get(self, options: FleetOptions) -> Fleet:
        """Return a running fleet with these options, a new one if need be."""
        fleet = self._fleets.pop(options, None)
        if fleet is not None and not fleet.is_usable():
            fleet.close()
            fleet = None
        if fleet is not None:
            self._fleets[options] = fleet
            return fleet
        while len(self._fleets) >= _MOST_FLEETS:
            self.discard(next(iter(self._fleets.values())))
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


_pool_key = pytest.StashKey[FleetPool]()


@pytest.fixture(scope="session")
def _fleet_pool(pytestconfig: pytest.Config) -> Iterator[FleetPool]:
    pool = pytestconfig.stash.setdefault(_pool_key, FleetPool())
    yield pool
    pool.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stop what no test of another group would use: an idle server looks around all the time."""
    yield
    pool = item.config.stash.get(_pool_key, None)
    if pool is not None and _group(item) != _group(nextitem):
        pool.close()


def _group(item: pytest.Item | None) -> object:
    marker = None if item is None else item.get_closest_marker("xdist_group")
    return item and (marker.args[0] if marker else item.path)


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

"""Clients that never read what is sent to them, or read it late."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import counter, runs
from tests.faults.watches import (
    FLOOD_APP,
    EchoWatch,
    MemoryWatch,
    crowding,
    milliseconds,
    wait_for_empty_tables,
)
from tests.support import wait_until
from tests.support.raw_clients import RawWebSocket
from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer, RawClient

    Connect = Callable[..., RawClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

NEVER_READS = "a client never reads what is emitted to it"
FLAT = 5.0
"""MiB that a worker may grow by for a client that does not read."""

_EVENT = 64_000
_NEWEST = 8
"""Events that a queue of 1 MiB holds at the least, beside what is being written."""
_KERNEL_BUFFER = 65536
IMPATIENT = {"SOCKETIO_GUARD_SLOW_CONSUMER_TIMEOUT": 1}
_SLOWEST_ANSWER = 1.0


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process without a message queue."""
    return make_fleet(app=FLOOD_APP, processes=1, has_queue=False, config=IMPATIENT).a


class Sleeper(RawWebSocket):
    """A client that reads only when it is told to, and the flood that is poured over it."""

    def __init__(self, server: GunicornServer) -> None:
        super().__init__(server.port, receive_buffer=_KERNEL_BUFFER)
        self._server = server

    def flood(self, witness: RawClient, megabytes: int, *, is_volatile: bool = False) -> int:
        """Have the server emit that much in events of 64 kB, and return their number."""
        count = megabytes * 1_000_000 // _EVENT
        self._server.post(
            "/flood",
            to=self.sid,
            witness=witness.sid,
            count=count,
            size=_EVENT,
            is_volatile=is_volatile,
        )
        return count

    def progress(self) -> dict[str, Any]:
        """Return how far the server has come."""
        found: dict[str, Any] = self._server.get(f"/flood/{self.sid}").json()
        return found

    def wait_for_end(self) -> dict[str, int]:
        """Wait until the server has emitted everything; return what became of how many."""
        wait_until(
            lambda: self.progress()["is_over"], timeout=20, interval=0.05, message="still emitting"
        )
        outcomes: dict[str, int] = self.progress()["outcomes"]
        return outcomes


@pytest.fixture
def sleeper(server: GunicornServer) -> Iterator[Sleeper]:
    """A client that has joined, and reads no more from now on."""
    with Sleeper(server) as client:
        client.open().join()
        yield client


def warm_up(server: GunicornServer, witness: RawClient) -> None:
    """Let the worker grow to the size that it takes to serve a client that reads."""
    with Sleeper(server) as client:
        client.open().join()
        count = client.flood(witness, 2)
        for number in range(count):
            client.read_until(f'42["flood",{number},')
        client.wait_for_end()
    wait_for_numbers(witness, count)
    wait_until(lambda: server.state()["tables"]["clients"] <= 2)
    witness.frames.clear()


def numbers(client: RawClient) -> list[int]:
    """Return the numbers of the small events, in the order of their arrival."""
    return [item.args[0] for item in client.events("steady")]


def wait_for_numbers(client: RawClient, count: int) -> None:
    """Wait until *client* has all of the small events, in order."""
    wait_until(
        lambda: len(numbers(client)) >= count,
        timeout=20,
        interval=0.1,
        message="another client did not get everything",
    )
    assert numbers(client) == list(range(count))


def flood_numbers(client: Sleeper, *, until: int, timeout: float = USUAL_TIMEOUT) -> list[int]:
    """Read up to the large event with the number *until*; return the numbers of all."""
    found: list[int] = []
    deadline = time.monotonic() + timeout
    while not found or found[-1] != until:
        frame = client.read_frame(deadline - time.monotonic())
        assert frame is not None, "the connection has ended"
        if frame.payload.startswith(b'42["flood",'):
            found.append(int(frame.payload[11:40].split(b",")[0]))
    return found


@pytest.mark.alone
@pytest.mark.faults(
    NEVER_READS, stock="RSS grows by what is emitted: 300 MB", because=r"grew by [23]\d\d\.\d MiB"
)
def test_client_that_never_reads_costs_no_memory_and_is_told_why_it_is_closed(
    server: GunicornServer, sleeper: Sleeper, raw_client: Connect, measured: Measured
) -> None:
    """300 MB are emitted to it; others get everything, and it reads the reason of its end."""
    witness = raw_client(server)
    warm_up(server, witness)
    disconnects, dropped = runs(server, "disconnect"), counter(server, "sends_dropped")
    with MemoryWatch(server) as memory, EchoWatch(server) as others:
        count = sleeper.flood(witness, 300)
        wait_until(
            lambda: runs(server, "disconnect") > disconnects or sleeper.progress()["is_over"],
            timeout=20,
            message="the disconnect handler did not run",
        )
        farewell = sleeper.read_to_end(timeout=4.0) if memory.growth < FLAT else None
        outcomes = sleeper.wait_for_end()
        wait_for_numbers(witness, count)
        measured("growth", f"{memory.growth:.1f} MiB")
        measured("others answered within", milliseconds(others.slowest()))
        assert memory.growth < FLAT, f"the worker grew by {memory.growth:.1f} MiB"
        assert not others.errors
        assert others.slowest() < _SLOWEST_ANSWER * crowding()
    measured("kept for it", f"{outcomes['queued'] * _EVENT / 1e6:.1f} MB")
    assert farewell is not None
    assert (farewell.code, farewell.reason) == (1008, "slow consumer")
    # One for the client; the client that watched is gone as well by now.
    wait_until(lambda: runs(server, "disconnect") >= disconnects + 2)
    assert runs(server, "disconnect") == disconnects + 2
    assert outcomes["dropped_closed"] > count // 2
    assert counter(server, "sends_dropped") >= dropped
    witness.close()
    wait_for_empty_tables(server)


def test_client_that_reads_one_large_message_is_not_taken_for_slow(
    make_fleet: Callable[..., Fleet], raw_client: Connect
) -> None:
    """A heartbeat and other events come meanwhile, and wait behind eight times the bound."""
    server = make_fleet(
        app=FLOOD_APP, processes=1, has_queue=False, socketio={"ping_interval": 1}
    ).a
    witness = raw_client(server)
    with Sleeper(server) as client:
        client.open().join()
        size = 8 * 2**20
        request = {"to": client.sid, "witness": witness.sid, "count": 1}
        server.post("/flood", **request, size=size)
        client.wait_for_end()
        server.post("/flood", **request, size=100)
        client.wait_for_end()
        time.sleep(1.5)  # the heartbeat comes; this client does nothing at all
        large, small = client.read_frame(10.0), client.read_frame(10.0)
        assert large is not None
        assert small is not None
        assert len(large.payload) > size > len(small.payload)
        assert server.state()["tables"]["clients"] == 2
        assert not runs(server, "disconnect")


@pytest.mark.faults(
    NEVER_READS, stock="RSS grows by what is emitted", because=r"grew by \d\d+\.\d MiB"
)
def test_client_that_never_reads_at_all_is_gone_within_the_close_timeout(
    server: GunicornServer, sleeper: Sleeper, raw_client: Connect, measured: Measured
) -> None:
    """It does not even read that it is closed, and nothing of it is left."""
    witness = raw_client(server)
    warm_up(server, witness)
    disconnects = runs(server, "disconnect")
    with MemoryWatch(server) as memory:
        count = sleeper.flood(witness, 64)
        began_at = time.monotonic()
        sleeper.wait_for_end()
        assert memory.growth < FLAT, f"the worker grew by {memory.growth:.1f} MiB"
        wait_until(lambda: runs(server, "disconnect") == disconnects + 1)
        witness.close()
        wait_for_empty_tables(server, timeout=6.0)
        measured("gone after", time.monotonic() - began_at)
        measured("growth", f"{memory.growth:.1f} MiB")
    assert count


@pytest.mark.faults(
    NEVER_READS, stock="RSS grows by what is emitted", because=r"grew by \d\d+\.\d MiB"
)
def test_client_that_reads_again_gets_the_newest_where_the_oldest_are_dropped(
    make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """With the policy drop_oldest a slow client stays, and goes on with what is new."""
    config = IMPATIENT | {"SOCKETIO_GUARD_SLOW_CONSUMER": "drop_oldest"}
    server = make_fleet(app=FLOOD_APP, processes=1, has_queue=False, config=config).a
    witness = raw_client(server)
    warm_up(server, witness)
    dropped = counter(server, "sends_dropped")
    with Sleeper(server) as sleeper, MemoryWatch(server) as memory:
        sleeper.open().join()
        count = sleeper.flood(witness, 64)
        outcomes = sleeper.wait_for_end()
        assert memory.growth < FLAT, f"the worker grew by {memory.growth:.1f} MiB"
        found = flood_numbers(sleeper, until=count - 1)
        wait_for_numbers(witness, count)
        measured("growth", f"{memory.growth:.1f} MiB")
        measured("received", f"{len(found)} of {count}")
        assert found == sorted(found)
        assert found[0] == 0
        assert found[-_NEWEST:] == list(range(count - _NEWEST, count)), "the newest have gaps"
        assert counter(server, "sends_dropped") == dropped + count - len(found)
        assert sum(outcomes.values()) == count
        assert sleeper.call("echo", "still there", ack_id=1) == ["still there"]


@pytest.mark.faults(
    NEVER_READS, stock="RSS grows by what is emitted", because=r"grew by \d\d+\.\d MiB"
)
@pytest.mark.parametrize("policy", ["disconnect", "drop_volatile"])
def test_volatile_events_are_dropped_before_a_slow_client_is(
    policy: str, make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """Volatile events to a client that does not read cost it nothing; it reads on later."""
    config = IMPATIENT | {"SOCKETIO_GUARD_SLOW_CONSUMER": policy}
    server = make_fleet(app=FLOOD_APP, processes=1, has_queue=False, config=config).a
    witness = raw_client(server)
    warm_up(server, witness)
    with Sleeper(server) as sleeper, MemoryWatch(server) as memory:
        sleeper.open().join()
        count = sleeper.flood(witness, 64, is_volatile=True)
        outcomes = sleeper.wait_for_end()
        assert memory.growth < FLAT, f"the worker grew by {memory.growth:.1f} MiB"
        measured("growth", f"{memory.growth:.1f} MiB")
        measured("outcomes", outcomes)
        sleeper.emit("echo", "still there", ack_id=1)
        assert sleeper.read_ack(1) == ["still there"], "the client was closed"
        wait_for_numbers(witness, count)
        assert sum(outcomes.values()) == count
        assert outcomes["dropped_slow"] > count // 2


@pytest.mark.faults(
    NEVER_READS, stock="RSS grows by what is emitted", because=r"grew by \d\d+\.\d MiB"
)
def test_client_that_never_reads_is_closed_where_nothing_is_volatile(
    make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """With the policy drop_volatile a flood of events that must not be lost ends the client."""
    config = IMPATIENT | {"SOCKETIO_GUARD_SLOW_CONSUMER": "drop_volatile"}
    server = make_fleet(app=FLOOD_APP, processes=1, has_queue=False, config=config).a
    witness = raw_client(server)
    warm_up(server, witness)
    disconnects = runs(server, "disconnect")
    with Sleeper(server) as sleeper, MemoryWatch(server) as memory:
        sleeper.open().join()
        sleeper.flood(witness, 64)
        wait_until(
            lambda: runs(server, "disconnect") > disconnects or sleeper.progress()["is_over"],
            timeout=20,
        )
        sleeper.wait_for_end() if memory.growth >= FLAT else None
        assert memory.growth < FLAT, f"the worker grew by {memory.growth:.1f} MiB"
        farewell = sleeper.read_to_end(timeout=4.0)
        measured("growth", f"{memory.growth:.1f} MiB")
        assert (farewell.code, farewell.reason) == (1008, "slow consumer")

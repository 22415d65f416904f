"""Emits that cannot be sent: for what they carry, or because the broker is away."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import Fleet, Flow, counter, sleep_until, wait_until_delivering
from tests.support.processes import end_process, start_process
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import SocketIOClient

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])

UNSERIALISABLE = "emit of something that JSON cannot hold"
OVERFLOW = "more is emitted while Redis is down than the outbox holds"
WRITE_ONLY = "write-only process while Redis is down"


class WriteOnlyProcess:
    """A running ``tests.faults.write_only``, to which commands can be given."""

    def __init__(self, fleet: Fleet) -> None:
        self._process = start_process(
            [sys.executable, "-m", "tests.faults.write_only"],
            env={**os.environ, **fleet.environment(), "PYTHONPATH": str(PROJECT_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def tell(self, do: str, **arguments: Any) -> Any:
        """Give a command and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end_input(self) -> None:
        """Let the program come to its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, timeout: float) -> int:
        """Return the exit status, when the process has ended by itself."""
        return self._process.wait(timeout)

    def close(self) -> None:
        """Kill the process if it still runs."""
        end_process(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


@pytest.fixture
def write_only(fleet: Fleet) -> Iterator[WriteOnlyProcess]:
    """A write-only process on the Redis of the fleet."""
    process = WriteOnlyProcess(fleet)
    yield process
    process.close()


@pytest.mark.faults(
    UNSERIALISABLE,
    stock='with no local client: no error, "cannot publish to redis"',
    because="the caller saw no error",
)
@both_modes
def test_emit_of_data_that_is_not_json_raises_a_type_error(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """An event holds a set, and no client of this process is there to receive it."""
    witness = sio_client(fleet.a)
    wait_until_delivering(fleet.b, witness)
    with_clients = fleet.a.post("/emit-unserialisable")
    assert with_clients["error"] == "TypeError"
    without_clients = fleet.a.post("/emit-unserialisable", namespace="/nobody")
    measured("error", without_clients["error"])
    assert without_clients["error"] == "TypeError", "the caller saw no error"
    wait_until_delivering(fleet.b, witness)
    assert not witness.events("unserialisable")


@pytest.mark.faults(
    UNSERIALISABLE,
    stock="this process's own listener is torn down (300 of 600 events lost after ten)",
    because=r"[1-9]\d* of \d+ incoming events lost",
)
@both_modes
def test_emit_of_data_that_is_not_json_does_not_disturb_the_listener(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """Ten such emits, while 100 events per second come in from the other process."""
    witness = sio_client(fleet.a)
    wait_until_delivering(fleet.b, witness)
    with Flow(fleet.b, witness, rate=100) as flow:
        began_at = time.monotonic()
        for number in range(10):
            fleet.a.post("/emit-unserialisable", namespace="/nobody")
            sleep_until(began_at + 0.2 * (number + 1))
        sleep_until(began_at + 3.0)
        emitted, _ = flow.stop()
    lost = flow.wait_for_all(emitted, timeout=2)
    measured("lost", f"{lost} of {emitted}")
    assert lost == 0, f"{lost} of {emitted} incoming events lost"


@pytest.mark.faults(
    UNSERIALISABLE,
    stock="write-only process: no error, event lost",
    because="the caller saw no error",
)
def test_emit_of_data_that_is_not_json_raises_in_a_write_only_process(
    fleet: Fleet, sio_client: Connect, write_only: WriteOnlyProcess, measured: Measured
) -> None:
    """A process without an application emits a set."""
    witness = sio_client(fleet.a)
    wait_until_delivering(fleet.b, witness)
    answer = write_only.tell("emit-unserialisable")
    measured("error", answer["error"])
    assert answer["error"] == "TypeError", "the caller saw no error"
    write_only.tell("emit", event="from-worker", count=1)
    witness.wait_for("from-worker")


@pytest.mark.faults(
    OVERFLOW, stock="no error, nothing is counted", because="0 lost events are accounted for"
)
@pytest.mark.parametrize("overflow", ["raise", "drop_oldest"])
def test_every_event_that_the_outbox_cannot_hold_is_accounted_for(
    overflow: str, make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """An outbox for 10 messages gets 100 while Redis is down."""
    fleet = make_fleet(
        config={
            "SOCKETIO_GUARD_OUTBOX_MAX_MESSAGES": 10,
            "SOCKETIO_GUARD_OUTBOX_OVERFLOW": overflow,
        }
    )
    witness, event = sio_client(fleet.a), f"overflow-{overflow}"
    wait_until_delivering(fleet.b, witness)
    dropped_before = counter(fleet.b, "outbox_dropped")
    fleet.redis.kill()
    errors = fleet.b.post("/emit", event=event, count=100)["errors"]
    dropped = counter(fleet.b, "outbox_dropped") - dropped_before
    fleet.redis.start()
    with contextlib.suppress(AssertionError):
        witness.wait_for(event, count=100 - dropped, timeout=5)
    wait_until_delivering(fleet.b, witness)
    numbers = [item.args[0]["number"] for item in witness.events(event)]
    measured("arrived", len(numbers))
    measured("counted", dropped)
    measured("errors", len(errors))
    assert numbers == sorted(set(numbers))
    assert dropped > 0, f"{dropped} lost events are accounted for"
    assert len(numbers) + dropped == 100
    assert len(numbers) >= 10
    if overflow == "raise":
        assert {error["error"] for error in errors} == {"OutboxFull"}
        assert {error["number"] for error in errors} == set(range(100)) - set(numbers)
    else:
        assert not errors
        assert numbers[-10:] == list(range(90, 100))


@pytest.mark.faults(WRITE_ONLY, stock="the events are lost", because=r"[1-9]\d* of 20 events lost")
@pytest.mark.parametrize("ending", ["flush", "exit"])
def test_write_only_process_sends_what_it_emitted_while_redis_was_down(
    ending: str,
    fleet: Fleet,
    sio_client: Connect,
    write_only: WriteOnlyProcess,
    measured: Measured,
) -> None:
    """A process without an application emits while Redis is down, and flushes or ends."""
    witness = sio_client(fleet.a)
    event = f"from-worker-{ending}"
    wait_until_delivering(fleet.b, witness)
    write_only.tell("emit", event=event, count=10)
    witness.wait_for(event, count=10)
    fleet.redis.kill()
    emitted_at = time.monotonic()
    write_only.tell("emit", event=event, count=20)
    measured("emits took", time.monotonic() - emitted_at)
    if ending == "exit":
        write_only.end_input()
    up_at = fleet.redis.start()
    if ending == "flush":
        flushed = write_only.tell("flush", timeout=10)
    else:
        assert write_only.wait(10) == 0
        flushed = True
    measured("flushed after", time.monotonic() - up_at)
    with contextlib.suppress(AssertionError):
        witness.wait_for(event, count=30, timeout=3)
    numbers = [item.args[0]["number"] for item in witness.events(event)]
    lost = 30 - len(set(numbers))
    measured("lost", lost)
    assert lost == 0, f"{lost} of 20 events lost"
    assert numbers == list(range(30))
    assert flushed is True

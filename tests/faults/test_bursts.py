"""Much that is emitted in one go to clients that read: all of it arrives, as without the guard."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.burst_app import BURST_APP
from tests.support.javascript import CLIENT_MODULE, require_client
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet

_PATIENCE = 40  # seconds
_CLIENT = Path(__file__).with_name("burst_client.mjs")

SMALL = (3000, 20)
LARGE = (30, 500_000)
BOTH_MODES = pytest.mark.parametrize("async_mode", ["gevent", "threading"], indirect=False)
BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["polling", "websocket"])


def ask_for(
    fleet: Fleet, transport: str, where: str, burst: tuple[int, int], *, clients: int = 1
) -> list[dict[str, Any]]:
    """Have events emitted by the first process; return what clients of the last received."""
    require_client()
    count, size = burst
    plan = {
        "port": fleet.servers[-1].port,
        "emitter": fleet.a.port,
        "clients": clients,
        "where": where,
        "count": count,
        "size": size,
        "patience": _PATIENCE,
    }
    command = ["node", str(_CLIENT), str(CLIENT_MODULE), transport, json.dumps(plan)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=_PATIENCE + 20, cwd=PROJECT_ROOT
    )
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def everything(burst: tuple[int, int], *, clients: int = 1) -> list[dict[str, Any]]:
    """Return what clients receive that receive everything, in order."""
    return [{"received": burst[0], "isOrdered": True, "ended": None}] * clients


@pytest.fixture
def single(make_fleet: Callable[..., Fleet]) -> Fleet:
    """One process without a message queue."""
    return make_fleet(app=BURST_APP, processes=1, has_queue=False)


@pytest.mark.sampled(4)
@BOTH_MODES
@BOTH_TRANSPORTS
@pytest.mark.parametrize("burst", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("where", ["connect", "event", "task"])
def test_a_client_that_reads_gets_all_that_is_emitted_in_one_go(
    single: Fleet, transport: str, where: str, burst: tuple[int, int]
) -> None:
    """Much in one turn does not make a client slow."""
    assert ask_for(single, transport, where, burst) == everything(burst)


@pytest.mark.sampled(2)
@BOTH_MODES
@BOTH_TRANSPORTS
def test_everybody_in_a_room_gets_a_burst_of_broadcasts(single: Fleet, transport: str) -> None:
    """Broadcasts pass the queues of their recipients, until these do not keep up."""
    burst = (45, 200_000)  # more than what may wait for each of them
    assert ask_for(single, transport, "task", burst, clients=10) == everything(burst, clients=10)


@pytest.mark.sampled(2)
@BOTH_TRANSPORTS
@pytest.mark.parametrize("burst", [SMALL, LARGE], ids=["small", "large"])
def test_a_client_that_reads_gets_a_burst_of_another_process(
    make_fleet: Callable[..., Fleet], transport: str, burst: tuple[int, int]
) -> None:
    """The listener waits for no client, and so passes more than an emitter that can wait."""
    fleet = make_fleet(app=BURST_APP)
    assert ask_for(fleet, transport, "event", burst) == everything(burst)

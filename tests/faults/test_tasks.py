"""Background tasks that raise."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.fleet import Fleet, health_details, runs
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    Measured = Callable[[str, object], None]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.parametrize("async_mode", ["gevent", "threading"]),
]

TASK_RAISES = "background task raises"


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """One process without a message queue."""
    return make_fleet(processes=1, has_queue=False)


@pytest.mark.faults(TASK_RAISES, stock="not restarted", because="the task was run 1 time")
def test_task_that_raises_is_restarted_and_visible_in_health(
    fleet: Fleet, measured: Measured
) -> None:
    """A background task raises twice, and would work the third time."""
    began_at = time.monotonic()
    fleet.a.post("/task", name="restarted")
    wait_until(lambda: runs(fleet.a, "task:restarted") >= 1)
    try:
        wait_until(lambda: runs(fleet.a, "task:restarted") == 3, timeout=5)
    except AssertionError:
        times = runs(fleet.a, "task:restarted")
        raise AssertionError(f"the task was run {times} time(s) and not again") from None
    measured("running again after", time.monotonic() - began_at)
    assert "restarted" in json.dumps(health_details(fleet.a)["checks"])


@pytest.mark.faults(TASK_RAISES, stock="not logged", because="0 log records")
def test_task_that_raises_is_logged_each_time(fleet: Fleet, measured: Measured) -> None:
    """A background task raises twice, and each time the log must hold the traceback."""
    since = time.time()
    fleet.a.post("/task", name="logged")

    def find() -> int:
        return len(
            fleet.a.records(
                since=since, matching=lambda record: "the task failed" in record.traceback
            )
        )

    try:
        wait_until(lambda: find() == 2, timeout=5)
    except AssertionError:
        raise AssertionError(f"{find()} log records with the traceback") from None
    finally:
        measured("log records", find())

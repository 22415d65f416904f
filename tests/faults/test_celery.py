"""A real Celery worker: what it sends is answered, and what it delivers arrives."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.delivery_app import DELIVERY_APP, IN_REDIS
from tests.support import wait_until
from tests.support.processes import end_process, start_process
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import RawClient, SocketIOClient

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """Two processes that share a store."""
    return make_fleet(app=DELIVERY_APP, processes=2, config={IN_REDIS: True})


class Worker:
    """A Celery worker with one child, and the way to its tasks."""

    def __init__(self, fleet: Fleet) -> None:
        from celery import Celery

        self._celery = Celery(broker=fleet.redis.url, backend=fleet.redis.url)
        env = {
            **os.environ,
            "REDIS_URL": fleet.redis.url,
            "SOCKETIO_GUARD_DELIVERY_STORE": fleet.redis.url,
            "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [
            *(sys.executable, "-m", "celery", "-A", "tests.faults.celery_app", "worker"),
            *("--concurrency", "1", "--pool", "prefork", "--loglevel", "WARNING"),
            *("--without-gossip", "--without-mingle"),
        ]
        self._process = start_process(command, env=env)

    def run(self, name: str, *args: Any) -> Any:
        """Have a task run; return its result."""
        return self._celery.send_task(name, args).get(timeout=40)

    def close(self) -> None:
        """End it."""
        self._celery.close()
        end_process(self._process)


@pytest.fixture
def worker(fleet: Fleet) -> Iterator[Worker]:
    """A worker of the fleet."""
    running = Worker(fleet)
    yield running
    running.close()


def test_a_celery_worker_delivers_and_is_answered(
    fleet: Fleet,
    worker: Worker,
    sio_client: Callable[..., SocketIOClient],
    raw_client: Callable[..., RawClient],
) -> None:
    """Its children are forked from a parent that has loaded the guard."""
    here = sio_client(fleet.a, query="identity=ann&room=hall")
    there = sio_client(fleet.b, query="room=hall", answer=lambda *_: "there")
    raw_client(fleet.b, query="room=hall")  # never answers
    gone = sio_client(fleet.b)
    sid = gone.sid
    gone.close()
    assert worker.run("deliver", "ann", {"a": 1}, 10.0)[1] == "delivered"
    assert [item.args[0] for item in here.events("news")] == [{"a": 1}]
    assert worker.run("ask", there.sid, 10.0) == "there"
    assert worker.run("ask_with_callback", here.sid, 10.0) == ["ok"]
    assert worker.run("ask", sid, 30.0) == "gone"
    assert worker.run("ask_all", "hall", 2.0) == [["ok", "there"], 1, 0]
    id, state = worker.run("deliver", "nobody yet", 2, 0.2)
    assert state == "pending"
    late = sio_client(fleet.a, query="identity=nobody%20yet")
    late.wait_for("news")
    wait_until(lambda: fleet.b.post("/receipts", ids=[id])[0][0] == "delivered")

"""What the documentation tells an administrator to grant in Redis is enough."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from socketio import RedisManager

from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.redis_store import RedisStore
from flask_socketio_guard.delivery.steps import (
    Acknowledge,
    DeadLetters,
    Expire,
    FailAll,
    Find,
    Finish,
    Join,
    Leave,
    Mark,
    Put,
    Waiting,
)
from flask_socketio_guard.queue.transport import Probe, QueueMessage
from flask_socketio_guard.states import DeliveryState
from flask_socketio_guard.upstream.redis.transport import RedisTransport
from tests.support import wait_until
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from tests.support import RedisServer

_TEXT = (PROJECT_ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
QUEUE, STORE = (line.split() for line in re.findall(r"^user (app .*)$", _TEXT, re.MULTILINE))


def refused(redis_server: RedisServer) -> list[bytes]:
    """Return what was refused, but for CLIENT SETINFO: the driver does without."""
    entries = redis_server.command("ACL", "LOG")
    objects = [
        entry[b"object"] if isinstance(entry, dict) else entry[entry.index(b"object") + 1]
        for entry in entries  # lists of an older driver
    ]
    return [each for each in objects if each != b"client"]


@pytest.fixture
def url(redis_server: RedisServer, request: pytest.FixtureRequest) -> str:
    """The address of Redis for a user with the rights of the test."""
    name, *rules = request.param
    redis_server.command("ACL", "SETUSER", name, "reset", *rules)
    return f"redis://{name}:password@127.0.0.1:{redis_server.port}/0"


@pytest.mark.parametrize("url", [QUEUE], ids=["queue"], indirect=True)
def test_the_rights_for_the_queue_are_enough(
    url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    transport = RedisTransport(RedisManager(url, channel="flask-socketio"), answer_timeout=2.0)
    assert transport.check() is None
    subscription, publisher = transport.subscribe(), transport.publisher(lambda: False)
    try:
        assert publisher.publish([QueueMessage(1, b"{}")], 7) == 1
        found: list[object] = []
        wait_until(lambda: found.extend(subscription.read(0.1)) or len(found) == 2)
        assert Probe(7) in found
        assert transport.is_probing
    finally:
        publisher.close()
        subscription.close()
    assert refused(redis_server) == []
    assert caplog.records == []


@pytest.mark.parametrize("url", [STORE], ids=["store"], indirect=True)
def test_the_rights_for_messages_that_must_arrive_are_enough(
    url: str, redis_server: RedisServer
) -> None:
    store = RedisStore(
        url,
        prefix="socketio-guard:flask-socketio:",
        host="here",
        timeout=2.0,
        lease=5.0,
        max_messages=10,
        max_size=10_000,
        retention=60.0,
        max_ended_size=10**6,
        max_dead_letters=10,
        max_dead_size=10**6,
        dead_retention=60.0,
    )
    everything = [
        Join("/,ann", "device"),
        *(Put(Delivery(f"{n:032x}", "ann", "news", "[]", 60.0)) for n in range(6)),
        Mark(f"{0:032x}", 1, True),
        Acknowledge(f"{0:032x}", "device", 1),
        Finish(f"{1:032x}", DeliveryState.REFUSED),
        Finish(f"{2:032x}", DeliveryState.CANCELLED),
        Leave("/,ann", "device"),
        Waiting("/,ann", 0, 10, 10**6),
        Expire(10),
        FailAll("/,ann", DeliveryState.GONE, 10),
        DeadLetters(10),
    ]
    try:
        assert store.lead()
        assert store.lead()  # again: it has the lock
        store.changes(0.1)
        assert store.heartbeat()
        store.apply(everything)
        assert store.changes(0.1) is not None
        assert list(store.reap_dead_processes()) == []
        assert store.do(Find(f"{0:032x}")).state is DeliveryState.DELIVERED
    finally:
        store.close()
    assert refused(redis_server) == []

"""Every kind of Redis that the message queue takes; of these the store refuses a cluster."""

from __future__ import annotations

import contextlib
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import redis
from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.redis_client import Driver
from flask_socketio_guard.delivery.steps import Put, Waiting
from flask_socketio_guard.errors import ConfigError, DeliveryStoreError
from tests.support import RedisServer, Sentinel, free_port, unit_support, wait_until
from tests.support.cases import in_turn
from tests.test_delivery_redis import make_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

nothing_left_behind = unit_support.nothing_left_behind

PASSWORD = "s3cret-passw0rd"


def store_and_hear(url: str, **options: Any) -> None:
    """Do with a store what a process does, over each of its connections."""
    store = make_store(url, "here", **options)
    try:
        assert store.lead()
        store.changes(0.1)
        stored = store.do(Put(Delivery("0" * 32, "ann", "news", "[]", 60.0))).delivery
        assert stored is not None
        assert store.changes(1.0) is not None
        assert len(store.do(Waiting("/,ann", 0, 10, 10**6)).deliveries) == 1
    finally:
        store.close()


@pytest.fixture
def empty(redis_server: RedisServer) -> RedisServer:
    """This module's Redis, with nothing in it."""
    redis_server.command("FLUSHALL")
    return redis_server


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_messages_are_kept_where_the_url_says(scheme: str, empty: RedisServer) -> None:
    store_and_hear(empty.url.replace("redis", scheme, 1))


def test_messages_are_kept_behind_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(options={"unixsocket": str(path)}):
        store_and_hear(f"unix://{path}")


@pytest.mark.parametrize("scheme", ["redis+sentinel", "valkey+sentinel"])
def test_messages_are_kept_where_sentinel_says(scheme: str, empty: RedisServer) -> None:
    """The service may be left out; then it is the channel, as it is for the message queue."""
    with Sentinel(empty) as sentinel:
        wait_until(lambda: sentinel.command("SENTINEL", "CKQUORUM", "main"))
        store_and_hear(sentinel.url(scheme, service=""), service="main")
        empty.command("FLUSHALL")
        store_and_hear(sentinel.url(scheme), service="other")


def test_messages_are_found_again_after_a_failover() -> None:
    """The master dies while a process uses the store; Sentinel makes its replica the master."""
    with RedisServer() as master, RedisServer() as replica:
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        wait_until(lambda: replica.command("ROLE")[3] == b"connected", timeout=20)
        with Sentinel(master) as sentinel:
            wait_until(lambda: sentinel.command("SENTINEL", "CKQUORUM", "main"))
            store = make_store(sentinel.url(), "here")
            try:
                stored = Delivery("0" * 32, "ann", "news", "[]", 60.0)
                store.do(Put(stored))
                wait_until(lambda: replica.command("DBSIZE") == master.command("DBSIZE"))
                wait_until(lambda: sentinel.command("SENTINEL", "REPLICAS", "main"), timeout=20)
                master.kill()

                def is_master() -> bool:
                    with contextlib.suppress(
                        redis.ConnectionError
                    ):  # a promoted replica closes its connections
                        return replica.command("ROLE")[0] == b"master"
                    return False

                wait_until(is_master, timeout=20, message="the replica was not made the master")

                def is_kept() -> bool:
                    with contextlib.suppress(DeliveryStoreError, redis.ConnectionError):
                        store.do(Put(Delivery("1" * 32, "ann", "news", "[]", 60.0)))
                        return replica.command("EXISTS", "test:m:" + "1" * 32) == 1
                    return False

                wait_until(is_kept, timeout=20, message="the new master is not used")
                assert len(store.do(Waiting("/,ann", 0, 10, 10**6)).deliveries) == 2
            finally:
                store.close()


# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    """A Redis Cluster of one node, which has all slots."""
    with RedisServer(options={"cluster-enabled": "yes"}) as server:
        server.command("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: "cluster_state:ok" in str(server.command("CLUSTER", "INFO")))
        yield server


def guarded(**settings: Any) -> SocketIOGuard:
    app = Flask("app")
    socketio = SocketIO(app, async_mode="threading")
    return SocketIOGuard(app, socketio, **settings)


def test_a_cluster_is_refused_at_start(nothing_left_behind: None, cluster: RedisServer) -> None:
    with pytest.raises(ConfigError, match="is a Redis Cluster") as caught:
        guarded(delivery_store=cluster.url)
    assert "redis+sentinel://" in str(caught.value)
    socketio = SocketIO(message_queue=cluster.url)  # for which it is good
    with pytest.raises(ConfigError, match="is a Redis Cluster"):
        SocketIOGuard(socketio=socketio, delivery_store=cluster.url)


def test_a_cluster_that_was_away_at_start_is_refused_later(cluster: RedisServer) -> None:
    store = make_store(cluster.url, "here")
    try:
        with pytest.raises(DeliveryStoreError, match="is a Redis Cluster"):
            store.do(Put(Delivery("0" * 32, "ann", "news", "[]", 60.0)))
    finally:
        store.close()


def test_a_store_that_is_away_does_not_hinder_the_start(nothing_left_behind: None) -> None:
    guarded(delivery_store=f"redis://127.0.0.1:{free_port()}/0")


def test_a_process_without_the_right_to_ask_for_a_cluster_starts(
    nothing_left_behind: None, redis_server: RedisServer
) -> None:
    redis_server.command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "+@all", "-info", "~*")
    guarded(delivery_store=f"redis://app:{PASSWORD}@127.0.0.1:{redis_server.port}/0")


# What is wrong with a URL


@in_turn(
    "url",
    [
        f"redis://:{PASSWORD}@h:not-a-port/0",
        f"redis+sentinel://:{PASSWORD}@h-without-a-port/0/main",
        f"redis+sentinel://:{PASSWORD}@h:1/not-a-database/main",
        f"redis://:{PASSWORD}/unescaped@h:6379/0",
        f"redis://:[{PASSWORD}@h:6379/0",
        f"redis+sentinel://:[{PASSWORD}@h:26379/0/main",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_never_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Driver(url, service="main", timeout=1.0)
    assert str(caught.value) == "SOCKETIO_GUARD_DELIVERY_STORE is not a valid Redis or Valkey URL"
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(ConfigError, match=r"begins with valkey:// .*: pip install valkey"):
        Driver("valkey://h:1/0", service="main", timeout=1.0)

"""Ends whose answers were lost, and those of processes that have died, on a real Redis."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.delivery import redis_store
from flask_socketio_guard.delivery.steps import Finish, Put
from flask_socketio_guard.errors import DeliveryStoreError
from flask_socketio_guard.states import DeliveryState
from tests.support import TcpProxy, wait_until
from tests.test_delivery_redis import LEASE, make_store, message, put
from tests.test_delivery_redis import stores as stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_socketio_guard.delivery.redis_store import RedisStore
    from tests.support import RedisServer

REFUSED = DeliveryState.REFUSED


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[TcpProxy]:
    with TcpProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def far(stores: Callable[[str], RedisStore], proxy: TcpProxy) -> Iterator[RedisStore]:
    """Return the store of a process that may not get its answers."""
    store = make_store(f"redis://127.0.0.1:{proxy.port}/0", "far", timeout=1.0)
    yield store
    store.close()


def refuse(store: RedisStore, *numbers: int) -> None:
    """End messages."""
    store.apply([Finish(message(number).id, REFUSED) for number in numbers])


def refuse_without_an_answer(store: RedisStore, proxy: TcpProxy, *numbers: int) -> None:
    """End messages; the answer is lost."""
    proxy.swallow_answers(b"\r\nfinish\r\n")
    with pytest.raises(DeliveryStoreError):
        refuse(store, *numbers)
    proxy.swallow_answers(None)


def own_ends(store: RedisStore, calls: int = 4) -> list[tuple[str, DeliveryState, list[Any]]]:
    """Return what the feed tells of the ends of the process itself."""
    found = [store.changes(0.02) for _ in range(calls)]
    ended = [each for changes in found if changes for each in changes.own_ended]
    return [(each.id, each.state, each.arguments) for each in ended]


def told(*numbers: int) -> list[tuple[str, DeliveryState, list[Any]]]:
    return [(message(number).id, REFUSED, [number]) for number in numbers]


def wait_until_dead(store: RedisStore, host: str) -> None:
    wait_until(lambda: not store._redis.exists(f"test:alive:{host}"), timeout=4 * LEASE + 10.0)


def reaped(store: RedisStore) -> list[tuple[str, DeliveryState, list[Any]]]:
    return [(each.id, each.state, each.arguments) for each in store.reap_dead_processes()]


def test_an_end_whose_answer_was_lost_is_told_once(far: RedisStore, proxy: TcpProxy) -> None:
    """It comes with the arguments of the dead letter; those that were answered are not told."""
    put(far, 1, 2, 3)
    far.changes(0.02)
    refuse(far, 1)
    refuse_without_an_answer(far, proxy, 2)
    refuse(far, 3)
    assert own_ends(far) == told(2)
    assert own_ends(far) == []


def test_an_end_is_told_that_was_lost_before_the_feed_was_followed(
    far: RedisStore, proxy: TcpProxy, stores: Callable[[str], RedisStore]
) -> None:
    put(stores("other"), 1)
    refuse_without_an_answer(far, proxy, 1)
    assert far.changes(0.02) is None, "a new follower has missed everything before"
    assert own_ends(far) == told(1)


def test_an_end_whose_answer_was_lost_is_told_after_changes_were_missed(
    far: RedisStore, proxy: TcpProxy, redis_server: RedisServer
) -> None:
    put(far, 1, 2)
    far.changes(0.02)
    put(far, 3)
    refuse_without_an_answer(far, proxy, 1)
    redis_server.command("XTRIM", "test:changes", "MAXLEN", 1)
    assert far.changes(0.02) is None
    assert own_ends(far) == told(1)


def test_an_end_is_told_although_its_body_could_not_be_read_at_first(
    far: RedisStore, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(far, 1)
    far.changes(0.02)
    refuse_without_an_answer(far, proxy, 1)
    with monkeypatch.context() as patched:
        patched.setattr(far._redis, "mget", _raise_os_error)
        with pytest.raises(DeliveryStoreError):
            own_ends(far)
    assert own_ends(far) == told(1)


def _raise_os_error(*_: object) -> None:
    raise OSError("away")


def test_own_entries_that_were_answered_are_not_decoded(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("one")
    put(store, 1)
    store.changes(0.02)
    monkeypatch.setattr(redis_store, "read_change", _raise_os_error)
    refuse(store, 1)
    assert own_ends(store) == []
    assert not store._own_calls._answered, "nothing is kept"


def test_a_call_that_still_runs_is_waited_for(stores: Callable[[str], RedisStore]) -> None:
    store = stores("one")
    put(store, 1)
    store.changes(0.02)
    serial = store._own_calls.begin()
    count: list[int] = []
    store._apply([Finish(message(1).id, REFUSED)], count)
    assert own_ends(store) == []
    store._own_calls.end(serial, count)
    assert own_ends(store) == []


def test_ends_of_a_dead_process_are_told_from_where_it_stopped(
    stores: Callable[[str], RedisStore],
) -> None:
    """Those it has told are not, nor those of others."""
    one, two = stores("one"), stores("two")
    put(one, 1, 2, 3, 4)
    one.changes(0.02)
    refuse(one, 1)
    one.told()
    own_ends(one)
    one.heartbeat()
    refuse(two, 3)
    refuse(one, 2, 4)
    wait_until_dead(two, "one")
    two.heartbeat()
    assert reaped(two) == told(2, 4)
    assert reaped(two) == []
    assert not two._redis.hexists("test:told", "one")
    assert two._redis.hexists("test:told", "two")


def test_ends_that_are_being_told_do_not_count_as_told(
    stores: Callable[[str], RedisStore],
) -> None:
    """The process dies between the answer and its hooks."""
    one, two = stores("one"), stores("two")
    put(one, 1)
    one.told()
    one.changes(0.02)
    refuse(one, 1)
    own_ends(one)
    one.heartbeat()
    wait_until_dead(two, "one")
    assert reaped(two) == told(1)


def test_lost_ends_of_a_dead_process_are_told(
    far: RedisStore, proxy: TcpProxy, stores: Callable[[str], RedisStore]
) -> None:
    """It has read the entry, but not told it."""
    two = stores("two")
    put(far, 1)
    far.told()
    far.changes(0.02)
    refuse_without_an_answer(far, proxy, 1)
    changes = far.changes(0.5)
    assert changes is not None
    assert changes.own_ended
    far.heartbeat()
    wait_until_dead(two, "far")
    assert reaped(two) == told(1)


def test_a_leader_that_dies_while_it_tells_leaves_it_to_the_next(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1, 2)
    one.heartbeat()
    refuse(one, 1, 2)
    wait_until_dead(two, "one")
    telling = iter(two.reap_dead_processes())
    assert next(telling).id == message(1).id
    telling.close()  # type: ignore[attr-defined]
    assert reaped(two) == told(1, 2)


def test_ends_on_several_pages_are_told(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "_PAGE", 2)
    one, two = stores("one"), stores("two")
    put(one, *range(1, 6))
    one.heartbeat()
    for number in range(1, 6):
        refuse(one, number)
    wait_until_dead(two, "one")
    assert reaped(two) == told(*range(1, 6))


@pytest.mark.parametrize(("kept", "trimmed"), [(1, 2), (0, 3), (3, 0)])
def test_entries_that_were_trimmed_before_they_were_told_are_counted_in_the_log(
    stores: Callable[[str], RedisStore],
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
    kept: int,
    trimmed: int,
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1, 2, 3)
    one.told()
    one.changes(0.02)
    own_ends(one)
    one.heartbeat()
    for number in (1, 2, 3):
        refuse(one, number)
    redis_server.command("XTRIM", "test:changes", "MAXLEN", kept)
    wait_until_dead(two, "one")
    assert reaped(two) == told(*range(4 - kept, 4))
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "trimmed" in line] == (
        [
            f"{trimmed} entries of the change feed were trimmed before the ends in them could be "
            "told for a process that has died"
        ]
        if trimmed
        else []
    )


def test_a_process_that_stops_cleanly_leaves_nothing_to_tell(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    store.heartbeat()
    put(store, 1)
    refuse(store, 1)
    store.told()
    store.close()
    assert redis_server.command("HGETALL", "test:told") in ([], {})


def test_a_process_that_stops_with_ends_to_tell_leaves_them_to_others(
    far: RedisStore, proxy: TcpProxy, stores: Callable[[str], RedisStore]
) -> None:
    two = stores("two")
    put(far, 1)
    far.told()
    far.changes(0.02)
    far.heartbeat()
    refuse_without_an_answer(far, proxy, 1)
    far.close()
    wait_until_dead(two, "far")
    assert reaped(two) == told(1)


def test_a_process_that_was_taken_for_dead_notes_again_what_it_has_told(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    one.heartbeat()
    wait_until_dead(two, "one")
    reaped(two)
    assert not two._redis.hexists("test:told", "one")
    one.heartbeat()
    assert two._redis.hexists("test:told", "one")


def test_ends_of_a_process_that_was_killed_after_the_step_are_told(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    two = stores("two")
    two.apply([Put(message(number)._replace(ttl=0.05)) for number in (1, 2)])
    program = (
        "import os, signal, time\n"
        "from flask_socketio_guard.delivery.steps import Expire\n"
        "from tests.test_delivery_redis import make_store\n"
        f"store = make_store({redis_server.url!r}, 'one')\n"
        "store.heartbeat()\n"
        "time.sleep(0.1)\n"
        "assert len(store.do(Expire(10))) == 2\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert killed.returncode == -9
    wait_until_dead(two, "one")
    assert [(id, arguments) for id, _, arguments in reaped(two)] == [
        (message(number).id, [number]) for number in (1, 2)
    ]


def test_an_idle_heartbeat_writes_nothing_but_itself(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    store.heartbeat()
    before = redis_server.command("INFO", "commandstats")
    for _ in range(3):
        store.heartbeat()
    after = redis_server.command("INFO", "commandstats")
    assert _calls(after, "hset") == _calls(before, "hset")


def _calls(info: Any, name: str) -> int:
    return int(info[f"cmdstat_{name}"]["calls"])

"""The delivery store in Redis: what its model in memory does not cover."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest

from flask_socketio_guard.delivery import redis_store
from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.redis_store import RedisStore
from flask_socketio_guard.delivery.steps import (
    Acknowledge,
    DeadLetters,
    End,
    Expire,
    FailAll,
    Find,
    Finish,
    Join,
    Leave,
    Mark,
    Put,
    Reap,
    Stored,
    Waiting,
)
from flask_socketio_guard.delivery.store import Changes, Usage
from flask_socketio_guard.errors import DeliveryFormatError, DeliveryStoreError
from flask_socketio_guard.states import DeliveryState
from tests.support import TcpProxy, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RedisServer

LEASE = 1.5
NOTHING = Changes([], [])
STORED = Changes(["/,ann"], [])


def make_store(url: str, host: str, **options: Any) -> RedisStore:
    settings: dict[str, Any] = {
        "prefix": "test:",
        "timeout": 2.0,
        "lease": LEASE,
        "max_messages": 100,
        "max_size": 1_000_000,
        "retention": 100.0,
        "max_ended_size": 1_000_000,
        "max_dead_letters": 100,
        "max_dead_size": 1_000_000,
        "dead_retention": 1000.0,
    }
    return RedisStore(url, host=host, **(settings | options))


@pytest.fixture
def stores(redis_server: RedisServer) -> Iterator[Callable[[str], RedisStore]]:
    """Return a function that makes the store of a process."""
    redis_server.command("FLUSHALL")
    made: list[RedisStore] = []

    def make(host: str) -> RedisStore:
        made.append(make_store(redis_server.url, host))
        return made[-1]

    yield make
    for store in made:
        store.close()


def message(number: int, **options: Any) -> Delivery:
    return Delivery(f"{number:032x}", "ann", "news", f"[{number}]", 60.0, **options)


def put(store: RedisStore, *numbers: int, **options: Any) -> None:
    store.apply([Put(message(number, **options)) for number in numbers])


def waiting(store: RedisStore) -> list[str]:
    return [each.body for each in store.do(Waiting("/,ann", 0, 10, 10**6)).deliveries]


def test_processes_share_messages(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1, 2)
    assert waiting(two) == ["[1]", "[2]"]
    assert two.do(Finish(message(1).id, DeliveryState.CANCELLED)).is_new
    assert not one.do(Finish(message(1).id, DeliveryState.CANCELLED)).is_new


def test_each_process_hears_what_the_others_do(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    assert one.changes(0.1) is None, "a new follower has missed everything before"
    assert two.changes(0.1) is None
    put(one, 1)
    one.do(Acknowledge(message(1).id, "phone", 1))
    assert one.changes(0.1) == NOTHING
    changes = two.changes(5.0)
    assert changes is not None
    (ended,) = changes.ended
    assert changes.stored == ["/,ann"]
    assert (ended.address, ended.event) == ("/,ann", "news")
    assert (ended.state, ended.attempts) == (DeliveryState.DELIVERED, 1)
    assert two.changes(0.01) == NOTHING


def test_missed_changes_are_noticed(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    two.changes(0.1)
    for number in (1, 2, 3):
        put(one, number)
    redis_server.command("XTRIM", "test:changes", "MAXLEN", 1)
    assert two.changes(1.0) is None
    put(one, 4)
    assert two.changes(1.0) == STORED


def test_one_process_leads_and_another_takes_over_when_its_lease_ends(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    assert one.lead()
    assert not two.lead()
    assert one.lead(), "it keeps the lease for as long as it asks"
    wait_until(two.lead, timeout=20.0, message="nobody has taken over")
    assert not one.lead()
    two.close()
    assert one.lead(), "a process that closes its store hands over at once"


def test_devices_of_a_dead_process_do_not_count(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    for store, device in ((one, "laptop"), (two, "phone")):
        store.heartbeat()
        store.do(Join("/,ann", device))
    put(one, 1, requires_all=True)
    assert two.do(Acknowledge(message(1).id, "phone", 1)) is None
    ended: list[Delivery] = []

    def has_ended() -> bool:
        two.heartbeat()
        ended.extend(two.reap_dead_processes())
        return bool(ended)

    wait_until(has_ended, timeout=20.0)
    assert [(each.id, each.state) for each in ended] == [(message(1).id, DeliveryState.DELIVERED)]


def test_a_jump_of_the_clock_expires_nothing(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour forward, as it looks to the process that leads, and back again."""
    store = stores("one")
    put(store, 1)
    store.lead()
    time_of_redis = store._redis.time
    for jump in (3600, 0):
        monkeypatch.setattr(
            store._redis,
            "time",
            lambda jump=jump: (time_of_redis()[0] + jump, time_of_redis()[1]),
        )
        store.lead()
        jumped = float(store._redis.get("test:jumped"))
        assert jumped == pytest.approx(jump, abs=1.5)


def test_the_leader_knows_by_its_own_clock_what_has_expired(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("one")
    assert not store.has_expired()
    store.do(Put(message(1)._replace(ttl=50.0)))
    assert store.has_expired(), "as long as it does not know the clock of Redis"
    store.lead()
    assert not store.has_expired()
    now = redis_store.clock
    for seconds, has_expired in ((49.5, False), (51.0, True)):
        monkeypatch.setattr(redis_store, "clock", lambda seconds=seconds: now() + seconds)
        assert store.has_expired() is has_expired
    monkeypatch.setattr(redis_store, "clock", now)
    time_of_redis = store._redis.time
    monkeypatch.setattr(
        store._redis, "time", lambda: (time_of_redis()[0] + 3600, time_of_redis()[1])
    )
    store.lead()
    assert not store.has_expired(), "a jump of the clock of Redis expires nothing"


def test_the_leader_does_not_reap_itself(stores: Callable[[str], RedisStore]) -> None:
    one = stores("one")
    one.do(Join("/,ann", "phone"))
    assert list(one.reap_dead_processes()) == []
    assert one._redis.scard("test:devices:/,ann") == 1


def test_an_idle_feed_looks_seldom_whether_redis_was_emptied(
    stores: Callable[[str], RedisStore],
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1)
    assert two.changes(0.01) is None
    assert two.changes(0.01) == NOTHING
    redis_server.command("FLUSHALL")
    assert two.changes(0.01) == NOTHING
    now = redis_store.clock
    monkeypatch.setattr(redis_store, "clock", lambda: now() + redis_store._CHECK_INTERVAL)
    assert two.changes(0.01) is None


def test_messages_of_another_version_are_left_as_they_are(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    redis_server.command("SET", "test:version", "99")
    store = stores("one")
    with pytest.raises(DeliveryFormatError, match="another version"):
        put(store, 1)
    assert redis_server.command("KEYS", "test:*") == [b"test:version"]


@pytest.mark.parametrize(
    "rubbish",
    [
        "",
        "null",
        "{}",
        "[]",
        "[2]",
        "[1]",
        '[2, "1", "ann", "news", "/", [1, 1, 1], null, 0, 0, 0]',
        '[2, 1, "ann", "news", "/", [1, 1, 1], null, 0, 0, 0]\n[]',
        '[2, "1", "ann", "news", "/", [1, 1, 0], null, 0, 0, 0]\n[]',
        '[2, "1", "ann", "news", "/", [[], 1, 1], null, 0, 0, 0]\n[]',
        '[2, "1", "ann", "news", "/", [1, 1, 1], 5, 0, 0, 0]\n[]',
    ],
)
def test_a_record_that_cannot_be_read_affects_no_other(
    stores: Callable[[str], RedisStore],
    redis_server: RedisServer,
    rubbish: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = stores("one")
    put(store, 1, 2)
    redis_server.command("SET", f"test:b:{message(1).id}", rubbish)
    assert waiting(store) == ["[2]"]
    assert "was skipped" in caplog.text
    assert redis_server.command("GET", f"test:b:{message(1).id}") == rubbish.encode()


def test_the_error_of_a_redis_that_is_away_has_no_password(make_redis: Any) -> None:
    server = make_redis()
    url = server.url.replace("redis://", "redis://:s3cret@")
    store = make_store(url, "one", timeout=0.2)
    server.stop()
    for attempt in (lambda: put(store, 1), lambda: store.changes(0.1), store.lead, store.heartbeat):
        with pytest.raises(DeliveryStoreError) as caught:
            attempt()
        assert "s3cret" not in str(caught.value)
    store.close()


def test_a_half_open_connection_of_the_feed_is_noticed(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    """The peer has vanished without closing the connection."""
    with TcpProxy(redis_server.port) as proxy:
        store = make_store(f"redis://127.0.0.1:{proxy.port}/0", "far", timeout=1.0)
        assert store.changes(0.1) is None
        assert store.changes(0.1) == NOTHING
        assert proxy.black_hole() > 0
        put(stores("one"), 1)
        with pytest.raises(DeliveryStoreError):
            store.changes(0.1)
        wait_until(lambda: store.changes(0.1) == STORED, timeout=20.0, message="it hears nothing")
        store.close()


@pytest.mark.parametrize("is_all", [False, True])
def test_an_evicted_message_affects_no_other(
    stores: Callable[[str], RedisStore], redis_server: RedisServer, *, is_all: bool
) -> None:
    store = stores("one")
    put(store, 1, 2, requires_all=is_all)
    put(store, 3, key="price")
    store.do(Join("/,ann", "phone"))
    store.do(Join("/,ann", "laptop"))
    for number in (1, 3):
        redis_server.command("DEL", f"test:m:{message(number).id}")
    assert store.do(Leave("/,ann", "laptop")) == []
    assert waiting(store) == ["[2]"]
    put(store, 4, key="price")
    assert store.do(Finish(message(1).id, DeliveryState.GONE)) == End(None, is_new=False)
    store._redis.incrbyfloat("test:jumped", -1000)
    assert [each.id for each in store.do(Expire(10))] == [message(2).id, message(4).id]
    assert store.do(Expire(10)) == []
    assert redis_server.command("ZCARD", "test:deadlines") == 0


def test_a_page_with_a_record_that_cannot_be_read_is_not_the_last(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2, 3)
    redis_server.command("SET", f"test:b:{message(1).id}", "rubbish")
    page = store.do(Waiting("/,ann", 0, 2, 10**6))
    assert [each.body for each in page.deliveries] == ["[2]"]
    assert (page.last, page.has_more) == (2, True)
    assert store.do(Waiting("/,ann", 0, 4, 10**6)).has_more is False


def test_an_end_whose_answer_was_lost_is_returned_again(
    stores: Callable[[str], RedisStore],
) -> None:
    store = stores("one")
    put(store, 1)
    ends = [store.do(Acknowledge(message(1).id, "phone", 1)) for _ in range(2)]
    assert [end.is_new for end in ends] == [True, False]
    assert ends[0].delivery == ends[1].delivery
    assert store.do(Acknowledge("0" * 32, "phone", 1)) == End(None, is_new=False)


def test_a_process_that_was_taken_for_dead_notices(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    assert one.heartbeat(), "a new process is not known yet"
    one.do(Join("/,ann", "phone"))
    assert not one.heartbeat()
    assert list(two.reap_dead_processes()) == []
    assert two._redis.scard("test:devices:/,ann") == 1

    def is_forgotten() -> bool:
        list(two.reap_dead_processes())
        return not two._redis.scard("test:devices:/,ann")

    wait_until(is_forgotten, timeout=20.0)
    assert not two._redis.smembers("test:hosts")
    assert one.heartbeat(), "its devices have to join again"


def test_the_feed_goes_on_after_redis_was_emptied(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1)
    assert two.changes(0.1) is None
    redis_server.command("FLUSHALL")
    assert two.changes(0.01) is None
    assert two.changes(0.01) is None
    put(one, 2)
    assert two.changes(1.0) == STORED


def test_an_entry_of_the_feed_that_cannot_be_read_affects_no_other(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    two.changes(0.1)
    put(one, 1)
    for fields in (
        ("a", "b"),
        ("count", "x"),
        ("count", "9", "host", "z", "what", "{"),
        ("count", "10", "what", "[[5], [[]]]"),
    ):
        redis_server.command("XADD", "test:changes", "*", *fields)
    put(one, 2)
    assert two.changes(1.0) is None, "some may have been missed"
    put(one, 3)
    assert two.changes(1.0) == STORED


def test_a_slow_reading_of_the_clock_is_discarded(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("one")
    store.lead()
    instants = iter([100.0, 105.0])
    monkeypatch.setattr(redis_store, "clock", lambda: next(instants))
    store.lead()
    assert store._redis.get("test:jumped") is None


def test_a_dead_letter_has_its_arguments(stores: Callable[[str], RedisStore]) -> None:
    store = stores("one")
    put(store, 1, 2)
    store.do(Mark(message(1).id, 2, True))
    gone = store.do(FailAll("/,ann", DeliveryState.GONE, 1))
    (refused,) = [store.do(Finish(message(2).id, DeliveryState.REFUSED)).delivery]
    letters = store.do(DeadLetters(9))
    assert [letter.delivery.arguments for letter in letters] == [[2], [1]]
    assert [each.arguments for each in (*gone, refused)] == [[1], [2]]
    assert [letter.delivery.state for letter in letters] == [
        DeliveryState.REFUSED,
        DeliveryState.GONE,
    ]
    assert letters[1].delivery.attempts == gone[0].attempts == 2


def test_a_redis_whose_memory_is_full_still_ends_messages(make_redis: Any) -> None:
    server = make_redis()
    store = make_store(server.url, "one")
    put(store, 1, 2, 3, 6)
    store.heartbeat()
    server.command("CONFIG", "SET", "maxmemory", "1")
    try:
        (refused,) = store.apply([Put(message(4))])
        assert refused == Stored(None, full="memory")
        assert store.usage == Usage(4, ANY, 100, 1_000_000, is_out_of_memory=True)
        store.do(Mark(message(1).id, 1, True))
        store.do(Join("/,ann", "phone"))
        assert not store.heartbeat()
        steps = [
            Put(message(5)),
            Acknowledge(message(1).id, "phone", 1),
            Finish(message(2).id, DeliveryState.REFUSED),
        ]
        refused, *ends = store.apply(steps)
        assert refused == Stored(None, full="memory")
        assert [end.is_new for end in ends] == [True, True]
        other = make_store(server.url, "two")
        other.heartbeat()
        assert other.usage.is_out_of_memory, "also one that stores nothing knows"
        store.do(Finish(message(6).id, DeliveryState.REFUSED))
        assert store.usage.is_out_of_memory
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
    for each in (store, other):
        each.heartbeat()
        assert each.usage == Usage(1, ANY, 100, 1_000_000)
    other.close()
    assert waiting(store) == ["[3]"]
    store.close()


def test_an_evicted_message_does_not_expire_again_and_again(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2)
    redis_server.command("DEL", f"test:m:{message(1).id}")
    store._redis.incrbyfloat("test:jumped", -1000)
    assert [each.id for each in store.do(Expire(10))] == [message(2).id]
    assert redis_server.command("ZCARD", "test:deadlines") == 0


def test_an_evicted_message_is_removed_from_its_mailbox(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1)
    redis_server.command("DEL", f"test:m:{message(1).id}")
    assert waiting(store) == []
    assert redis_server.command("ZCARD", "test:mailbox:/,ann") == 0


def test_ended_messages_leave_only_receipts_and_dead_letters(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    store.heartbeat()
    store.do(Join("/,ann", "phone"))
    put(store, 1, requires_all=True)
    put(store, 2, key="price")
    put(store, 3)
    store.do(Acknowledge(message(1).id, "other", 1))
    store.do(Acknowledge(message(1).id, "phone", 1))
    store.do(Leave("/,ann", "phone"))
    for number in (2, 3):
        store.do(Finish(message(number).id, DeliveryState.REFUSED))
    assert redis_server.command("GET", "test:size") == b"0"
    messages = {f"test:{kind}:{message(n).id}".encode() for kind in "mb" for n in (2, 3)}
    kept = {"alive:one", "dead", "hosts", "changes", "changes-count", "changes-sizes", "numbers"}
    kept |= {"ended", "ended-order", "version", "told"}
    kept |= {"size", "ended-size", "dead-size", "changes-size"}
    names = set(redis_server.command("KEYS", "test:*"))
    assert names == messages | {f"test:{name}".encode() for name in kept}


def test_a_message_that_replaces_another_needs_no_room_of_its_own(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    stores("one")
    store = make_store(redis_server.url, "two", max_size=1200)
    put(store, 1, key="price")
    (full,) = store.apply([Put(message(2))])
    assert full == Stored(None, full="size")
    (newer,) = store.apply([Put(message(3, key="price"))])
    assert newer.delivery is not None
    assert newer.replaced.id == message(1).id
    store.close()


def test_every_process_knows_how_full_the_store_is(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    """By the answers that it gets anyway."""
    one, two = stores("one"), stores("two")
    assert one.usage is None, "nothing is known yet"
    put(one, 1, 2)
    size = int(redis_server.command("GET", "test:size"))
    assert one.usage == Usage(2, size, 100, 1_000_000)
    two.heartbeat()
    assert two.usage == one.usage
    one.do(Acknowledge(message(1).id, "phone", 1))
    assert one.usage == Usage(1, size // 2, 100, 1_000_000)
    known = one.usage
    put(two, 3)
    one.do(Find("0" * 32))
    assert one.usage is known, "a step that changes nothing does not pay for it"
    one.heartbeat()
    assert one.usage.messages == 2
    full = make_store(redis_server.url, "three", max_messages=1)
    assert full.do(Put(message(4))) == Stored(None, full="messages")
    assert full.usage.fill == 2.0
    full.close()


def test_a_process_whose_heartbeat_returns_is_not_reaped(
    stores: Callable[[str], RedisStore],
) -> None:
    """After the leader has missed its heartbeat."""
    one, two = stores("one"), stores("two")
    one.heartbeat()
    one.do(Join("/,ann", "phone"))
    assert two.do(Reap("one", 10)) == ([], 0)
    assert two._redis.scard("test:devices:/,ann") == 1


def test_changes_before_a_step_that_fails_are_published(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1)
    two.changes(0.1)
    redis_server.command("SET", "test:mailbox:/,bob", "somebody else's")
    to_bob = message(2)._replace(recipient="bob")
    steps = [Finish(message(1).id, DeliveryState.CANCELLED), Put(to_bob)]
    with pytest.raises(DeliveryStoreError):
        one.do(Put(to_bob))
    is_over, failure = one.apply(steps)
    assert is_over.is_new
    assert isinstance(failure, DeliveryStoreError)
    changes = two.changes(1.0)
    assert changes is not None
    assert [each.id for each in changes.ended] == [message(1).id]


def used(server: RedisServer) -> int:
    """Return the bytes of all that Redis keeps."""
    return sum(
        int(server.command("MEMORY", "USAGE", key, "SAMPLES", 0) or 0)
        for key in server.command("KEYS", "*")
    )


@pytest.mark.parametrize(
    ("size", "options"),
    [(5, {}), (3000, {}), (5, {"key": "price"}), (5, {"requires_all": True})],
)
def test_the_counted_size_is_what_redis_needs(
    make_redis: Any, size: int, options: dict[str, Any]
) -> None:
    """With all that is kept about a message: keys, deadlines, who has it."""
    server = make_redis()
    store = make_store(server.url, "one", max_messages=1000, max_size=10**9, prefix="guard:chat:")

    def memory() -> int:
        server.command("MEMORY", "PURGE")
        return int(server.command("INFO", "memory")["used_memory"])

    options |= {"body": "x" * size}
    to = [message(n)._replace(recipient=f"user-{n}", **options) for n in range(500)]
    put(store, 999)
    store.do(Finish(message(999).id, DeliveryState.CANCELLED))
    before, news_before = memory(), int(server.command("GET", "guard:chat:changes-size"))
    store.apply([Put(each) for each in to])
    changes = int(server.command("GET", "guard:chat:changes-size")) - news_before
    counted, needed = int(server.command("GET", "guard:chat:size")), memory() - before
    assert counted > 0.9 * (needed - changes), f"{counted} counted, {needed - changes} needed"
    assert counted < 1.4 * (needed - changes), f"{counted} counted, {needed - changes} needed"
    store.apply([Acknowledge(each.id, "phone", 1) for each in to])
    assert server.command("GET", "guard:chat:size") == b"0"
    kept = sum(
        int(server.command("GET", f"guard:chat:{name}-size")) for name in ("ended", "changes")
    )
    # Less what the server keeps for its connections.
    assert memory() - before < 1.2 * kept + 64_000, f"{kept} counted, {memory() - before} needed"
    store.close()


def test_all_records_are_bounded_in_bytes(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies go at the end; receipts, dead letters and changes do when they take too much."""
    redis_server.command("FLUSHALL")
    monkeypatch.setattr(redis_store, "_MAX_CHANGES_SIZE", 20_000)
    bounds = {"max_ended_size": 20_000, "max_dead_size": 50_000}
    store = make_store(redis_server.url, "one", max_messages=1000, **bounds)
    numbers = iter(range(10_000))

    def send(count: int, size: int, **options: Any) -> list[str]:
        given = [message(next(numbers), **options)._replace(body="x" * size) for _ in range(count)]
        for each in given:
            store.apply([Put(each)])
        return [each.id for each in given]

    for id in send(60, 10_000, key="k" * 500):
        store.do(Finish(id, DeliveryState.CANCELLED))
    assert redis_server.command("GET", "test:size") == b"0"
    assert used(redis_server) < 70_000
    ids = send(60, 10_000)
    for id in ids:
        store.do(Finish(id, DeliveryState.REFUSED))
    assert used(redis_server) < 120_000, "before anybody looks at them"
    letters = store.do(DeadLetters(1000))
    assert [letter.delivery.id for letter in letters] == ids[:-5:-1]
    ids = send(300, 1)
    for id in ids:
        store.do(Acknowledge(id, "phone", 1))
    found = [store.do(Find(id)) for id in ids]
    assert found[0] is None, "the oldest receipts have gone"
    assert found[-1].state is DeliveryState.DELIVERED
    assert used(redis_server) < 120_000
    store._redis.incrbyfloat("test:jumped", -2000)
    assert store.do(Expire(10)) == []
    assert store.do(DeadLetters(9)) == []
    assert [store.do(Find(id)) for id in ids] == [None] * 300
    for name in ("ended-size", "dead-size", "size"):
        assert redis_server.command("GET", f"test:{name}") == b"0"
    store.close()


def test_a_device_that_comes_and_goes_is_not_remembered_for_ever(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    store.do(Join("/,ann", "laptop"))
    put(store, 1, requires_all=True)
    for number in range(200):
        assert store.do(Acknowledge(message(1).id, f"phone-{number}", 1)) is None
    assert int(redis_server.command("SCARD", f"test:acks:{message(1).id}")) <= 64
    assert store.do(Acknowledge(message(1).id, "laptop", 1)).is_new


def test_a_message_names_the_devices_that_have_it(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    """Also those that do not count any more, because their process was silent for too long."""
    one, two = stores("one"), stores("two")
    two.changes(0.1)
    for device in ("laptop", "frozen"):
        one.do(Join("/,ann", device))
    put(one, 1, 2, requires_all=True)
    one.do(Leave("/,ann", "frozen"))
    for id in (message(1).id, message(2).id):
        assert one.do(Acknowledge(id, "frozen", 1)) is None
        pending = {each.id: each for each in one.do(Waiting("/,ann", 0, 9, 10**6)).deliveries}
        assert (pending[id].acknowledged_by, pending[id].acknowledgements) == (("frozen",), 1)
    end = one.do(Acknowledge(message(1).id, "laptop", 1))
    assert end.delivery.acknowledged_by == ("frozen", "laptop")
    refused = one.do(Finish(message(2).id, DeliveryState.REFUSED)).delivery
    assert (refused.acknowledged_by, refused.arguments) == (("frozen",), [2])
    (letter,) = two.do(DeadLetters(9))
    assert letter.delivery == refused._replace(ttl=letter.delivery.ttl)
    found = [two.do(Find(message(number).id)) for number in (1, 2)]
    assert [each.acknowledged_by for each in found] == [("frozen", "laptop"), ("frozen",)]
    changes = two.changes(1.0)
    while not changes.ended:
        changes = two.changes(1.0)
    assert changes.ended[0].acknowledged_by == ("frozen", "laptop")


def test_a_message_that_requires_one_device_names_none(
    stores: Callable[[str], RedisStore],
) -> None:
    store = stores("one")
    put(store, 1)
    end = store.do(Acknowledge(message(1).id, "phone", 1))
    assert (end.delivery.acknowledged_by, end.delivery.acknowledgements) == ((), 0)


def test_the_newest_devices_are_named_and_all_are_counted(
    stores: Callable[[str], RedisStore],
) -> None:
    store = stores("one")
    store.do(Join("/,ann", "laptop"))
    put(store, 1, requires_all=True)
    for number in [*range(70), 69, 60]:
        store.do(Acknowledge(message(1).id, f"phone-{number}", 1))
    found = store.do(Find(message(1).id))
    assert found.acknowledged_by == tuple(f"phone-{number}" for number in range(6, 70))
    assert found.acknowledgements == 70
    assert 64 * 300 < store.usage.size < 65 * 300 + 1300, "names count"
    store.do(Finish(message(1).id, DeliveryState.REFUSED))
    assert store.usage.size == 0


def test_a_page_is_bounded_in_bytes(stores: Callable[[str], RedisStore]) -> None:
    store = stores("one")
    put(store, *range(1, 6))
    page = store.do(Waiting("/,ann", 0, 10, int(2.5 * len(message(1).to_json()))))
    assert [each.body for each in page.deliveries] == ["[1]", "[2]"]
    assert page.has_more
    page = store.do(Waiting("/,ann", page.last, 10, 1))
    assert [each.body for each in page.deliveries] == ["[3]"], "one of any size"


def test_an_error_belongs_to_its_own_step(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2)
    redis_server.command("SET", f"test:b:{message(1).id}", "rubbish")
    found = store.apply(
        [
            Put(message(3)),
            Find(message(1).id),
            Find("\ud800"),
            Put(message(1)),
            object(),
            Finish(message(2).id, "cancelled"),  # type: ignore[arg-type]
            Put(message(4)),
        ]
    )
    assert [type(each) for each in found] == [
        Stored,
        DeliveryFormatError,
        UnicodeEncodeError,
        DeliveryFormatError,
        TypeError,
        AttributeError,
        Stored,
    ]
    assert waiting(store) == ["[2]", "[3]", "[4]"]
    with pytest.raises(DeliveryFormatError):
        store.do(Find(message(1).id))


def test_foreign_records_do_not_keep_messages_from_expiring(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2, 3)
    redis_server.command("SET", f"test:m:{message(1).id}", "somebody else's")
    redis_server.command("HDEL", f"test:m:{message(2).id}", "size")
    store._redis.incrbyfloat("test:jumped", -1000)
    assert [each.id for each in store.do(Expire(10))] == [message(3).id]
    assert redis_server.command("GET", f"test:m:{message(1).id}") == b"somebody else's"


def test_a_message_that_cannot_be_stored_leaves_nothing_behind(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    redis_server.command("SET", "test:all:/,ann", "somebody else's")
    with pytest.raises(DeliveryStoreError):
        store.do(Put(message(1, requires_all=True, key="price")))
    assert waiting(store) == []
    assert store.do(Find(message(1).id)) is None
    assert redis_server.command("HLEN", "test:keys") == 0

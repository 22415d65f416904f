"""Messages that must arrive in Redis: what no model in memory knows of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.delivery import redis_store
from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.redis_store import RedisStore
from flask_socketio_guard.delivery.store import End, News, Put, Step
from flask_socketio_guard.errors import DeliveryFormatError, DeliveryStoreError
from flask_socketio_guard.states import DeliveryState
from tests.support import TcpProxy, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RedisServer

LEASE = 1.5
NOTHING = News([], [])
STORED = News(["/,ann"], [])


def make_store(url: str, host: str, **options: Any) -> RedisStore:
    settings: dict[str, Any] = {
        "prefix": "test:",
        "timeout": 2.0,
        "lease": LEASE,
        "max_messages": 100,
        "max_size": 1_000_000,
        "retention": 100.0,
        "max_dead_letters": 100,
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
    store.apply([Step("put", (message(number, **options),)) for number in numbers])


def waiting(store: RedisStore) -> list[str]:
    return [each.body for each in store.do("waiting", "/,ann", 0, 10).deliveries]


def test_processes_share_what_there_is(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1, 2)
    assert waiting(two) == ["[1]", "[2]"]
    assert two.do("finish", message(1).id, DeliveryState.CANCELLED).is_new
    assert not one.do("finish", message(1).id, DeliveryState.CANCELLED).is_new


def test_each_hears_what_the_others_do(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    assert one.news(0.1) is None, "who begins to hear has missed all before"
    assert two.news(0.1) is None
    put(one, 1)
    one.do("acknowledge", message(1).id, "phone", 1)
    assert one.news(0.1) == NOTHING
    news = two.news(5.0)
    assert news is not None
    (ended,) = news.ended
    assert news.stored == ["/,ann"]
    assert (ended.address, ended.event) == ("/,ann", "news")
    assert (ended.state, ended.attempts) == (DeliveryState.DELIVERED, 1)
    assert two.news(0.01) == NOTHING


def test_news_that_were_missed_are_known_to_be(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    two.news(0.1)
    for number in (1, 2, 3):
        put(one, number)
    redis_server.command("XTRIM", "test:news", "MAXLEN", 1)
    assert two.news(1.0) is None
    put(one, 4)
    assert two.news(1.0) == STORED


def test_one_leads_and_another_takes_over_when_it_dies(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    assert one.lead()
    assert not two.lead()
    assert one.lead(), "it keeps the lease for as long as it asks"
    wait_until(two.lead, timeout=20.0, message="nobody has taken over")
    assert not one.lead()
    two.close()
    assert one.lead(), "who goes in an orderly way hands over at once"


def test_devices_of_a_process_that_died_count_no_more(
    stores: Callable[[str], RedisStore],
) -> None:
    one, two = stores("one"), stores("two")
    for store, device in ((one, "desk"), (two, "phone")):
        store.stay()
        store.do("join", "/,ann", device)
    put(one, 1, requires_all=True)
    assert two.do("acknowledge", message(1).id, "phone", 1) is None
    ended: list[Delivery] = []

    def has_ended() -> bool:
        two.stay()
        ended.extend(two.forget_dead_processes())
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
        '[1, 1, "ann", "news", "[]", "/", [1, 1, 1], null, 0, 0, 0]',
        '[1, "1", "ann", "news", "[]", "/", [1, 1, 0], null, 0, 0, 0]',
        '[1, "1", "ann", "news", "[]", "/", [[], 1, 1], null, 0, 0, 0]',
        '[1, "1", "ann", "news", "[]", "/", [1, 1, 1], 5, 0, 0, 0]',
    ],
)
def test_rubbish_in_redis_keeps_nobody_from_the_rest(
    stores: Callable[[str], RedisStore],
    redis_server: RedisServer,
    rubbish: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = stores("one")
    put(store, 1, 2)
    redis_server.command("HSET", f"test:m:{message(1).id}", "body", rubbish)
    assert waiting(store) == ["[2]"]
    assert "left alone" in caplog.text
    assert redis_server.command("HGET", f"test:m:{message(1).id}", "body") == rubbish.encode()


def test_a_redis_that_is_away_is_told_without_its_password(make_redis: Any) -> None:
    server = make_redis()
    url = server.url.replace("redis://", "redis://:s3cret@")
    store = make_store(url, "one", timeout=0.2)
    server.stop()
    for attempt in (lambda: put(store, 1), lambda: store.news(0.1), store.lead, store.stay):
        with pytest.raises(DeliveryStoreError) as caught:
            attempt()
        assert "s3cret" not in str(caught.value)
    store.close()


def test_who_hears_nothing_notices(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    """The other side of the connection has vanished without a word."""
    with TcpProxy(redis_server.port) as proxy:
        store = make_store(f"redis://127.0.0.1:{proxy.port}/0", "far", timeout=1.0)
        assert store.news(0.1) is None
        assert store.news(0.1) == NOTHING
        assert proxy.black_hole() > 0
        put(stores("one"), 1)
        with pytest.raises(DeliveryStoreError):
            store.news(0.1)
        wait_until(lambda: store.news(0.1) == STORED, timeout=20.0, message="it hears nothing")
        store.close()


@pytest.mark.parametrize("is_all", [False, True])
def test_what_redis_has_thrown_out_keeps_nobody_from_the_rest(
    stores: Callable[[str], RedisStore], redis_server: RedisServer, *, is_all: bool
) -> None:
    store = stores("one")
    put(store, 1, 2, requires_all=is_all)
    put(store, 3, key="price")
    store.do("join", "/,ann", "phone")
    store.do("join", "/,ann", "desk")
    for number in (1, 3):
        redis_server.command("DEL", f"test:m:{message(number).id}")
    assert store.do("leave", "/,ann", "desk") == []
    assert waiting(store) == ["[2]"]
    put(store, 4, key="price")
    assert store.do("finish", message(1).id, DeliveryState.GONE) == End(None, is_new=False)
    store._redis.incrbyfloat("test:jumped", -1000)
    assert [each.id for each in store.do("expire", 10)] == [message(2).id, message(4).id]
    assert store.do("expire", 10) == []
    assert redis_server.command("ZCARD", "test:deadlines") == 0


def test_a_page_of_what_cannot_be_read_is_not_the_last(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2, 3)
    redis_server.command("HSET", f"test:m:{message(1).id}", "body", "rubbish")
    page = store.do("waiting", "/,ann", 0, 2)
    assert [each.body for each in page.deliveries] == ["[2]"]
    assert (page.last, page.has_more) == (2, True)
    assert store.do("waiting", "/,ann", 0, 4).has_more is False


def test_an_end_whose_answer_was_lost_is_told_when_asked_again(
    stores: Callable[[str], RedisStore],
) -> None:
    store = stores("one")
    put(store, 1)
    ends = [store.do("acknowledge", message(1).id, "phone", 1) for _ in range(2)]
    assert [end.is_new for end in ends] == [True, False]
    assert ends[0].delivery == ends[1].delivery
    assert store.do("acknowledge", "0" * 32, "phone", 1) == End(None, is_new=False)


def test_who_was_taken_for_dead_is_told(stores: Callable[[str], RedisStore]) -> None:
    one, two = stores("one"), stores("two")
    assert one.stay(), "nobody knows who has just come"
    one.do("join", "/,ann", "phone")
    assert not one.stay()
    assert two.forget_dead_processes() == []
    assert two._redis.scard("test:devices:/,ann") == 1

    def is_forgotten() -> bool:
        two.forget_dead_processes()
        return not two._redis.scard("test:devices:/,ann")

    wait_until(is_forgotten, timeout=20.0)
    assert not two._redis.smembers("test:hosts")
    assert one.stay(), "its devices have to join again"


def test_a_redis_that_was_emptied_is_heard_again(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1)
    assert two.news(0.1) is None
    redis_server.command("FLUSHALL")
    assert two.news(0.01) is None
    assert two.news(0.01) is None
    put(one, 2)
    assert two.news(1.0) == STORED


def test_rubbish_in_the_news_keeps_nobody_from_the_rest(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    two.news(0.1)
    put(one, 1)
    for fields in (
        ("a", "b"),
        ("count", "x"),
        ("count", "9", "host", "z", "what", "{"),
        ("count", "10", "what", "[[5], [[]]]"),
    ):
        redis_server.command("XADD", "test:news", "*", *fields)
    put(one, 2)
    assert two.news(1.0) is None, "some may have been missed"
    put(one, 3)
    assert two.news(1.0) == STORED


def test_a_clock_that_was_read_too_slowly_says_nothing(
    stores: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("one")
    store.lead()
    instants = iter([100.0, 105.0])
    monkeypatch.setattr(redis_store, "clock", lambda: next(instants))
    store.lead()
    assert store._redis.get("test:jumped") is None


def test_a_dead_letter_says_what_was_in_it(stores: Callable[[str], RedisStore]) -> None:
    store = stores("one")
    put(store, 1, 2)
    store.do("mark", message(1).id, 2, True)
    gone = store.do("abandon", "/,ann", DeliveryState.GONE, 1)
    (refused,) = [store.do("finish", message(2).id, DeliveryState.REFUSED).delivery]
    letters = store.do("dead_letters", 9)
    assert [letter.delivery.arguments for letter in letters] == [[2], [1]]
    assert [each.arguments for each in (*gone, refused)] == [[1], [2]]
    assert [letter.delivery.state for letter in letters] == [
        DeliveryState.REFUSED,
        DeliveryState.GONE,
    ]
    assert letters[1].delivery.attempts == gone[0].attempts == 2


def test_a_redis_whose_memory_is_full_hears_what_has_ended(make_redis: Any) -> None:
    server = make_redis()
    store = make_store(server.url, "one")
    put(store, 1, 2, 3)
    store.stay()
    server.command("CONFIG", "SET", "maxmemory", "1")
    try:
        (refused,) = store.apply([Step("put", (message(4),))])
        assert refused == Put(None)
        store.do("mark", message(1).id, 1, True)
        store.do("join", "/,ann", "phone")
        assert not store.stay()
        steps = [
            Step("put", (message(5),)),
            Step("acknowledge", (message(1).id, "phone", 1)),
            Step("finish", (message(2).id, DeliveryState.REFUSED)),
        ]
        refused, *ends = store.apply(steps)
        assert refused == Put(None)
        assert [end.is_new for end in ends] == [True, True]
    finally:
        server.command("CONFIG", "SET", "maxmemory", "0")
    assert waiting(store) == ["[3]"]
    store.close()


def test_what_redis_has_thrown_out_does_not_expire_for_ever(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1, 2)
    redis_server.command("DEL", f"test:m:{message(1).id}")
    store._redis.incrbyfloat("test:jumped", -1000)
    assert [each.id for each in store.do("expire", 10)] == [message(2).id]
    assert redis_server.command("ZCARD", "test:deadlines") == 0


def test_what_redis_has_thrown_out_is_not_looked_for_for_ever(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    put(store, 1)
    redis_server.command("DEL", f"test:m:{message(1).id}")
    assert waiting(store) == []
    assert redis_server.command("ZCARD", "test:box:/,ann") == 0


def test_what_has_ended_leaves_only_what_is_to_be_found(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    store = stores("one")
    store.stay()
    store.do("join", "/,ann", "phone")
    put(store, 1, requires_all=True)
    put(store, 2, key="price")
    put(store, 3)
    store.do("acknowledge", message(1).id, "other", 1)
    store.do("acknowledge", message(1).id, "phone", 1)
    store.do("leave", "/,ann", "phone")
    for number in (2, 3):
        store.do("finish", message(number).id, DeliveryState.REFUSED)
    assert redis_server.command("GET", "test:size") == b"0"
    messages = {f"test:m:{message(number).id}".encode() for number in (1, 2, 3)}
    for name in messages:
        assert 0 < int(redis_server.command("TTL", name)) <= 100
    kept = {b"alive:one", b"dead", b"hosts", b"news", b"news-count", b"numbers", b"size"}
    names = set(redis_server.command("KEYS", "test:*"))
    assert names == messages | {b"test:" + name for name in kept | {b"version"}}


def test_a_message_that_replaces_another_needs_no_room_of_its_own(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    stores("one")
    store = make_store(redis_server.url, "two", max_size=300)
    put(store, 1, key="price")
    (full,) = store.apply([Step("put", (message(2),))])
    assert full == Put(None)
    (newer,) = store.apply([Step("put", (message(3, key="price"),))])
    assert newer.delivery is not None
    assert newer.replaced.id == message(1).id
    store.close()


def test_who_comes_back_in_time_is_not_buried(stores: Callable[[str], RedisStore]) -> None:
    """After the leader has seen that it says nothing."""
    one, two = stores("one"), stores("two")
    one.stay()
    one.do("join", "/,ann", "phone")
    assert two.do("bury", "one", 10) == ([], 0)
    assert two._redis.scard("test:devices:/,ann") == 1


def test_what_was_done_before_a_step_that_fails_is_told_to_the_others(
    stores: Callable[[str], RedisStore], redis_server: RedisServer
) -> None:
    one, two = stores("one"), stores("two")
    put(one, 1)
    two.news(0.1)
    redis_server.command("SET", "test:box:/,bob", "somebody else's")
    to_bob = message(2)._replace(recipient="bob")
    steps = [Step("finish", (message(1).id, DeliveryState.CANCELLED)), Step("put", (to_bob,))]
    with pytest.raises(DeliveryStoreError):
        one.apply(steps)
    news = two.news(1.0)
    assert news is not None
    assert [each.id for each in news.ended] == [message(1).id]

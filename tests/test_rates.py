"""How often something may happen: in memory, in Redis, and while Redis is away."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_socketio_guard.errors import ConfigError, RateLimited
from flask_socketio_guard.events import rates
from flask_socketio_guard.events.rates import Limit, RateLimiter
from tests.support import TcpProxy, unit_support, wait_until
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RedisServer

nothing_left_behind = unit_support.nothing_left_behind

ADVICE = 'rate limits need the package limits: pip install "Flask-SocketIO-Guard[ratelimit]"'
NO_RATE = 'a rate must be one number and time such as "20/second", not '
PASSWORD = "s3cret-passw0rd"
RETRY = 5.0
"""Longest time until a Redis that is away is asked again."""


class GivingWay(dict[str, int]):
    """Lets other threads run between reading a count and writing it."""

    def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
        count = super().get(key, default)
        time.sleep(0)
        return count


def hits(limit: Limit, key: str, count: int) -> int:
    """Hit so many times and return how many were let in."""
    return sum(retry_after(limit, key) is None for _ in range(count))


def retry_after(limit: Limit, key: str = "sid") -> float | None:
    """Hit once and return how long to wait; ``None`` when let in."""
    try:
        limit.hit(key)
    except RateLimited as exc:
        return exc.retry_after
    return None


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def failures() -> list[Exception]:
    """What the limiters of a test reported."""
    return []


@pytest.fixture
def make_limiter(
    nothing_left_behind: None, clock: FakeClock, failures: list[Exception]
) -> Iterator[Callable[..., RateLimiter]]:
    """Return a function that makes a limiter with the clock of the test."""
    made: list[RateLimiter] = []

    def make(url: str = "memory://", **options: Any) -> RateLimiter:
        options = {"clock": clock, "on_storage_failure": failures.append} | options
        made.append(RateLimiter(url, **options))
        return made[-1]

    yield make
    for limiter in made:
        limiter.stop(0.0)


@pytest.fixture
def limiter(make_limiter: Callable[..., RateLimiter]) -> RateLimiter:
    """A limiter in memory."""
    return make_limiter()


@pytest.fixture
def shared(
    make_limiter: Callable[..., RateLimiter], redis_server: RedisServer
) -> Callable[..., RateLimiter]:
    """Return a function that makes limiters on one Redis, which is empty at first."""
    redis_server.command("FLUSHALL")

    def make(**options: Any) -> RateLimiter:
        return make_limiter(redis_server.url, **options)

    return make


# In memory


def test_so_many_are_let_in_and_no_more(limiter: RateLimiter) -> None:
    limit = limiter.limit("3/second")
    assert hits(limit, "sid", 10) == 3
    with pytest.raises(RateLimited, match="too many events") as caught:
        limit.hit("sid")
    assert caught.value.code == "rate_limited"


def test_the_refusal_says_how_long_to_wait(limiter: RateLimiter, clock: FakeClock) -> None:
    """The first of 4 in a second weighs a quarter second less than all four."""
    limit = limiter.limit("4 per 1 second")
    clock.advance(0.5)
    assert hits(limit, "sid", 4) == 4
    assert retry_after(limit) == pytest.approx(0.5, abs=0.01)
    clock.advance(0.5)
    assert retry_after(limit) == pytest.approx(0.0, abs=0.01)
    clock.advance(0.01)
    assert hits(limit, "sid", 4) == 1
    assert retry_after(limit) == pytest.approx(0.24, abs=0.01)
    clock.advance(0.5)
    assert hits(limit, "sid", 4) == 2


def test_refused_attempts_do_not_count(limiter: RateLimiter, clock: FakeClock) -> None:
    limit = limiter.limit("2/second")
    hits(limit, "sid", 1000)
    clock.advance(2.0)
    assert hits(limit, "sid", 1000) == 2


@pytest.mark.parametrize("pause", [2.0, 2.5, 100.0])
def test_all_is_forgotten_after_two_windows(
    limiter: RateLimiter, clock: FakeClock, pause: float
) -> None:
    limit = limiter.limit("5/second")
    assert hits(limit, "sid", 9) == 5
    clock.advance(pause)
    assert hits(limit, "sid", 9) == 5


def test_each_key_has_its_own_count(limiter: RateLimiter) -> None:
    limit = limiter.limit("2/second")
    assert [hits(limit, key, 3) for key in ("a", "b", "c")] == [2, 2, 2]


def test_limits_do_not_share_their_counts(limiter: RateLimiter) -> None:
    first, second, other = (limiter.limit(rate) for rate in ("2/second", "2/second", "3/second"))
    assert [hits(limit, "sid", 9) for limit in (first, second, other)] == [2, 2, 3]


@given(
    amount=st.integers(1, 20),
    window=st.integers(1, 60),
    pauses=st.lists(
        st.floats(0.0, 0.3) | st.floats(0.0, 3.0) | st.just(0.0), min_size=30, max_size=60
    ),
)
@settings(deadline=None)
def test_the_formula_holds_and_the_wait_is_true(
    amount: int, window: int, pauses: list[float]
) -> None:
    """Beside a plain count; and whoever waits as told is let in, and not a moment sooner."""
    clock = FakeClock()
    began_at = clock()
    limiter = RateLimiter(on_storage_failure=lambda exc: None, clock=clock)
    limit = limiter.limit(f"{amount} per {window} second")
    counts: Counter[int] = Counter()
    is_aligned = True
    for pause in pauses:
        clock.advance(pause * window)
        number, age = divmod(clock() - began_at, window)
        weighted = counts[int(number) - 1] * (window - age) / window + counts[int(number)]
        delay = retry_after(limit)
        is_aligned = is_aligned and pause < 1.0
        if is_aligned and abs(weighted - amount) > 1e-6:
            assert (delay is None) == (weighted < amount)
        if delay is None:
            counts[int(number)] += 1
            continue
        assert 0.0 < delay <= 2 * window
        if delay > 0.01:
            clock.advance(delay - 0.005)
            assert retry_after(limit) is not None
            clock.advance(0.005)
        else:
            clock.advance(delay)
        assert retry_after(limit) is None
        counts[int((clock() - began_at) // window)] += 1


def test_memory_is_bounded_under_many_keys(limiter: RateLimiter, clock: FakeClock) -> None:
    limit = limiter.limit("1/day")
    for number in range(180_000):
        limit.hit(str(number))
    counts = limit._local
    assert 50_000 <= len(counts._current) + len(counts._previous) <= 100_001
    clock.advance(0.001)
    assert retry_after(limit, "179999") is not None
    assert hits(limit, "sid", 9) == 1


def test_keys_that_have_gone_are_forgotten(limiter: RateLimiter, clock: FakeClock) -> None:
    limit = limiter.limit("1/second")
    for second in range(10):
        for number in range(100):
            limit.hit(f"{second}-{number}")
        clock.advance(1.0)
    counts = limit._local
    assert len(counts._current) + len(counts._previous) <= 200


def test_counts_are_right_when_threads_meet(limiter: RateLimiter) -> None:
    limit = limiter.limit("1000/day")
    limit._local._current = GivingWay()
    let_in: list[int] = []
    threads = [
        threading.Thread(target=lambda: let_in.append(hits(limit, "sid", 400))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(let_in) == 1000


def test_a_hit_in_memory_gives_way_to_nobody(limiter: RateLimiter) -> None:
    """Neither to a greenlet nor to a thread of its own; the event loop itself may hit."""
    limit = limiter.limit("100/second")
    ran: list[str] = []
    other = gevent.spawn(ran.append, "other")
    threads = threading.active_count()
    assert hits(limit, "sid", 50) == 50
    assert ran == []
    assert threading.active_count() == threads
    gevent.get_hub().loop.run_callback(lambda: ran.append(str(hits(limit, "sid", 60))))
    other.join()
    gevent.sleep(0)
    assert ran == ["other", "50"]


# What can be asked for


@pytest.mark.parametrize(
    ("rate", "amount", "seconds"),
    [
        ("20/second", 20, 1),
        ("5 per 10 minutes", 5, 600),
        ("1/day", 1, 86_400),
        ("2/2seconds", 2, 2),
    ],
)
def test_rates_are_in_the_words_of_the_library(
    limiter: RateLimiter, clock: FakeClock, rate: str, amount: int, seconds: int
) -> None:
    limit = limiter.limit(rate)
    assert hits(limit, "sid", amount + 1) == amount
    clock.advance(seconds - 0.01)
    assert hits(limit, "sid", 1) == 0
    clock.advance(seconds + 0.02)
    assert hits(limit, "sid", amount + 1) == amount


@pytest.mark.parametrize(
    "rate",
    [
        "",
        "20",
        "20/fortnight",
        "many/second",
        "0/second",
        "-1/second",
        "1/second;5/minute",
        20,
        None,
    ],
)
def test_a_rate_that_cannot_be_read_is_refused(limiter: RateLimiter, rate: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        limiter.limit(rate)
    assert str(caught.value) == f"{NO_RATE}{rate!r}"


@pytest.mark.parametrize(
    "url",
    [
        f"memcached://:{PASSWORD}@localhost",
        f"redis+cluster://:{PASSWORD}@localhost:1",
        PASSWORD,
        "",
    ],
)
def test_a_storage_that_is_not_supported_is_refused(
    make_limiter: Callable[..., RateLimiter], url: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_limiter(url)
    assert str(caught.value) == (
        'SOCKETIO_GUARD_RATE_STORAGE must be "memory://" or the URL of a Redis'
    )


@pytest.mark.parametrize(
    "url", [f"redis://:x/{PASSWORD}@localhost/0", f"redis://:{PASSWORD}@localhost:{PASSWORD}"]
)
def test_an_address_that_cannot_be_read_is_not_repeated(
    make_limiter: Callable[..., RateLimiter], url: str
) -> None:
    """Not even in a chained exception: libraries quote pieces of it."""
    limiter = make_limiter(url)
    with pytest.raises(ConfigError) as caught:
        limiter.limit("1/second")
    text = "".join(traceback.format_exception(caught.value))
    assert "SOCKETIO_GUARD_RATE_STORAGE cannot be read as the URL of a Redis" in text
    assert PASSWORD not in text
    assert caught.value.__context__ is None


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+unix", "unix"])
def test_making_a_limit_connects_to_nobody(
    make_limiter: Callable[..., RateLimiter], scheme: str, failures: list[Exception]
) -> None:
    make_limiter(f"{scheme}://localhost/nowhere").limit("1/second")
    assert failures == []


def test_a_rate_without_the_library_names_what_to_install(
    limiter: RateLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(ConfigError) as caught:
        limiter.limit("1/second")
    assert str(caught.value) == ADVICE


def test_nothing_of_the_library_is_imported_before_a_rate_is_used() -> None:
    program = (
        "import sys; from flask_socketio_guard.events.rates import RateLimiter;"
        "[RateLimiter(url, on_storage_failure=print) for url in ('memory://', 'redis://')];"
        "sys.exit('limits' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


# In Redis


def test_processes_share_their_counts(shared: Callable[..., RateLimiter]) -> None:
    one, other = (shared().limit("10/day", name="chat") for _ in range(2))
    assert hits(one, "sid", 6) == 6
    assert hits(other, "sid", 9) == 4
    assert hits(one, "sid", 1) == 0
    assert hits(one, "another", 1) == 1


def test_limits_in_redis_do_not_share_their_counts(shared: Callable[..., RateLimiter]) -> None:
    limiter = shared()
    limits = [
        limiter.limit("2/day"),
        limiter.limit("2/day"),
        limiter.limit("2/day", name="chat"),
        limiter.limit("3/day", name="chat"),
        limiter.limit("2/hour", name="chat"),
        shared(namespace="another application").limit("2/day", name="chat"),
    ]
    assert [hits(limit, "sid", 9) for limit in limits] == [2, 2, 2, 3, 2, 2]


def test_keys_in_redis_are_told_apart_and_end(
    shared: Callable[..., RateLimiter], redis_server: RedisServer
) -> None:
    shared(namespace="shop").limit("2/second", name="chat").hit("sid")
    (key,) = redis_server.command("KEYS", "*")
    assert key == b"LIMITS:{shop/chat/2/1/sid}"
    assert 0 < redis_server.command("PTTL", key) <= 2000


def test_whoever_waits_as_told_is_let_in_by_redis(
    shared: Callable[..., RateLimiter],
) -> None:
    """In real time: the windows are those of Redis."""
    limit = shared(clock=time.monotonic).limit("5/second")
    for _ in range(3):
        while (delay := retry_after(limit)) is None:
            pass
        assert 0.0 < delay <= 1.3
        time.sleep(delay + 0.005)
        assert retry_after(limit) is None


def test_who_was_refused_by_counts_that_are_gone_may_come_at_once() -> None:
    """They may end in Redis between the refusal and the question how long to wait."""
    assert rates._delay(0, 0.0, 0, 5, 60) == pytest.approx(0.001)
    assert rates._delay(10, 0.0, 0, 5, 60) == pytest.approx(0.001)


def test_a_flood_ends_before_redis(
    shared: Callable[..., RateLimiter], redis_server: RedisServer, clock: FakeClock
) -> None:
    """A key that was refused is refused for a second without asking."""
    limiter = shared()
    limit = limiter.limit("2/day")

    def asked() -> int:
        stats = redis_server.command("INFO", "commandstats").get("cmdstat_evalsha", {})
        return int(stats.get("calls", 0))

    assert hits(limit, "sid", 3) == 2
    before = asked()
    delay = retry_after(limit)
    assert hits(limit, "sid", 1000) == 0
    assert asked() == before
    clock.advance(0.9)
    assert delay is not None
    assert delay > 3600
    assert retry_after(limit) == pytest.approx(delay - 0.9)
    assert asked() == before
    clock.advance(0.2)
    assert hits(limit, "sid", 1000) == 0
    assert asked() == before + 2
    redis_server.command("FLUSHALL")
    clock.advance(1.1)
    limit.hit("sid")
    assert limiter._shared is not None
    assert limiter._shared._refusals == {}
    assert hits(limit, "sid", 3) == 1


def test_memory_is_bounded_under_many_refused_keys(
    shared: Callable[..., RateLimiter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_MAX_REFUSALS", 10)
    limiter = shared()
    limit = limiter.limit("1/day")
    for number in range(25):
        assert hits(limit, str(number), 3) == 1
    assert limiter._shared is not None
    assert len(limiter._shared._refusals) <= 10


def test_a_key_that_cannot_be_encoded_is_no_failure_of_redis(
    shared: Callable[..., RateLimiter], failures: list[Exception]
) -> None:
    limit = shared().limit("2/day")
    assert hits(limit, "\ud800", 3) == 2
    assert failures == []


def test_limits_share_their_connections(
    shared: Callable[..., RateLimiter], redis_server: RedisServer
) -> None:
    def connections() -> int:
        return int(redis_server.command("INFO", "clients")["connected_clients"])

    before = connections()
    limiter = shared()
    for _ in range(5):
        limiter.limit("2/day").hit("sid")
    assert connections() == before + 1


def test_connections_to_redis_are_few_and_closed(
    shared: Callable[..., RateLimiter], redis_server: RedisServer, failures: list[Exception]
) -> None:
    def connections() -> int:
        return int(redis_server.command("INFO", "clients")["connected_clients"])

    before = connections()
    limiter = shared()
    limit = limiter.limit("100000/day")
    start = threading.Barrier(40)

    def hit() -> None:
        start.wait()
        limit.hit("sid")

    threads = [threading.Thread(target=hit) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert before < connections() <= before + 16
    limiter.stop(0.0)
    wait_until(lambda: connections() == before)
    limit.hit("sid")


# While Redis is away


def test_counting_goes_on_in_memory_while_redis_is_away(
    make_redis: Callable[[], RedisServer],
    make_limiter: Callable[..., RateLimiter],
    failures: list[Exception],
    clock: FakeClock,
) -> None:
    """Killed midway, and started again."""
    server = make_redis()
    limit = make_limiter(server.url).limit("10/day")
    assert hits(limit, "sid", 4) == 4
    server.kill()
    assert hits(limit, "sid", 99) == 10
    assert hits(limit, "another", 99) == 10
    assert len(failures) == 1
    assert isinstance(failures[0], redis.ConnectionError)
    server.start()
    assert hits(limit, "sid", 99) == 0
    clock.advance(RETRY)
    assert hits(limit, "sid", 99) == 10
    assert server.command("DBSIZE") == 1
    assert len(failures) == 1


def test_each_outage_is_told_once(
    make_redis: Callable[[], RedisServer],
    make_limiter: Callable[..., RateLimiter],
    failures: list[Exception],
    clock: FakeClock,
) -> None:
    server = make_redis()
    limit = make_limiter(server.url).limit("1000/day")
    for outage in range(1, 4):
        server.kill()
        for _ in range(5):
            clock.advance(RETRY)
            assert hits(limit, "sid", 3) == 3
        assert len(failures) == outage
        server.start()
        clock.advance(RETRY)
        limit.hit("sid")


def test_a_redis_that_was_never_there_is_told_once(
    make_limiter: Callable[..., RateLimiter], failures: list[Exception]
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    limit = make_limiter(url).limit("3/day")
    assert hits(limit, "sid", 9) == 3
    assert len(failures) == 1
    assert PASSWORD not in repr(failures[0])


def test_a_redis_that_refuses_is_as_good_as_away(
    make_redis: Callable[[], RedisServer],
    make_limiter: Callable[..., RateLimiter],
    failures: list[Exception],
) -> None:
    """Its memory is full."""
    server = make_redis()
    limit = make_limiter(server.url).limit("3/day")
    server.command("CONFIG", "SET", "maxmemory", "1")
    assert hits(limit, "sid", 9) == 3
    assert [isinstance(failure, redis.ResponseError) for failure in failures] == [True]


def test_a_redis_that_hangs_holds_up_one_hit_and_not_for_long(
    make_redis: Callable[[], RedisServer],
    make_limiter: Callable[..., RateLimiter],
    failures: list[Exception],
    clock: FakeClock,
) -> None:
    server = make_redis()
    limit = make_limiter(server.url).limit("10/day")
    limit.hit("sid")
    server.pause()
    try:
        for outage in range(2):
            began_at = time.monotonic()
            limit.hit(f"first-{outage}")
            assert 0.3 < time.monotonic() - began_at < 1.5
            began_at = time.monotonic()
            assert hits(limit, "sid", 99) == (10, 0)[outage]
            assert time.monotonic() - began_at < 0.3
            clock.advance(RETRY)
        assert [type(failure) for failure in failures] == [redis.TimeoutError]
    finally:
        server.resume()
    assert hits(limit, "another", 99) == 10
    assert hits(limit, "sid", 99) == 9, "answers of before the outage count for others now"


def test_one_caller_at_a_time_asks_whether_redis_is_back(
    make_redis: Callable[[], RedisServer],
    make_limiter: Callable[..., RateLimiter],
    clock: FakeClock,
) -> None:
    server = make_redis()
    limit = make_limiter(server.url).limit("1000/day")
    server.pause()
    try:
        limit.hit("sid")
        clock.advance(RETRY)
        took: list[float] = []

        def hit() -> None:
            began_at = time.monotonic()
            limit.hit("sid")
            took.append(time.monotonic() - began_at)

        threads = [threading.Thread(target=hit) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.resume()
    assert sum(seconds > 0.3 for seconds in took) == 1


def test_half_open_connections_are_not_used_again(
    redis_server: RedisServer,
    make_limiter: Callable[..., RateLimiter],
    failures: list[Exception],
    clock: FakeClock,
) -> None:
    """One outage costs one wait, however many connections were idle."""
    with TcpProxy(redis_server.port) as proxy:
        limiter = make_limiter(redis_server.url_through(proxy.port))
        limit = limiter.limit("100000/day", name="half-open")
        start = threading.Barrier(8)

        def hit_often() -> None:
            start.wait()
            hits(limit, "sid", 50)

        for _ in range(2):
            threads = [threading.Thread(target=hit_often) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not failures:
                assert proxy.black_hole() > 1
                limit.hit("sid")
                clock.advance(RETRY)
                limit.hit("sid")
        assert len(failures) == 1


PATCHED = """
from gevent import monkey
monkey.patch_all()
import gevent, json, sys, time
from flask_socketio_guard.events.rates import RateLimiter

failures = []
limiter = RateLimiter(sys.argv[1], on_storage_failure=lambda exc: failures.append(repr(exc)))
limit = limiter.limit("1000/day")
longest = 0.0

def tick():
    global longest
    while True:
        began_at = time.monotonic()
        gevent.sleep(0.01)
        longest = max(longest, time.monotonic() - began_at)

def hit(took):
    began_at = time.monotonic()
    limit.hit("sid")
    took.append(time.monotonic() - began_at)

def storm():
    took = []
    gevent.joinall([gevent.spawn(hit, took) for _ in range(200)], raise_error=True)
    return [len(took), max(took)]

gevent.spawn(tick)
print(json.dumps(storm()), flush=True)
sys.stdin.readline()
print(json.dumps(storm()), flush=True)
print(json.dumps(storm()), flush=True)
limiter.stop(0.0)
print(json.dumps([failures, longest]), flush=True)
"""


@pytest.mark.alone
def test_greenlets_wait_together_and_the_loop_runs_on(
    make_redis: Callable[[], RedisServer],
) -> None:
    """200 hit at once: on a Redis that answers, on one that hangs, and after that."""
    server = make_redis()
    with subprocess.Popen(
        [sys.executable, "-c", PATCHED, server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            answering = json.loads(process.stdout.readline())
            server.pause()
            print(file=process.stdin, flush=True)
            hanging = json.loads(process.stdout.readline())
            after = json.loads(process.stdout.readline())
            failures, longest = json.loads(process.stdout.readline())
            assert process.wait(10.0) == 0
        finally:
            server.resume()
            process.kill()
    assert [storm[0] for storm in (answering, hanging, after)] == [200, 200, 200]
    assert hanging[1] < 2.0
    assert after[1] < 0.3
    assert 1 <= len(failures) < 10, "each tried for itself"
    assert longest < 0.5

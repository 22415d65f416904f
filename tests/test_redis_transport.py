"""Redis pub/sub against a real Redis: what goes over, what breaks, what is refused."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hiredis
import pytest
import redis
from socketio import RedisManager

from flask_socketio_guard.core.runtime import ThreadRuntime
from flask_socketio_guard.errors import BrokerError, PublishError, PublishRefused
from flask_socketio_guard.queue.outbox import Outbox
from flask_socketio_guard.queue.reachability import Reachability
from flask_socketio_guard.queue.transport import Probe, QueueMessage
from flask_socketio_guard.upstream.redis import connection as redis_link
from flask_socketio_guard.upstream.redis.connection import RedisConnection
from flask_socketio_guard.upstream.redis.errors import describe
from flask_socketio_guard.upstream.redis.subscription import RedisSubscription
from flask_socketio_guard.upstream.redis.transport import RedisTransport, stamp
from tests.support import Sentinel, TcpProxy, free_port, unit_support, wait_until
from tests.support.redis_server import redis_binary
from tests.support.tls import untrusted_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask_socketio_guard.upstream.redis.transport import RedisPublisher
    from tests.support import RedisServer

nothing_left_behind = unit_support.nothing_left_behind

CHANNEL = "flask-socketio"
PASSWORD = "s3cret-passw0rd"
_users = itertools.count(1)


@pytest.fixture
def make_transport(nothing_left_behind: None) -> Callable[..., RedisTransport]:
    """Return a function that makes a transport for a URL; it takes ``redis_options``."""

    def make(url: str, *, answer_timeout: float = 1.0, **options: Any) -> RedisTransport:
        manager = RedisManager(url, channel=CHANNEL, redis_options=options)
        return RedisTransport(manager, answer_timeout=answer_timeout)

    return make


@pytest.fixture
def transport(
    redis_server: RedisServer, make_transport: Callable[..., RedisTransport]
) -> RedisTransport:
    """A transport to this module's Redis."""
    return make_transport(redis_server.url)


@contextmanager
def subscribed(transport: RedisTransport) -> Iterator[RedisSubscription]:
    subscription = transport.subscribe()
    try:
        yield subscription
    finally:
        subscription.close()


@contextmanager
def publishing(
    transport: RedisTransport, is_answering: Callable[[], bool] = lambda: True
) -> Iterator[RedisPublisher]:
    publisher = transport.publisher(is_answering)
    try:
        yield publisher
    finally:
        publisher.close()


def messages(*payloads: bytes) -> list[QueueMessage]:
    return [QueueMessage(number, payload) for number, payload in enumerate(payloads, 1)]


def read(subscription: RedisSubscription, count: int) -> list[Any]:
    """Read until so many things have arrived."""
    found: list[Any] = []
    deadline = time.monotonic() + 5.0
    while len(found) < count and time.monotonic() < deadline:
        found += subscription.read(0.2)
    return found


def user(redis_server: RedisServer, *rules: str) -> str:
    """Make a user with these rules and return the URL for it."""
    name = f"user-{next(_users)}"
    redis_server.command("ACL", "SETUSER", name, "on", f">{PASSWORD}", *rules)
    return f"redis://{name}:{PASSWORD}@127.0.0.1:{redis_server.port}/0"


# The stamp


@pytest.mark.parametrize(
    "payload", [b'{"method": "emit"}', b'{"a":{}}', '{"text": "\\u00fc ü"}'.encode()]
)
def test_a_stamp_adds_the_sequence_number_to_the_object(payload: bytes) -> None:
    stamped = json.loads(stamp(QueueMessage(17, payload)))
    assert stamped == {**json.loads(payload), "guard_seq": 17}


def test_what_is_no_plain_object_goes_unstamped() -> None:
    """A JSON module of the application may end its text otherwise."""
    assert stamp(QueueMessage(1, b'{"a": 1}\n')) == b'{"a": 1}\n'


def test_a_description_is_one_short_line() -> None:
    assert describe(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert describe(RuntimeError()) == "RuntimeError: "
    assert len(describe(RuntimeError("x" * 1000))) == 300


# Over and back


def test_messages_and_probes_come_back_in_order(transport: RedisTransport) -> None:
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        publisher.publish(messages(b'{"n":1}', b'{"n":2}'), 5)
        publisher.publish(messages(b'{"n":3}'), None)
        publisher.publish([], 6)
        arrived = read(subscription, 5)
    assert [json.loads(item)["n"] for item in arrived if isinstance(item, bytes)] == [1, 2, 3]
    assert [item for item in arrived if isinstance(item, Probe)] == [Probe(5), Probe(6)]
    assert json.loads(arrived[0]) == {"n": 1, "guard_seq": 1}


def test_nothing_arrives_when_nothing_was_sent(transport: RedisTransport) -> None:
    with subscribed(transport) as subscription:
        began_at = time.monotonic()
        assert list(subscription.read(0.1)) == []
        assert 0.08 <= time.monotonic() - began_at < 1.0
        assert list(subscription.read(0.0)) == []


def test_many_messages_arrive_complete_and_in_order(transport: RedisTransport) -> None:
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        for start in range(0, 2000, 500):
            batch = [QueueMessage(n, b'{"n":%d}' % n) for n in range(start, start + 500)]
            publisher.publish(batch, None)
        arrived = read(subscription, 2000)
    assert [json.loads(item)["n"] for item in arrived] == list(range(2000))


def test_a_large_message_arrives_whole(transport: RedisTransport) -> None:
    payload = json.dumps({"data": "ü" * 2_000_000}).encode()
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        publisher.publish(messages(payload), None)
        (arrived,) = read(subscription, 1)
    assert json.loads(arrived)["data"] == "ü" * 2_000_000


def test_subscribers_are_counted(transport: RedisTransport, redis_server: RedisServer) -> None:
    with publishing(transport) as publisher:
        assert publisher.publish([], None) == 0
        with subscribed(transport):
            assert publisher.publish([], None) == 1
            assert publisher.publish([], 1) == 1
            assert publisher.publish(messages(b"{}"), None) == 1
            with subscribed(transport):
                assert publisher.publish(messages(b'{"a":1}', b'{"a":2}'), 2) == 2
    wait_until(lambda: redis_server.subscribers() == 0)


def test_each_process_hears_its_own_probes_only(
    redis_server: RedisServer, make_transport: Callable[..., RedisTransport]
) -> None:
    """So their cost grows with the number of processes, and not with its square."""
    mine, other = make_transport(redis_server.url), make_transport(redis_server.url)
    with subscribed(mine) as subscription, publishing(other) as publisher:
        publisher.publish(messages(b'{"n":1}'), 1)
        assert [json.loads(item)["n"] for item in read(subscription, 1)] == [1]
        assert list(subscription.read(0.1)) == []


@pytest.mark.parametrize("text", [b"", b"x", b"-1", b"1.5", b" 1", "²".encode()])
def test_a_probe_that_is_no_number_is_ignored(
    transport: RedisTransport, redis_server: RedisServer, text: bytes
) -> None:
    with subscribed(transport) as subscription, redis_server.client() as client:
        client.publish(transport.probe_channel, text)
        client.publish(CHANNEL, b"after")
        assert read(subscription, 1) == [b"after"]


def test_the_probe_channel_follows_the_host_id(transport: RedisTransport) -> None:
    """Which is renewed in a forked child."""
    before = transport.probe_channel
    transport._manager.host_id = "renewed"
    assert transport.probe_channel == f"{CHANNEL}:guard:renewed" != before


def test_the_managers_own_client_and_options_stay_as_they_are(
    redis_server: RedisServer, make_transport: Callable[..., RedisTransport]
) -> None:
    """Nothing of ours is left in what the application owns."""
    transport = make_transport(redis_server.url, client_name="own")
    manager = transport._manager
    with subscribed(transport):
        assert manager.redis_options == {"client_name": "own"}
        assert manager.redis is None
        assert manager.pubsub is None
        names = [each["name"] for each in redis_server_clients(redis_server)]
        assert "own" in names


def redis_server_clients(redis_server: RedisServer) -> list[dict[str, str]]:
    with redis_server.client() as client:
        listed: list[dict[str, str]] = client.client_list()
        return listed


@pytest.mark.parametrize(
    "options",
    [
        {"decode_responses": True},
        {"decode_responses": True, "encoding": "latin-1"},
        {"health_check_interval": 1},
        {"socket_timeout": 0.01},
        {"socket_timeout": None},
        {"protocol": 3},
        {"retry_on_timeout": True},
        {"db": 5},
    ],
    ids=str,
)
def test_options_of_the_application_do_not_get_in_the_way(
    redis_server: RedisServer,
    make_transport: Callable[..., RedisTransport],
    options: dict[str, Any],
) -> None:
    transport = make_transport(redis_server.url, **options)
    assert transport.check() is None
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        time.sleep(0.05)
        assert publisher.publish(messages('{"text":"ü"}'.encode()), 1) == 1
        arrived = read(subscription, 2)
    assert Probe(1) in arrived
    assert json.loads(arrived[0])["text"] == "ü"


# Ways to Redis


def test_a_password_is_used(redis_server: RedisServer, make_transport: Any) -> None:
    transport = make_transport(user(redis_server, "allchannels", "+@all"))
    assert transport.check() is None
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        publisher.publish([], 1)
        assert read(subscription, 1) == [Probe(1)]


def test_a_wrong_password_is_told_without_the_password(
    redis_server: RedisServer, make_transport: Any
) -> None:
    url = user(redis_server, "allchannels", "+@all").replace(PASSWORD, f"wrong-{PASSWORD}")
    transport = make_transport(url)
    reasons = [str(transport.check())]
    assert transport.check().category == "authentication"
    with pytest.raises(BrokerError) as subscribing:
        transport.subscribe()
    with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
        publisher.publish(messages(b"{}"), None)
    reasons += [str(subscribing.value), str(caught.value)]
    for reason in reasons:
        assert reason is not None
        assert "WRONGPASS" in reason or "invalid username-password" in reason
        assert PASSWORD not in reason
        assert "wrong-" not in reason


def test_redis_on_a_unix_socket_is_reached(tmp_path: Path, make_transport: Any) -> None:
    path = tmp_path / "redis.sock"
    command = [redis_binary(), "--port", "0", "--unixsocket", str(path), "--save", ""]
    server = subprocess.Popen(
        [*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        transport = make_transport(f"unix://{path}?db=1")
        wait_until(lambda: transport.check() is None, message="redis-server does not answer")
        with subscribed(transport) as subscription, publishing(transport) as publisher:
            publisher.publish(messages(b'{"n":1}'), 1)
            assert len(read(subscription, 2)) == 2
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.parametrize("scheme", ["redis+sentinel", "valkey+sentinel"])
def test_sentinel_is_asked_where_the_master_is(
    scheme: str, redis_server: RedisServer, make_transport: Any
) -> None:
    with Sentinel(redis_server) as sentinel:
        transport = make_transport(sentinel.url(scheme))
        wait_until(
            lambda: transport.check() is None, timeout=10, message="the master was not found"
        )
        with subscribed(transport) as subscription, publishing(transport) as publisher:
            publisher.publish(messages(b'{"n":1}'), 1)
            assert len(read(subscription, 2)) == 2
            assert redis_server.subscribers() == 1


def test_the_driver_of_valkey_is_taken_for_its_urls(
    redis_server: RedisServer, make_transport: Any
) -> None:
    url = user(redis_server, "resetchannels", f"&{CHANNEL}", "+@all")
    transport = make_transport(url.replace("redis://", "valkey://"))
    assert transport.exceptions.__name__ == "valkey.exceptions"
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        publisher.publish(messages(b'{"n":1}'), 1)
        assert len(read(subscription, 2)) == 2
        assert not transport.is_probing
    wrong = make_transport(url.replace("redis://", "valkey://").replace(PASSWORD, "wrong"))
    assert wrong.check().category == "authentication"


# Access lists


def test_a_forbidden_publish_is_kept_until_it_is_allowed(
    redis_server: RedisServer, make_transport: Any
) -> None:
    """It is about the right and not about the message."""
    transport = make_transport(user(redis_server, "allchannels", "+@all", "-publish"))
    with publishing(transport) as publisher:
        for _ in range(2):
            with pytest.raises(PublishError) as caught:
                publisher.publish(messages(b'{"a":1}', b'{"a":2}', b'{"a":3}'), None)
            assert not isinstance(caught.value, PublishRefused)
            assert (caught.value.published, caught.value.refused) == (0, 0)
            assert caught.value.category == "permission"
            assert "publish" in str(caught.value)
            assert PASSWORD not in str(caught.value)
        redis_server.command("ACL", "SETUSER", f"user-{next(_users) - 1}", "+publish")
        assert publisher.publish(messages(b'{"a":1}'), None) == 0


def test_a_forbidden_channel_is_refused(redis_server: RedisServer, make_transport: Any) -> None:
    transport = make_transport(user(redis_server, "resetchannels", "&other", "+@all"))
    with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
        publisher.publish(messages(b"{}"), None)
    assert caught.value.category == "permission"
    with pytest.raises(BrokerError, match="channel") as subscribing:
        transport.subscribe()
    assert subscribing.value.category == "permission"
    assert transport.check() is None


def test_who_may_not_ping_is_answered(redis_server: RedisServer, make_transport: Any) -> None:
    transport = make_transport(user(redis_server, "allchannels", "-@all", "+subscribe"))
    assert transport.check() is None


def test_without_the_channel_of_probes_they_are_pings_over_the_subscription(
    redis_server: RedisServer, make_transport: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An access list that names the channel of Flask-SocketIO alone."""
    url = user(redis_server, "resetchannels", f"&{CHANNEL}", "+@all")
    name = f"user-{next(_users) - 1}"
    transport = make_transport(url)
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        assert not transport.is_probing
        for token in (1, 2):
            publisher.publish(messages(b'{"n":1}'), token)
            assert set(read(subscription, 2)) == {b'{"n":1, "guard_seq": 1}', Probe(token)}
        redis_server.command("ACL", "SETUSER", name, f"&{CHANNEL}:guard:*")
        for token in range(3, 20):
            publisher.publish([], token)
            assert read(subscription, 1) == [Probe(token)]
        assert transport.is_probing
        assert redis_server.subscribers(transport.probe_channel) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "without end-to-end probes" in caplog.records[0].getMessage()
    assert "was granted" in caplog.records[1].getMessage()


def test_a_probe_that_may_not_be_published_is_a_ping(
    redis_server: RedisServer, make_transport: Any
) -> None:
    """The right was taken, and the subscription has not ended yet."""
    listening = make_transport(redis_server.url)
    forbidden = make_transport(user(redis_server, "resetchannels", f"&{CHANNEL}", "+@all"))
    with subscribed(listening) as subscription, publishing(forbidden) as publisher:
        forbidden._subscription = subscription
        publisher.publish([], 1)
        assert read(subscription, 1) == [Probe(1)]
        assert not forbidden.is_probing
        publisher.publish([], 2)
        assert read(subscription, 1) == [Probe(2)]


def test_a_half_open_subscription_without_probes_is_silent(
    redis_server: RedisServer, make_transport: Any
) -> None:
    url = user(redis_server, "resetchannels", f"&{CHANNEL}", "+@all")
    with TcpProxy(redis_server.port) as proxy:
        transport = make_transport(url.replace(str(redis_server.port), str(proxy.port)))
        with subscribed(transport) as subscription, publishing(transport) as publisher:
            publisher.publish([], 1)
            assert read(subscription, 1) == [Probe(1)]
            proxy.black_hole()
            transport.ping(2, is_refused=False)
            assert [list(subscription.read(0.1)) for _ in range(3)] == [[], [], []]


def test_a_list_that_allows_the_channel_and_what_begins_like_it_is_enough(
    redis_server: RedisServer, make_transport: Any
) -> None:
    """What an administrator has to grant."""
    url = user(
        redis_server,
        "resetchannels",
        f"&{CHANNEL}",
        f"&{CHANNEL}:guard:*",
        "-@all",
        "+ping",
        "+publish",
        "+subscribe",
    )
    transport = make_transport(url)
    assert transport.check() is None
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        publisher.publish(messages(b"{}"), 3)
        assert Probe(3) in read(subscription, 2)


def test_a_forbidden_count_is_not_asked_for_again(
    redis_server: RedisServer, make_transport: Any
) -> None:
    """PUBLISH itself tells how many got the message."""
    transport = make_transport(user(redis_server, "allchannels", "+@all", "-pubsub"))
    with subscribed(transport), publishing(transport) as publisher:
        assert publisher.publish(messages(b"{}"), 1) == 1
        assert publisher.publish([], None) is None
        assert publisher.publish([], 2) is None
        assert publisher.publish(messages(b'{"a":1}', b'{"a":2}'), None) == 1


# Faults


@pytest.fixture
def untrusted() -> Iterator[int]:
    """The port of a server with a certificate that nobody trusts."""
    with untrusted_server() as port:
        yield port


def test_what_is_wrong_with_the_way_to_redis_has_a_category(
    redis_server: RedisServer, untrusted: int, make_transport: Any
) -> None:
    """Which health tells, where the driver's words may be too much."""
    url = user(redis_server, "allchannels", "+@all", "-select")
    ways = {
        "certificate": f"rediss://127.0.0.1:{untrusted}/0",
        "tls": f"rediss://127.0.0.1:{redis_server.port}/0",
        "name": "redis://no-such-host.invalid:6379/0",
        "unreachable": f"redis://127.0.0.1:{free_port()}/0",
        "authentication": url.replace(PASSWORD, "wrong"),
        "permission": url.replace("/0", "/1"),
    }
    found = {}
    for way, address in ways.items():
        transport = make_transport(address)
        with publishing(transport) as publisher, pytest.raises(PublishError) as publishing_failed:
            publisher.publish(messages(b"{}"), None)
        with pytest.raises(BrokerError) as subscribing_failed:
            transport.subscribe()
        found[way] = {
            transport.check().category,
            publishing_failed.value.category,
            subscribing_failed.value.category,
        }
    found["tls"] -= {"unreachable"}  # a plain port may also close the connection
    assert found == {way: {way} for way in ways} | {"tls": found["tls"] & {"tls"}}


def test_who_needs_a_password_and_has_none_is_not_let_in(
    make_redis: Callable[[], RedisServer], make_transport: Any
) -> None:
    """Redis says so to each command, and not when the connection is made."""
    server = make_redis()
    transport = make_transport(server.url)
    with publishing(transport) as publisher:
        assert publisher.publish(messages(b"{}"), None) == 0
        publisher.close()
        server.command("CONFIG", "SET", "requirepass", PASSWORD)
        with pytest.raises(PublishError) as caught:
            publisher.publish(messages(b"{}"), None)
    assert not isinstance(caught.value, PublishRefused)
    with pytest.raises(BrokerError) as subscribing:
        transport.subscribe()
    assert {
        transport.check().category,
        caught.value.category,
        subscribing.value.category,
    } == {"authentication"}


@pytest.mark.parametrize(
    "word",
    [
        "BUSY a script is running",
        "MISCONF cannot save",
        "MASTERDOWN connection with the master is down",
        "CLUSTERDOWN the cluster is down",
        "READONLY a replica",
        "OOM command not allowed",
    ],
)
def test_what_is_refused_for_now_is_to_be_sent_again(make_transport: Any, word: str) -> None:
    """It has nothing to do with the message."""
    with ScriptedRedis(OK, f"-{word}\r\n".encode()) as server:
        transport = make_transport(server.url)
        with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
            publisher.publish(messages(*[b'{"a":1}'] * 2), None)
    assert not isinstance(caught.value, PublishRefused)
    assert (caught.value.published, caught.value.refused) == (1, 0)


def test_a_broker_that_is_not_there_is_told(make_transport: Any) -> None:
    transport = make_transport(f"redis://127.0.0.1:{free_port()}/0")
    trouble = transport.check()
    assert "refused" in str(trouble)
    assert trouble.category == "unreachable"
    with pytest.raises(BrokerError, match="refused"):
        transport.subscribe()
    with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
        publisher.publish(messages(b"{}"), 1)
    assert caught.value.published == 0
    assert isinstance(caught.value.__cause__, BrokerError)


def test_a_broker_that_hangs_is_told_in_time(
    make_redis: Callable[[], RedisServer], make_transport: Any
) -> None:
    server = make_redis()
    transport = make_transport(server.url, answer_timeout=0.3)
    server.pause()
    try:
        began_at = time.monotonic()
        assert transport.check() is not None
        with pytest.raises(BrokerError):
            transport.subscribe()
        assert time.monotonic() - began_at < 3.0
    finally:
        server.resume()


def test_a_publisher_waits_for_a_broker_that_hangs(
    make_redis: Callable[[], RedisServer], make_transport: Any
) -> None:
    """To give up would send again what may be on its way."""
    server = make_redis()
    transport = make_transport(server.url, answer_timeout=0.1)
    with subscribed(transport) as subscription, publishing(transport) as publisher:
        asked: list[bool] = []

        def is_answering() -> bool:
            asked.append(True)
            if len(asked) == 3:
                server.resume()
            return False

        publisher._is_answering = is_answering
        publisher.publish(messages(b'{"n":0}'), None)
        server.pause()
        try:
            publisher.publish(messages(b'{"n":1}', b'{"n":2}'), None)
        finally:
            server.resume()
        assert len(asked) >= 3
        assert [json.loads(item)["n"] for item in read(subscription, 3)] == [0, 1, 2]


def test_a_half_open_connection_is_given_up_when_the_broker_answers_elsewhere(
    redis_server: RedisServer, make_transport: Any
) -> None:
    with TcpProxy(redis_server.port) as proxy:
        transport = make_transport(redis_server.url_through(proxy.port), answer_timeout=0.2)
        with publishing(transport, lambda: transport.check() is None) as publisher:
            publisher.publish(messages(b"{}"), None)
            assert proxy.black_hole() == 1
            began_at = time.monotonic()
            with pytest.raises(PublishError, match="half open") as caught:
                publisher.publish(messages(b"{}"), None)
            assert caught.value.published == 0
            assert time.monotonic() - began_at < 2.0
            assert publisher.publish(messages(b"{}"), None) == 0


def test_a_half_open_subscription_is_silent(redis_server: RedisServer, make_transport: Any) -> None:
    """Nothing on this connection can tell; that is what probes are for."""
    with TcpProxy(redis_server.port) as proxy:
        transport = make_transport(redis_server.url_through(proxy.port))
        with subscribed(transport) as subscription, publishing(transport) as publisher:
            proxy.black_hole()
            publisher.publish([], 1)
            assert list(subscription.read(0.2)) == []


def test_a_lost_subscription_stays_lost(redis_server: RedisServer, make_transport: Any) -> None:
    """redis-py would connect again by itself, and be subscribed to nothing."""
    with TcpProxy(redis_server.port) as proxy:
        transport = make_transport(redis_server.url_through(proxy.port))
        with subscribed(transport) as subscription:
            proxy.drop()
            for _ in range(3):
                with pytest.raises(BrokerError):
                    subscription.read(0.5)
            wait_until(lambda: redis_server.subscribers() == 0)


def test_a_closed_subscription_cannot_be_read(transport: RedisTransport) -> None:
    subscription = transport.subscribe()
    subscription.close()
    subscription.close()
    for _ in range(2):
        with pytest.raises(BrokerError):
            subscription.read(0.1)


def test_a_read_under_way_ends_when_the_subscription_is_closed(transport: RedisTransport) -> None:
    subscription = transport.subscribe()
    ended: list[BaseException] = []

    def read_for_long() -> None:
        try:
            subscription.read(30.0)
        except BrokerError as exc:
            ended.append(exc)

    thread = threading.Thread(target=read_for_long)
    thread.start()
    time.sleep(0.05)
    subscription.close()
    thread.join(5.0)
    assert not thread.is_alive()
    assert len(ended) == 1


def test_a_publisher_connects_anew_after_a_loss(
    redis_server: RedisServer, make_transport: Any
) -> None:
    with TcpProxy(redis_server.port) as proxy:
        transport = make_transport(redis_server.url_through(proxy.port))
        with publishing(transport) as publisher:
            publisher.publish(messages(b"{}"), None)
            proxy.drop()
            with pytest.raises(PublishError):
                publisher.publish(messages(b"{}"), None)
            assert publisher.publish(messages(b"{}"), None) == 0


class ScriptedRedis:
    """Speaks just enough of Redis's protocol to break at a chosen byte.

    What no real server does on demand: answer some commands of a pipeline and die.
    """

    def __init__(self, *replies: bytes, is_slow: bool = False) -> None:
        self._replies = list(replies)
        self._piece = 1 if is_slow else 1 << 20
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._server.getsockname()[1]}/0"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as stream:
            replies = list(self._replies)
            while replies:
                line = stream.readline()
                if not line:
                    return
                words = []
                for _ in range(int(line[1:])):
                    stream.readline()
                    words.append(stream.readline().strip())
                if words[0].upper() in (b"PUBLISH", b"SUBSCRIBE"):
                    reply = replies.pop(0)
                    for start in range(0, len(reply), self._piece):
                        connection.sendall(reply[start : start + self._piece])
                else:
                    connection.sendall(b"+OK\r\n")

    def __enter__(self) -> ScriptedRedis:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._thread.join(5.0)


OK, NO = b":2\r\n", b"-ERR not this one\r\n"
GRANTED = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n" * 2


def said(payload: bytes) -> bytes:
    """Return a message of the channel as a subscriber gets it."""
    return b"*3\r\n$7\r\nmessage\r\n$14\r\nflask-socketio\r\n$%d\r\n%b\r\n" % (
        len(payload),
        payload,
    )


@pytest.mark.parametrize(
    ("replies", "published"),
    [([OK], 1), ([OK, OK], 2), ([OK, b":"], 1), ([b"+garbage", b"\r\n"], 0)],
    ids=["one", "two", "one-and-a-half", "half"],
)
def test_what_was_acknowledged_before_the_loss_is_counted(
    make_transport: Any, replies: list[bytes], published: int
) -> None:
    if published == 0:
        replies = [b"+garb"]
    with ScriptedRedis(*replies) as server:
        transport = make_transport(server.url, answer_timeout=0.5)
        with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
            publisher.publish(messages(*[b'{"a":1}'] * 4), None)
    assert caught.value.published == published
    assert not isinstance(caught.value, PublishRefused)


def test_some_of_a_batch_may_be_refused(make_transport: Any) -> None:
    with ScriptedRedis(OK, NO, OK, NO) as server:
        transport = make_transport(server.url)
        with publishing(transport) as publisher, pytest.raises(PublishRefused) as caught:
            publisher.publish(messages(*[b'{"a":1}'] * 4), None)
    assert (caught.value.published, caught.value.refused) == (2, 2)
    assert "not this one" in str(caught.value)


def test_a_refusal_before_a_loss_is_counted(make_transport: Any) -> None:
    """Two of four went out, one was refused, one has to be sent again."""
    lost: list[tuple[int, str]] = []
    with ScriptedRedis(OK, NO, OK) as server:
        transport = make_transport(server.url, answer_timeout=0.5)
        with publishing(transport) as publisher:
            outbox = Outbox(
                ThreadRuntime(),
                publisher,
                Reachability(transport.check, on_change=lambda *_: None),
                max_messages=100,
                max_bytes=10_000,
                is_dropping_oldest=False,
                reconnect_max_delay=0.1,
                resubscribe_timeout=0.0,
                is_listening=lambda: True,
                on_lost=lambda count, reason, _: lost.append((count, reason)),
                on_trouble=lambda _: None,
                on_probe=lambda _: None,
            )
            for _ in range(4):
                outbox.put(b'{"a":1}')
            with pytest.raises(PublishError):
                outbox._publish_once()
    assert len(outbox) == 1
    assert lost == [(1, "refused")]


def test_what_arrived_before_a_loss_is_handed_over_first(make_transport: Any) -> None:
    """The connection breaks in the middle of the second message."""
    with ScriptedRedis(GRANTED + said(b"{}") + said(b"{}")[:20]) as server:
        transport = make_transport(server.url, answer_timeout=0.5)
        with subscribed(transport) as subscription:
            assert read_once(subscription) == [b"{}"]
            for _ in range(2):
                with pytest.raises(BrokerError):
                    subscription.read(0.2)


def read_once(subscription: RedisSubscription) -> list[Any]:
    return list(subscription.read(2.0))


def test_the_driver_is_the_one_that_socketio_uses(transport: RedisTransport) -> None:
    assert transport.exceptions is redis.exceptions
    assert transport.name == "redis"


def test_replies_may_come_in_pieces(make_transport: Any) -> None:
    with ScriptedRedis(OK, NO, OK, is_slow=True) as server:
        transport = make_transport(server.url)
        with publishing(transport) as publisher, pytest.raises(PublishRefused) as caught:
            publisher.publish(messages(*[b'{"a":1}'] * 3), None)
    assert (caught.value.published, caught.value.refused) == (2, 1)


def test_messages_may_come_in_pieces(make_transport: Any) -> None:
    payloads = [b"{}", b'{"a": "\r\n"}', b'{"a": 2}']
    with ScriptedRedis(GRANTED + b"".join(map(said, payloads)), is_slow=True) as server:
        transport = make_transport(server.url)
        found: list[Any] = []
        with subscribed(transport) as subscription:
            while len(found) < len(payloads):
                found += subscription.read(2.0)
    assert found == payloads


# A slow connection


class SlowSocket:
    """Takes what it is told to, and passes time in between.

    Args:
        connection: Whose socket it becomes.
        takes: How many bytes each call takes; ``None`` for none in its timeout.
        unsent: How many bytes the kernel has not got rid of, at each look.
    """

    def __init__(
        self, connection: RedisConnection, takes: list[int | None], unsent: list[int | None]
    ) -> None:
        self.got = b""
        self.largest = 0
        self._takes = takes
        connection._sock = self
        connection.unsent = lambda: unsent.pop(0) if unsent else 0  # type: ignore[method-assign]

    def send(self, data: memoryview) -> int:
        count = self._takes.pop(0) if self._takes else len(data)
        self.largest = max(self.largest, len(data))
        if count is None:
            raise TimeoutError
        self.got += data[:count]
        return min(count, len(data))


@pytest.fixture
def wired() -> Iterator[tuple[RedisConnection, socket.socket]]:
    """A connection to nobody, and the other end of its socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as here:
        for sock, buffer in ((listening, socket.SO_RCVBUF), (here, socket.SO_SNDBUF)):
            sock.setsockopt(socket.SOL_SOCKET, buffer, 32 * 1024)
        here.connect(listening.getsockname())
        there = listening.accept()[0]
        parser = SimpleNamespace(parse_error=RuntimeError)
        with there:
            yield RedisConnection(SimpleNamespace(_sock=here, _parser=parser)), there


COMMAND = ("PUBLISH", "x", b"a" * 300_000)


def test_a_large_message_has_time_as_long_as_redis_takes_of_it(
    wired: tuple[RedisConnection, socket.socket],
) -> None:
    """Some timeouts pass; were it given up, it would be sent again, for ever."""
    connection, _ = wired
    sock = SlowSocket(connection, [5000, None, None, 3, None], [9000, 8000, 7999, 7000, 6000])
    connection.send([COMMAND, ("PING",)])
    assert sock.got == hiredis.pack_command(COMMAND) + hiredis.pack_command(("PING",))
    assert sock.largest <= 64 * 1024, "TLS shows nothing of what it is given at a time"


@pytest.mark.parametrize("unsent", [[9000, 9000], [9000, 8000, 8000], [None, None], [9000, None]])
def test_a_message_of_which_redis_takes_no_more_is_given_up(
    wired: tuple[RedisConnection, socket.socket], unsent: list[int | None]
) -> None:
    connection, _ = wired
    SlowSocket(connection, [5000, *[None] * 5], unsent)
    with pytest.raises(TimeoutError):
        connection.send([COMMAND])


def test_a_link_knows_what_has_not_arrived(wired: tuple[RedisConnection, socket.socket]) -> None:
    connection, there = wired
    connection._sock.settimeout(0.1)
    assert connection.unsent() == 0
    with pytest.raises(TimeoutError):
        connection.send([("PUBLISH", "x", b"a" * 5_000_000)])
    assert connection.unsent()
    while connection.unsent():
        assert there.recv(65536)
    connection._sock.close()
    assert connection.unsent() is None


class Answering:
    """A connection whose answers take their time."""

    def __init__(self, unsent: list[int], replies: list[list[int]]) -> None:
        self.unsent = lambda: unsent.pop(0)
        self.read = lambda _timeout: replies.pop(0)


def test_the_answer_to_a_large_message_has_time_as_long_as_it_is_on_its_way(
    transport: RedisTransport,
) -> None:
    """Redis answers others meanwhile, and so this connection would count as half open."""
    with publishing(transport, lambda: True) as publisher:
        replies: list[Any] = []
        connection: Any = Answering([9000, 5000, 0], [[], [], [1]])
        publisher._collect(replies, 1, connection)
        assert replies == [1]
        for unsent in ([9000, 9000], [0, 0], [9000, 0, 0]):
            connection = Answering(unsent, [[], [], []])
            with pytest.raises(TimeoutError, match="half open"):
                publisher._collect([], 1, connection)


def test_a_message_is_on_its_way_between_its_first_byte_and_its_last(
    wired: tuple[RedisConnection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, there = wired
    now = 1000.0
    monkeypatch.setattr(redis_link, "clock", lambda: now)
    assert not connection.is_receiving
    reply = said(b"x" * 1000)
    there.sendall(reply + reply[:500])
    subscription = RedisSubscription(connection, CHANNEL, "probes", [])
    assert read_once(subscription) == [b"x" * 1000]
    assert subscription.is_receiving
    now += 0.9
    assert subscription.is_receiving
    now += 0.2
    assert not subscription.is_receiving, "nothing more of it came for a second"
    there.sendall(reply[500:501])
    assert list(subscription.read(0.1)) == []
    assert subscription.is_receiving
    there.sendall(reply[501:])
    assert read_once(subscription) == [b"x" * 1000]
    assert not subscription.is_receiving


def test_a_server_that_is_loading_has_taken_nothing(make_transport: Any) -> None:
    """It means the connection and not the message, which is to be sent again."""
    with ScriptedRedis(OK, b"-LOADING Redis is loading the dataset in memory\r\n") as server:
        transport = make_transport(server.url)
        with publishing(transport) as publisher, pytest.raises(PublishError) as caught:
            publisher.publish(messages(*[b'{"a":1}'] * 2), None)
    assert not isinstance(caught.value, PublishRefused)
    assert (caught.value.published, caught.value.refused) == (1, 0)


@pytest.mark.parametrize(
    "noise",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 100, b"*-7\r\n"],
    ids=["http", "zeros", "length"],
)
def test_a_server_that_is_no_redis_is_an_error(make_transport: Any, noise: bytes) -> None:
    with ScriptedRedis(noise) as server:
        transport = make_transport(server.url, answer_timeout=0.5)
        with publishing(transport) as publisher, pytest.raises(PublishError):
            publisher.publish(messages(b"{}"), None)
    with ScriptedRedis(noise) as server, pytest.raises(BrokerError):
        make_transport(server.url, answer_timeout=0.5).subscribe()
    # It waits for more, and does not close the connection.
    with ScriptedRedis(GRANTED + said(b"{}") + noise, b"") as server:
        transport = make_transport(server.url, answer_timeout=0.5)
        with subscribed(transport) as subscription:
            assert read_once(subscription) == [b"{}"]
            with pytest.raises(BrokerError):
                subscription.read(0.5)

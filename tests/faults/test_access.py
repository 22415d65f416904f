"""Redis does not let a process in, or not everywhere; or it was never reached at all."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import APP, health_details, wait_until_delivering
from tests.faults.watches import HealthWatch
from tests.support import GunicornServer, TcpProxy, wait_until
from tests.support.tls import untrusted_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RedisServer, SocketIOClient
    from tests.support.servers import LogRecord

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(90)

PASSWORD = "s3cret-passw0rd"
CHANNEL = "flask-socketio"
_OUTBOX = 50
both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])


@pytest.fixture
def launch(async_mode: str) -> Iterator[Callable[..., GunicornServer]]:
    """Return a function that starts a guarded server on a URL, and does not wait for it."""
    launched: list[GunicornServer] = []

    def start(url: str) -> GunicornServer:
        config = json.dumps(
            {
                "SOCKETIO_GUARD_PROBE_INTERVAL": 0.1,
                "SOCKETIO_GUARD_PROBE_TIMEOUT": 1.0,
                "SOCKETIO_GUARD_OUTBOX_MAX_MESSAGES": _OUTBOX,
            }
        )
        env = {"GUARD": "1", "REDIS_URL": url, "ASYNC_MODE": async_mode, "APP_CONFIG": config}
        server = GunicornServer(APP, async_mode=async_mode, env=env)
        launched.append(server)
        server.launch()
        return server

    yield start
    for server in launched:
        server.close()


def warnings(server: GunicornServer) -> list[LogRecord]:
    """Return what was logged that people should act upon."""
    return server.records(matching=lambda record: record.level in {"WARNING", "ERROR"})


def observed(server: GunicornServer, key: str) -> Any:
    """Return what health observes under *key*, and its output."""
    (entry,) = health_details(server)["checks"][key]
    return entry["observedValue"], entry.get("output")


def status(server: GunicornServer) -> int:
    """Return the status of ``/readyz``, which that of ``/healthz`` equals."""
    found = {server.get(path).status_code for path in ("/readyz", "/healthz")}
    assert server.get("/livez").status_code == 200
    return found.pop() if len(found) == 1 else 0


@both_modes
def test_a_right_to_the_channel_of_flask_socketio_alone_is_enough(
    make_redis: Callable[[], RedisServer],
    launch: Callable[..., GunicornServer],
    sio_client: Connect,
    measured: Measured,
) -> None:
    """Without the guard it is, too. The rights change while the processes run."""
    redis = make_redis()

    def grant(*rules: str) -> None:
        redis.command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "+@all", *rules)

    grant("resetchannels", f"&{CHANNEL}")
    with TcpProxy(redis.port) as proxy:
        urls = [f"redis://app:{PASSWORD}@127.0.0.1:{port}/0" for port in (proxy.port, redis.port)]
        a, b = servers = [launch(url) for url in urls]
        for server in servers:
            server.wait_until_serving()
            wait_until(lambda: status(server) == 200, message="not ready")  # noqa: B023
        witness = sio_client(a)
        assert [b.post("/emit", event="news")["errors"] for _ in range(3)] == [[], [], []]
        witness.wait_for("news", count=3, message="the listener is deaf")
        assert health_details(a)["listener"] == "running"
        assert observed(a, "listener:probes") == ("connection only", None)
        said = [record.message for record in warnings(a)]
        assert sum("without end-to-end probes" in message for message in said) == 1

        with HealthWatch(a, "/livez"):
            assert proxy.black_hole() > 0
            deaf = wait_until_delivering(b, witness, message="half open, and nobody noticed")
        measured("delivering again after", deaf)

        grant("resetchannels")
        wait_until(lambda: status(a) == 503, message="a process without its channel is ready")
        grant(f"&{CHANNEL}")
        wait_until(lambda: status(a) == 200, message="not ready again")
        wait_until_delivering(b, witness)
        grant(f"&{CHANNEL}:guard:*")
        wait_until(lambda: observed(a, "listener:probes") == ("end to end", None), timeout=10)
        wait_until_delivering(b, witness)

        grant("-publish")
        own = sio_client(b)
        assert b.post("/emit", event="local", count=3 * _OUTBOX)["errors"] == []
        own.wait_for("local", count=3 * _OUTBOX)
        wait_until(lambda: observed(b, "outbox:messages") == (_OUTBOX, "permission"))
        assert (health_details(b)["status"], status(b)) == ("warn", 200)
        wait_until(lambda: observed(b, "outbox_dropped:count") == (2 * _OUTBOX, None))
        said = [record.message for record in warnings(b)]
        assert sum("refuses to publish messages" in message for message in said) == 1
        assert any("dropped: overflow" in message for message in said)
        assert witness.events("local") == []
        grant("+publish")
        witness.wait_for("local", count=_OUTBOX)
        wait_until(lambda: health_details(b)["status"] == "pass")
    assert not any(PASSWORD in record.message for record in warnings(a))


@pytest.mark.parametrize(
    "tried",
    [("authentication", "certificate"), pytest.param(("tls", "name"), marks=pytest.mark.long)],
    ids="-".join,
)
def test_a_process_that_never_reached_its_broker_is_not_ready(
    redis_server: RedisServer, launch: Callable[..., GunicornServer], tried: tuple[str, ...]
) -> None:
    """A broken deploy must not pass. The reason is in the log, and no secret anywhere."""
    redis_server.command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "allchannels", "+@all")
    with untrusted_server() as port:
        ways = {
            "authentication": f"redis://app:not-{PASSWORD}@127.0.0.1:{redis_server.port}/0",
            "certificate": f"rediss://app:{PASSWORD}@127.0.0.1:{port}/0",
            "tls": f"rediss://app:{PASSWORD}@127.0.0.1:{redis_server.port}/0",
            "name": f"redis://app:{PASSWORD}@no-such-host.invalid:6379/0",
        }
        servers = {way: launch(url) for way, url in ways.items() if way in tried}
        for server in servers.values():
            server.wait_until_serving()
        reasons = {
            "authentication": "invalid username-password|WRONGPASS",
            "certificate": "certificate verify failed",
            "tls": "SSL|closed|reset|Timeout",
            "name": "not known|resol|-2|-3|-5",
        }
        for way, server in servers.items():
            # A plain port that is spoken TLS to may also say nothing, or close the connection.
            told = {(False, way), (False, "unreachable" if way == "tls" else way)}
            wait_until(
                lambda server=server, told=told: (  # type: ignore[misc]
                    observed(server, "broker:reachable") in told
                ),
                message=f"health does not tell of {way}",
            )
            assert status(server) == 503
            messages = " ".join(record.message for record in warnings(server))
            assert re.search(reasons[way], messages), messages
            for text in (messages, server.log(), server.get("/healthz").text):
                assert PASSWORD not in text


def test_a_broker_that_is_away_is_a_shared_fault_once_it_was_reached(
    make_redis: Callable[[], RedisServer], launch: Callable[..., GunicornServer], measured: Measured
) -> None:
    """First it is not there yet, then it is, then it is not, and then it asks for a password."""
    redis = make_redis()
    redis.kill()
    server = launch(redis.url)
    server.wait_until_serving()
    wait_until(lambda: health_details(server)["listener"] == "reconnecting")
    assert status(server) == 503
    redis.start()
    wait_until(lambda: status(server) == 200, message="not ready although Redis is there")
    redis.kill()
    wait_until(lambda: health_details(server)["status"] == "warn")
    assert status(server) == 200
    redis.start()
    wait_until(lambda: health_details(server)["status"] == "pass")
    redis.command("CONFIG", "SET", "requirepass", PASSWORD)
    with redis.client(password=PASSWORD) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal")
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: status(server) == 503, message="ready although Redis refuses it")
    assert observed(server, "broker:reachable") == (False, "authentication")
    errors = [record.message for record in warnings(server) if record.level == "ERROR"]
    measured("said", errors[0])
    assert errors[0].startswith("the message queue refuses this process: ")
    with redis.client(password=PASSWORD) as client:
        client.config_set("requirepass", "")
    wait_until(lambda: status(server) == 200, message="not ready although it is let in")

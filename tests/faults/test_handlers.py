"""Handlers that raise, and events that a client must not be able to send."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import Fleet, counter, runs
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer, RawClient

    Connect = Callable[..., RawClient]
    Measured = Callable[[str, object], None]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.parametrize("async_mode", ["gevent", "threading"]),
]

HANDLER_RAISES = "handler raises, client waits for an ack"
CONNECT_RAISES = "`connect` raises without an error handler"
RESERVED_EVENT = "client sends an event named `connect` or `disconnect`"


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """One process without a message queue."""
    return make_fleet(processes=1, has_queue=False)


@pytest.fixture
def server(fleet: Fleet) -> GunicornServer:
    """The one process."""
    return fleet.a


def wait_for_answer(client: RawClient) -> str:
    """Return the answer to a CONNECT packet: CONNECT (``40``) or CONNECT_ERROR (``44``)."""
    answer = wait_until(
        lambda: next(
            (text for text, _ in list(client.frames) if text.startswith(("40", "44"))), None
        ),
        timeout=3,
        message="the client got no answer at all",
    )
    assert answer is not None
    return answer


def assert_refused(frame: str) -> None:
    """Assert that *frame* is a CONNECT_ERROR which tells an error id and no secret."""
    assert frame.startswith("44"), "the client was let in"
    error = json.loads(frame[2:])
    assert error["data"]["code"] == "internal_error"
    assert error["data"]["id"]
    assert "secret" not in frame


@pytest.mark.faults(
    HANDLER_RAISES, stock="never answered", because="the acknowledgement was never answered"
)
def test_failed_handler_answers_its_acknowledgement(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A handler raises while the client waits for an acknowledgement."""
    client = raw_client(server)
    sent_at = time.monotonic()
    client.emit("raise", ack_id=7)
    (answer,) = client.wait_for_ack(7, timeout=3, message="the acknowledgement was never answered")
    measured("answered after", time.monotonic() - sent_at)
    assert answer["error"]["code"] == "internal_error"
    assert answer["error"]["id"]
    assert "secret" not in json.dumps(answer)
    assert client.call("echo", "still there", ack_id=8) == ["still there"]


@pytest.mark.faults(
    HANDLER_RAISES, stock="traceback to stderr, no log record", because="there is no log record"
)
def test_failed_handler_is_logged_once_with_traceback_and_error_id(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A handler raises, and the log must hold one record that support can find by the id."""
    client = raw_client(server)
    since = time.time()
    client.emit("raise", ack_id=7)

    def find() -> list[Any]:
        return server.records(
            since=since, matching=lambda record: "handler failed: secret" in record.traceback
        )

    wait_until(find, timeout=3, message="there is no log record with the traceback")
    (answer,) = client.wait_for_ack(7)
    assert client.call("echo", "drained", ack_id=8) == ["drained"]
    records = find()
    measured("log records", len(records))
    assert len(records) == 1
    assert records[0].level == "ERROR"
    assert records[0].logger == "flask_socketio_guard"
    assert records[0].error_id == answer["error"]["id"]
    assert answer["error"]["id"] in records[0].message


@pytest.mark.faults(
    "`connect` raises while `on_error_default` is set",
    stock="client is let in",
    because="the client was let in",
)
def test_client_is_refused_although_an_error_handler_answers_for_connect(
    make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """The connect handler raises, and what the error handler returns counts as success."""
    server = make_fleet(processes=1, has_queue=False, error_handler=True).a
    connects, errors = runs(server, "connect:raise"), runs(server, "error-handler")
    client = raw_client(server, query="connect=raise", join=False)
    client.send("40")
    answer = wait_for_answer(client)
    measured("answer", answer[:2])
    assert_refused(answer)
    assert runs(server, "connect:raise") == connects + 1
    assert runs(server, "error-handler") == errors + 1


@pytest.mark.faults(
    CONNECT_RAISES, stock="no answer at all", because="the client got no answer at all"
)
def test_client_is_refused_when_connect_raises(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """The connect handler raises, and the client waits for an answer."""
    client = raw_client(server, query="connect=raise", join=False)
    sent_at = time.monotonic()
    client.send("40")
    answer = wait_for_answer(client)
    measured("answered after", time.monotonic() - sent_at)
    assert_refused(answer)


@pytest.mark.faults(
    CONNECT_RAISES, stock="the client's entry leaks", because="the client's entry stays"
)
def test_refused_client_leaves_no_trace(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """The connect handler raises, and the tables must not remember the client."""
    before = runs(server, "connect:raise")
    client = raw_client(server, query="connect=raise", join=False)
    client.send("40")
    wait_until(lambda: runs(server, "connect:raise") > before, message="connect was not run")
    client.vanish()
    wait_until(
        lambda: server.state()["tables"]["environs"] == 0,
        message="the Engine.IO connection does not end",
    )

    def leaked() -> int:
        tables = server.state()["tables"]
        return max(int(tables["clients"]), int(tables["connecting"]))

    measured("entries left", leaked())
    wait_until(lambda: not leaked(), timeout=2, message="the client's entry stays")


@pytest.mark.faults(
    CONNECT_RAISES, stock="a TypeError bug runs it 4 times", because="connect was run 4 times"
)
def test_connect_handler_with_a_type_error_is_run_once(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A TypeError inside the connect handler is taken for a wrong signature."""
    before = runs(server, "connect:type-error")
    client = raw_client(server, query="connect=type-error", join=False)
    client.send("40")
    wait_until(lambda: runs(server, "connect:type-error") > before, message="connect was not run")
    times = runs(server, "connect:type-error") - before
    measured("runs", times)
    assert times == 1, f"connect was run {times} times"
    assert_refused(wait_for_answer(client))
    assert runs(server, "connect:type-error") == before + 1


@pytest.mark.faults(
    RESERVED_EVENT,
    stock="runs the application's handler while the client stays connected",
    because="the client ran the application's",
)
@pytest.mark.parametrize("event", ["connect", "disconnect"])
def test_event_with_a_reserved_name_is_rejected(
    event: str, server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A client sends an ordinary event whose name belongs to the protocol."""
    client = raw_client(server)
    handler = "connect:" if event == "connect" else event
    # An earlier test's clients may only now be seen to have gone.
    wait_until(lambda: server.state()["tables"]["clients"] == 1)
    runs_before, rejected_before = runs(server, handler), counter(server, "events_rejected")
    client.emit(event, "x")
    wait_until(
        lambda: (
            runs(server, handler) > runs_before
            or counter(server, "events_rejected") > rejected_before
        ),
        timeout=3,
        message="the event was neither rejected nor handled",
    )
    times = runs(server, handler) - runs_before
    measured("handler runs", times)
    assert times == 0, f"the client ran the application's {event} handler"
    assert counter(server, "events_rejected") == rejected_before + 1
    assert client.call("echo", "still there", ack_id=1) == ["still there"]


@pytest.mark.faults(
    "client sends an event named `*` to an application with a `'*'` handler",
    stock="the handler runs with whatever session id the client sends",
    because="the handler ran with the victim's session id",
)
def test_event_named_asterisk_cannot_take_the_session_of_another_client(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A client sends ``42["*", sid of another client]``."""
    victim = raw_client(server, namespace="/any")
    attacker = raw_client(server, namespace="/any")
    calls_before, rejected_before = (
        len(server.state()["calls"]),
        counter(server, "events_rejected"),
    )
    attacker.emit("*", victim.sid, 1)
    wait_until(
        lambda: (
            len(server.state()["calls"]) > calls_before
            or counter(server, "events_rejected") > rejected_before
        ),
        timeout=3,
        message="the event was neither rejected nor handled",
    )
    calls = server.state()["calls"][calls_before:]
    measured("handler runs", len(calls))
    assert victim.sid not in [call["sid"] for call in calls], (
        "the handler ran with the victim's session id"
    )
    assert counter(server, "events_rejected") == rejected_before + 1
    attacker.emit("anything", 2)
    wait_until(
        lambda: {"sid": attacker.sid, "event": "anything", "args": [2]} in server.state()["calls"],
        message="an honest event does not reach the handler",
    )

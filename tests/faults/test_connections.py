"""Clients that come half, leave at the wrong moment, or come and go by the thousand."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.faults.connection_app import (
    ACCESS_LOG,
    CONNECTION_APP,
    EVENTS,
    WORKERS,
    happenings,
    worker_options,
)
from tests.faults.fleet import NOISE, Fleet
from tests.support import DeadlineExceeded, wait_until
from tests.support.raw_clients import RawClients, RawWebSocket, ask, open_many
from tests.support.raw_websocket import close_frame, target, upgrade_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.support import GunicornServer

    Departure = Callable[[RawClients, int], None]
    MakeServer = Callable[..., GunicornServer]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_workers = pytest.mark.parametrize("worker", WORKERS)

HALF_HANDSHAKES = "200 half handshakes and quick departures"
ODD_UPGRADE = "upgrade requests with missing or odd headers"
LEAVES_EARLY = "client leaves while its connect handler runs"
DISCONNECT_RAISES = "`disconnect` raises"
UNKNOWN_SESSION = "AAAAAAAAAAAAAAAAAAAA"

QUICK = {"ping_interval": 1, "ping_timeout": 1}
_FORGOTTEN_WITHIN = QUICK["ping_interval"] + QUICK["ping_timeout"]
_JOIN_TIMEOUT = 2.5
# Stock looks at each client once per ping timeout, and may just have done so.
_LONGER_THAN_PING_TIMEOUT = 4
_TIMES = 20
_ROUND_TRIPS = 10_000
_ROUND = 50
_GROWTH_LIMIT = 5 * 1024
"""KiB."""


@pytest.fixture
def worker() -> str:
    """The worker of gunicorn, unless a test is parametrised with others."""
    return "gevent-websocket"


@pytest.fixture
def make_connection_server(
    make_fleet: Callable[..., Fleet], worker: str, is_stock: bool
) -> MakeServer:
    """Return a function that provides one process; it takes options of ``SocketIO``."""

    def make(**socketio: Any) -> GunicornServer:
        options = worker_options(worker, is_stock=is_stock)
        options["config"]["SOCKETIO_GUARD_JOIN_TIMEOUT"] = _JOIN_TIMEOUT
        return make_fleet(
            app=CONNECTION_APP,
            processes=1,
            has_queue=False,
            socketio={**QUICK, **socketio},
            **options,
        ).a

    return make


@pytest.fixture
def server(make_connection_server: MakeServer) -> GunicornServer:
    """One process that notices soon when a client does not answer."""
    server = make_connection_server()
    wait_until(lambda: not any(tables(server).values()), timeout=10)
    return server


@pytest.fixture
def clients() -> Iterator[RawClients]:
    """The clients of one test."""
    of_this_test = RawClients()
    yield of_this_test
    of_this_test.close()


def tables(server: GunicornServer) -> dict[str, int]:
    """Return how much the server remembers of connections."""
    found: dict[str, int] = server.get("/tables").json()
    return found


def ghosts(server: GunicornServer) -> int:
    """Return the size of the largest table."""
    return max(tables(server).values())


class Log:
    """What a server logs from now on."""

    def __init__(self, server: GunicornServer) -> None:
        self._server = server
        self._begin = len(server.log())
        self._since = time.time()

    def tracebacks(self) -> int:
        """Return the number of tracebacks, in the log or on the error output."""
        on_output = self._text().count("Traceback (most recent call last)")
        return on_output + len([None for record in self._records() if record.has_traceback])

    def errors(self) -> list[str]:
        """Return the lines of level ERROR and above."""
        lines = [line for line in self._text().splitlines() if "[ERROR]" in line]
        return lines + [
            record.message for record in self._records() if record.level in {"ERROR", "CRITICAL"}
        ]

    def lines(self) -> int:
        """Return the number of lines, where one record is one and its traceback more."""
        return len(self._text().splitlines()) + sum(
            1 + len(record.traceback.splitlines()) for record in self._records()
        )

    def _text(self) -> str:
        return self._server.log()[self._begin :]

    def _records(self) -> list[Any]:
        return self._server.records(
            since=self._since, matching=lambda record: record.logger not in {EVENTS, ACCESS_LOG}
        )


# Half handshakes -----------------------------------------------------------------------------


def poll_once(clients: RawClients, port: int) -> None:
    clients.polling(port).open()


def open_and_go(clients: RawClients, port: int) -> None:
    clients.websocket(port).open().shut()


def reset_after_request(clients: RawClients, port: int) -> None:
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket")))
    connection.reset()


def reset_within_request(clients: RawClients, port: int) -> None:
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket"))[:60])
    connection.reset()


def reset_after_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    client = clients.websocket(port).open(session=session)
    client.send("2probe")
    client.read_until("3probe")
    client.reset()


def go_before_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    clients.websocket(port).open(session=session).close()


def go_instead_of_probe(clients: RawClients, port: int) -> None:
    session = clients.polling(port).open().session
    client = clients.websocket(port).open(session=session)
    client.send("hello?")
    client.shut()


def upgrade_oddly(clients: RawClients, port: int) -> None:
    answer_to_upgrade(clients, port, headers={"Connection": "keep-alive"})


def use_stale_session(clients: RawClients, port: int) -> None:
    address = target("polling", session=UNKNOWN_SESSION)
    assert ask(port, "GET", address).status == 400
    assert ask(port, "POST", address, body=b"40").status == 400
    connection = clients.connection(port).dial()
    connection.write(upgrade_bytes(target("websocket", session=UNKNOWN_SESSION)))
    connection.reset()


def join_nothing(clients: RawClients, port: int) -> None:
    client = clients.websocket(port).open()
    client.send_join("/unknown")
    client.read_until("44/unknown,")
    client.reset()


def join_and_reset(clients: RawClients, port: int) -> None:
    client = clients.websocket(port).open()
    client.send_join()
    client.reset()


DEPARTURES: tuple[Departure, ...] = (
    poll_once,
    open_and_go,
    reset_after_request,
    reset_within_request,
    reset_after_probe,
    go_before_probe,
    go_instead_of_probe,
    upgrade_oddly,
    use_stale_session,
    join_nothing,
    join_and_reset,
)


def answer_to_upgrade(
    clients: RawClients,
    port: int,
    *,
    headers: Mapping[str, str | None] | None = None,
    session: str | None = None,
    protocol: str = "HTTP/1.1",
) -> str:
    """Return what an upgrade request is answered with: a status, or words."""
    connection = clients.connection(port, timeout=2.0).dial()
    connection.write(
        upgrade_bytes(target("websocket", session=session), headers=headers, protocol=protocol)
    )
    try:
        return str(connection.read_answer().status)
    except TimeoutError:
        return "nothing at all"
    except ConnectionError:
        return "the end of the connection"
    finally:
        connection.shut()


@pytest.mark.faults(
    HALF_HANDSHAKES,
    stock="tracebacks, and sessions without a client",
    because=r"[1-9]\d* tracebacks, [1-9]\d* error lines, [1-9]\d* ghosts",
)
@both_workers
def test_half_handshakes_leave_no_log_line_and_no_ghost(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """Clients stop at every point of a handshake, twenty times each."""
    log = Log(server)
    for _ in range(_TIMES):
        for depart in DEPARTURES:
            depart(clients, server.port)
    clients.close()
    gone_at = time.monotonic()
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: not ghosts(server), timeout=_FORGOTTEN_WITHIN + NOISE, interval=0.1)
    forgotten = time.monotonic() - gone_at
    left = ghosts(server)
    measured("log lines", log.lines())
    measured("forgotten after", forgotten)
    found = (
        f"{log.tracebacks()} tracebacks, {len(log.errors())} error lines, "
        f"{left} ghosts after the ping timeout"
    )
    measured("found", found)
    assert not log.tracebacks() + len(log.errors()) + left, found
    assert log.lines() <= 10, f"{log.lines()} log lines"


@pytest.mark.faults(
    ODD_UPGRADE,
    stock="traceback, ghost session, or let in",
    because="answered with (500|101|the end of the connection)",
)
@both_workers
def test_odd_upgrade_request_is_answered_with_400(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """Each header of an upgrade request is missing once and odd once."""
    odd: list[dict[str, Any]] = [
        {"headers": {name: value}}
        for name, value in (
            ("Connection", None),
            ("Connection", "keep-alive"),
            ("Connection", "xupgrade"),
            ("Upgrade", None),
            ("Upgrade", "h2c"),
            ("Sec-WebSocket-Version", None),
            ("Sec-WebSocket-Version", "99"),
            ("Sec-WebSocket-Key", None),
            ("Sec-WebSocket-Key", "no base64!"),
            ("Sec-WebSocket-Key", "AAAA"),
        )
    ]
    odd.append({"protocol": "HTTP/1.0"})
    log = Log(server)
    wrong = []
    for change in odd:
        answer = answer_to_upgrade(clients, server.port, **change)
        if answer != "400":
            wrong.append(f"{change} of a new client: answered with {answer}")
    left = tables(server)["sockets"]
    for change in odd:
        polling = clients.polling(server.port).open()
        answer = answer_to_upgrade(clients, server.port, session=polling.session, **change)
        if answer != "400":
            wrong.append(f"{change} of a client that polls: answered with {answer}")
        elif polling.post("40").status != 200:
            wrong.append(f"{change} of a client that polls: it cannot go on polling")
    measured("wrong answers", f"{len(wrong)} of {2 * len(odd)}")
    measured("ghosts", left)
    assert not wrong, f"{len(wrong)} wrong answers: {'; '.join(wrong)}"
    assert not left, "sessions were made for refused clients"
    assert not log.tracebacks() + len(log.errors())


@pytest.mark.faults(
    "client opens a connection and never joins a namespace",
    stock="stays for ever",
    because="not closed within",
)
def test_client_that_joins_nothing_is_closed(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The client answers pings, and that is all it does."""
    client = clients.websocket(server.port).open()
    opened_at = time.monotonic()
    farewell = client.read_farewell(timeout=_JOIN_TIMEOUT + 1.5)
    measured("closed after", farewell.at - opened_at)
    assert farewell.at - opened_at > _JOIN_TIMEOUT - NOISE
    wait_until(lambda: not ghosts(server), message="something is left of them")


# Exactly once --------------------------------------------------------------------------------


def departures(server: GunicornServer, *sids: str) -> list[dict[str, Any]]:
    """Return the runs of the disconnect handler for these session ids."""
    return happenings(server, "departed", sids=set(sids))


def asked(server: GunicornServer, *, since: float) -> str:
    """Wait until a connect handler runs, and return for which session id."""

    def find() -> str | None:
        return next(
            (str(seen["sid"]) for seen in happenings(server, "asked") if seen["at"] >= since), None
        )

    found = wait_until(find, message="the connect handler was not run")
    assert found is not None
    return found


def assert_departed_once(server: GunicornServer, *sids: str, timeout: float = 8.0) -> list[str]:
    """Assert that the disconnect handler runs once for each, and return the reasons."""
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: len(departures(server, *sids)) >= len(sids), timeout=timeout)
    # A second run would come with the end of the transport, which the tables tell.
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: not ghosts(server), timeout=3)
    times = Counter(seen["sid"] for seen in departures(server, *sids))
    ran = sorted(times[sid] for sid in sids)
    assert ran == [1] * len(sids), f"the disconnect handler ran {ran} times"
    left = {name: size for name, size in tables(server).items() if size}
    assert not left, f"left in the tables: {left}"
    return [str(seen["reason"]) for seen in departures(server, *sids)]


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="disconnect handler never run, entry stays for ever",
    because=r"the disconnect handler ran \[0, 0, 0\] times",
)
def test_disconnect_runs_once_for_who_left_during_a_slow_connect(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The connect handler takes longer than the ping timeout, and then accepts."""
    query = f"connect=slow&for={_LONGER_THAN_PING_TIMEOUT}"
    sids = []
    for leave in ("reset", "close frame", "silence"):
        client = clients.websocket(server.port).open(query=query)
        began_at = time.time()
        client.send_join()
        sids.append(asked(server, since=began_at))
        if leave == "reset":
            client.reset()
        elif leave == "close frame":
            client.close()
    reasons = assert_departed_once(server, *sids)
    assert len(happenings(server, "accepted", sids=set(sids))) == len(sids)
    measured("reasons", ", ".join(reasons))


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="disconnect handler never run, entry stays for ever",
    because=r"the disconnect handler ran \[0\] times",
)
def test_disconnect_runs_once_for_who_closed_its_polling_session_during_connect(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """One request runs the connect handler, and a second one closes the session."""
    client = clients.polling(server.port, query="connect=slow&for=1").open()
    began_at = time.time()
    client.begin("POST", "40")
    sid = asked(server, since=began_at)
    client.post("1")
    reasons = assert_departed_once(server, sid)
    measured("reason", reasons[0])


@pytest.mark.faults(
    LEAVES_EARLY,
    stock="with `always_connect`, the disconnect handler runs for who is refused",
    because=r"the disconnect handler ran 1 time",
)
@pytest.mark.parametrize("behaviour", ["slow-refuse", "slow-raise"])
def test_disconnect_never_runs_for_who_is_refused_after_leaving(
    behaviour: str, make_connection_server: MakeServer, clients: RawClients
) -> None:
    """Everyone is told at once that they are connected, and this one leaves thereupon."""
    server = make_connection_server(always_connect=True)
    client = clients.polling(server.port, query=f"connect={behaviour}&for=0.5").open()
    began_at = time.time()
    client.begin("POST", "40")
    sid = asked(server, since=began_at)
    client.post("1")
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: departures(server, sid), timeout=1)
    times = len(departures(server, sid))
    assert not times, f"the disconnect handler ran {times} time(s)"
    wait_until(lambda: not ghosts(server), timeout=6, message="something is left of the client")
    assert not departures(server, sid)


@pytest.mark.parametrize("behaviour", ["slow-refuse", "slow-raise"])
def test_disconnect_never_runs_for_who_is_refused(
    behaviour: str, server: GunicornServer, clients: RawClients
) -> None:
    """The first has left before it is refused, the second stays to hear it."""
    sids = []
    query = f"connect={behaviour}&for=0.5"
    leaving = clients.websocket(server.port).open(query=query)
    staying = clients.websocket(server.port).open(query=query)
    for client in (leaving, staying):
        began_at = time.time()
        client.send_join()
        sids.append(asked(server, since=began_at))
    leaving.reset()
    staying.read_until("44")
    staying.shut()
    wait_until(lambda: not ghosts(server), timeout=6, message="something is left of the client")
    assert not departures(server, *sids)
    assert not happenings(server, "accepted", sids=set(sids))


def was_sent_away(client: RawWebSocket) -> bool:
    """Whether the client is told soon that it has to leave its namespace, or is closed."""
    deadline = time.monotonic() + 4.0
    with contextlib.suppress(TimeoutError):
        while (frame := client.read_frame(deadline - time.monotonic())) is not None:
            if frame.text.startswith(("41", "44")):
                break
        return True
    return False


@pytest.mark.faults(
    "server disconnects a client while its connect handler runs",
    stock="ignored: the client comes in and stays",
    because="the client was not closed",
)
def test_disconnect_during_connect_is_not_forgotten(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The server wants a client to go about which the connect handler is still thinking."""
    client = clients.websocket(server.port).open(query="connect=slow&for=1")
    began_at = time.time()
    client.send_join()
    sid = asked(server, since=began_at)
    server.post("/disconnect", sids=[sid])
    assert was_sent_away(client), "the client was not closed"
    client.shut()
    measured("reason", assert_departed_once(server, sid)[0])


@pytest.mark.parametrize("disconnect", ["", "slow"])
def test_disconnect_runs_once_when_both_sides_close_at_once(
    disconnect: str, server: GunicornServer, clients: RawClients
) -> None:
    """Twenty clients leave in four ways while the server ends their connections."""
    query = f"disconnect={disconnect}&for=0.3"
    opened = clients.many(server.port, _TIMES, query=query)
    sids = [client.sid for client in opened]
    server.post("/disconnect", sids=sids[: _TIMES // 2])
    for number, client in enumerate(opened):
        if number % 4 == 0:
            client.send("41")
        elif number % 4 == 1:
            client.send("1")
        elif number % 4 == 2:
            client.reset()
    server.post("/disconnect", sids=sids)
    reasons = assert_departed_once(server, *sids)
    assert len(reasons) == _TIMES


def test_disconnect_runs_once_when_the_ping_times_out_during_it(
    server: GunicornServer, clients: RawClients
) -> None:
    """The client leaves its namespace and is silent while the handler takes its time."""
    query = "disconnect=slow&for=3"
    client = clients.websocket(server.port).open(query=query).join()
    client.send("41")
    wait_until(lambda: departures(server, client.sid))
    wait_until(
        lambda: happenings(server, "farewell done", sids={client.sid}),
        timeout=8,
        message="the disconnect handler did not end",
    )
    assert assert_departed_once(server, client.sid) == ["client disconnect"]


@pytest.mark.faults(
    DISCONNECT_RAISES,
    stock="the other namespaces are not told, the entry stays",
    because=r"the disconnect handler ran \[0, 1\] times",
)
@both_workers
def test_disconnect_runs_in_each_namespace_although_one_raises(
    server: GunicornServer, clients: RawClients
) -> None:
    """A client of two namespaces goes, and the first handler raises."""
    client = clients.websocket(server.port).open().join("/raising")
    first = client.sid
    client.join("/calm")
    second = client.sid
    client.shut()
    assert assert_departed_once(server, first, second) == ["transport close"] * 2


@pytest.mark.faults(
    DISCONNECT_RAISES, stock="a TypeError bug runs it twice", because=r"ran \[2\] times"
)
def test_disconnect_handler_with_a_type_error_is_run_once(
    server: GunicornServer, clients: RawClients
) -> None:
    """A TypeError inside the handler is taken for the wrong number of arguments."""
    client = clients.websocket(server.port).open(query="disconnect=type-error").join()
    client.close()
    assert_departed_once(server, client.sid)


@pytest.mark.parametrize("namespace", ["/legacy", "/legacy-class"])
def test_disconnect_handler_without_a_reason_is_run_once(
    namespace: str, server: GunicornServer, clients: RawClients
) -> None:
    """Applications wrote them without before the reason was there."""
    client = clients.websocket(server.port).open().join(namespace)
    client.send(f"41{namespace},")
    wait_until(lambda: departures(server, client.sid))
    client.close()
    assert_departed_once(server, client.sid)


def test_disconnect_handler_is_told_the_reason(server: GunicornServer, clients: RawClients) -> None:
    """Each way in which a connection ends has a reason of its own."""
    by_reason = {
        "client disconnect": clients.websocket(server.port).open().join(),
        "server disconnect": clients.websocket(server.port).open().join(),
        "transport close": clients.websocket(server.port).open().join(),
        "ping timeout": clients.websocket(server.port).open().join(),
    }
    by_reason["client disconnect"].send("41")
    by_reason["server disconnect"].emit("leave")
    by_reason["transport close"].shut()
    sids = {client.sid: reason for reason, client in by_reason.items()}
    assert_departed_once(server, *sids)
    assert {seen["sid"]: seen["reason"] for seen in departures(server, *sids)} == sids


# Many ----------------------------------------------------------------------------------------


def at_times(look: Callable[[], int], *, times: int, interval: float) -> Iterator[int]:
    """Look so many times."""
    for _ in range(times):
        yield look()
        time.sleep(interval)


@pytest.mark.faults(
    "clients come and go, 10,000 times",
    stock="each leaves a greenlet that sleeps until its next ping: 12 KiB",
    because=r"left: \d{4,} greenlets, \d{5} KiB",
)
@pytest.mark.timeout(180)
def test_ten_thousand_connections_leave_nothing_behind(
    make_connection_server: MakeServer, measured: Measured
) -> None:
    """Clients come, ask something and leave in one of four ways."""
    server = make_connection_server(ping_interval=300)
    (pid,) = server.worker_pids()
    process = psutil.Process(pid)

    def come_and_go(count: int) -> None:
        for _ in range(count // _ROUND):
            opened = open_many(server.port, _ROUND)
            for client in opened[::4]:
                client.write(close_frame(None))
            for client in opened[1::4]:
                client.send("41")
            for client in opened[2::4]:
                client.reset()
            for client in opened[::4]:
                client.read_farewell()
            for client in opened:
                client.shut()

    def settle() -> tuple[int, int, int]:
        wait_until(
            lambda: not ghosts(server),
            timeout=5,
            message=f"the tables are not empty: {tables(server)}",
        )
        greenlets = server.state()["greenlets"]  # collects what is in cycles, too
        # The connection of the last request may not be closed yet.
        descriptors = min(at_times(process.num_fds, times=20, interval=0.01))
        return greenlets, process.memory_info().rss // 1024, descriptors

    come_and_go(_ROUND_TRIPS // 5)
    greenlets_before, memory_before, descriptors_before = settle()
    began_at, used_before = time.monotonic(), sum(process.cpu_times()[:2])
    come_and_go(_ROUND_TRIPS - _ROUND_TRIPS // 5)
    took, used = time.monotonic() - began_at, sum(process.cpu_times()[:2]) - used_before
    greenlets, memory, descriptors = settle()
    counted = _ROUND_TRIPS - _ROUND_TRIPS // 5
    measured("connections per second", round(counted / took))
    measured("CPU per connection", f"{1000 * used / counted:.2f} ms")
    left = (
        f"{greenlets - greenlets_before} greenlets, {memory - memory_before} KiB, "
        f"{descriptors - descriptors_before} descriptors"
    )
    measured("left", left)
    runs = server.state()["runs"]
    assert (runs["accepted:/"], runs["departed:/"]) == (_ROUND_TRIPS, _ROUND_TRIPS)
    is_flat = memory - memory_before < _GROWTH_LIMIT and descriptors <= descriptors_before
    assert is_flat, f"left: {left}"
    assert greenlets <= greenlets_before + _ROUND, f"left: {left}"


# The guard's own -----------------------------------------------------------------------------


def look(server: GunicornServer, sid: str) -> dict[str, Any]:
    """Return what the guard says of one session id."""
    found: dict[str, Any] = server.post("/connections/look", sid=sid)
    return found


def test_connection_is_found_as_long_as_it_lasts(
    server: GunicornServer, clients: RawClients
) -> None:
    """By its session id, among all, and in the counts by state and namespace."""
    client = clients.websocket(server.port).open().join()
    other = clients.websocket(server.port).open().join("/calm")
    assert look(server, client.sid) == {"is_connected": True, "is_known": True, "state": "open"}
    listed = {entry["sid"]: entry for entry in server.get("/connections").json()}
    assert listed.keys() == {client.sid, other.sid}
    assert listed[other.sid]["namespace"] == "/calm"
    assert listed[other.sid]["is_open"]
    assert server.post("/connections/count") == 2
    assert server.post("/connections/count", namespace="/calm") == 1
    assert server.post("/connections/count", namespace="/nowhere") == 0
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    assert not look(server, client.sid)["is_connected"]
    assert server.post("/connections/count") == 1


def test_disconnect_of_the_unknown_is_an_answer(
    server: GunicornServer, clients: RawClients
) -> None:
    """Neither who was never there nor who has gone costs an exception or a log line."""
    log = Log(server)
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/disconnect", sid="nobody") is False
    assert server.post("/guard/disconnect", sid=client.sid, namespace="/calm") is False
    assert server.post("/guard/disconnect", sid=client.sid) is True
    client.read_until("41")
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    assert server.post("/guard/disconnect", sid=client.sid) is False
    assert assert_departed_once(server, client.sid) == ["server disconnect"]
    assert log.lines() == 0


def test_emit_says_what_became_of_it(server: GunicornServer, clients: RawClients) -> None:
    """To who is there, to who has gone, and with the wish for an exception."""
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/emit", event="news", to=client.sid) == ["queued"]
    client.read_until('42["news"')
    assert server.post("/guard/emit", event="news", to=client.sid, strict=True) == ["queued"]
    client.shut()
    wait_until(lambda: not look(server, client.sid)["is_known"])
    log = Log(server)
    assert server.post("/guard/emit", event="news", to=client.sid) == ["dropped_closed"]
    assert server.post("/guard/emit", event="news", to=client.sid, strict=True) == [
        "ConnectionClosed"
    ]
    assert log.lines() == 0


def test_emit_says_that_a_client_does_not_keep_up(
    make_connection_server: MakeServer, clients: RawClients
) -> None:
    """It reads nothing, and its queue is full at some time."""
    server = make_connection_server(ping_interval=300)
    client = clients.websocket(server.port, receive_buffer=4096).open().join()
    outcomes = server.post("/guard/emit", event="news", to=client.sid, size=100_000, count=100)
    first_loss = next(index for index, outcome in enumerate(outcomes) if outcome != "queued")
    assert 10 <= first_loss < 90
    assert outcomes[first_loss] == "dropped_slow"
    assert set(outcomes[first_loss:]) <= {"dropped_slow", "dropped_closed"}
    wait_until(lambda: not ghosts(server), message="the client stays")


def test_emit_to_who_is_not_here_is_handed_to_the_queue(
    make_fleet: Callable[..., Fleet], clients: RawClients
) -> None:
    """Another process may know the session id."""
    server = make_fleet(app=CONNECTION_APP, processes=1).a
    client = clients.websocket(server.port).open().join()
    assert server.post("/guard/emit", event="news", to=client.sid) == ["queued"]
    assert server.post("/guard/emit", event="news", to="nobody") == ["handed_to_queue"]
    assert server.post("/guard/emit", event="news", to="nobody", strict=True) == ["handed_to_queue"]


def test_long_loop_ends_at_the_checkpoint_after_the_client_left(
    server: GunicornServer, clients: RawClients, measured: Measured
) -> None:
    """The handler sends step by step; meanwhile others are served."""
    walker, other = (clients.websocket(server.port).open().join() for _ in range(2))
    steps = 1_000_000
    walker.emit("walk", steps)
    walker.read_until('42["step",10')
    asked_at = time.monotonic()
    assert other.call("echo", "meanwhile", ack_id=1) == ["meanwhile"]
    measured("another was answered after", time.monotonic() - asked_at)
    walker.reset()
    left_at = time.time()
    wait_until(lambda: happenings(server, "walk ended", sids={walker.sid}), timeout=5)
    (ended,) = happenings(server, "walk ended", sids={walker.sid})
    measured("ended after", ended["at"] - left_at)
    assert ended["error"] == "ConnectionClosed"
    assert ended["steps"] < steps
    assert ended["at"] - left_at < 1.0 + NOISE


def test_handshake_makes_a_connection_ready(server: GunicornServer, clients: RawClients) -> None:
    """Only who said hello receives what is for the ready."""
    ready, other = (clients.websocket(server.port).open().join("/shaking") for _ in range(2))
    assert other.call("enter", "shaken", ack_id=1, namespace="/shaking") == ["shaken"]
    assert look(server, ready.sid)["state"] == "open"
    assert ready.call("hello", "world", ack_id=1, namespace="/shaking") == ["hello, world"]
    assert look(server, ready.sid)["state"] == "ready"
    assert server.post("/connections/count", state="ready", namespace="/shaking") == 1
    for event, is_for_ready in (("for-the-ready", True), ("for-all", False)):
        server.post(
            "/guard/emit",
            event=event,
            to="shaken",
            namespace="/shaking",
            ready_only=is_for_ready,
        )
    for client in (ready, other):
        client.read_until('42/shaking,["for-all"')
    assert any("for-the-ready" in text for text in ready.received)
    assert not any("for-the-ready" in text for text in other.received)


def test_who_does_not_complete_the_handshake_is_closed(
    server: GunicornServer, clients: RawClients
) -> None:
    """One says nothing, one fails; both get the time that was set, and no more."""
    silent, failing, quick = (
        clients.websocket(server.port).open().join("/shaking") for _ in range(3)
    )
    joined_at = time.time()
    quick.emit("hello", "world", namespace="/shaking")
    failing.emit("hello", "raise", namespace="/shaking")
    sids = {silent.sid, failing.sid}
    wait_until(lambda: len(happenings(server, "departed", sids=sids)) == len(sids), timeout=4)
    for seen in happenings(server, "departed", sids=sids):
        assert 0.7 < seen["at"] - joined_at < 2.0 + NOISE
    assert quick.call("enter", "room", ack_id=1, namespace="/shaking") == ["room"]
    for client in (silent, failing, quick):
        client.shut()
    assert_departed_once(server, silent.sid, failing.sid, quick.sid)


def test_leaving_before_the_handshake_is_normal(
    server: GunicornServer, clients: RawClients
) -> None:
    """It costs no log line."""
    polling = clients.polling(server.port).open().join("/shaking")
    opened = clients.websocket(server.port).open().join("/shaking")
    # What is attached to them fails when it is released, which is logged; so nothing else is.
    log = Log(server)
    polling.post("1")
    opened.shut()
    assert_departed_once(server, polling.sid, opened.sid)
    assert len(log.errors()) == 2
    assert log.tracebacks() == 2


def test_resources_are_released_once_in_reverse_order(
    server: GunicornServer, clients: RawClients
) -> None:
    """However the connection ends, and although one of them cannot be released."""
    opened = [clients.websocket(server.port).open().join("/shaking") for _ in range(4)]
    for client in opened:
        client.emit("hello", "world", namespace="/shaking")
    sids = [client.sid for client in opened]
    opened[0].send("41/shaking,")
    server.post("/guard/disconnect", sid=sids[1], namespace="/shaking")
    opened[2].reset()
    assert_departed_once(server, *sids)
    for sid in sids:
        released = [seen["name"] for seen in happenings(server, "released", sids={sid})]
        assert released == ["third", "second", "first"]

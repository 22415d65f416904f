"""What stands in front of an application: health, who is let in, and how many are served."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from flask import Flask, Response, stream_with_context
from flask_socketio import SocketIO
from gevent import socket as gevent_socket
from gevent.pywsgi import WSGIServer
from geventwebsocket.handler import WebSocketHandler
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client, EnvironBuilder, run_wsgi_app
from werkzeug.wsgi import ClosingIterator, FileWrapper

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.gunicorn import CountedRequests
from flask_socketio_guard.middleware import GuardMiddleware
from flask_socketio_guard.telemetry import records as signals
from tests.support import unit_support
from tests.support.raw_websocket import upgrade_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded
stop_guards = unit_support.stop_guards

HANDSHAKE = "/socket.io/?EIO=4&transport=polling"
REASONS = ("full", "address", "rate", "draining")


@dataclass
class Front:
    """A guarded application, and which clients it refused."""

    guarded: Guarded
    refusals: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        app = self.guarded.app
        app.add_url_rule("/page", view_func=lambda: "a page")
        self._subscription = signals.subscribe(
            signals.handshake_refused,
            app,
            lambda record: self.refusals.append((record.reason, record.detail)),
        )

    def get(self, url: str, **options: Any) -> Any:
        return self.guarded.app.test_client().get(url, **options)


@pytest.fixture
def front(guarded: Guarded) -> Front:
    return Front(guarded)


@pytest.fixture
def make_front(make_guarded: Callable[..., Guarded]) -> Callable[..., Front]:
    """Return a function that makes a guarded application."""
    return lambda **settings: Front(make_guarded(**settings))


@pytest.fixture
def make_refusing(make_front: Callable[..., Front]) -> Callable[[str], Front]:
    """Return a function that makes an application that refuses its second client."""
    settings: dict[str, dict[str, Any]] = {
        "full": {"max_connections": 1},
        "address": {"max_connections_per_address": 1},
        "rate": {"connection_rate": "1/hour"},
        "draining": {},
    }
    return lambda reason: make_front(**settings[reason])


# Who is let in


@pytest.mark.parametrize("reason", REASONS)
def test_a_client_that_is_refused_is_asked_to_come_back(
    make_refusing: Callable[[str], Front], reason: str
) -> None:
    front = make_refusing(reason)
    assert front.get(HANDSHAKE).status_code == 200
    front.guarded.inner.admission.is_draining = reason == "draining"
    answer = front.get(HANDSHAKE)
    assert answer.status == "503 Service Unavailable"
    assert answer.headers["Retry-After"] == "5"
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.headers["Content-Length"] == "0"
    assert answer.data == b""
    assert front.refusals == [(reason, "")]
    assert front.guarded.guard.counters["handshakes_refused"] == 1
    assert len(front.guarded.socketio.server.eio.sockets) == 1


@pytest.mark.parametrize("reason", REASONS)
def test_a_client_that_is_in_is_served_whoever_is_refused(
    make_refusing: Callable[[str], Front], reason: str
) -> None:
    front = make_refusing(reason)
    front.guarded.socketio.on_event("echo", lambda value: value)
    client = front.guarded.polling()
    assert client.connect().startswith("40")
    front.guarded.inner.admission.is_draining = reason == "draining"
    assert front.guarded.polling().handshake().status_code == 503
    assert client.call("echo", "still here") == ["still here"]
    assert front.refusals == [(reason, "")]


def test_a_place_that_is_free_again_is_given_away(make_front: Callable[..., Front]) -> None:
    front = make_front(max_connections=1, max_connections_per_address=1)
    client = front.guarded.polling()
    client.connect()
    assert front.get(HANDSHAKE).status_code == 503
    client.leave()
    assert front.get(HANDSHAKE).status_code == 200


def test_places_are_counted_for_each_address(make_front: Callable[..., Front]) -> None:
    front = make_front(max_connections_per_address=1)
    here, there = ({"REMOTE_ADDR": address} for address in ("192.0.2.1", "192.0.2.2"))
    assert front.get(HANDSHAKE, environ_overrides=here).status_code == 200
    assert front.get(HANDSHAKE, environ_overrides=here).status_code == 503
    assert front.get(HANDSHAKE, environ_overrides=there).status_code == 200


def test_a_client_is_one_whichever_of_its_ipv6_addresses_it_takes(
    make_front: Callable[..., Front],
) -> None:
    front = make_front(max_connections_per_address=1)
    taken = ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1")
    answers = [front.get(HANDSHAKE, environ_overrides={"REMOTE_ADDR": each}) for each in taken]
    assert [answer.status_code for answer in answers] == [200, 503, 200]
    assert front.guarded.inner.admission.count("2001:db8:0:1::/64") == 1


def test_an_address_is_the_one_that_a_proxy_tells() -> None:
    """As the application sees it, also if ``ProxyFix`` was there before the guard."""
    app = Flask("proxied")
    socketio = SocketIO(app, async_mode="threading")
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    SocketIOGuard(app, socketio, max_connections_per_address=1)
    clients = ("192.0.2.1", "192.0.2.2", "192.0.2.1")
    http = app.test_client()
    answers = [http.get(HANDSHAKE, headers={"X-Forwarded-For": client}) for client in clients]
    assert [answer.status_code for answer in answers] == [200, 200, 503]


def test_where_nobody_has_an_address_nobody_is_refused_for_it(
    make_front: Callable[..., Front],
) -> None:
    """Over a Unix socket all clients would share a place."""
    front = make_front(max_connections_per_address=1)
    environ = EnvironBuilder(path=HANDSHAKE).get_environ()
    environ.pop("REMOTE_ADDR", None)
    assert [status(front.guarded.app.wsgi_app, environ) for _ in range(2)] == [200, 200]


def status(app: Any, environ: dict[str, Any]) -> int:
    """Return the status that *app* answers with."""
    answer, text, _ = run_wsgi_app(app, environ, buffered=True)
    del answer
    return int(text.split()[0])


@pytest.mark.parametrize("sid", ["sid=unknown", "sid=unknown&sid=too", "x=1&sid=y"])
def test_a_session_that_is_unknown_is_no_new_client(front: Front, sid: str) -> None:
    """It is refused for what it is, and takes nobody's place in the rate."""
    front.guarded.inner.admission.is_draining = True
    assert front.get(f"{HANDSHAKE}&{sid}").status_code == 400
    assert [reason for reason, _ in front.refusals] == ["elsewhere"]


NO_HANDSHAKES = {
    "nothing": ("get", "", 400),
    "no transport": ("get", "?EIO=4", 400),
    "an empty session": ("get", "?EIO=4&sid=", 400),
    "no version": ("get", "?transport=polling", 400),
    "an old version": ("get", "?EIO=3&transport=polling", 400),
    "an unknown transport": ("get", "?EIO=4&transport=carrier-pigeon", 400),
    "no upgrade": ("get", "?EIO=4&transport=websocket", 400),
    "no session to post to": ("post", "?EIO=4&transport=polling", 400),
    "a bad JSONP index": ("get", "?EIO=4&transport=polling&j=x", 400),
    "a preflight": ("options", "?EIO=4&transport=polling", 200),
    "a method that there is not": ("head", "?EIO=4&transport=polling", 405),
}


@pytest.mark.parametrize("what", NO_HANDSHAKES)
def test_what_is_no_handshake_takes_nobodys_place(
    make_front: Callable[..., Front], what: str
) -> None:
    """Browsers send a preflight before each cross-origin handshake that has headers of its own."""
    method, query, expected = NO_HANDSHAKES[what]
    front = make_front(connection_rate="1/hour", max_connections=1, max_connections_per_address=1)
    ask = getattr(front.guarded.app.test_client(), method)
    assert [ask(f"/socket.io/{query}").status_code for _ in range(3)] == [expected] * 3
    assert front.get(HANDSHAKE).status_code == 200
    assert front.get(HANDSHAKE).status_code == 503
    assert ask(f"/socket.io/{query}").status_code == expected


def test_a_foreign_origin_takes_nobodys_place(make_front: Callable[..., Front]) -> None:
    front = make_front(connection_rate="1/hour")
    strange = {"Origin": "http://strange.example"}
    assert front.get(HANDSHAKE, headers=strange).status_code == 400
    assert front.get(HANDSHAKE).status_code == 200


REFUSED_QUERIES = {
    "refused": (HANDSHAKE, 503),
    "no transport": ("/socket.io/?EIO=4", 400),
    "an unknown transport": ("/socket.io/?EIO=4&transport=x", 400),
    "an old version": ("/socket.io/?EIO=3&transport=polling", 400),
    "no session": (f"{HANDSHAKE}&sid=unknown", 400),
}


@pytest.mark.parametrize("what", REFUSED_QUERIES)
def test_a_page_from_an_allowed_origin_can_read_why_it_is_refused(
    make_guarded: Callable[..., Guarded], what: str
) -> None:
    """Without the headers a browser tells the page of a network error, whatever was answered."""
    url, expected = REFUSED_QUERIES[what]
    origin, strange = "http://page.example", "http://strange.example"
    options = {"cors_allowed_origins": [origin]}
    front = Front(make_guarded(options=options, max_connections=1))
    admitted = front.get(HANDSHAKE, headers={"Origin": origin})
    answer = front.get(url, headers={"Origin": origin})
    assert (admitted.status_code, answer.status_code) == (200, expected)
    names = [name for name, _ in admitted.headers if name.startswith("Access-Control-")]
    assert names
    assert [answer.headers[name] for name in names] == [admitted.headers[name] for name in names]
    foreign = front.get(url, headers={"Origin": strange})
    assert (foreign.status_code, foreign.data) == (400, b'"Not an accepted origin."')
    assert "Access-Control-Allow-Origin" not in foreign.headers


def test_without_cors_there_are_no_headers_for_it(make_guarded: Callable[..., Guarded]) -> None:
    """With ``cors_allowed_origins=[]`` a proxy adds them, and twice is not allowed."""
    front = Front(make_guarded(options={"cors_allowed_origins": []}, max_connections=1))
    for url in (HANDSHAKE, HANDSHAKE, "/socket.io/?EIO=4"):
        answer = front.get(url, headers={"Origin": "http://page.example"})
        assert not [name for name, _ in answer.headers if name.startswith("Access-Control-")]


@pytest.mark.parametrize("path", ["/page", "/socket.io", "/socket.iox", "/", "/x/socket.io/"])
def test_what_has_nothing_to_do_with_socketio_is_never_refused(front: Front, path: str) -> None:
    front.guarded.inner.admission.is_draining = True
    expected = 200 if path == "/page" else 404
    assert front.get(path).status_code == expected
    assert front.refusals == []


@pytest.mark.parametrize("reason", ["full", "address", "rate", "draining"])
def test_a_refused_websocket_is_answered_with_try_again_later(
    make_refusing: Callable[[str], Front], reason: str
) -> None:
    """gevent-websocket would answer 101 before the application is asked."""
    front = make_refusing(reason)
    front.get(HANDSHAKE)
    front.guarded.inner.admission.is_draining = reason == "draining"
    server = WSGIServer(
        ("127.0.0.1", 0), front.guarded.app, handler_class=WebSocketHandler, log=None
    )
    server.start()
    try:
        with gevent.Timeout(5.0):
            client = gevent_socket.create_connection(("127.0.0.1", server.server_port))
            client.sendall(upgrade_bytes("/socket.io/?EIO=4&transport=websocket"))
            received = b""
            while data := client.recv(4096):
                received += data
            client.close()
    finally:
        server.stop(timeout=1.0)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 5" in head
    assert body == b""
    assert front.refusals == [(reason, "")]
    assert len(front.guarded.socketio.server.eio.sockets) == 1


# While the process ends


@pytest.mark.parametrize("path", ["/page", "/livez", "/readyz", HANDSHAKE, f"{HANDSHAKE}&sid=x"])
def test_connections_are_closed_while_the_process_ends(front: Front, path: str) -> None:
    """One that is idle, and kept, would hold the worker."""
    assert "Connection" not in front.get(path).headers
    front.guarded.inner.admission.is_draining = True
    answer = front.get(path)
    assert answer.headers.getlist("Connection") == ["close"]
    if path == "/page":
        assert (answer.status_code, answer.data) == (200, b"a page")
        assert answer.headers["Content-Type"].startswith("text/html")


def test_all_that_wsgi_allows_is_allowed_while_the_process_ends(front: Front) -> None:
    """An answer that is begun anew after an error, and one that is written piece by piece."""
    begun: list[Any] = []
    written: list[bytes] = []
    error = (RuntimeError, RuntimeError("boom"), None)

    def begin(*args: Any) -> Callable[[bytes], object]:
        begun.append(args)
        return written.append

    def app(environ: Any, start_response: Any) -> list[bytes]:
        del environ
        start_response("200 OK", [("X-Try", "1")])
        start_response("500 Oops", [("X-Try", "2")], error)(b"piece")
        return []

    front.guarded.inner.admission.is_draining = True
    middleware = GuardMiddleware(app, front.guarded.inner)
    middleware(EnvironBuilder(path="/page").get_environ(), begin)  # type: ignore[arg-type]
    assert begun == [
        ("200 OK", [("X-Try", "1"), ("Connection", "close")]),
        ("500 Oops", [("X-Try", "2"), ("Connection", "close")], error),
    ]
    assert written == [b"piece"]


# Health, and the start


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz"])
def test_health_comes_first(front: Front, path: str) -> None:
    """Before whoever is refused, and before the application, which may hang."""
    assert front.get(path).status_code == 200
    front.guarded.inner.admission.is_draining = True
    middleware = GuardMiddleware(pytest.fail, front.guarded.inner)
    answer = Client(middleware).get(path)
    assert answer.status_code == 200
    assert answer.mimetype == "application/health+json"
    assert front.refusals == []


@pytest.mark.parametrize("path", ["/livez", "/page", HANDSHAKE])
def test_the_first_request_starts_the_guard(front: Front, path: str) -> None:
    assert front.guarded.inner.supervisor.tasks == []
    front.get(path)
    assert front.guarded.inner.supervisor.tasks != []


def test_a_client_that_is_refused_starts_the_guard_too(front: Front) -> None:
    front.guarded.inner.admission.is_draining = True
    assert front.get(HANDSHAKE).status_code == 503
    assert front.guarded.inner.supervisor.tasks != []


# How many are served


@dataclass
class Counted:
    """An application behind the middleware, and how many requests it saw in progress."""

    front: Front
    counting: CountedRequests | None = None
    middleware: Any = None
    seen: list[int] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return 0 if self.counting is None else self.counting.in_progress

    def look(self) -> None:
        self.seen.append(self.requests)

    def call(self, answer: Callable[[], Any], **environ: Any) -> Any:
        """Send a request to an application that answers with what *answer* returns."""

        def app(_environ: Any, start_response: Any) -> Any:
            self.look()
            start_response("200 OK", [("Content-Type", "text/plain")])
            return answer()

        if self.counting is None:
            self.counting = CountedRequests(lambda *request: self.middleware(*request))
        self.middleware = GuardMiddleware(app, self.front.guarded.inner)
        request = {**EnvironBuilder(path="/page").get_environ(), **environ}
        return self.counting(request, lambda *_: lambda data: None)  # type: ignore[arg-type,return-value]


@pytest.fixture
def counted(front: Front) -> Counted:
    return Counted(front)


class Body:
    """An answer that is made while it is sent, and has to be closed."""

    def __init__(self, counted: Counted, chunks: Iterable[bytes], on_close: Any = None) -> None:
        self._counted = counted
        self._chunks = iter(chunks)
        self._on_close = on_close or (lambda: None)

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._counted.look()
            yield chunk

    def close(self) -> None:
        self._counted.closed.append("closed")
        self._on_close()


@pytest.mark.parametrize("answer", [[b"a", b"b"], (b"a", b"b"), []])
def test_an_answer_that_is_complete_is_served_when_it_is_given(
    counted: Counted, answer: Any
) -> None:
    assert counted.call(lambda: answer) is answer
    assert counted.seen == [1]
    assert counted.requests == 0


def test_an_answer_that_is_made_while_it_is_sent_is_in_progress_until_its_end(
    counted: Counted,
) -> None:
    answer = counted.call(lambda: Body(counted, [b"a", b"b"]))
    assert counted.requests == 1
    assert list(answer) == [b"a", b"b"]
    assert counted.seen == [1, 1, 1]
    assert counted.requests == 1
    assert counted.closed == []
    answer.close()
    assert counted.requests == 0
    assert counted.closed == ["closed"]


def test_a_generator_is_in_progress_until_its_end(counted: Counted) -> None:
    def chunks() -> Iterator[bytes]:
        try:
            yield b"a"
            yield b"b"
        finally:
            counted.closed.append("closed")

    answer = counted.call(chunks)
    assert next(iter(answer)) == b"a"
    assert counted.requests == 1
    answer.close()
    assert counted.closed == ["closed"]
    assert counted.requests == 0


def test_a_client_that_goes_before_the_first_byte_is_served(counted: Counted) -> None:
    answer = counted.call(lambda: Body(counted, [b"a"]))
    answer.close()
    assert counted.requests == 0
    assert counted.closed == ["closed"]


def test_an_answer_that_breaks_off_is_in_progress_until_its_end(counted: Counted) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a"
        raise RuntimeError("boom")

    answer = counted.call(lambda: Body(counted, chunks()))
    with pytest.raises(RuntimeError, match="boom"):
        list(answer)
    answer.close()
    assert counted.requests == 0


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(1), gevent.GreenletExit()])
def test_an_application_that_raises_has_served(counted: Counted, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        counted.call(fail)
    assert raised.value is error
    assert counted.seen == [1]
    assert counted.requests == 0


def test_an_answer_whose_close_raises_has_been_served(counted: Counted) -> None:
    """A process that ends waits for those that are in progress."""

    def fail() -> None:
        raise RuntimeError("boom")

    answer = counted.call(lambda: Body(counted, [b"a"], on_close=fail))
    assert list(answer) == [b"a"]
    with pytest.raises(RuntimeError, match="boom"):
        answer.close()
    assert counted.requests == 0


def test_an_answer_that_is_closed_twice_has_been_served_once(counted: Counted) -> None:
    """Not every middleware keeps the rule that only the server closes."""
    answer = counted.call(lambda: Body(counted, [b"a"]))
    answer.close()
    answer.close()
    assert counted.requests == 0
    assert counted.closed == ["closed"]


def test_several_are_counted_each(counted: Counted) -> None:
    answers = [counted.call(lambda: Body(counted, [b"a"])) for _ in range(3)]
    assert counted.requests == 3
    for number, answer in enumerate(answers, 1):
        answer.close()
        assert counted.requests == 3 - number
    assert counted.seen == [1, 2, 3]


def test_a_file_goes_through_as_it_is(counted: Counted) -> None:
    answer = counted.call(lambda: FileWrapper(io.BytesIO(b"content")))
    assert type(answer) is FileWrapper
    assert b"".join(answer) == b"content"
    assert counted.requests == 1
    answer.close()
    assert counted.requests == 0


class ServersFileWrapper:
    """How a server wants a file: it knows it by its type, and sends it with ``sendfile``."""

    def __init__(self, file: Any, block_size: int = 8192) -> None:
        self.file = file
        self.block_size = block_size

    def __getitem__(self, key: int) -> bytes:
        data: bytes = self.file.read(self.block_size)
        if not data:
            raise IndexError(key)
        return data

    def close(self) -> None:
        self.file.close()


def test_a_file_goes_through_as_the_server_wants_it(counted: Counted) -> None:
    """That of gunicorn is no iterator, and not the one of Werkzeug."""
    answer = counted.call(
        lambda: ServersFileWrapper(io.BytesIO(b"content")),
        **{"wsgi.file_wrapper": ServersFileWrapper},
    )
    assert type(answer) is ServersFileWrapper
    assert b"".join(iter(answer)) == b"content"  # type: ignore[call-overload]
    assert counted.requests == 1
    answer.close()
    assert counted.requests == 0


def test_a_file_goes_through_as_uwsgi_wants_it(counted: Counted) -> None:
    """Its wrapper is a function that returns the file; another answer it reads line by line."""
    file = io.BytesIO(b"content")
    answer = counted.call(
        lambda: file,
        **{"wsgi.file_wrapper": lambda file, _size=8192: file, "uwsgi.version": b"2.0"},
    )
    assert answer is file
    answer.close()
    assert counted.requests == 0


def test_clients_of_socketio_are_not_counted(front: Front) -> None:
    """A polling request waits for news, and is ended by the drain."""
    seen: list[int] = []
    app = front.guarded.app
    counting = app.wsgi_app = CountedRequests(app.wsgi_app)  # type: ignore[method-assign,assignment]
    front.guarded.socketio.on_event("look", lambda: seen.append(counting.in_progress))
    client = front.guarded.polling()
    client.connect()
    client.call("look")
    assert seen == [0]


def test_requests_of_an_application_are_counted(front: Front) -> None:
    app: Flask = front.guarded.app
    counting = app.wsgi_app = CountedRequests(app.wsgi_app)  # type: ignore[method-assign,assignment]
    seen: list[int] = []

    @app.get("/plain")
    def plain() -> str:
        seen.append(counting.in_progress)
        return "plain"

    @app.get("/stream")
    def stream() -> Response:
        def chunks() -> Iterator[str]:
            for number in range(3):
                seen.append(counting.in_progress)
                yield str(number)

        return Response(stream_with_context(chunks()))

    @app.get("/fails")
    def fails() -> str:
        seen.append(counting.in_progress)
        raise RuntimeError("boom")

    assert front.get("/plain", buffered=True).data == b"plain"
    assert front.get("/stream", buffered=True).data == b"012"
    assert front.get("/fails", buffered=True).status_code == 500
    assert seen == [1] * 5
    assert counting.in_progress == 0


def test_a_closing_iterator_is_no_list(counted: Counted) -> None:
    """What Flask answers with is one, whatever is in it."""
    answer = counted.call(lambda: ClosingIterator([b"a"], [lambda: counted.closed.append("own")]))
    assert counted.requests == 1
    assert list(answer) == [b"a"]
    answer.close()
    assert counted.closed == ["own"]
    assert counted.requests == 0


@pytest.mark.parametrize(
    ("async_mode", "server", "is_told"),
    [
        ("gevent", "Werkzeug/3.1.3", True),
        ("threading", "Werkzeug/3.1.3", False),
        ("gevent", "gevent/25.0 Python/3.11", False),
    ],
)
def test_a_development_server_that_cannot_serve_the_mode_is_told_once(
    caplog: pytest.LogCaptureFixture,
    async_mode: str,
    server: str,
    is_told: bool,
) -> None:
    """As with ``flask run``, which starts, answers pages, and leaves its clients waiting."""
    app = Flask("app")
    SocketIOGuard(app, SocketIO(app, async_mode=async_mode))
    client = app.test_client()
    for _ in range(2):
        client.get("/livez", environ_overrides={"SERVER_SOFTWARE": server})
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    text = (
        "flask run cannot serve async_mode 'gevent': no WebSocket works, and without "
        "gevent.monkey.patch_all() polling hangs too: start with socketio.run(app), or use "
        'SocketIO(async_mode="threading") under flask run'
    )
    assert said == ([text] if is_told else [])

"""Large messages and endless fragments: no frame stops a worker, or fills its memory."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.watches import (
    FLOOD_APP,
    PLAIN_GEVENT_WORKER,
    HttpWatch,
    MemoryWatch,
    crowding,
    milliseconds,
    wait_for_empty_tables,
)
from tests.support.raw_clients import RawWebSocket
from tests.support.raw_websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    encode_frame,
    text_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = [pytest.mark.timeout(90), pytest.mark.alone]

LARGE_MESSAGE = "an unauthenticated WebSocket sends one large message"
ENDLESS_FRAGMENTS = "a WebSocket sends fragments without end"
MEGABYTE = 1_000_000
NOISY_P99 = 0.25
"""Seconds; 0.05 on a machine that has nothing else to do."""

_STALL = 4.0
"""Seconds after which a worker that does not answer is given up."""
_SHORTEST_LOOK = 0.5
_CLOSE_TIMEOUT = 5.0
_FRAGMENT = 65536

_stalls = "HTTP p99 was|HTTP was stalled"
_no_websocket = "the WebSocket handshake was answered with 500"


def both_workers(fault: str, *, stock: str, because: str = _stalls) -> pytest.MarkDecorator:
    """Run a test under the gevent-websocket and under the plain gevent worker."""
    return pytest.mark.parametrize(
        "arguments",
        [
            pytest.param(
                (),
                id="geventwebsocket",
                marks=pytest.mark.faults(fault, stock=stock, because=because),
            ),
            pytest.param(
                PLAIN_GEVENT_WORKER,
                id="gevent",
                marks=pytest.mark.faults(
                    fault,
                    stock="no WebSocket at all: the handshake is answered with 500",
                    because=_no_websocket,
                ),
            ),
        ],
    )


@pytest.fixture
def server(make_fleet: Callable[..., Fleet], arguments: tuple[str, ...]) -> GunicornServer:
    """One process without a message queue, under the worker in question."""
    return make_fleet(app=FLOOD_APP, processes=1, has_queue=False, arguments=arguments).a


@pytest.fixture
def sender(server: GunicornServer) -> Iterator[RawWebSocket]:
    """A client that is yet to open its connection."""
    with RawWebSocket(server.port, timeout=_CLOSE_TIMEOUT) as client:
        yield client


class Attack:
    """Sends pieces in a thread, as far as the server takes them, and looks at what others feel."""

    def __init__(self, server: GunicornServer, sender: RawWebSocket) -> None:
        self._server = server
        self._sender = sender
        self._http = HttpWatch(server)
        self._memory = MemoryWatch(server)
        self._error: Exception | None = None
        self.sent = 0
        self.began_at = 0.0

    def run(self, pieces: Iterator[bytes], *, until: Callable[[], object]) -> None:
        """Send all *pieces*, and wait until *until* returns; fail if HTTP stalls meanwhile.

        Args:
            pieces: Bytes to send.
            until: Called once, in a thread; reads what the sender is answered.
        """
        reader = threading.Thread(target=self._read, args=(until,), daemon=True)
        writer = threading.Thread(target=self._send, args=(pieces,), daemon=True)
        with self._http as http, self._memory:
            self.began_at = time.monotonic()
            reader.start()
            writer.start()
            while reader.is_alive() or time.monotonic() < self.began_at + _SHORTEST_LOOK:
                time.sleep(0.01)
                slowest = http.slowest(since=self.began_at)
                assert slowest < _STALL, f"HTTP was stalled for {slowest:.1f} s and longer"
            writer.join(_CLOSE_TIMEOUT)
        assert self._error is None, f"the sender is neither answered nor closed: {self._error!r}"
        assert not http.errors

    def judge(self, measured: Measured, *, max_growth: float) -> None:
        """Assert that others were answered in time, and that memory was flat."""
        p99 = self._http.p99(since=self.began_at)
        slowest = self._http.slowest(since=self.began_at)
        measured("HTTP p99", milliseconds(p99))
        measured("slowest", milliseconds(slowest))
        measured("growth", f"{self._memory.growth:.1f} MiB")
        assert p99 < NOISY_P99 * crowding(), f"HTTP p99 was {milliseconds(p99)}"
        assert self._memory.growth < max_growth, f"memory grew by {self._memory.growth:.1f} MiB"

    def _read(self, until: Callable[[], object]) -> None:
        try:
            until()
        except (OSError, AssertionError) as error:
            self._error = error

    def _send(self, pieces: Iterator[bytes]) -> None:
        with contextlib.suppress(OSError):  # the server may close before it has everything
            for piece in pieces:
                self._sender.write(piece)
                self.sent += len(piece)


@both_workers(LARGE_MESSAGE, stock="a legal 0.9 MB message stalls the worker for 0.3 to 0.8 s")
def test_legal_message_of_almost_a_megabyte_is_echoed_and_stalls_nobody(
    server: GunicornServer, sender: RawWebSocket, measured: Measured
) -> None:
    """A message of 0.9 MB, below the limit, is sent and echoed, three times."""
    text = "x" * 900_000
    sender.open().join()
    echoed: list[Any] = []

    def read() -> None:
        echoed.extend(sender.read_ack(number) for number in range(3))

    attack = Attack(server, sender)
    pieces = (encode_frame(TEXT, f'42{number}["echo","{text}"]'.encode()) for number in range(3))
    attack.run(pieces, until=read)
    attack.judge(measured, max_growth=24.0)
    assert echoed == [[text]] * 3


def one_frame(size: int) -> Iterator[bytes]:
    """Return a text frame of that size."""
    yield encode_frame(TEXT, length=size)
    piece = b"4" * MEGABYTE
    for _ in range(size // MEGABYTE):
        yield piece


def fragments(size: int) -> Iterator[bytes]:
    """Return a message of that size in fragments, without an end."""
    piece = b"4" * _FRAGMENT
    yield encode_frame(TEXT, piece, is_final=False)
    following = encode_frame(CONTINUATION, piece, is_final=False)
    for _ in range(size // _FRAGMENT):
        yield following


@pytest.mark.sampled(2)
@both_workers(
    LARGE_MESSAGE,
    stock="stalls the worker for 4 s (10 MB), 30 s (100 MB), until gunicorn kills it",
)
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda: one_frame(10 * MEGABYTE), id="10-MB"),
        pytest.param(lambda: one_frame(100 * MEGABYTE), id="100-MB"),
        pytest.param(lambda: fragments(100 * MEGABYTE), id="100-MB-in-fragments"),
    ],
)
def test_sender_of_too_large_a_message_is_closed_and_stalls_nobody(
    pieces: Callable[[], Iterator[bytes]],
    server: GunicornServer,
    sender: RawWebSocket,
    measured: Measured,
) -> None:
    """A message beyond the limit is refused from its header, with the code that says why."""
    sender.open()
    attack = Attack(server, sender)
    closed_after: list[float] = []

    def read() -> None:
        sender.read_farewell()
        closed_after.append(time.monotonic() - attack.began_at)

    attack.run(pieces(), until=read)
    attack.judge(measured, max_growth=8.0)
    measured("taken", f"{attack.sent / MEGABYTE:.0f} MB")
    measured("closed after", milliseconds(closed_after[0]))
    assert sender.farewell is not None
    assert sender.farewell.code == 1009
    sender.shut()
    wait_for_empty_tables(server)


def empty_fragments(count: int) -> Iterator[bytes]:
    """Return the beginning of a message and *count* fragments of nothing."""
    yield encode_frame(TEXT, b"4", is_final=False)
    following = encode_frame(CONTINUATION, is_final=False) * 1000
    for _ in range(count // 1000):
        yield following


def tiny_fragments(count: int) -> Iterator[bytes]:
    """Return the beginning of a message and *count* fragments of a byte each."""
    yield encode_frame(TEXT, b"4", is_final=False)
    following = encode_frame(CONTINUATION, b"x", is_final=False) * 1000
    for _ in range(count // 1000):
        yield following


@pytest.mark.sampled(2)
@both_workers(
    ENDLESS_FRAGMENTS, stock="stall the worker for seconds", because=f"{_stalls}|memory grew"
)
@pytest.mark.parametrize("pieces", [empty_fragments, tiny_fragments])
def test_endless_fragments_stall_nobody_and_cost_no_memory(
    pieces: Callable[[int], Iterator[bytes]],
    server: GunicornServer,
    sender: RawWebSocket,
    measured: Measured,
) -> None:
    """600,000 fragments of a message that never ends, each of nothing or of one byte."""
    sender.open()
    attack = Attack(server, sender)

    def send() -> Iterator[bytes]:
        yield from pieces(600_000)
        yield encode_frame(PING, b"done")

    def read() -> None:
        """Read until the server has come to the ping at the end, or has closed."""
        while True:
            frame = sender.read_frame(timeout=20.0)
            if frame is None or frame.payload == b"done":
                return

    attack.run(send(), until=read)
    attack.judge(measured, max_growth=8.0)
    measured("outcome", f"closed {sender.farewell.code}" if sender.farewell else "kept")
    sender.shut()
    wait_for_empty_tables(server)


@pytest.mark.sampled(2)
@both_workers(
    "a WebSocket sends tiny frames without end", stock="stall the worker for as long as they come"
)
@pytest.mark.parametrize(
    ("frame", "count"),
    [
        pytest.param(encode_frame(PING), 100_000, id="pings"),
        pytest.param(encode_frame(TEXT, b"6"), 100_000, id="noops"),
        pytest.param(encode_frame(TEXT, b"42[]"), 20_000, id="empty-events"),
    ],
)
def test_endless_tiny_frames_stall_nobody(
    frame: bytes, count: int, server: GunicornServer, sender: RawWebSocket, measured: Measured
) -> None:
    """Frames of a few bytes each, legal or refused one by one, as fast as they are taken."""
    sender.open().join()
    attack = Attack(server, sender)

    def send() -> Iterator[bytes]:
        for _ in range(count // 1000):
            yield frame * 1000
        yield text_frame("40/done,")

    def read() -> None:
        """Read until the server has come to the end, or has closed."""
        while True:
            found = sender.read_frame(timeout=20.0)
            if found is None or found.payload.startswith(b"44/done,"):
                return

    attack.run(send(), until=read)
    attack.judge(measured, max_growth=8.0)
    measured("outcome", f"closed {sender.farewell.code}" if sender.farewell else "kept")


@both_workers(
    "a close frame",
    stock='answered with code 25209, the letters "by"',
    because="answered with code 25209",
)
def test_close_is_answered_with_its_code_and_ends_the_connection(
    server: GunicornServer, sender: RawWebSocket, measured: Measured
) -> None:
    """A client closes as the protocol has it, and the server does its part."""
    sender.open()
    sent_at = time.monotonic()
    sender.write(encode_frame(CLOSE, b"\x03\xe8bye"))
    code = sender.read_to_end(timeout=2.0).code
    measured("ended after", milliseconds(time.monotonic() - sent_at))
    assert code == 1000, f"answered with code {code}"
    wait_for_empty_tables(server)


@both_workers(
    "a WebSocket in unusual but legal frames",
    stock="its close code is answered with another",
    because="answered with code 25209",
)
def test_legal_frames_of_every_shape_are_taken(
    server: GunicornServer, sender: RawWebSocket, measured: Measured
) -> None:
    """Fragments, also amid a character; pings between them; binary; lengths of every form."""
    sender.open().join()
    sender.write(
        encode_frame(TEXT, '421["echo","gr\u00fc'.encode()[:-1], is_final=False, mask=b"mask")
        + encode_frame(PING, b"between")
        + encode_frame(CONTINUATION, is_final=False)
        + encode_frame(CONTINUATION, "\u00fc".encode()[1:] + b'n"]', mask=b"\xff\0\xff\0")
    )
    pong = sender.read_frame()
    assert pong is not None
    assert (pong.opcode, pong.payload) == (PONG, b"between")
    assert sender.read_ack(1) == ["gr\u00fcn"]
    for size in (125, 126, 65535, 65536):
        assert sender.call("echo", "x" * size, ack_id=size) == ["x" * size]
    sender.send('451-2["echo",{"_placeholder":true,"num":0}]')
    sender.write(encode_frame(BINARY, b"\0\xff", mask=b"\x12\x34\x56\x78"))
    sender.read_until("461-2[")
    attachment = sender.read_frame()
    assert attachment is not None
    assert (attachment.opcode, attachment.payload) == (BINARY, b"\0\xff")
    sender.write(encode_frame(PONG, b"unasked"))
    sender.write(encode_frame(CLOSE, b"\x0f\xa0mine"))
    code = sender.read_farewell(timeout=2.0).code
    measured("close", code)
    assert code == 4000, f"answered with code {code}"

"""WebSockets underneath an Engine.IO socket: real sockets, and a real client at the other end."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import socket as sockets
import struct
import threading
import time
import tracemalloc
from collections import deque
from typing import TYPE_CHECKING, Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from engineio.async_drivers.threading import _async
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Opcode

from flask_socketio_guard.clients import send_queue as sending
from flask_socketio_guard.clients.send_queue import SendQueue, SlowConsumer
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream.engineio.keepalive import keep_alive
from flask_socketio_guard.upstream.engineio.library_transport import LibraryTransport
from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from flask_socketio_guard.upstream.engineio.websocket import RawSocket
from flask_socketio_guard.upstream.engineio.websocket_transport import ProtocolTransport
from tests.support import unit_support, unit_websocket
from tests.support.raw_websocket import BINARY, CLOSE, CONTINUATION, PING, TEXT, encode_frame
from tests.support.scale import examples
from tests.support.unit_websocket import Ended, Peer
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_socketio_guard.app_guard import AppGuard
    from tests.support.unit_support import Guarded
    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_served = unit_websocket.make_served

MAX_SIZE = 100_000
CLOSE_TIMEOUT = 0.3


class Line:
    """A transport with a client at its other end, and a task that receives.

    Attributes:
        messages: What was received.
        has_ended: Whether there will be no more.
    """

    def __init__(
        self,
        served: Served,
        ends: tuple[Any, Any],
        *,
        extensions: tuple[list[Any], list[Any]] = ([], []),
        read_first: Callable[[int], bytes] | None = None,
        is_answering: bool = True,
    ) -> None:
        self.served = served
        self.inner: AppGuard = served.inner
        self.sock, client = ends
        self.peer = Peer(client, extensions=extensions[1], is_answering=is_answering)
        self.peer.sock.settimeout(5.0)
        self.queue = SendQueue(max_packets=10**6, max_bytes=10**9, policy=SlowConsumer.DISCONNECT)
        raw = RawSocket(self.sock, read_first or self.sock.recv, extensions[0], None)
        self.transport = ProtocolTransport(raw, self.queue, self.inner, max_size=MAX_SIZE)
        self.messages: list[str | bytes] = []
        self.batches: list[int] = []
        self.violations: list[signals.Violation] = served.collect(signals.protocol_violated)
        self.has_ended = False
        self.ended_at = 0.0

    def receive(self) -> None:
        """Start the task that receives."""
        self.inner.runtime.spawn(self._receive, name="receiver")

    def _receive(self) -> None:
        try:
            while (messages := self.transport.receive()) is not None:
                batch = list(messages)
                self.batches.append(len(batch))
                self.messages += batch
            if self.transport.is_leaving:
                self.transport.leave()
        finally:
            self.has_ended = True
            self.ended_at = time.monotonic()

    def put(self, *messages: str | bytes) -> None:
        """Queue messages; a text has the Engine.IO packet type in front when it arrives."""
        for message in messages:
            self.queue.put(ClientMessage.of_socketio(message))
        self.transport.wake()

    def wait_for(self, condition: Callable[[], object], message: str = "it is not so") -> None:
        self.served.wait_for(condition, message)

    def expect(self, *messages: str | bytes) -> None:
        """Wait until just these messages were received."""
        self.wait_for(lambda: len(self.messages) >= len(messages), "no message was received")
        assert self.messages == list(messages)

    def end(self) -> None:
        self.transport.abort()
        if self.messages or self.batches or self.has_ended:
            self.wait_for(lambda: self.has_ended, "it is still receiving")
        self.sock.close()
        self.peer.sock.close()


@pytest.fixture
def served(make_served: Callable[..., Served]) -> Served:
    """An application whose guard is started."""
    served = make_served(close_timeout=CLOSE_TIMEOUT)
    served.inner.start()
    return served


@pytest.fixture
def make_line(served: Served) -> Iterator[Callable[..., Line]]:
    """Return a function that makes a line; with ``is_receiving=False`` nobody receives."""
    lines: list[Line] = []

    def make(
        *, ends: tuple[Any, Any] | None = None, is_receiving: bool = True, **options: Any
    ) -> Line:
        line = Line(served, ends or gevent.socket.socketpair(), **options)
        lines.append(line)
        if is_receiving:
            line.receive()
        return line

    yield make
    for line in lines:
        line.end()


@pytest.fixture
def line(make_line: Callable[..., Line]) -> Line:
    """A line on which is received; nothing is sent before ``wire.start()``."""
    return make_line()


def narrow_pair() -> tuple[Any, Any]:
    """Return two connected sockets between which little is under way at a time."""
    pair: tuple[Any, Any] = gevent.socket.socketpair()
    for sock in pair:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4096)
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    return pair


def tls_pair() -> tuple[Any, Any]:
    """Return two sockets connected by TLS; nobody has a certificate."""
    contexts = []
    for protocol in (gevent.ssl.PROTOCOL_TLS_SERVER, gevent.ssl.PROTOCOL_TLS_CLIENT):
        context = gevent.ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = gevent.ssl.CERT_NONE
        context.maximum_version = gevent.ssl.TLSVersion.TLSv1_2  # 1.3 knows no anonymous ciphers
        context.set_ciphers("aNULL:@SECLEVEL=0")
        contexts.append(context)
    server, client = gevent.socket.socketpair()
    accepting = gevent.spawn(contexts[0].wrap_socket, server, server_side=True)
    client = contexts[1].wrap_socket(client)
    return accepting.get(timeout=5.0), client


def deflating(**client_options: Any) -> dict[str, Any]:
    """Return the option of a line on which both ends compress."""
    return {
        "extensions": (
            [PerMessageDeflate(False, False, 15, 15)],
            [PerMessageDeflate(False, False, 15, 15, **client_options)],
        )
    }


def fragments(opcode: int, *parts: bytes) -> bytes:
    """Return a message in as many frames as there are parts."""
    return b"".join(
        encode_frame(CONTINUATION if number else opcode, part, is_final=number == len(parts) - 1)
        for number, part in enumerate(parts)
    )


# What a client sends


def test_text_and_binary_messages_are_received_in_order(line: Line) -> None:
    line.peer.send("one", b"\x00\xff", "", b"", "d\N{EURO SIGN}\N{GRINNING FACE}")
    line.expect("one", b"\x00\xff", "", b"", "d\N{EURO SIGN}\N{GRINNING FACE}")
    assert [type(message) for message in line.messages] == [str, bytes, str, bytes, str]


def test_fragments_are_put_together_and_pings_between_them_are_answered(line: Line) -> None:
    line.peer.send_raw(
        encode_frame(TEXT, b"a", is_final=False)
        + encode_frame(PING, b"are you there")
        + encode_frame(CONTINUATION, b"", is_final=False)
        + encode_frame(CONTINUATION, b"b")
        + fragments(BINARY, b"\x00", b"\xff", b"")
        + encode_frame(TEXT, b"whole")
    )
    line.expect("ab", b"\x00\xff", "whole")
    frame = line.peer.read_frame()
    assert (frame.opcode, bytes(frame.data)) == (Opcode.PONG, b"are you there")


def test_characters_may_be_cut_by_fragments(line: Line) -> None:
    text = "\N{EURO SIGN}\N{GRINNING FACE}"
    data = text.encode()
    line.peer.send_raw(fragments(TEXT, *(data[i : i + 1] for i in range(len(data)))))
    line.expect(text)


def test_messages_arrive_however_they_are_cut(make_line: Callable[..., Line]) -> None:
    """Frames, and the pieces in which TCP delivers them, say nothing of messages."""
    line = make_line()

    @settings(deadline=None, max_examples=examples(25))
    @given(
        st.lists(st.text(max_size=30) | st.binary(max_size=30), min_size=1, max_size=4),
        st.randoms(use_true_random=False),
    )
    def send(messages: list[str | bytes], chance: random.Random) -> None:
        line.messages.clear()
        stream = b""
        for message in messages:
            data = message.encode() if isinstance(message, str) else message
            cuts = sorted(chance.randint(0, len(data)) for _ in range(chance.randint(0, 3)))
            parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            stream += fragments(TEXT if isinstance(message, str) else BINARY, *parts)
        cuts = sorted(chance.randint(0, len(stream)) for _ in range(8))
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            line.peer.send_raw(stream[start:end])
            line.inner.runtime.sleep(0)
        line.expect(*messages)

    send()
    assert line.violations == []


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(TEXT, b"\xff"),
        encode_frame(TEXT, "\N{EURO SIGN}".encode()[:2]),
        encode_frame(TEXT, b"\xed\xa0\x80"),
        fragments(TEXT, b"a", b"\xff", b"b"),
        fragments(TEXT, "\N{EURO SIGN}".encode()[:2], b"x"),
    ],
    ids=["byte", "cut", "surrogate", "fragment", "continued"],
)
@pytest.mark.parametrize("before", [[], ["before"]], ids=["alone", "after-a-message"])
def test_invalid_utf8_costs_its_sender_the_connection(
    line: Line, data: bytes, before: list[str]
) -> None:
    """What it sent before is received, what it sends afterwards is not."""
    line.peer.is_answering = False
    line.transport.start()
    line.peer.send_raw(
        b"".join(encode_frame(TEXT, text.encode()) for text in before)
        + data
        + encode_frame(TEXT, b"afterwards")
    )
    assert line.peer.read_rest() == []
    assert line.peer.closed == (1007, "invalid UTF-8")
    line.peer.sock.close()
    line.wait_for(lambda: line.has_ended)
    assert line.messages == before
    assert line.violations == [signals.Violation("websocket", "invalid UTF-8")]


def test_a_message_of_just_the_largest_size_is_received(line: Line) -> None:
    half = b"x" * (MAX_SIZE // 2)
    line.peer.send_raw(
        encode_frame(BINARY, b"x" * MAX_SIZE)
        + fragments(BINARY, half, half)
        + fragments(BINARY, b"x" * MAX_SIZE, b"")
    )
    line.expect(*[b"x" * MAX_SIZE] * 3)
    assert line.violations == []


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(BINARY, length=MAX_SIZE + 1),
        encode_frame(TEXT, length=2**62),
        encode_frame(BINARY, b"x" * MAX_SIZE, is_final=False) + encode_frame(CONTINUATION, b"x"),
        encode_frame(BINARY, b"x", is_final=False) + encode_frame(CONTINUATION, length=MAX_SIZE),
    ],
    ids=["just", "absurdly", "fragments", "last-fragment"],
)
def test_too_large_a_message_is_refused_before_its_body_is_there(line: Line, data: bytes) -> None:
    line.peer.send_raw(data)
    assert line.peer.read_rest() == []
    assert line.peer.closed is not None
    assert line.peer.closed[0] == 1009
    line.peer.sock.close()
    line.wait_for(lambda: line.has_ended)
    assert line.messages == []
    assert [violation.reason for violation in line.violations] == ["size"]


def test_a_sender_that_goes_on_sending_can_read_why_it_was_closed(line: Line) -> None:
    """Were its bytes left unread, TCP would reset the connection and with it the reason."""
    line.transport.start()
    line.peer.send_raw(encode_frame(BINARY, length=10**9))
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 3_000_000:
            line.peer.send_raw(b"x" * 65536)
            sent += 65536
            line.put('2["news"]')  # others go on to send to it
            line.inner.runtime.sleep(0)
    assert sent >= 3_000_000, "nobody reads what it sends"
    line.peer.read_rest()
    assert line.peer.closed is not None
    assert line.peer.closed[0] == 1009


def test_a_sender_that_is_closed_is_not_read_from_for_ever(line: Line) -> None:
    began_at = time.monotonic()
    line.peer.send_raw(encode_frame(BINARY, length=10**9))
    line.wait_for(lambda: line.has_ended, "it is still read from")
    assert CLOSE_TIMEOUT - 0.05 < line.ended_at - began_at < CLOSE_TIMEOUT + 1.0


def test_a_message_of_too_many_fragments_is_refused(line: Line) -> None:
    """Empty ones cost no bytes, and so no bound of bytes ends them."""
    empty = encode_frame(CONTINUATION, b"", is_final=False)
    line.peer.send_raw(encode_frame(TEXT, b"", is_final=False) + empty * 4095)
    line.peer.send_raw(encode_frame(CONTINUATION, b"whole"))
    line.expect("whole")
    line.peer.send_raw(
        encode_frame(TEXT, b"", is_final=False)
        + empty * 4096
        + encode_frame(CONTINUATION, b"end")
        + encode_frame(TEXT, b"afterwards")
    )
    line.peer.read_rest()
    assert line.peer.closed == (1008, "too many fragments")
    assert line.messages == ["whole"]
    assert line.violations == [signals.Violation("websocket", "too many fragments")]


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(TEXT, b"x", mask=None),
        encode_frame(3, b"x"),
        encode_frame(TEXT, b"x", reserved=4),
        encode_frame(CONTINUATION, b"x"),
        encode_frame(TEXT, b"x", is_final=False) + encode_frame(TEXT, b"x"),
        encode_frame(PING, b"x" * 126),
        encode_frame(PING, b"x", is_final=False),
        encode_frame(CLOSE, b"x"),
        encode_frame(CLOSE, struct.pack("!H", 1005)),
    ],
    ids=[
        "unmasked",
        "opcode",
        "reserved-bit",
        "nothing-to-continue",
        "not-continued",
        "long-ping",
        "cut-ping",
        "short-close",
        "close-code",
    ],
)
def test_frames_that_are_none_are_refused(line: Line, data: bytes) -> None:
    line.peer.send_raw(encode_frame(TEXT, b"before") + data)
    assert line.peer.read_rest() == []
    assert line.peer.closed is not None
    assert line.peer.closed[0] == 1002
    assert line.messages == ["before"]
    assert [violation.reason for violation in line.violations] == ["websocket"]


def test_what_the_http_parser_has_read_comes_first(make_line: Callable[..., Line]) -> None:
    frames = encode_frame(TEXT, b"first") + encode_frame(TEXT, b"second")
    left = deque([frames[:5]])
    line = make_line(read_first=lambda size: left.popleft()[:size])
    line.peer.send_raw(frames[5:])
    line.expect("first", "second")
    assert not left


@pytest.mark.parametrize(
    "unit",
    [
        encode_frame(TEXT, b"x"),
        encode_frame(PING),
        encode_frame(CONTINUATION, is_final=False),
        encode_frame(BINARY, b"x" * 9000),
    ],
    ids=["messages", "pings", "fragments", "large"],
)
def test_a_client_that_always_says_something_lets_others_have_their_turn(
    make_line: Callable[..., Line], unit: bytes
) -> None:
    line = make_line(is_receiving=False)
    size = 20_000 if len(unit) < 100 else 1_000_000
    line.peer.sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 8 * size)
    start = encode_frame(TEXT, is_final=False) if unit[0] == CONTINUATION else b""
    line.peer.send_raw(start + unit * (size // len(unit)))
    turns: list[float] = []

    def count() -> None:
        while not line.has_ended:
            turns.append(time.process_time())  # what other processes do does not count
            line.inner.runtime.sleep(0.0002)

    line.inner.runtime.spawn(count, name="counter")
    line.receive()
    line.inner.runtime.sleep(0)
    line.peer.vanish()
    line.wait_for(lambda: line.has_ended)
    longest = max(b - a for a, b in itertools.pairwise(turns))
    assert len(turns) > 3
    assert longest < 0.1


def test_a_flood_of_small_messages_is_acted_upon_in_portions(
    make_line: Callable[..., Line],
) -> None:
    """A buffer of the kernel's holds ten thousand of them, also after a large one."""
    line = make_line(is_receiving=False)
    data = encode_frame(BINARY, b"x" * MAX_SIZE) + encode_frame(TEXT, b"x") * 10_000
    line.peer.sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4 * len(data))
    sending = line.inner.runtime.spawn(lambda: line.peer.send_raw(data), name="sender")
    line.receive()
    line.wait_for(lambda: len(line.messages) == 10_001)
    sending.join(5.0)
    assert max(line.batches[3:]) < 200


# Pings


def test_pings_are_answered(line: Line) -> None:
    for data in (b"", b"x" * 125):
        line.peer.send_raw(encode_frame(PING, data))
        frame = line.peer.read_frame()
        assert (frame.opcode, bytes(frame.data)) == (Opcode.PONG, data)


def test_a_client_that_pings_and_never_reads_holds_no_memory(
    make_line: Callable[..., Line],
) -> None:
    """The newest pings are answered when it reads."""
    line = make_line(ends=narrow_pair())
    pings = [encode_frame(PING, str(number).encode().rjust(125)) for number in range(8_000)]
    end = encode_frame(TEXT, b"end")
    line.inner.runtime.start(lambda: None)
    line.inner.runtime.sleep(0.01)  # greenlets have been made ahead
    tracemalloc.start()
    try:
        for start in range(0, len(pings), 100):
            line.peer.send_raw(b"".join(pings[start : start + 100]))
        line.peer.send_raw(end)
        line.expect("end")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200_000, "answers pile up"
    answered = []
    while not answered or answered[-1] != len(pings) - 1:
        answered.append(int(bytes(line.peer.read_frame().data)))
    assert answered == sorted(answered)
    assert len(answered) < 1000


# What is sent to a client


def test_nothing_is_sent_before_the_start_but_what_is_said_so(line: Line) -> None:
    line.put("waits")
    line.transport.send_at_once("3probe")
    assert line.peer.read() == "3probe"
    line.inner.runtime.sleep(0.02)
    line.transport.send_at_once("again")
    assert line.peer.read() == "again"
    line.transport.start()
    assert line.peer.read() == "4waits"


def test_messages_are_sent_in_order_and_the_books_are_empty_afterwards(line: Line) -> None:
    line.transport.start()
    messages: list[str | bytes] = [f'2["{number}"]' for number in range(500)]
    messages[::5] = [os.urandom(number) for number in range(1, 101)]
    line.put(*messages)
    for message in messages:
        assert line.peer.read() == (message if isinstance(message, bytes) else f"4{message}")
    assert (len(line.queue), line.queue.size) == (0, 0)
    assert not line.transport.is_stuck


def test_a_client_that_reads_slowly_gets_everything_in_order(
    make_line: Callable[..., Line],
) -> None:
    """While it does not read, one task waits for it; pings are answered in between."""
    line = make_line(ends=narrow_pair())
    line.transport.start()
    chance = random.Random(1)
    messages = [chance.randbytes(chance.choice((1, 100, 70_000, 300_000))) for _ in range(40)]
    line.put(*messages[:20])
    line.wait_for(lambda: line.transport.is_stuck, "everything fits into the buffers of the kernel")
    line.peer.send_raw(encode_frame(PING, b"still there?"))
    line.put(*messages[20:])
    received: list[bytes] = []
    answers = []
    while len(received) < len(messages):
        frame = line.peer.read_frame()
        (answers if frame.opcode is Opcode.PONG else received).append(bytes(frame.data))
        line.inner.runtime.sleep(0.001)
    assert received == messages
    assert answers == [b"still there?"]
    line.wait_for(lambda: not line.transport.is_stuck, "it seems stuck for ever")
    assert (len(line.queue), line.queue.size) == (0, 0)
    line.put("2[]")
    assert line.peer.read() == "42[]"


def test_a_spawn_callback_that_fails_stops_no_writer(
    make_line: Callable[..., Line], caplog: pytest.LogCaptureFixture
) -> None:
    """The task that waits for a client is started in the event loop, where none may wait."""
    line = make_line(ends=narrow_pair())
    line.transport.start()

    def fail(_greenlet: object) -> None:
        raise RuntimeError("a spawn callback")

    gevent.Greenlet.add_spawn_callback(fail)
    try:
        line.put(b"x" * 300_000)
        line.wait_for(lambda: line.transport.is_stuck)
        line.inner.runtime.sleep(0)
    finally:
        gevent.Greenlet.remove_spawn_callback(fail)
    line.put("2[]")
    assert line.peer.read() == b"x" * 300_000
    assert line.peer.read() == "42[]"
    assert "a spawn callback of gevent failed" in caplog.text


def test_a_client_that_does_not_read_has_no_more_in_its_way_than_one_batch(
    make_line: Callable[..., Line],
) -> None:
    """What waits is counted as waiting, so that bounds can tell."""
    line = make_line(ends=narrow_pair())
    line.transport.start()
    line.put(*[b"x" * 10_000] * 100)
    line.wait_for(lambda: line.transport.is_stuck)
    size = line.queue.size
    line.inner.runtime.sleep(0.02)
    assert line.queue.size == size
    assert size > 700_000
    line.transport.flush()
    assert line.queue.size == size


def test_a_wire_is_flushed_once_however_much_is_put(line: Line) -> None:
    line.transport.start()
    line.inner.runtime.sleep(0.01)
    line.put("one")
    line.put("two")
    assert len(line.inner.write_batcher._due) == 1
    assert [line.peer.read(), line.peer.read()] == ["4one", "4two"]


def test_flush_sends_at_once(line: Line) -> None:
    line.transport.start()
    line.inner.runtime.sleep(0)
    line.put("now")
    line.transport.flush()
    assert not line.transport.is_stuck
    line.peer.sock.setblocking(False)
    assert line.peer.read() == "4now"
    line.peer.sock.settimeout(5.0)


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_client_that_vanishes_while_something_is_sent_ends_it(
    make_line: Callable[..., Line], is_slow: bool
) -> None:
    line = make_line(ends=narrow_pair() if is_slow else None)
    line.transport.start()
    if is_slow:
        line.put(b"x" * 1_000_000, "2[]")
        line.wait_for(lambda: line.transport.is_stuck)
    line.peer.vanish()
    line.put(b"x" * 1_000_000, "2[]")
    line.wait_for(lambda: line.has_ended)
    line.wait_for(lambda: not line.transport.is_stuck)
    assert not line.queue
    line.put("2[]")
    line.transport.flush()


# What is sent past the queue


def frames_of(*messages: str | bytes) -> bytes:
    return b"".join(ClientMessage.of_socketio(message).frames for message in messages)


def test_a_broadcast_is_written_at_once_where_nothing_waits(line: Line) -> None:
    line.transport.start()
    line.inner.runtime.sleep(0)
    assert line.transport.write_now(frames_of("now", "and then"))
    line.peer.sock.setblocking(False)
    assert [line.peer.read(), line.peer.read()] == ["4now", "4and then"]
    line.peer.sock.settimeout(5.0)


def test_a_broadcast_does_not_overtake_what_waits(line: Line) -> None:
    assert not line.transport.write_now(frames_of("before the start"))
    line.transport.start()
    line.put("first")
    assert not line.transport.write_now(frames_of("second"))
    line.put("second")
    line.inner.runtime.sleep(0)
    assert line.transport.write_now(frames_of("third"))
    assert [line.peer.read() for _ in range(3)] == ["4first", "4second", "4third"]


def test_a_broadcast_does_not_overtake_an_answer_to_a_ping(line: Line) -> None:
    line.transport.start()
    line.inner.runtime.sleep(0)
    line.transport.send_at_once("3probe")
    assert not line.transport.write_now(frames_of("later"))


def test_a_broadcast_waits_behind_one_that_the_client_does_not_read(
    make_line: Callable[..., Line],
) -> None:
    line = make_line(ends=narrow_pair())
    line.transport.start()
    line.inner.runtime.sleep(0)
    large = os.urandom(300_000)
    assert line.transport.write_now(frames_of(large))
    assert line.transport.is_stuck
    assert not line.transport.write_now(frames_of("second"))
    line.put("second")
    assert [line.peer.read(), line.peer.read()] == [large, "4second"]
    line.wait_for(lambda: not line.transport.is_stuck)
    assert line.transport.write_now(frames_of("third"))
    assert line.peer.read() == "4third"


@pytest.mark.parametrize("how", ["close", "abort", "vanish", "leave"])
def test_a_broadcast_is_not_written_to_who_leaves(line: Line, how: str) -> None:
    line.transport.start()
    line.inner.runtime.sleep(0)
    if how == "close":
        line.transport.close(1000, "")
        line.inner.runtime.sleep(0.01)
    elif how == "abort":
        line.transport.abort()
    elif how == "leave":
        line.peer.send_close()
        line.wait_for(lambda: line.transport.is_leaving)
    else:
        line.peer.vanish()
        line.wait_for(lambda: line.has_ended)
        # The first may still be taken by the kernel, which then learns that nobody is there.
        line.wait_for(lambda: not line.transport.write_now(frames_of("anybody?")))
    assert not line.transport.write_now(frames_of("late"))
    if how == "close":
        assert line.peer.read_rest() == []


def test_a_broadcast_over_tls_takes_the_way_through_the_queue(
    make_line: Callable[..., Line],
) -> None:
    line = make_line(ends=tls_pair())
    line.transport.start()
    line.inner.runtime.sleep(0.01)
    assert not line.transport.write_now(frames_of("now"))


def test_a_compressed_broadcast_takes_the_way_through_the_queue(
    make_line: Callable[..., Line],
) -> None:
    """Each client's compression has a state of its own."""
    line = make_line(**deflating())
    line.transport.start()
    line.inner.runtime.sleep(0)
    assert not line.transport.write_now(frames_of("now"))


@pytest.mark.parametrize("is_fast", [True, False])
def test_writes_may_be_made_one_by_one(make_served: Callable[..., Served], is_fast: bool) -> None:
    """For diagnosis: what is put is sent before anything else happens."""
    served = make_served(close_timeout=CLOSE_TIMEOUT, fast=is_fast)
    served.inner.start()
    line = Line(served, gevent.socket.socketpair())
    line.transport.start()
    line.put("now")
    assert len(line.queue) == is_fast
    assert line.peer.read() == "4now"
    line.end()


# TLS


@pytest.fixture
def tls_line(make_line: Callable[..., Line]) -> Line:
    """A line over TLS."""
    line = make_line(ends=tls_pair())
    line.transport.start()
    return line


def test_messages_pass_through_tls_both_ways(tls_line: Line) -> None:
    chance = random.Random(2)
    messages = [chance.randbytes(chance.choice((1, 1000, 100_000))) for _ in range(30)]
    tls_line.put(*messages)
    assert [tls_line.peer.read() for _ in messages] == messages
    tls_line.peer.send(*messages)
    tls_line.expect(*messages)
    tls_line.wait_for(lambda: not tls_line.transport.is_stuck)


def test_a_client_over_tls_that_reads_slowly_gets_everything(tls_line: Line) -> None:
    messages = [os.urandom(50_000) for _ in range(30)]
    tls_line.put(*messages)
    tls_line.inner.runtime.sleep(0.02)
    tls_line.put("2[]")
    assert tls_line.transport.is_stuck
    assert [tls_line.peer.read() for _ in messages] == messages
    assert tls_line.peer.read() == "42[]"


def test_a_large_message_over_tls_makes_progress_while_it_is_taken(
    tls_line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a client on a slow link would count as slow in the middle of it."""
    progress: list[int] = []
    monkeypatch.setattr(SendQueue, "progressed", lambda queue: progress.append(len(queue)))
    tls_line.put(b"x" * 3_000_000)
    assert tls_line.peer.read() == b"x" * 3_000_000
    assert len(progress) >= 30


def test_the_server_says_through_tls_why_it_closes(tls_line: Line) -> None:
    tls_line.put("2[]")
    tls_line.transport.close(1012, "service restart")
    assert tls_line.peer.read_rest() == ["42[]"]
    assert tls_line.peer.closed == (1012, "service restart")


def test_a_client_that_closes_is_answered_through_tls(tls_line: Line) -> None:
    tls_line.peer.send_close(1000, "bye")
    tls_line.peer.read_rest()
    assert tls_line.peer.closed == (1000, "bye")


def test_a_client_that_breaks_the_protocol_is_told_through_tls(tls_line: Line) -> None:
    tls_line.peer.send_raw(encode_frame(BINARY, length=10**9))
    tls_line.peer.read_rest()
    assert tls_line.peer.closed is not None
    assert tls_line.peer.closed[0] == 1009


# Compression


def test_messages_are_compressed_both_ways(make_line: Callable[..., Line]) -> None:
    line = make_line(**deflating())
    line.transport.start()
    noise = random.Random(3).randbytes(5000)
    for message in ("x" * 50_000, "\N{EURO SIGN}" * 100, b"\x00" * 50_000, noise, "", b"y"):
        line.messages.clear()
        line.put(message)
        received = line.peer.read()
        assert received == (f"4{message}" if isinstance(message, str) else message)
        line.peer.send(message)
        line.expect(message)


def test_compressed_frames_are_small_and_remember_each_other(
    make_line: Callable[..., Line],
) -> None:
    line = make_line(extensions=([PerMessageDeflate(False, False, 15, 15)], []))
    line.transport.start()
    text = "".join(random.Random(4).choices("abcdefgh", k=3000))
    line.put(text, text)
    line.inner.runtime.sleep(0.02)
    data = line.peer.sock.recv(65536)
    first = struct.unpack("!H", data[2:4])[0]
    assert data[0] == 0x80 | 0x40 | TEXT
    assert first < 2000
    assert len(data) < first + 200


def test_control_frames_are_not_compressed(make_line: Callable[..., Line]) -> None:
    line = make_line(**deflating())
    line.transport.send_at_once("3probe")
    assert line.peer.read() == "3probe"
    line.peer.send_raw(encode_frame(PING, b"ping"))
    assert bytes(line.peer.read_frame().data) == b"ping"
    line.transport.start()
    line.put("last" * 100)
    line.transport.close(1000, "bye")
    assert line.peer.read_rest() == ["4" + "last" * 100]
    assert line.peer.closed == (1000, "bye")


def test_little_is_inflated_in_one_go(make_line: Callable[..., Line]) -> None:
    """A buffer of the kernel's holds 64 MB, compressed; also after a message that is none."""
    line = make_line(is_receiving=False, **deflating())
    protocol = line.peer.protocol
    for _ in range(4):
        protocol.send_binary(random.Random(5).randbytes(90_000))
    for _ in range(200):
        protocol.send_binary(bytes(MAX_SIZE))
    data = b"".join(protocol.data_to_send())
    line.peer.sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4 * len(data))
    sending = line.inner.runtime.spawn(lambda: line.peer.send_raw(data), name="sender")
    line.receive()
    line.wait_for(lambda: len(line.messages) == 204)
    sending.join(5.0)
    assert max(line.batches) <= 20


@pytest.mark.parametrize("is_fast", [True, False])
def test_what_is_compressed_in_one_turn_is_bounded(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    served = make_served(fast=is_fast)
    served.inner.start()
    line = Line(served, gevent.socket.socketpair(), **deflating())
    turns: dict[float, int] = {}
    compressed = ProtocolTransport._compressed

    def counted(transport: ProtocolTransport, item: Any) -> bytes:
        now = served.runtime.loop_iteration()
        turns[now] = turns.get(now, 0) + item.size
        return compressed(transport, item)

    monkeypatch.setattr(ProtocolTransport, "_compressed", counted)
    line.transport.start()
    line.put(*["x" * 50_000] * 40)
    for _ in range(40):
        assert len(line.peer.read()) == 50_001
    line.end()
    assert sum(turns.values()) > 2_000_000
    assert max(turns.values()) < 400_000


@pytest.mark.parametrize("is_fragmented", [False, True])
def test_the_largest_size_holds_for_what_is_inflated(
    make_line: Callable[..., Line], is_fragmented: bool
) -> None:
    line = make_line(**deflating())
    line.peer.send(b"\0" * MAX_SIZE)
    line.expect(b"\0" * MAX_SIZE)
    if is_fragmented:
        line.peer.protocol.send_binary(b"\0" * MAX_SIZE, fin=False)
        line.peer.protocol.send_continuation(b"\0", fin=True)
        line.peer.send()
    else:
        line.peer.send(b"\0" * (MAX_SIZE * 100))
    line.peer.read_rest()
    assert line.peer.closed is not None
    assert line.peer.closed[0] == 1009
    assert [violation.reason for violation in line.violations] == ["size"]
    assert len(line.messages) == 1


# The end


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "leaving"), (4000, "own")])
def test_a_client_that_closes_is_answered_with_its_code(line: Line, code: int, reason: str) -> None:
    line.transport.start()
    line.peer.send_close(code, reason)
    assert line.peer.read_rest() == []
    assert line.peer.closed == (code, reason)
    assert not line.has_ended, "it does not wait until the client has read that"
    line.peer.sock.close()
    line.wait_for(lambda: line.has_ended)
    assert line.ended_at
    assert line.violations == []


def test_a_client_that_closes_without_a_code_is_answered(line: Line) -> None:
    line.peer.send_raw(encode_frame(CLOSE))
    frame = line.peer.read_frame()
    assert (frame.opcode, bytes(frame.data)) == (Opcode.CLOSE, b"")
    assert line.peer.read_rest() == []


def test_a_client_that_closes_and_stays_is_left_alone_after_a_while(line: Line) -> None:
    began_at = time.monotonic()
    line.peer.is_answering = False
    line.peer.send_raw(encode_frame(CLOSE))
    line.wait_for(lambda: line.has_ended)
    assert CLOSE_TIMEOUT - 0.05 < line.ended_at - began_at < CLOSE_TIMEOUT + 1.0


def test_a_message_and_a_close_at_once_are_both_acted_upon(line: Line) -> None:
    """A client that is done says both in one packet of TCP, and waits for the server to end it."""
    line.peer.is_answering = False
    line.peer.send_raw(encode_frame(TEXT, b"last") + encode_frame(CLOSE, struct.pack("!H", 1000)))
    line.expect("last")
    assert line.peer.read_rest() == []
    assert line.peer.closed == (1000, "")
    assert line.peer.has_ended


def test_nothing_is_sent_after_the_close_frame(line: Line) -> None:
    """Not even where the client closes while its last message is acted upon.

    Source:
        RFC 6455, section 5.5.1: no more frames after a close frame.
    """
    line.transport.start()
    line.peer.is_answering = False
    line.peer.send_raw(encode_frame(TEXT, b"bad") + encode_frame(CLOSE, struct.pack("!H", 1000)))
    line.expect("bad")
    line.put("2[]")
    line.transport.close(1002, "protocol error")
    frames = []
    with contextlib.suppress(Ended):
        while True:
            frames.append(line.peer.read_frame())
    assert [frame.opcode for frame in frames].count(Opcode.CLOSE) == 1
    assert frames[-1].opcode is Opcode.CLOSE


def test_the_server_sends_what_waits_then_closes(line: Line) -> None:
    line.transport.start()
    line.put("2[1]", b"x" * 500_000, "2[2]")
    line.transport.close(1012, "service restart")
    line.transport.close(1000, "again")
    assert line.peer.read_rest() == ["42[1]", b"x" * 500_000, "42[2]"]
    assert line.peer.closed == (1012, "service restart")
    line.wait_for(lambda: line.has_ended)
    assert line.violations == []


def test_the_last_words_are_written_although_the_loop_stood_still(line: Line) -> None:
    """The deadline of the answer is over before the loop has had a turn to write."""
    line.transport.start()
    line.inner.runtime.sleep(0.01)  # nothing is due to be sent
    line.inner.runtime.call_soon(lambda: time.sleep(CLOSE_TIMEOUT + 0.1))
    line.transport.close(1012, "service restart")
    assert line.peer.read_rest() == []
    assert line.peer.closed == (1012, "service restart")


def test_the_server_goes_on_receiving_until_the_client_has_answered(line: Line) -> None:
    line.peer.is_answering = False
    line.transport.start()
    line.inner.runtime.sleep(0.01)  # nothing is due to be sent
    line.transport.close(1000, "")
    line.peer.read_frame()
    line.peer.send_raw(encode_frame(TEXT, b"crossed"))
    line.expect("crossed")
    assert not line.has_ended
    line.peer.send_raw(encode_frame(CLOSE, struct.pack("!H", 1000)))
    line.wait_for(lambda: line.has_ended)


def test_a_client_that_does_not_answer_a_close_is_cut_off(line: Line) -> None:
    line.transport.start()
    line.peer.is_answering = False
    began_at = time.monotonic()
    line.transport.close(1000, "")
    line.wait_for(lambda: line.has_ended)
    assert CLOSE_TIMEOUT - 0.05 < line.ended_at - began_at < CLOSE_TIMEOUT + 1.0
    line.peer.read_rest()
    assert line.peer.has_ended


def test_a_client_that_does_not_read_is_cut_off_after_a_close(
    make_line: Callable[..., Line],
) -> None:
    line = make_line(ends=narrow_pair())
    line.transport.start()
    line.put(b"x" * 1_000_000, b"y" * 1_000_000)
    line.wait_for(lambda: line.transport.is_stuck)
    line.transport.close(1008, "slow consumer")
    line.wait_for(lambda: line.has_ended)
    line.wait_for(lambda: not line.transport.is_stuck, "the writer runs on")


def test_both_ends_may_close_at_once(line: Line) -> None:
    line.transport.start()
    line.transport.close(1012, "service restart")
    line.peer.send_close(1000, "bye")
    line.peer.read_rest()
    assert line.peer.closed == (1012, "service restart")
    line.wait_for(lambda: line.has_ended)
    assert line.violations == []


def test_a_close_reason_is_cut_to_what_a_frame_holds(line: Line) -> None:
    line.transport.start()
    line.transport.close(1008, "\N{EURO SIGN}" * 100)
    line.peer.read_rest()
    assert line.peer.closed == (1008, "\N{EURO SIGN}" * 41)


def test_an_aborted_wire_is_quiet(line: Line) -> None:
    line.transport.start()
    line.put("2[]")
    line.transport.abort()
    line.wait_for(lambda: line.has_ended)
    assert line.peer.read_rest() == []
    assert line.peer.closed is None
    line.put("2[]")
    line.transport.flush()
    line.transport.close(1000, "")
    line.transport.abort()
    assert line.violations == []


def test_a_client_that_vanishes_is_no_violation(line: Line) -> None:
    """Also in the middle of a frame."""
    line.peer.send_raw(encode_frame(TEXT, b"whole") + encode_frame(TEXT, b"part")[:4])
    line.expect("whole")
    line.peer.vanish()
    line.wait_for(lambda: line.has_ended)
    assert line.violations == []


# Keep-alive


def test_the_kernel_is_asked_to_look_after_a_connection() -> None:
    with sockets.create_server(("127.0.0.1", 0)) as listener:
        sock = sockets.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with sock, accepted:
            keep_alive(accepted, silence=44.6)
            values = [
                accepted.getsockopt(sockets.IPPROTO_TCP, getattr(sockets, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                if hasattr(sockets, name)
            ]
            assert values == [45, 15, 3, 45_000][: len(values)]
            assert accepted.getsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE)
            keep_alive(accepted, silence=0.1)
            assert accepted.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPINTVL) == 1


def test_a_socket_that_is_none_of_tcp_or_is_closed_stays_as_it_is() -> None:
    one, other = sockets.socketpair()
    keep_alive(one, silence=45.0)
    one.close()
    other.close()
    keep_alive(one, silence=45.0)


# simple-websocket


class Library:
    """A transport that simple-websocket serves, under Werkzeug's server.

    Attributes:
        messages: What was received.
    """

    def __init__(self, guarded: Guarded) -> None:
        self.inner = guarded.inner
        self.lock = threading.Lock()
        self.queue = SendQueue(max_packets=10**6, max_bytes=10**9, policy=SlowConsumer.DISCONNECT)
        self.messages: list[str | bytes] = []
        self.transport: Any = None
        self.has_ended = threading.Event()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        adapter = _async["websocket"](self._serve, None, max_message_size=MAX_SIZE)
        return adapter(environ, start_response)

    def _serve(self, websocket: Any) -> list[bytes]:
        self.transport = LibraryTransport(
            websocket, self.queue, self.inner, lock=self.lock, max_size=MAX_SIZE
        )
        try:
            while (messages := self.transport.receive()) is not None:
                self.messages += messages
        finally:
            self.transport.abort()
            self.has_ended.set()
        return []

    def put(self, *messages: str | bytes) -> None:
        with self.lock:
            for message in messages:
                self.queue.put(ClientMessage.of_socketio(message))
        self.transport.wake()


@pytest.fixture
def library(make_guarded: Callable[..., Guarded]) -> Iterator[tuple[Library, Peer]]:
    """A transport that receives, and a client that has shaken hands."""
    guarded = make_guarded(close_timeout=CLOSE_TIMEOUT, blocking_timeout=None)
    guarded.inner.start()
    library = Library(guarded)
    errors = io.StringIO()
    with unit_websocket.serve(library, "threads", errors) as address:
        peer = Peer(sockets.create_connection(address, timeout=5.0))
        peer.shake_hands("/")
        wait_until(lambda: library.transport is not None)
        try:
            yield library, peer
        finally:
            library.transport.abort()
            peer.sock.close()
        assert library.has_ended.wait(5.0), "it waits for ever"
    assert errors.getvalue() == ""


def test_the_library_receives_text_and_binary(library: tuple[Library, Peer]) -> None:
    transport, peer = library
    peer.send("one", b"\x00\xff", "d\N{EURO SIGN}")
    peer.send_raw(fragments(TEXT, b"a", b"b") + fragments(BINARY, b"a", b"b"))
    wait_until(lambda: len(transport.messages) == 5)
    assert transport.messages == ["one", b"\x00\xff", "d\N{EURO SIGN}", "ab", b"ab"]
    assert [type(message) for message in transport.messages] == [str, bytes, str, str, bytes]


def test_the_library_sends_in_order_and_the_books_are_empty_afterwards(
    library: tuple[Library, Peer],
) -> None:
    transport, peer = library
    assert not transport.transport.is_stuck
    transport.put("waits")
    transport.transport.send_at_once("3probe")
    assert peer.read() == "3probe"
    transport.transport.start()
    assert peer.read() == "4waits"
    messages = [random.Random(5).randbytes(size) for size in (1, 100, 10_000) * 20]
    for message in messages:
        transport.put(message, "2[]")
    for message in messages:
        assert peer.read() == message
        assert peer.read() == "42[]"
    wait_until(lambda: not transport.transport.is_stuck)
    wait_until(lambda: (len(transport.queue), transport.queue.size) == (0, 0))


def test_the_library_is_stuck_while_its_client_does_not_read(
    library: tuple[Library, Peer],
) -> None:
    transport, peer = library
    transport.transport.start()
    transport.put(b"x" * 20_000_000, "2[]")
    wait_until(lambda: transport.transport.is_stuck)
    transport.transport.flush()
    assert peer.read() == b"x" * 20_000_000
    assert peer.read() == "42[]"
    wait_until(lambda: not transport.transport.is_stuck)


def test_each_message_that_the_library_has_sent_is_progress(
    library: tuple[Library, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many are taken off the queue in one go, and may be on their way for long."""
    transport, peer = library
    now = time.monotonic()
    monkeypatch.setattr(sending, "clock", lambda: now)
    send = transport.transport._websocket.send
    was_slow: list[bool] = []

    def take_time(data: str | bytes) -> None:
        nonlocal now
        was_slow.append(transport.queue.is_slow(10.0, is_shared=False))
        now += 6.0
        send(data)

    monkeypatch.setattr(transport.transport._websocket, "send", take_time)
    transport.put(*["2[]"] * 10)
    transport.transport.start()
    assert [peer.read() for _ in range(10)] == ["42[]"] * 10
    assert was_slow == [False] * 10


def test_a_large_message_of_the_library_makes_progress_while_it_is_taken(
    library: tuple[Library, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, peer = library
    ticks = itertools.count()
    monkeypatch.setattr(sending, "clock", lambda: float(next(ticks)))
    transport.put(b"x" * 3_000_000)
    transport.transport.start()
    assert peer.read() == b"x" * 3_000_000
    assert transport.queue._progress_at >= 30


def test_the_library_answers_a_ping_behind_the_message_that_is_sent(
    library: tuple[Library, Peer],
) -> None:
    """Another thread answers; in the middle of a frame, that would be taken for a part of it."""
    transport, peer = library
    transport.transport.start()
    transport.put(b"x" * 20_000_000)
    assert peer._receive(), "a part of the message"
    peer.send_raw(encode_frame(PING, b"still there?"))
    frames = [peer.read_frame() for _ in range(2)]
    assert [(frame.opcode, len(frame.data)) for frame in frames] == [
        (Opcode.BINARY, 20_000_000),
        (Opcode.PONG, 12),
    ]


def test_the_library_sends_what_waits_then_closes(library: tuple[Library, Peer]) -> None:
    transport, peer = library
    transport.transport.start()
    transport.put("2[1]", b"x" * 100_000)
    transport.transport.close(1012, "service restart")
    assert peer.read_rest() == ["42[1]", b"x" * 100_000]
    assert peer.closed == (1012, "service restart")
    assert transport.has_ended.wait(5.0)


def test_a_client_of_the_library_that_does_not_answer_a_close_is_cut_off(
    library: tuple[Library, Peer],
) -> None:
    transport, peer = library
    peer.is_answering = False
    transport.transport.start()
    began_at = time.monotonic()
    transport.transport.close(1000, "")
    assert transport.has_ended.wait(5.0)
    assert CLOSE_TIMEOUT - 0.05 < time.monotonic() - began_at < CLOSE_TIMEOUT + 1.0


def test_a_client_of_the_library_that_does_not_read_is_cut_off_after_a_close(
    library: tuple[Library, Peer],
) -> None:
    transport, _ = library
    transport.transport.start()
    transport.put(b"x" * 20_000_000, "2[]")
    wait_until(lambda: transport.transport.is_stuck)
    transport.transport.close(1008, "slow consumer")
    assert transport.has_ended.wait(5.0)


class LateSocket:
    """Sends a moment later, as on a busy machine."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def send(self, data: bytes) -> int:
        time.sleep(0.05)
        return int(self._sock.send(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_the_library_takes_a_message_of_just_the_largest_size(
    library: tuple[Library, Peer],
) -> None:
    transport, peer = library
    peer.send(b"x" * MAX_SIZE)
    wait_until(lambda: transport.messages)
    assert transport.messages == [b"x" * MAX_SIZE]


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(TEXT, b"\xff"),
        encode_frame(BINARY, b"x" * (MAX_SIZE + 1)),
        encode_frame(CONTINUATION, b"x"),
    ],
    ids=["utf8", "size", "continuation"],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_the_library_ends_where_a_frame_is_wrong(
    library: tuple[Library, Peer], data: bytes, is_late: bool
) -> None:
    """It may tell the receiver before the end is true."""
    transport, peer = library
    transport.transport.start()
    if is_late:
        connection = transport.transport._websocket.ws
        connection.sock = LateSocket(connection.sock)
    peer.send_raw(data)
    assert transport.has_ended.wait(20.0), "it waits for ever"
    assert transport.messages == []


def test_an_aborted_library_wire_is_quiet(library: tuple[Library, Peer]) -> None:
    transport, peer = library
    transport.transport.start()
    transport.transport.abort()
    assert peer.read_rest() == []
    assert peer.closed is None
    assert transport.has_ended.wait(5.0)
    transport.put("2[]")
    transport.transport.close(1000, "")


def test_a_client_of_the_library_that_vanishes_ends_it(library: tuple[Library, Peer]) -> None:
    transport, peer = library
    transport.transport.start()
    transport.put(b"x" * 20_000_000)
    wait_until(lambda: transport.transport.is_stuck)
    peer.vanish()
    assert transport.has_ended.wait(5.0)

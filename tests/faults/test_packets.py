"""Hostile packets: each costs its sender at most the connection, and nobody else anything."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import engineio.packet
import pytest
import requests
import socketio.packet
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.fleet import counter
from tests.faults.watches import (
    FLOOD_APP,
    EchoWatch,
    LogWatch,
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
    TEXT,
    encode_frame,
    text_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(100)

HOSTILE_PACKETS = "malformed packets"
MAX_LOG_LINES = 10
SLOWEST_ANSWER = 1.0
"""Seconds that others may wait for an answer meanwhile."""
FUZZ_CASES = os.environ.get("FUZZ_CASES")
"""Packets that the fuzzer sends; `make soak-packets` sends many more."""

in_short_and_at_length = pytest.mark.parametrize(
    "count", [1000, pytest.param(10_000, marks=pytest.mark.long)]
)
_KEPT_PER_CONNECTION = 300
_SENDERS = 4
_MAX_GROWTH = 24.0
"""MiB that a worker may grow by: buffers, and the connections of all senders at a time."""

KEPT, CLOSED, EITHER = "kept", "closed", "either"


@dataclass(frozen=True)
class Kind:
    """One kind of hostile packet.

    Attributes:
        name: For people.
        frames: What is sent after the namespace was joined.
        outcome: ``kept`` or ``closed`` with a status code, or ``either``.
    """

    name: str
    frames: bytes
    outcome: str = f"{CLOSED} 1002"

    def is_fine(self, outcome: str) -> bool:
        """Say whether *outcome* is one that is wanted."""
        return self.outcome == EITHER or outcome == self.outcome


def texts(*packets: str) -> bytes:
    """Return text frames."""
    return b"".join(map(text_frame, packets))


def binary(payload: bytes) -> bytes:
    """Return a binary frame."""
    return encode_frame(BINARY, payload)


def nested(depth: int) -> str:
    """Return JSON nested that deep."""
    return "[" * depth + "]" * depth


_PLACEHOLDER = '{"_placeholder":true,"num":%s}'

MALFORMED_JSON = [
    Kind("an event cut short", texts('42["ignore",')),
    Kind("an event with an extra bracket", texts('42["ignore"]]')),
    Kind("an event with bare words", texts("42[ignore]")),
    Kind("a CONNECT with broken authentication", texts("40{broken")),
    Kind("an acknowledgement cut short", texts("431[")),
    Kind("nested 90,000 deep", texts(f'42["ignore",{nested(90_000)}]')),
    Kind("nested 90,000 deep, as Engine.IO JSON", texts(f"4{nested(90_000)}")),
    Kind("nested 300 deep", texts(f'42["ignore",{nested(300)}]'), EITHER),
    Kind("a number of 5,000 digits", texts(f'42["ignore",{"9" * 5000}]'), EITHER),
]
CONTAINERS = [
    Kind("100,000 lists and objects", texts(f'42["ignore"{",[],{}" * 49_999}]'), KEPT),
    Kind("more lists than there may be", texts(f'42["ignore"{",[]" * 100_000}]'), f"{CLOSED} 1009"),
    Kind("a string of brackets", texts(f'42["ignore","{"[" * 200_000}"]'), KEPT),
    Kind("a list of lists for Engine.IO", texts(f"6[{'[],' * 200_000}[]]"), KEPT),
    Kind("authentication of lists", texts(f"40/x,[{'[],' * 200_000}[]]"), f"{CLOSED} 1009"),
    Kind("an answer of lists", texts(f"431[{'[],' * 200_000}[]]"), f"{CLOSED} 1009"),
]
WRONG_TYPES = [
    Kind("an event that is an object", texts('42{"ignore":1}'), EITHER),
    Kind("an event that is a string", texts('42"ignore"'), EITHER),
    Kind("an event that is null", texts("42null"), EITHER),
    Kind("an event that is nothing", texts("42"), EITHER),
    Kind("an event that is empty", texts("42[]"), EITHER),
    Kind("an acknowledgement that is an object", texts('431{"a":1}'), EITHER),
    Kind("an acknowledgement without an id", texts("43[1]"), EITHER),
    Kind("a CONNECT_ERROR", texts('44{"message":"no"}')),
    Kind("packet type 7", texts('47["ignore"]')),
    Kind("packet type 9", texts("49")),
    Kind("a packet that is JSON for Engine.IO", texts('4{"type":2}')),
    Kind("a list for Engine.IO", texts('4["ignore"]')),
    Kind("a message that is empty", texts("4")),
    Kind("a CONNECT once more", texts("40"), EITHER),
    Kind("a CONNECT with authentication that is a list", texts("40/other,[1]"), EITHER),
]
ACK_IDS = [
    Kind("ack id 0", texts("430[1]"), KEPT),
    Kind("ack id unknown", texts("4312345[1]"), KEPT),
    Kind("ack id huge", texts(f"43{'9' * 90}[1]"), KEPT),
    Kind("ack id negative", texts("43-1[1]")),
    Kind("ack id of 5,000 digits", texts(f"43{'9' * 5000}[1]")),
    Kind("ack id that is no decimal digit", texts("43²[1]")),
    Kind("event id of 5,000 digits", texts(f'42{"9" * 5000}["ignore"]')),
]
ATTACHMENTS = [
    Kind("9,999,999,999 attachments", texts(f'459999999999-["ignore",{_PLACEHOLDER % 0}]')),
    Kind("65 attachments", texts(f'4565-["ignore",{_PLACEHOLDER % 0}]')),
    Kind("11 digits of attachments", texts('4599999999999-["ignore"]')),
    Kind(
        "a text where an attachment is due",
        texts(f'451-["ignore",{_PLACEHOLDER % 0}]', '42["ignore"]'),
    ),
    Kind(
        "an attachment beyond those announced",
        texts(f'451-["ignore",{_PLACEHOLDER % 0}]') + binary(b"one") + binary(b"two"),
    ),
    Kind("an attachment of nothing", binary(b"attachment")),
    Kind("a placeholder beyond", texts(f'451-["ignore",{_PLACEHOLDER % 5}]') + binary(b"one")),
    Kind("a placeholder below", texts(f'451-["ignore",{_PLACEHOLDER % -3}]') + binary(b"one")),
    Kind(
        "a placeholder that is a word",
        texts(f'451-["ignore",{_PLACEHOLDER % chr(34) + "a" + chr(34)}]') + binary(b"one"),
    ),
    Kind("a placeholder that is null", texts(f'451-["a",{_PLACEHOLDER % "null"}]') + binary(b"1")),
    Kind("a placeholder that is true", texts(f'451-["ignore",{_PLACEHOLDER % "true"}]')),
    Kind(
        "an attachment named twice",
        texts(f'451-["ignore",{_PLACEHOLDER % 0},{_PLACEHOLDER % 0}]') + binary(b"one"),
    ),
    Kind(
        "an attachment named twice, at two depths",
        texts(f'451-["ignore",{_PLACEHOLDER % 0},[{_PLACEHOLDER % 0}]]') + binary(b"one"),
    ),
    Kind("an attachment without a place", texts('451-["ignore"]') + binary(b"one")),
    Kind("an acknowledgement with attachments that never come", texts("4664-1[1]", "42[]")),
]
EVENT_NAMES = [
    Kind("an event name that is a number", texts("42[1,2]"), KEPT),
    Kind("an event name that is null", texts("42[null]"), KEPT),
    Kind("an event name that is a list", texts('42[["ignore"]]'), KEPT),
    Kind("an event name that is an object", texts('42[{"ignore":1}]'), KEPT),
    Kind("an event named connect", texts('42["connect"]'), KEPT),
    Kind("an event named disconnect", texts('42["disconnect","x"]'), KEPT),
    Kind("an event named *", texts('42["*","sid"]'), KEPT),
    Kind("an event named by half a character", texts('42["\\ud800",1]'), KEPT),
    Kind("an event name of 100,000 characters", texts(f'42["{"n" * 100_000}"]'), KEPT),
]
ENGINE_IO = [
    Kind("an empty packet", texts("")),
    Kind("a packet type that is a letter", texts("x")),
    Kind("a packet type that is a minus", texts("-1")),
    Kind("a packet type that is no decimal digit", texts("²")),
    Kind("a packet type above those there are", texts("9hello")),
    Kind("base64 that is none", texts("b!!!")),
    Kind("base64 cut short", texts("bYQ")),
]
NAMESPACES = [
    Kind("a CONNECT to an unknown namespace", texts("40/nope,"), KEPT),
    Kind("a CONNECT to a namespace of 100,000 characters", texts(f"40/{'n' * 100_000},"), KEPT),
    Kind("an event in an unknown namespace", texts('42/nope,["ignore"]'), KEPT),
    Kind("an acknowledgement in an unknown namespace", texts("43/nope,1[1]"), KEPT),
    Kind("a DISCONNECT of an unknown namespace", texts("41/nope,"), KEPT),
]
FRAMES = [
    Kind("an unmasked frame", encode_frame(TEXT, b'42["ignore"]', mask=None)),
    Kind("a reserved bit", encode_frame(TEXT, b'42["ignore"]', reserved=1)),
    Kind("a compressed frame, unasked", encode_frame(TEXT, b'42["ignore"]', reserved=4)),
    Kind("a reserved opcode", encode_frame(0x3, b'42["ignore"]')),
    Kind("a reserved control opcode", encode_frame(0xB, b"")),
    Kind("a fragmented ping", encode_frame(PING, b"ping", is_final=False)),
    Kind("a ping of 126 bytes", encode_frame(PING, b"x" * 126)),
    Kind("a continuation of nothing", encode_frame(CONTINUATION, b"42")),
    Kind(
        "a message within another",
        encode_frame(TEXT, b"42", is_final=False) + encode_frame(TEXT, b'["ignore"]'),
    ),
    Kind("a close frame of one byte", encode_frame(CLOSE, b"\x03")),
    Kind("a close frame with code 1005", encode_frame(CLOSE, b"\x03\xed")),
    Kind("text that is no UTF-8", encode_frame(TEXT, b"4\xff\xfe"), f"{CLOSED} 1007"),
    Kind("text with half a surrogate", encode_frame(TEXT, b"4\xed\xa0\x80"), f"{CLOSED} 1007"),
    Kind(
        "fragments that are no UTF-8",
        encode_frame(TEXT, b"4\xf0\x9f", is_final=False) + encode_frame(CONTINUATION, b"["),
        f"{CLOSED} 1007",
    ),
    Kind("a frame of 4 MB", encode_frame(TEXT, b"4", length=4_000_000), f"{CLOSED} 1009"),
    Kind("a frame of 2^62 bytes", encode_frame(BINARY, b"", length=1 << 62), f"{CLOSED} 1009"),
    Kind(
        "fragments of 1.2 MB together",
        encode_frame(TEXT, b"4" + b" " * 600_000, is_final=False)
        + encode_frame(CONTINUATION, b" " * 600_000),
        f"{CLOSED} 1009",
    ),
    Kind(
        "fragments that are empty",
        encode_frame(TEXT, b"4", is_final=False)
        + encode_frame(CONTINUATION, is_final=False) * 5000,
        EITHER,
    ),
]
KINDS = [
    *MALFORMED_JSON,
    *CONTAINERS,
    *WRONG_TYPES,
    *ACK_IDS,
    *ATTACHMENTS,
    *EVENT_NAMES,
    *ENGINE_IO,
    *NAMESPACES,
    *FRAMES,
]
# 9 kinds carry 100 kB and more; sent as often as the rest they would test the loopback device.
LARGE = 50_000

_marks = itertools.count(1)


def mark() -> str:
    """Return the name of a namespace that nobody has.

    The server answers a CONNECT to it at once and in order, whatever became of the namespaces
    that the client had joined.
    """
    return f"/mark-{next(_marks)}"


def outcome_of(client: RawWebSocket, name: str) -> str:
    """Read until the server answers for the namespace *name* or closes; say which it was."""
    wanted = f"44{name},".encode()
    while (frame := client.read_frame()) is not None:
        if frame.payload.startswith(wanted):
            return KEPT
    return f"{CLOSED} {client.read_farewell().code}"


def send_hostile(server: GunicornServer, frames: bytes, *, timeout: float = 5.0) -> str:
    """Send *frames* from a client of their own, and say what became of the client."""
    with RawWebSocket(server.port, timeout=timeout) as client:
        client.open().join()
        name = mark()
        # Closed before everything was sent, it can still read why.
        with contextlib.suppress(ConnectionError):
            client.write(frames + text_frame(f"40{name},"))
        try:
            return outcome_of(client, name)
        except TimeoutError:
            return "neither answered nor closed"


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process without a message queue."""
    return make_fleet(app=FLOOD_APP, processes=1, has_queue=False).a


@pytest.mark.faults(
    HOSTILE_PACKETS,
    stock="some are kept, others end the connection without a code or leave it hanging",
    because=r"kinds had another outcome",
)
def test_each_kind_of_hostile_packet_has_its_outcome(
    server: GunicornServer, measured: Measured
) -> None:
    """Each kind is sent once; the connection is closed with the right code, or kept."""
    wrong = []
    for kind in KINDS:
        outcome = send_hostile(server, kind.frames, timeout=3.0)
        is_settled = outcome == KEPT or outcome.startswith(CLOSED)
        if not (is_settled and kind.is_fine(outcome)):
            wrong.append(f"{kind.name}: {outcome} instead of {kind.outcome}")
        if len(wrong) == 10:
            break  # without the guard each of these may take until its timeout
    measured("kinds", len(KINDS))
    assert not wrong, f"{len(wrong)} kinds had another outcome: {'; '.join(wrong)}"
    wait_for_empty_tables(server)


def batches(count: int) -> Iterator[list[Kind]]:
    """Return *count* packets, all that one connection takes in one list."""
    small = [kind for kind in KINDS if len(kind.frames) < LARGE]
    kept = [kind for kind in small if kind.outcome == KEPT]
    others = [kind for kind in small if kind.outcome != KEPT]
    rounds = count // (len(others) + _KEPT_PER_CONNECTION)
    for number in range(rounds + 1):
        for kind in others:
            yield [kind]
        yield [kept[index % len(kept)] for index in range(_KEPT_PER_CONNECTION)]
        if number % 16 == 0:
            for kind in KINDS:
                if kind not in small:
                    yield [kind]


@in_short_and_at_length
@pytest.mark.faults(
    HOSTILE_PACKETS,
    stock="a traceback and more for each",
    because=r"\d+ log lines after \d+ packets",
)
def test_thousands_of_malformed_packets_trouble_nobody(
    server: GunicornServer, measured: Measured, count: int
) -> None:
    """Packets of every kind, from as many connections as they cost, while others are served."""
    for kind in KINDS[:: len(KINDS) // 10]:
        send_hostile(server, kind.frames)  # let the worker grow to its usual size
    log = LogWatch(server)
    pids = server.worker_pids()
    violations = counter(server, "protocol_violations")
    sent = connections = 0
    began_at = time.monotonic()
    with (
        EchoWatch(server) as others,
        MemoryWatch(server) as memory,
        ThreadPoolExecutor(_SENDERS) as pool,
    ):
        for group in _in_groups(batches(count), first=_SENDERS, then=200):
            outcomes = list(
                pool.map(
                    lambda batch: send_hostile(server, b"".join(kind.frames for kind in batch)),
                    group,
                )
            )
            sent += sum(map(len, group))
            connections += len(group)
            lines = log.lines()
            assert len(lines) <= MAX_LOG_LINES, (
                f"{len(lines)} log lines after {sent} packets, such as {lines[0]}"
            )
            for batch, outcome in zip(group, outcomes, strict=True):
                is_settled = outcome == KEPT or outcome.startswith(CLOSED)
                assert is_settled, f"{batch[0].name}: {outcome}"
        measured("packets", sent)
        measured("connections", connections)
        measured("took", time.monotonic() - began_at)
        measured("log lines", len(log.lines()))
        measured("others answered within", milliseconds(others.slowest()))
        measured("growth", f"{memory.growth:.1f} MiB")
        assert sent >= count
        assert not log.tracebacks()
        assert not others.errors
        assert others.slowest() < SLOWEST_ANSWER * crowding()
        assert memory.growth < _MAX_GROWTH, f"the worker grew by {memory.growth:.1f} MiB"
    assert server.worker_pids() == pids
    wait_for_empty_tables(server)
    assert counter(server, "protocol_violations") > violations


def _in_groups(items: Iterable[Any], *, first: int, then: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    size = first
    while group := list(itertools.islice(iterator, size)):
        yield group
        size = then


# Polling

POLLING_BODIES = {
    "an empty packet": '42["ignore"]\x1e\x1e42["ignore"]',
    "a packet type that is a letter": "x",
    "base64 that is none": "b!!!",
    "no UTF-8": b"4\xff\xfe",
    "an event cut short": '42["ignore",',
    "a form without a packet": "d=",
    "nested 90,000 deep": f"4{nested(90_000)}",
}


@pytest.mark.faults(
    "polling POST with packets that cannot be taken",
    stock="answered 200, and dropped",
    because="answered 200",
)
@pytest.mark.parametrize("body", POLLING_BODIES.values(), ids=POLLING_BODIES.keys())
def test_polling_request_that_is_not_taken_is_answered_400(
    body: str | bytes, server: GunicornServer, measured: Measured
) -> None:
    """A polling client posts packets that cannot be decoded."""
    log = LogWatch(server)
    violations = counter(server, "protocol_violations")
    with requests.Session() as http:
        address = f"{server.url}/socket.io/?EIO=4&transport=polling"
        eio_sid = json.loads(http.get(address).text[1:])["sid"]
        address += f"&sid={eio_sid}"
        http.post(address, data="40")
        http.get(address)
        response = http.post(address, data=body.encode() if isinstance(body, str) else body)
        measured("answer", response.status_code)
        assert response.status_code == 400, f"answered {response.status_code}"
        assert http.post(address, data='42["ignore"]').status_code == 400, "the session goes on"
    assert not log.tracebacks()
    assert len(log.lines()) <= 2
    assert counter(server, "protocol_violations") == violations + 1
    wait_for_empty_tables(server)


# Fuzzing

Case = tuple[str | bytes, ...]


class Shape(NamedTuple):
    """The parts of an event or an acknowledgement."""

    kind: str
    attachments: int
    namespace: str
    id: str
    content: list[Any]

    def case(self) -> Case:
        """Return the frames."""
        announced = f"{self.attachments}-" if self.attachments else ""
        text = f"4{self.kind}{announced}{self.namespace}{self.id}{json.dumps(self.content)}"
        return (text, *(b"attachment" for _ in range(self.attachments)))


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.builds(lambda number: {"_placeholder": True, "num": number}, st.integers(-2, 3)),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=6,
)
_names: st.SearchStrategy[Any] = st.sampled_from(
    ["ignore", "unheard-of", "another", "connect", "*", 1, None, [], {}]
)
_ids = st.sampled_from(["", "", "0", "7", "٣", "9" * 99])
_namespaces = st.sampled_from(["", "", "/,", "/any,", "/nope,", "/any?x=1,", f"/{'n' * 300},"])
_shapes = st.builds(
    lambda kind, namespace, id, name, rest: Shape(kind[0], kind[1], namespace, id, [name, *rest]),
    st.sampled_from([("2", 0), ("2", 0), ("3", 0), ("5", 1), ("5", 3), ("6", 2)]),
    _namespaces,
    _ids,
    _names,
    st.lists(_json, max_size=2),
)
_others = st.one_of(
    st.text(max_size=20).map(lambda text: (text,)),
    st.binary(max_size=20).map(lambda data: (data,)),
    st.builds(lambda kind, rest: (f"{kind}{rest}",), st.integers(0, 9), st.text(max_size=8)),
    st.builds(lambda kind, rest: (f"4{kind}{rest}",), st.integers(0, 9), _json.map(json.dumps)),
    st.builds(lambda where: (f"40{where}",), _namespaces),
    st.builds(lambda where: (f"41{where}",), _namespaces),
    st.sampled_from(["42-1[1]", "43²[1]", f"43{'9' * 101}[1]", "4599-[1]"]).map(lambda it: (it,)),
)
_corpus = st.tuples(
    st.lists(_shapes, min_size=3, max_size=8), st.lists(_others, min_size=3, max_size=8)
)
_ALPHABET = '0123456789-,[]{}":/b?\\ ²٣\ud7ff\x1e\x00nul'


class Mutator:
    """Makes many cases of a few that were drawn: parts exchanged, characters changed.

    Args:
        corpus: What was drawn.
        seed: For reproducible choices.
    """

    def __init__(self, corpus: tuple[list[Shape], list[Case]], seed: int) -> None:
        self._shapes, self._others = corpus
        self._source = random.Random(seed)
        self._values = [value for shape in self._shapes for value in shape.content]

    def cases(self, count: int) -> tuple[list[Case], list[Case]]:
        """Return that many cases: those that a client may survive, and others, one in a hundred."""
        kept: list[Case] = []
        deadly: list[Case] = []
        while len(kept) + len(deadly) < count:
            case = self._case()
            if is_likely_kept(case):
                kept.append(case)
            elif len(deadly) < count // 100:
                deadly.append(case)
        return kept, deadly

    def _case(self) -> Case:
        source = self._source
        if source.random() < 0.85:
            return self._recombined().case()
        is_other = source.random() < 0.4
        case = source.choice(self._others) if is_other else self._recombined().case()
        for _ in range(source.randint(0, 3)):
            case = self._mutated(case)
        return case

    def _recombined(self) -> Shape:
        shapes, source = self._shapes, self._source
        one, other, third = (source.choice(shapes) for _ in range(3))
        values = source.choices(self._values, k=source.randrange(3))
        if source.random() < 0.2:
            values = [{"nested": values}]
        name = third.content[0] if source.random() < 0.9 else source.choice(self._values)
        return Shape(one.kind, one.attachments, other.namespace, third.id, [name, *values])

    def _mutated(self, case: Case) -> Case:
        source = self._source
        frames = list(case)
        index = source.randrange(len(frames))
        frame = frames[index]
        if isinstance(frame, bytes):
            frames[index : index + 1] = source.choice(([], [frame, frame], [frame.hex()]))
            return tuple(frames) or ("",)
        at = source.randint(0, len(frame))
        character = source.choice(_ALPHABET)
        frames[index] = source.choice(
            (
                frame[:at] + character + frame[at:],
                frame[:at] + character + frame[at + 1 :],
                frame[:at] + frame[at + 1 :],
                frame[at:] + frame[:at],
            )
        )
        return tuple(frames)


def is_likely_kept(case: Case) -> bool:
    """Guess whether a client may go on after *case*. Wrong guesses only cost time."""
    awaited = 0
    for frame in case:
        if awaited:
            if not isinstance(frame, bytes):
                return False
            awaited -= 1
            continue
        try:
            outer = engineio.packet.Packet(encoded_packet=frame)
            is_text = isinstance(outer.data, str) and outer.data
            if outer.packet_type != engineio.packet.MESSAGE or not is_text:
                return False
            inner = socketio.packet.Packet(encoded_packet=outer.data)
        except Exception:
            return False
        awaited = inner.attachment_count
        if inner.packet_type in (socketio.packet.BINARY_EVENT, socketio.packet.BINARY_ACK):
            if not 1 <= awaited <= 3 or "num" in outer.data:
                return False
        elif inner.packet_type not in (socketio.packet.EVENT, socketio.packet.ACK) or awaited:
            return False
    return not awaited


def encoded(case: Case) -> bytes:
    """Return the frames of *case*."""
    return b"".join(
        encode_frame(BINARY, frame)
        if isinstance(frame, bytes)
        else text_frame(frame.encode("utf-8", "replace").decode())
        for frame in case
    )


class Fuzzer:
    """Sends cases to a server, many on each connection, and counts those that were taken in.

    Cases that the client is expected to survive go in one batch. Where it does not, it is unknown
    which of them were read, and all of them are sent again, each from a client of its own.
    """

    def __init__(self, server: GunicornServer, pool: ThreadPoolExecutor) -> None:
        self._server = server
        self._pool = pool
        self.cases = 0
        self.connections = 0
        self.hanging: list[Case] = []
        """Cases after which a client was neither answered nor closed."""

    def send(self, kept: list[Case], deadly: list[Case]) -> None:
        """Send all cases, the *deadly* ones each at the end of a batch."""
        size = max(len(kept) // max(len(deadly), 1), 8)
        groups = _in_groups(kept, first=size, then=size)
        batches = itertools.zip_longest(groups, deadly)
        for clients in self._pool.map(lambda batch: self._send_together(*batch), batches):
            self.connections += clients
        self.cases += len(kept) + len(deadly)

    def _send_together(self, cases: list[Case] | None, last: Case | None) -> int:
        """Send *cases*, then *last*; return how many clients that took."""
        together = b"".join(map(encoded, cases or ()))
        rest = b"" if last is None else encoded(last)
        try:
            is_kept = self._send(together, rest)
        except TimeoutError:
            is_kept = False
        if is_kept:
            return 1
        every = [*(cases or ()), *([] if last is None else [last])]
        for case in every:
            try:
                self._send(b"", encoded(case))
            except TimeoutError:
                self.hanging.append(case)
        return 1 + len(every)

    def _send(self, first: bytes, second: bytes) -> bool:
        """Send both from a client of their own; say whether it survived the first."""
        between, after = mark(), mark()
        marks = text_frame(f"40{between},"), text_frame(f"40{after},")
        with RawWebSocket(self._server.port) as client:
            client.open().join()
            # Closed before everything was sent, it can still read why.
            with contextlib.suppress(ConnectionError):
                client.write(first + marks[0] + second + marks[1])
            is_kept = outcome_of(client, between) == KEPT
            if is_kept:
                outcome_of(client, after)
            return is_kept


@pytest.mark.timeout(100 + int(FUZZ_CASES or 0) / 500)
@(pytest.mark.parametrize("count", [int(FUZZ_CASES)]) if FUZZ_CASES else in_short_and_at_length)
@pytest.mark.faults(
    HOSTILE_PACKETS,
    stock="a traceback for every second case, some past the log",
    because=r"\d+ tracebacks after \d+ cases",
)
def test_fuzzed_packets_raise_nothing_outside_the_connection_of_their_sender(
    server: GunicornServer, measured: Measured, count: int
) -> None:
    """Random packets, and packets with random mistakes; every one is read or ends its sender."""
    log = LogWatch(server)
    pids = server.worker_pids()
    per_example = 1000
    began_at = time.monotonic()

    @settings(
        max_examples=-(-count // per_example),
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a worker that has seen thousands of cases cannot be shrunk
        suppress_health_check=list(HealthCheck),
    )
    @given(corpus=_corpus, seed=st.integers(0, 2**32))
    def fuzz(corpus: tuple[list[Shape], list[Case]], seed: int) -> None:
        fuzzer.send(*Mutator(corpus, seed).cases(per_example))
        tracebacks = log.tracebacks()
        assert not tracebacks, (
            f"{len(tracebacks)} tracebacks after {fuzzer.cases} cases, such as {tracebacks[0]}"
        )
        assert not fuzzer.hanging, f"neither answered nor closed: {fuzzer.hanging[0]}"

    with EchoWatch(server) as others, ThreadPoolExecutor(_SENDERS) as pool:
        fuzzer = Fuzzer(server, pool)
        while fuzzer.cases < count:  # hypothesis may see fewer examples as enough
            fuzz()
        measured("cases", fuzzer.cases)
        measured("connections", fuzzer.connections)
        measured("took", time.monotonic() - began_at)
        measured("log lines", len(log.lines()))
        measured("others answered within", milliseconds(others.slowest()))
        assert not others.errors
        assert others.slowest() < SLOWEST_ANSWER * crowding()
    minutes = 1 + int((time.monotonic() - began_at) / 60)
    assert len(log.lines()) <= MAX_LOG_LINES * minutes
    assert server.worker_pids() == pids
    wait_for_empty_tables(server)

"""JSON with kept encoder and decoder: what upstream would write and read, byte for byte."""

from __future__ import annotations

import contextlib
import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
from engineio import json as upstream_json
from flask import Flask
from flask_socketio import ConnectionRefusedError as ConnectionRefused
from flask_socketio import SocketIO
from hypothesis import given, settings
from hypothesis import strategies as st
from socketio import packet as packets
from socketio.packet import Packet

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.upstream.socketio.encoding import (
    KeptJSON,
    KeptPacket,
    QueueJSON,
    StrictJSON,
    _kept_encoder,
    encoded,
    encoded_event,
)
from tests.support import unit_support
from tests.support.cases import in_turn
from tests.support.scale import examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None, max_examples=examples(100))
@given(values)
def test_it_writes_what_upstream_writes(value: Any) -> None:
    for options in ({"separators": (",", ":")}, {}, {"separators": (", ", ": "), "indent": 1}):
        assert KeptJSON.dumps(value, **options) == upstream_json.dumps(value, **options)


@settings(deadline=None, max_examples=examples(100))
@given(values)
def test_it_reads_what_upstream_reads(value: Any) -> None:
    text = json.dumps(value)
    for form in (text, text.encode(), bytearray(text.encode())):
        for kept in (KeptJSON, QueueJSON):
            assert repr(kept.loads(form)) == repr(upstream_json.loads(form))


@in_turn("before", range(0, 60, 7))
@in_turn("filling", ["x", "9"])
def test_a_long_integer_is_found_wherever_it_is(before: int, filling: str) -> None:
    """Upstream takes integers of a hundred characters, however many there are, and no longer."""
    for digits in ("1" * 100, "-" + "1" * 99, "1" * 101, "-" + "1" * 100):
        text = f'["{filling * before}",{",".join(["7"] * 200)},{digits},"{"9" * 300}"]'
        if len(digits) <= 100:
            assert KeptJSON.loads(text) == json.loads(text)
            continue
        with pytest.raises(ValueError, match="too large"):
            KeptJSON.loads(text)


@pytest.mark.parametrize("is_collecting", [True, False])
def test_the_garbage_collector_is_as_it_was(is_collecting: bool) -> None:
    """It rests while a large text is decoded, also one that is no JSON."""
    if not is_collecting:
        gc.disable()
    try:
        for end in ("]", "}"):
            with contextlib.suppress(ValueError):
                KeptJSON.loads("[" + "[]," * 10_000 + "[]" + end)
            assert gc.isenabled() == is_collecting
    finally:
        gc.enable()


@settings(deadline=None, max_examples=examples(100))
@given(values, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"]))
def test_it_reads_every_unicode_that_json_may_come_in(value: Any, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=False).encode(encoding, "surrogatepass")
    assert repr(QueueJSON.loads(text)) == repr(upstream_json.loads(text))


@in_turn("text", ["", "{", "[1,]", "1" * 101, "nul", "[1] 2", "\ufeff[]", '"\x00"', "[" * 100_000])
def test_it_refuses_what_upstream_refuses(text: str) -> None:
    """A number of a thousand digits would cost seconds."""
    with pytest.raises((ValueError, RecursionError)):
        upstream_json.loads(text)
    with pytest.raises((ValueError, RecursionError)):
        KeptJSON.loads(text)


@settings(deadline=None, max_examples=examples(100))
@given(
    kind=st.sampled_from([packets.EVENT, packets.ACK]),
    data=st.lists(values | st.binary(max_size=4) | st.lists(st.binary(max_size=4)), max_size=4),
    namespace=st.sampled_from(["/", "/chat", "/größe"]),
    id=st.none() | st.integers(0, 2**40),
)
def test_packets_are_encoded_as_upstream_encodes_them(
    kind: int, data: list[Any], namespace: str, id: int | None
) -> None:
    wanted = Packet(kind, data=data, namespace=namespace, id=id).encode()
    for packet_class in (KeptPacket, Packet):
        assert encoded(packet_class, kind, data, namespace, id) == wanted


@settings(deadline=None, max_examples=examples(100))
@given(
    event=st.text(),
    arguments=st.lists(values.filter(lambda value: value == value), max_size=3),
    namespace=st.sampled_from(["/", "/chat"]),
    id=st.integers(0, 2**40),
)
def test_arguments_that_are_text_already_are_taken_as_they_are(
    event: str, arguments: list[Any], namespace: str, id: int
) -> None:
    text = json.dumps(arguments, separators=(",", ":"))
    wanted = encoded(KeptPacket, packets.EVENT, [event, *arguments], namespace, id)
    assert encoded_event(KeptPacket, event, text, namespace, id) == wanted
    if len(text) < 90:  # no integer that upstream refuses to read
        assert encoded_event(Packet, event, text, namespace, id) == wanted


@settings(deadline=None, max_examples=examples(100))
@given(st.recursive(values | st.binary(), lambda inner: st.lists(inner), max_leaves=10))
def test_what_is_binary_is_known_as_upstream_knows_it(value: Any) -> None:
    assert KeptPacket.data_is_binary(value) == Packet.data_is_binary(value)
    assert KeptPacket.data_is_binary({"a": [value]}) == Packet.data_is_binary({"a": [value]})


@pytest.mark.parametrize("options", [{}, {"separators": (",", ":")}])
def test_it_raises_what_upstream_raises_for_what_json_cannot_hold(options: dict[str, Any]) -> None:
    itself: list[Any] = []
    itself.append({"a": itself})
    for json_module in (upstream_json, KeptJSON):
        with pytest.raises(TypeError, match="not JSON serializable"):
            json_module.dumps({"a": object()}, **options)
        with pytest.raises(TypeError, match="keys must be"):
            json_module.dumps({(): 1}, **options)
        with pytest.raises(ValueError, match="Circular reference"):
            json_module.dumps(itself, **options)
        assert json_module.dumps([1], **options) == "[1]"


def test_without_the_part_in_c_it_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on PyPy, or where the standard library has changed."""
    encoder = json.JSONEncoder()
    make: Any = json.encoder.c_make_encoder  # type: ignore[attr-defined]

    def make_another(markers: Any, *options: Any) -> Any:
        return (lambda *_: ("something else",)) if markers is None else make(markers, *options)

    for made_in_c in (None, make_another):
        monkeypatch.setattr(json.encoder, "c_make_encoder", made_in_c)
        assert _kept_encoder(encoder) == encoder.encode


@in_turn(
    "text", ["", "{", "[1,]", f"[{10**100}{5000 * ' '}]", "[1] 2", '"\x00"', "\x00", "[" * 100_000]
)
def test_what_other_processes_say_is_refused_as_upstream_refuses_it(text: str) -> None:
    for json_module in (upstream_json, QueueJSON):
        with pytest.raises((ValueError, RecursionError)):
            json_module.loads(text.encode())


class OwnJSON:
    """What an application brings."""

    dumps = staticmethod(json.dumps)
    loads = staticmethod(json.loads)


class OwnPacket(Packet):
    """What an application brings."""


def json_of(**options: Any) -> Any:
    app = Flask(__name__)
    is_fast = options.pop("fast", True)
    socketio = SocketIO(app, async_mode="threading", **options)
    SocketIOGuard(app, socketio, fast=is_fast)
    return socketio.server.packet_class


def test_it_is_used_by_the_guarded_server_alone() -> None:
    assert json_of().json is KeptJSON
    assert Packet.json is upstream_json
    packet_class = json_of(fast=False)
    assert (packet_class.json, packet_class.__bases__) == (StrictJSON, (Packet,))


def test_an_application_keeps_what_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packet, "json", upstream_json)  # upstream sets it on its class
    assert json_of(json=OwnJSON).json is OwnJSON
    monkeypatch.undo()
    assert issubclass(json_of(serializer=OwnPacket), OwnPacket)


# What JSON has not

NUMBERS = [float("nan"), float("inf"), -float("inf")]


class NaiveJSON:
    """As most modules that applications bring: it writes what no browser reads."""

    dumps = staticmethod(lambda value, **_options: json.dumps(value, separators=(",", ":")))
    loads = staticmethod(json.loads)


@pytest.fixture(params=["kept", "plain", "own", "own packets"])
def client_of(
    request: pytest.FixtureRequest,
    make_guarded: Callable[..., Guarded],
    monkeypatch: pytest.MonkeyPatch,
) -> Guarded:
    """An application with each of the ways in which packets become text."""
    monkeypatch.setattr(Packet, "json", upstream_json)
    options: dict[str, Any] = {
        "own": {"json": NaiveJSON},
        "own packets": {"serializer": OwnPacket},
    }.get(request.param, {})
    monkeypatch.setattr("engineio.packet.Packet.json", upstream_json)
    return make_guarded(options=options, fast=request.param != "plain")


@pytest.mark.parametrize("number", NUMBERS)
def test_what_json_has_not_is_refused_and_not_sent(client_of: Guarded, number: float) -> None:
    client_of.socketio.on_event("echo", lambda value: value)
    client_of.socketio.on_event("answer", lambda: {"deep": [number]})
    client = client_of.polling()
    client.connect()
    for emit in (client_of.socketio.emit, client_of.guard.emit):
        for payload in (number, {"deep": [{"er": number}]}, ("two", number), [b"bytes", number]):
            with pytest.raises(ValueError, match=r"JSON"):
                emit("news", payload)
            with pytest.raises(ValueError, match=r"JSON"):
                emit("news", payload, callback=print, to=client.sid)
    with pytest.raises(ValueError, match=r"JSON"):
        client_of.guard.broadcast_call("question", number, room=client.sid, timeout=0.1)
    (answer,) = client.call("answer")
    assert answer["error"]["code"] == "internal_error"
    client_of.socketio.emit("NaN", {"-Infinity": ['"NaN', "\\", "Infinity"]})
    assert client.receive("42") == '42["NaN",{"-Infinity":["\\"NaN","\\\\","Infinity"]}]'
    assert client_of.guard.waiting_callbacks == 0
    assert client.frames == []


def test_a_refusal_that_json_cannot_hold_is_still_a_refusal(guarded: Guarded) -> None:
    @guarded.socketio.on("connect")
    def connect(_auth: Any) -> None:
        raise ConnectionRefused("because", NUMBERS[0])

    client = guarded.polling()
    assert client.connect() == '44{"message":"Connection rejected by server"}'
    assert guarded.guard.counters["handler_failures"] == 1

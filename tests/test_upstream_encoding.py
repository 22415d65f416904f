"""JSON with kept encoder and decoder: what upstream would write and read, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engineio import json as upstream_json
from flask import Flask
from flask_socketio import SocketIO
from hypothesis import given, settings
from hypothesis import strategies as st
from socketio import packet as packets
from socketio.packet import Packet

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.upstream.encoding import (
    KeptJSON,
    KeptPacket,
    QueueJSON,
    _kept_encoder,
    encoded,
    encoded_event,
)
from tests import unit_support

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None, max_examples=100)
@given(values)
def test_it_writes_what_upstream_writes(value: Any) -> None:
    for options in ({"separators": (",", ":")}, {}, {"separators": (", ", ": "), "indent": 1}):
        assert KeptJSON.dumps(value, **options) == upstream_json.dumps(value, **options)


@settings(deadline=None, max_examples=100)
@given(values)
def test_it_reads_what_upstream_reads(value: Any) -> None:
    text = json.dumps(value)
    for form in (text, text.encode(), bytearray(text.encode())):
        for kept in (KeptJSON, QueueJSON):
            assert repr(kept.loads(form)) == repr(upstream_json.loads(form))


@settings(deadline=None, max_examples=100)
@given(values, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"]))
def test_it_reads_every_unicode_that_json_may_come_in(value: Any, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=False).encode(encoding, "surrogatepass")
    assert repr(QueueJSON.loads(text)) == repr(upstream_json.loads(text))


@pytest.mark.parametrize(
    "text", ["", "{", "[1,]", "1" * 101, "nul", "[1] 2", "\ufeff[]", '"\x00"', "[" * 100_000]
)
def test_it_refuses_what_upstream_refuses(text: str) -> None:
    """A number of a thousand digits would cost seconds."""
    with pytest.raises((ValueError, RecursionError)):
        upstream_json.loads(text)
    with pytest.raises((ValueError, RecursionError)):
        KeptJSON.loads(text)


@settings(deadline=None, max_examples=200)
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


@settings(deadline=None, max_examples=200)
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


@settings(deadline=None, max_examples=200)
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


@pytest.mark.parametrize(
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
    is_fast = options.pop("fast_json", True)
    socketio = SocketIO(app, async_mode="threading", **options)
    SocketIOGuard(app, socketio, fast_json=is_fast)
    return socketio.server.packet_class


def test_it_is_used_by_the_guarded_server_alone() -> None:
    assert json_of().json is KeptJSON
    assert Packet.json is upstream_json
    assert json_of(fast_json=False) is Packet


def test_an_application_keeps_what_it_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packet, "json", upstream_json)  # upstream sets it on its class
    assert json_of(json=OwnJSON).json is OwnJSON
    monkeypatch.undo()
    assert issubclass(json_of(serializer=OwnPacket), OwnPacket)

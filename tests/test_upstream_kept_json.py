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
from flask_socketio_guard.upstream.kept_json import KeptJSON, KeptPacket, encoded
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
        assert repr(KeptJSON.loads(form)) == repr(upstream_json.loads(form))


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
@given(st.recursive(values | st.binary(), lambda inner: st.lists(inner), max_leaves=10))
def test_what_is_binary_is_known_as_upstream_knows_it(value: Any) -> None:
    assert KeptPacket.data_is_binary(value) == Packet.data_is_binary(value)
    assert KeptPacket.data_is_binary({"a": [value]}) == Packet.data_is_binary({"a": [value]})


def test_it_raises_what_upstream_raises_for_what_json_cannot_hold() -> None:
    for json_module in (upstream_json, KeptJSON):
        with pytest.raises(TypeError, match="not JSON serializable"):
            json_module.dumps({"a": object()}, separators=(",", ":"))


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

"""One message in every form in which a transport wants it."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from engineio import packet as eio_packets
from engineio.packet import Packet as EnginePacket
from engineio.payload import Payload
from hypothesis import given, settings
from hypothesis import strategies as st
from socketio.packet import EVENT, Packet
from websockets.frames import Opcode
from websockets.protocol import CLIENT, Protocol

from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from tests.support import unit_support, unit_websocket
from tests.support.cases import in_turn
from tests.support.scale import examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
make_served = unit_websocket.make_served


def decoded(data: bytes) -> list[str | bytes]:
    """Return what a client receives that gets *data* over WebSocket."""
    protocol = Protocol(CLIENT, max_size=None)
    protocol.receive_data(data)
    messages: list[str | bytes] = []
    for frame in protocol.events_received():
        assert frame.fin  # type: ignore[union-attr]
        body = bytes(frame.data)  # type: ignore[union-attr]
        messages.append(body.decode() if frame.opcode is Opcode.TEXT else body)  # type: ignore[union-attr]
    assert protocol.parser_exc is None
    assert not protocol.data_to_send()
    return messages


def polled(message: ClientMessage) -> str:
    """Return what a client receives that polls."""
    return str(Payload(packets=message.packets()).encode())


def encoded(data: Any) -> Any:
    """Return a Socket.IO event as python-socketio encodes it."""
    return Packet(EVENT, data=["event", data]).encode()


TEXT_AND_BINARY = {"a": b"\x00\xff", "b": [b"", {"c": b"x" * 70_000}], "d": "\N{EURO SIGN}"}


@pytest.mark.parametrize("is_polled_first", [False, True])
def test_one_object_serves_polling_and_websocket_recipients(is_polled_first: bool) -> None:
    """Upstream's packet keeps the form that it was first encoded to."""
    message = ClientMessage.of_socketio(encoded(TEXT_AND_BINARY))
    if is_polled_first:
        polled(message)
    text, *attachments = decoded(message.frames)
    assert attachments == [b"\x00\xff", b"", b"x" * 70_000]
    assert message.plain() == [text, *attachments]
    assert polled(message).split("\x1e") == [
        text,
        *("b" + base64.b64encode(part).decode() for part in attachments if isinstance(part, bytes)),
    ]
    assert decoded(message.frames) == [text, *attachments]
    assert polled(message) == polled(message)


@settings(deadline=None, max_examples=examples(30))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=300),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_every_transport_carries_what_upstream_would(data: Any) -> None:
    """Byte for byte what packets of upstream's own give."""
    parts = encoded(data)
    parts = parts if isinstance(parts, list) else [parts]
    message = ClientMessage.of_socketio(parts)

    def stock() -> list[Any]:
        return [EnginePacket(eio_packets.MESSAGE, data=part) for part in parts]

    plain = [packet.encode() for packet in stock()]
    assert message.plain() == plain
    assert decoded(message.frames) == plain
    assert polled(message) == Payload(packets=stock()).encode()


@in_turn("size", [0, 1, 124, 125, 126, 65_534, 65_535, 65_536, 100_000])
def test_frames_of_every_size_are_whole(size: int) -> None:
    assert decoded(ClientMessage.of_socketio("x" * size).frames) == ["4" + "x" * size]
    assert decoded(ClientMessage.of_socketio(b"x" * size).frames) == [b"x" * size]


def test_packets_of_engineio_are_messages_too() -> None:
    for packet, text in (
        (EnginePacket(eio_packets.PING), "2"),
        (EnginePacket(eio_packets.NOOP), "6"),
        (EnginePacket(eio_packets.OPEN, {"sid": "x"}), '0{"sid":"x"}'),
        (EnginePacket(eio_packets.MESSAGE, {"a": 1}), '4{"a":1}'),
    ):
        message = ClientMessage.of_engineio(packet)
        assert decoded(message.frames) == [text]
        assert message.plain() == [text]
        assert polled(message) == text
        assert not message.is_event
        assert not message.is_volatile


def test_frames_are_made_once() -> None:
    """A broadcast must not encode for each of its recipients."""
    message = ClientMessage.of_socketio(encoded(TEXT_AND_BINARY))
    assert message.frames is message.frames


def test_a_message_costs_what_its_frames_do_and_a_bit() -> None:
    """Without the bit a flood of empty messages would cost nothing."""
    for part in ("", "x" * 1000, [b"x" * 1000, "y"]):
        message = ClientMessage.of_socketio(part)
        assert message.size == len(message.frames) + 100


@pytest.mark.parametrize("is_event", [False, True])
@pytest.mark.parametrize("is_volatile", [False, True])
def test_a_message_knows_what_it_is_worth(is_event: bool, is_volatile: bool) -> None:
    message = ClientMessage.of_socketio("2[]", is_event=is_event, is_volatile=is_volatile)
    assert (message.is_event, message.is_volatile) == (is_event, is_volatile)
    message = ClientMessage((), is_event=is_event, is_volatile=is_volatile)
    assert (message.is_event, message.is_volatile) == (is_event, is_volatile)
    message = ClientMessage.of_socketio("2[]")
    assert (message.is_event, message.is_volatile) == (False, False)


@pytest.mark.parametrize("kind", ["gevent-websocket", "threads"])
def test_a_binary_broadcast_reaches_clients_of_every_transport(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind)
    clients = [served.polling(), served.websocket(), served.polling(), served.websocket()]
    for client in clients:
        client.join()
    served.socketio.emit("news", {"data": b"\x00\xff"})
    body = json.dumps(["news", {"data": {"_placeholder": True, "num": 0}}], separators=(",", ":"))
    for client in clients:
        assert client.read_until("451-") == f"451-{body}"
        if isinstance(client, unit_websocket.Peer):
            assert client.read() == b"\x00\xff"
        else:
            assert client.read_until("b") == "bAP8="

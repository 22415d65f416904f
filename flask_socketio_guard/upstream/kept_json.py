"""Packets as upstream reads and writes them, with an encoder and a decoder that are kept.

The functions of the standard library make an object for every call whose options are
not their defaults, and those of upstream never are.
"""

from __future__ import annotations

from json import JSONDecoder, JSONEncoder
from typing import Any, Final

from engineio import json as upstream_json
from socketio.packet import Packet

_SEPARATORS: Final = (",", ":")
_encode = JSONEncoder(separators=_SEPARATORS).encode
_decoder: Any = JSONDecoder(parse_int=upstream_json._safe_int)
_scan = _decoder.scan_once
_NEVER_BINARY: Final = frozenset({str, int, float, bool, type(None)})


class KeptJSON:
    """Stands in for ``engineio.json``, the module; see there."""

    JSONDecodeError = upstream_json.JSONDecodeError

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text."""
        if len(options) == 1 and options.get("separators") == _SEPARATORS:
            return _encode(value)
        return upstream_json.dumps(value, **options)

    @staticmethod
    def loads(text: str | bytes | bytearray, **options: Any) -> Any:
        """Return what JSON *text* holds.

        Raises:
            ValueError: It is none.
        """
        if options:
            return upstream_json.loads(text, **options)
        if isinstance(text, bytes) and text.isascii() and b"\0" not in text:
            text = str(text, "ascii")  # upstream asks first which kind of Unicode it is
        if not isinstance(text, str):
            return upstream_json.loads(text)
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            end = -1
        # Space around it, and what else there may be, is for the decoder to look at.
        return value if end == len(text) else _decoder.decode(text)


class KeptPacket(Packet):
    """Stands in for upstream's packet class."""

    json = KeptJSON

    @classmethod
    def data_is_binary(cls, data: Any) -> bool:
        """Say whether *data* holds bytes somewhere; as upstream's, which looks at all of it."""
        kind = type(data)
        if kind in _NEVER_BINARY:
            return False
        if kind is list:
            values = data
        elif kind is dict:
            values = data.values()
        else:
            return bool(super().data_is_binary(data))
        for value in values:
            if type(value) not in _NEVER_BINARY and cls.data_is_binary(value):
                return True
        return False


def encoded(
    packet_class: Any, kind: int, data: list[Any], namespace: str, id: int | None
) -> str | bytes | list[Any]:
    """Return an EVENT or ACK packet as *packet_class* encodes it.

    Source:
        Socket.IO protocol v5, "Packet encoding".
    """
    if packet_class is not KeptPacket or KeptPacket.data_is_binary(data):
        encoded: Any = packet_class(kind, data=data, namespace=namespace, id=id).encode()
        return encoded
    head = f"{kind}{namespace}," if namespace != "/" else str(kind)
    return f"{head}{_encode(data)}" if id is None else f"{head}{id}{_encode(data)}"


def keep_json(server: Any) -> None:
    """Have a ``socketio.Server`` and its manager use it, unless the application has its own."""
    packet_class, manager = server.packet_class, server.manager
    if manager.json is upstream_json:
        manager.json = KeptJSON
    if packet_class is Packet and Packet.json is upstream_json:
        server.packet_class = KeptPacket
    elif packet_class.json is upstream_json:
        # Upstream keeps the module on the class, which other servers use too.
        server.packet_class = type(packet_class.__name__, (packet_class,), {"json": KeptJSON})

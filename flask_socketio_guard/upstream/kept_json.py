"""JSON as upstream reads and writes it, with an encoder and a decoder that are kept.

The functions of the standard library make an object for every call whose options are
not their defaults, and those of upstream never are.
"""

from __future__ import annotations

from json import JSONDecoder, JSONEncoder
from typing import Any, Final

from engineio import json as upstream_json

_SEPARATORS: Final = (",", ":")
_encode = JSONEncoder(separators=_SEPARATORS).encode
_decode = JSONDecoder(parse_int=upstream_json._safe_int).decode


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
        if options or not isinstance(text, str):
            return upstream_json.loads(text, **options)
        return _decode(text)


def keep_json(server: Any) -> None:
    """Have the packets of a ``socketio.Server`` use it, unless the application has its own."""
    packet_class = server.packet_class
    if packet_class.json is upstream_json:
        # Upstream keeps the module on the class, which other servers use too.
        server.packet_class = type(packet_class.__name__, (packet_class,), {"json": KeptJSON})

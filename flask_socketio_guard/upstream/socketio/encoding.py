"""Packets in upstream's format, with a JSON encoder and decoder that are reused.

The functions of the standard library create an encoder or decoder for every call with options
that are not the defaults, as all of upstream's calls have.
"""

from __future__ import annotations

import json as standard_json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from json import JSONDecoder, JSONEncoder
from json import encoder as json_encoder
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from engineio import json as upstream_json
from socketio.packet import EVENT, Packet

from ...events.pieces import PieceDecoder, without_gc
from ...events.shape import HEAD, Places, is_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SEPARATORS: Final = (",", ":")
_NEVER_BINARY: Final = frozenset({str, int, float, bool, type(None)})
_SHORT: Final = 4096  # characters; an integer of this length costs microseconds
_FEW: Final = 3  # name and first arguments, where most attachments are
_SMALL: Final = 512  # characters; below this, the search costs as much as it saves
_LARGE: Final = 16 * 1024  # characters
IN_PIECES: Final = 32 * 1024
"""Shortest JSON text, in characters, that is decoded in pieces; shorter ones take at most 2 ms."""
_QUICK: Final = 256 * 1024  # characters; takes 1.6 ms if all are escapes
_FEW_VALUES: Final = 8192  # numbers or members; they take 0.7 to 1.2 ms
_MAX_DIGITS: Final = 100  # longest integer that upstream accepts
_TOO_LONG: Final = b"0" * (_MAX_DIGITS + 1)
_STRIDE: Final = 25
_PLACEHOLDER: Final = '"_placeholder"'
_ZEROS: Final = bytes.maketrans(b"123456789-", b"0000000000")
_decoder: Any = JSONDecoder(parse_int=upstream_json._safe_int)
_scan = _decoder.scan_once
_scan_fast = JSONDecoder().scan_once  # type: ignore[attr-defined]


def is_quick(packet: str | bytes) -> bool:
    """Return whether *packet*, although long, decodes within 2 ms: mostly one long string.

    Decoding in pieces would gain nothing and make 100 kB of text half as slow again.
    """
    return (
        isinstance(packet, str)
        and len(packet) <= _QUICK
        and is_flat(packet)
        # The search for a single comma is ten times as fast as a count.
        and (packet.find(",", HEAD) < 0 or packet.count(",") <= _FEW_VALUES)
    )


def _has_only_short_numbers(text: str) -> bool:
    """Return whether no integer in *text* is too long for upstream."""
    # The stride samples four of any hundred consecutive characters.
    if b"0000" not in text[::_STRIDE].encode("utf-8", "surrogatepass").translate(_ZEROS):
        return True
    return _TOO_LONG not in text.encode("utf-8", "surrogatepass").translate(_ZEROS)


def _scan_for(text: str) -> Any:
    """Return the scanner for *text*: the fast one if no integer is too long for upstream."""
    # A call of a Python function for each integer is half the cost of a table of numbers.
    size = len(text)
    is_fast = size <= _MAX_DIGITS or (size > _SMALL and _has_only_short_numbers(text))
    return _scan_fast if is_fast else _scan


class _PieceOptions(NamedTuple):
    """Options for decoding a large packet; see :class:`~...events.pieces.PieceDecoder`."""

    max_containers: int
    take_turn: Callable[[], object]


_piece_options: ContextVar[_PieceOptions | None] = ContextVar(
    "socketio_guard_piece_options", default=None
)


@contextmanager
def decoding_in_pieces(*, max_containers: int, take_turn: Callable[[], object]) -> Iterator[None]:
    """Make :meth:`KeptJSON.loads` decode in pieces and check the shape of each.

    Args:
        max_containers: Most lists and objects that a text may hold.
        take_turn: See :class:`~...events.pieces.PieceDecoder`.
    """
    token = _piece_options.set(_PieceOptions(max_containers, take_turn))
    try:
        yield
    finally:
        _piece_options.reset(token)


def _kept_encoder(encoder: JSONEncoder) -> Callable[[object], str]:
    """Return a function like ``encoder.encode`` that creates the encoder in C only once.

    The standard library creates one for each call, with a table to detect circular references.
    Without that table they end in a RecursionError, after which *encoder* itself reports them.

    Source:
        CPython, ``Lib/json/encoder.py``, ``JSONEncoder.iterencode``, as in 3.10 to 3.14. If
        the interpreter differs, ``encoder.encode`` itself is returned.
    """
    encode = encoder.encode
    try:
        iterate: Any = json_encoder.c_make_encoder(  # type: ignore[attr-defined]
            None,
            encoder.default,
            json_encoder.c_encode_basestring_ascii,  # type: ignore[attr-defined]
            None,
            encoder.key_separator,
            encoder.item_separator,
            encoder.sort_keys,
            encoder.skipkeys,
            encoder.allow_nan,
        )
        sample = _SAMPLE if encoder.allow_nan else _SAMPLE[1:]
        if "".join(iterate(sample, 0)) != encode(sample):
            return encode
    except (AttributeError, TypeError, ValueError):
        return encode

    def encode_kept(value: object) -> str:
        try:
            return "".join(iterate(value, 0))
        except RecursionError:
            return encode(value)

    return encode_kept


_SAMPLE: Final = [float("inf"), '"\u00e4\n', 1, -1.5, True, None, {"a": [], "b": {}}, {1: "c"}]
_encode_spaced = _kept_encoder(JSONEncoder())
_encode_spaced_strict = _kept_encoder(JSONEncoder(allow_nan=False))

encode_strict = _kept_encoder(JSONEncoder(separators=_SEPARATORS, allow_nan=False))
"""Returns a value as JSON text. Raises like ``json.dumps``, and ValueError for NaN and infinity.

JSON has no such numbers: a browser that receives one drops its connection with "parse error".
"""


class StrictJSON:
    """Replaces the module ``engineio.json`` and refuses NaN and infinity."""

    JSONDecodeError = upstream_json.JSONDecodeError
    loads = staticmethod(upstream_json.loads)

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text.

        Raises:
            ValueError: *value* holds a NaN or an infinity.
        """
        return upstream_json.dumps(value, **{"allow_nan": False, **options})


class KeptJSON(StrictJSON):
    """`StrictJSON` with an encoder and a decoder that are reused."""

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text; see :class:`StrictJSON`."""
        if len(options) == 1 and options.get("separators") == _SEPARATORS:
            return encode_strict(value)
        return StrictJSON.dumps(value, **options)

    @staticmethod
    def loads(text: str | bytes | bytearray, **options: Any) -> Any:
        """Return the value of JSON *text*.

        Raises:
            ValueError: *text* is not JSON, or holds an integer of more than 100 digits.
        """
        if isinstance(text, str) and not options:
            in_pieces = _piece_options.get()
            if in_pieces is not None:
                return PieceDecoder(text, scan_for=_scan_for, **in_pieces._asdict()).decode()
            size = len(text)
            scan = _scan_for(text)
            try:
                value, end = scan(text, 0) if size < _LARGE else without_gc(scan, text)
            except StopIteration:
                end = -1
            # Whitespace around the value, and any error, is left to the decoder.
            return value if end == len(text) else _decoder.decode(text)
        return upstream_json.loads(text, **options)


class QueueJSON(KeptJSON):
    """`KeptJSON` for messages between processes, which are short and arrive as bytes.

    NaN is allowed: a client other than a browser may have sent it in an acknowledgement.
    """

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text, with NaN and infinity as in ``json.dumps``."""
        return upstream_json.dumps(value, **options) if options else _encode_spaced(value)

    @staticmethod
    def loads(text: str | bytes | bytearray, **options: Any) -> Any:
        """Return the value of JSON *text*, with long integers allowed in short texts.

        Upstream refuses every integer of more than 100 digits.

        Raises:
            ValueError: *text* is not JSON, or upstream refuses it.
        """
        if isinstance(text, bytes) and len(text) <= _SHORT:
            try:
                ascii_text = str(text, "ascii")  # skips upstream's detection of UTF-8, -16 or -32
                value, end = _scan_fast(ascii_text, 0)
                if end == len(ascii_text):
                    return value
            except (ValueError, StopIteration):
                pass  # upstream raises the proper error, if there is one
        return upstream_json.loads(text, **options)


class KeptPacket(Packet):
    """Replaces upstream's packet class, with `KeptJSON` and a faster search for bytes."""

    json = KeptJSON

    @classmethod
    def data_is_binary(cls, data: Any) -> bool:
        """Return whether *data* contains bytes, like upstream, which does not stop at the first."""
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

    Raises:
        ValueError: The packet is JSON and holds a NaN, an infinity, or a placeholder for an
            attachment that does not belong to it.

    Source:
        Socket.IO protocol v5, "Packet encoding".
    """
    text = _as_text(data) if packet_class is KeptPacket else None
    if text is None:
        encoded: Any = packet_class(kind, data=data, namespace=namespace, id=id).encode()
        if isinstance(encoded, list) and str(encoded[0]).count(_PLACEHOLDER) >= len(encoded):
            without_attachments(data)  # raises, if they are placeholders
        if packet_class.json is not KeptJSON and is_json(packet_class):
            refuse_nan(encoded[0] if isinstance(encoded, list) else encoded)
        return encoded
    head = f"{kind}{namespace}," if namespace != "/" else str(kind)
    return f"{head}{text}" if id is None else f"{head}{id}{text}"


def without_attachments(data: list[Any]) -> tuple[list[Any], list[bytes]]:
    """Return *data* with its bytes replaced by placeholders, and the bytes in order.

    Raises:
        ValueError: *data* already contains placeholders, which a client may have sent as plain
            JSON. With the number of an attachment, each would repeat that attachment in another
            process; with any other number, browsers drop their connections.
    """
    data, attachments = Packet.deconstruct_binary(data)
    try:
        Places(data, len(attachments))
    except ValueError as exc:
        raise ValueError(f"it holds a placeholder for an attachment: {exc}") from exc
    return data, attachments


def _as_text(data: list[Any]) -> str | None:
    """Return *data* as JSON text, or ``None`` if it contains bytes, which become attachments.

    Only the first values are checked for bytes. Beyond these, the encoder's error is cheaper than
    a search through all of *data*.
    """
    for value in data[:_FEW]:
        if type(value) is bytes:
            return None
    try:
        return encode_strict(data)
    except TypeError:
        if KeptPacket.data_is_binary(data):
            return None
        raise


def is_json(packet_class: Any) -> bool:
    """Return whether packets of that class are JSON text, of whichever JSON module."""
    return packet_class.encode is Packet.encode


def refuse_nan(text: str | bytes) -> None:
    """Check JSON *text* from an application's own JSON module.

    Raises:
        ValueError: *text* holds a NaN or an infinity, which JSON does not allow.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if ("NaN" in text or "Infinity" in text) and _NO_NUMBER.search(_STRINGS.sub("", text)):
        raise ValueError("JSON allows neither NaN nor Infinity")


_STRINGS = re.compile(r'^[^\[{"]*|"(?:[^"\\]|\\.)*"')  # or the head of a packet, with a namespace
_NO_NUMBER = re.compile("NaN|Infinity")


def encoded_for_queue(json: Any, packet_class: Any, message: dict[str, Any]) -> bytes:
    """Return the JSON text of an event for other processes, which put it into packets.

    Args:
        json: The JSON module of the manager.
        packet_class: The packet class of the server, or ``None``. If its packets are not JSON,
            NaN and infinity are allowed.
        message: A dict, as in upstream's ``PubSubManager.emit``.

    Raises:
        ValueError: *message* holds a NaN or an infinity.
    """
    if json is QueueJSON and packet_class is KeptPacket:
        return _encode_spaced_strict(message).encode()
    text: str | bytes = json.dumps(message)
    if packet_class is None or is_json(packet_class):
        refuse_nan(text)
    return text if isinstance(text, bytes) else text.encode()


def encoded_event(
    packet_class: Any, event: str, arguments: str, namespace: str, id: int
) -> str | bytes | list[Any]:
    """Return an EVENT packet for arguments that are already JSON text.

    Args:
        packet_class: See :func:`encoded`.
        event: Name of the event.
        arguments: JSON text of a list, without whitespace around it.
        namespace: Socket.IO namespace.
        id: Id of the acknowledgement.
    """
    if packet_class is not KeptPacket:
        return encoded(packet_class, EVENT, [event, *_decoder.decode(arguments)], namespace, id)
    where = f"{namespace}," if namespace != "/" else ""
    comma = "" if arguments == "[]" else ","
    return f"{EVENT}{where}{id}[{encode_strict(event)}{comma}{arguments[1:]}"


def keep_json(server: Any, *, is_fast: bool) -> None:
    """Install these JSON classes in a ``socketio.Server`` and its manager.

    An application's own JSON module or packet class is kept.

    Args:
        server: A server whose class has not been replaced yet, or only just.
        is_fast: Whether to reuse the encoder and decoder, that is, the setting ``FAST``.
    """
    packet_class, manager = server.packet_class, server.manager
    if is_fast and manager.json in (upstream_json, standard_json):
        manager.json = QueueJSON
    if is_fast and packet_class is Packet and Packet.json is upstream_json:
        server.packet_class = KeptPacket
    elif packet_class.json is upstream_json:
        # Upstream keeps the module on the class, which other servers use too.
        own_json = KeptJSON if is_fast else StrictJSON
        server.packet_class = type(packet_class.__name__, (packet_class,), {"json": own_json})

"""Packets as upstream reads and writes them, with an encoder and a decoder that are kept.

The functions of the standard library make an object for every call whose options are
not their defaults, and those of upstream never are.
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
_SHORT: Final = 4096  # characters; an integer of so many digits costs microseconds
_FEW: Final = 3  # name and first arguments, where most attachments are
_SMALL: Final = 512  # characters: to look costs as much as it saves
_LARGE: Final = 16 * 1024  # characters
IN_PIECES: Final = 32 * 1024
"""Characters of JSON from which on it may be decoded in pieces; fewer take at most 2 ms."""
_QUICK: Final = 256 * 1024  # characters; of nothing but escapes 1.6 ms
_FEW_VALUES: Final = 8192  # numbers or members; 0.7 to 1.2 ms
_MAX_DIGITS: Final = 100  # that upstream takes
_TOO_LONG: Final = b"0" * (_MAX_DIGITS + 1)
_STRIDE: Final = 25
_PLACEHOLDER: Final = '"_placeholder"'
_ZEROS: Final = bytes.maketrans(b"123456789-", b"0000000000")
_decoder: Any = JSONDecoder(parse_int=upstream_json._safe_int)
_scan = _decoder.scan_once
_scan_fast = JSONDecoder().scan_once  # type: ignore[attr-defined]


def is_quick(packet: str | bytes) -> bool:
    """Say whether *packet*, though long, is decoded in 2 ms: it is hardly more than a long text.

    Pieces would gain nothing, and cost 100 kB of text half as much again.
    """
    return (
        isinstance(packet, str)
        and len(packet) <= _QUICK
        and is_flat(packet)
        # To find none is ten times as fast as to count.
        and (packet.find(",", HEAD) < 0 or packet.count(",") <= _FEW_VALUES)
    )


def _has_only_short_numbers(text: str) -> bool:
    """Say whether no integer in *text* is too long for upstream."""
    # Of a hundred characters in a row it meets four.
    if b"0000" not in text[::_STRIDE].encode("utf-8", "surrogatepass").translate(_ZEROS):
        return True
    return _TOO_LONG not in text.encode("utf-8", "surrogatepass").translate(_ZEROS)


def _scan_for(text: str) -> Any:
    """Return what decodes *text*: the faster one where no integer is too long for upstream."""
    # A function of Python for each integer is half of what a table of numbers costs.
    size = len(text)
    is_fast = size <= _MAX_DIGITS or (size > _SMALL and _has_only_short_numbers(text))
    return _scan_fast if is_fast else _scan


class _Manners(NamedTuple):
    """How a large packet is decoded; see :class:`~...events.pieces.PieceDecoder`."""

    max_containers: int
    take_turn: Callable[[], object]


_manners: ContextVar[_Manners | None] = ContextVar("socketio_guard_manners", default=None)


@contextmanager
def decoding_in_pieces(*, max_containers: int, take_turn: Callable[[], object]) -> Iterator[None]:
    """Have :meth:`KeptJSON.loads` decode piece by piece, and look at the shape of each.

    Args:
        max_containers: Lists and objects that a text may hold.
        take_turn: See :class:`~...events.pieces.PieceDecoder`.
    """
    token = _manners.set(_Manners(max_containers, take_turn))
    try:
        yield
    finally:
        _manners.reset(token)


def _kept_encoder(encoder: JSONEncoder) -> Callable[[object], str]:
    """Return ``encode`` of *encoder*, but the part in C is made once.

    The standard library makes one for each call, so that each has a memory of its own for
    what refers to itself. Without one that is found by the depth, and then told as always.

    Source:
        CPython, ``Lib/json/encoder.py``, ``JSONEncoder.iterencode``. Where it is not what
        it was in 3.10 to 3.14, the encoder itself is returned.
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
"""Returns a value as JSON text; raises what ``json.dumps`` raises, for NaN and infinity too.

They are none of JSON's: a browser that is sent one drops its connection with "parse error".
"""


class StrictJSON:
    """Stands in for ``engineio.json``, the module, and refuses NaN and infinity."""

    JSONDecodeError = upstream_json.JSONDecodeError
    loads = staticmethod(upstream_json.loads)

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text.

        Raises:
            ValueError: It holds a NaN or an infinity.
        """
        return upstream_json.dumps(value, **{"allow_nan": False, **options})


class KeptJSON(StrictJSON):
    """The same, with an encoder and a decoder that are kept."""

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text; see :class:`StrictJSON`."""
        if len(options) == 1 and options.get("separators") == _SEPARATORS:
            return encode_strict(value)
        return StrictJSON.dumps(value, **options)

    @staticmethod
    def loads(text: str | bytes | bytearray, **options: Any) -> Any:
        """Return what JSON *text* holds.

        Raises:
            ValueError: It is none.
        """
        if isinstance(text, str) and not options:
            manners = _manners.get()
            if manners is not None:
                return PieceDecoder(text, scan_for=_scan_for, **manners._asdict()).decode()
            size = len(text)
            scan = _scan_for(text)
            try:
                value, end = scan(text, 0) if size < _LARGE else without_gc(scan, text)
            except StopIteration:
                end = -1
            # Space around it, and what else there may be, is for the decoder to look at.
            return value if end == len(text) else _decoder.decode(text)
        return upstream_json.loads(text, **options)


class QueueJSON(KeptJSON):
    """The same for what processes of the fleet say to each other: bytes, and short.

    They may say NaN: what a client of another kind than a browser has answered.
    """

    @staticmethod
    def dumps(value: object, **options: Any) -> str:
        """Return *value* as JSON text."""
        return upstream_json.dumps(value, **options) if options else _encode_spaced(value)

    @staticmethod
    def loads(text: str | bytes | bytearray, **options: Any) -> Any:
        """Return what JSON *text* holds; as upstream's, but for integers.

        Upstream refuses one of more than 100 digits wherever it is.

        Raises:
            ValueError: It is none.
        """
        if isinstance(text, bytes) and len(text) <= _SHORT:
            try:
                ascii_text = str(text, "ascii")  # upstream asks which kind of Unicode it is
                value, end = _scan_fast(ascii_text, 0)
                if end == len(ascii_text):
                    return value
            except (ValueError, StopIteration):
                pass  # it says what is wrong, if anything is
        return upstream_json.loads(text, **options)


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

    Raises:
        ValueError: It is one of JSON, and holds a NaN, an infinity, or a placeholder of an
            attachment that is not its own.

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
    """Return *data* with placeholders for the bytes in it, and these bytes.

    Raises:
        ValueError: There are placeholders in it already, such as a client may have sent as plain
            JSON. With a number of an attachment they would stand for it any number of times in
            another process; with any other, browsers drop their connections.
    """
    data, attachments = Packet.deconstruct_binary(data)
    try:
        Places(data, len(attachments))
    except ValueError as exc:
        raise ValueError(f"it holds a placeholder of an attachment: {exc}") from exc
    return data, attachments


def _as_text(data: list[Any]) -> str | None:
    """Return *data* as JSON text; ``None`` if there are bytes in it, which go beside it.

    To look for them in all of it costs more than to find out by an error.
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
    """Say whether packets of that class are JSON text, whoever writes it."""
    return packet_class.encode is Packet.encode


def refuse_nan(text: str | bytes) -> None:
    """Raise if *text*, JSON that a module of the application wrote, holds what JSON has not.

    Raises:
        ValueError: It holds a NaN or an infinity.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if ("NaN" in text or "Infinity" in text) and _NO_NUMBER.search(_STRINGS.sub("", text)):
        raise ValueError("JSON knows neither NaN nor Infinity")


_STRINGS = re.compile(r'^[^\[{"]*|"(?:[^"\\]|\\.)*"')  # and the head of a packet, with a namespace
_NO_NUMBER = re.compile("NaN|Infinity")


def encoded_for_queue(json: Any, packet_class: Any, message: dict[str, Any]) -> bytes:
    """Return an event for other processes as JSON text, which goes into packets there.

    Args:
        json: That of the manager.
        packet_class: That of the server; what packets can hold that are no JSON may pass.
        message: See upstream's ``PubSubManager.emit``.

    Raises:
        ValueError: It holds a NaN or an infinity.
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
    """Return an EVENT packet whose arguments are there as the JSON text of a list.

    Args:
        packet_class: See :func:`encoded`.
        event: Its name.
        arguments: Without spaces around it.
        namespace: Socket.IO namespace.
        id: Of the acknowledgement.
    """
    if packet_class is not KeptPacket:
        return encoded(packet_class, EVENT, [event, *_decoder.decode(arguments)], namespace, id)
    where = f"{namespace}," if namespace != "/" else ""
    comma = "" if arguments == "[]" else ","
    return f"{EVENT}{where}{id}[{encode_strict(event)}{comma}{arguments[1:]}"


def keep_json(server: Any, *, is_fast: bool) -> None:
    """Have a ``socketio.Server`` and its manager use it, unless the application has its own.

    Args:
        server: Not guarded yet, or only just.
        is_fast: Whether encoder and decoder are kept.
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

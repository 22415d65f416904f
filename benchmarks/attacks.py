"""The attacks, each small, bounded in time, and as strong as one or a few connections can be.

``python -m benchmarks.attacks NAME PORT SECONDS`` builds the data to send, prints ``ready``, waits
for a line, attacks, and prints the results as JSON.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from benchmarks.attacker import (
    BINARY,
    COMPRESSED,
    PING,
    TEXT,
    Attacker,
    UselessAttackError,
    WebSocketTransport,
    request,
)
from benchmarks.client import client_frame

if TYPE_CHECKING:
    from collections.abc import Callable

MAILBOX = "somebody"

_LARGE = 990_000  # bytes: just below Flask-SocketIO's limit for one message
_ALLOWED = 99_000  # lists: just below MAX_CONTAINERS
_ROOM = 16_000  # bytes of small packets that are written at once


@dataclass(frozen=True)
class Attack:
    """One kind of input that a client chooses.

    Attributes:
        title: Name in the report.
        run: Attacks until its attacker's time is over.
        proof: The handler that must run at least once under attack on stock; empty if none does.
        is_guard_only: Whether stock has no such feature to attack.
        needs_compression: Whether the server must allow permessage-deflate.
        needs_mailbox: Whether messages wait for :data:`MAILBOX`.
    """

    title: str
    run: Callable[[Attacker], None]
    proof: str = ""
    is_guard_only: bool = False
    needs_compression: bool = False
    needs_mailbox: bool = False


def _text(packet: str) -> bytes:
    return client_frame(TEXT, packet.encode())


def _event(name: str, argument: str, ack: str = "") -> bytes:
    return _text(f'42{ack}["{name}",{argument}]')


def _many(frame: bytes) -> tuple[bytes, int]:
    """Return as many copies of *frame* as are sent at once, and their number."""
    count = max(1, _ROOM // len(frame))
    return frame * count, count


def _lists(count: int, *, item: str = "[]") -> str:
    return f"[{','.join([item] * count)}]"


def _flood(
    frames: bytes, units: int = 1, *, is_reading: bool = True, is_compressed: bool = False
) -> Callable[[Attacker], None]:
    """Return an attack that sends *frames* without end, and reconnects when it is closed."""

    def run(attacker: Attacker) -> None:
        while attacker.left:
            with attacker.websocket(is_compressed=is_compressed) as wire:
                wire.is_reading = is_reading
                while wire.write(frames):
                    attacker.units += units
                attacker.settle()

    return run


def _some(frames: bytes, count: int) -> Callable[[Attacker], None]:
    """Return an attack that sends *frames* that many times, then waits."""

    def run(attacker: Attacker) -> None:
        while attacker.left and attacker.units < count:
            with attacker.websocket() as wire:
                while attacker.units < count and wire.write(frames):
                    attacker.units += 1
                if attacker.units == count:
                    wire.drain()
                attacker.settle()

    return run


def _nothing(attacker: Attacker) -> None:
    with attacker.websocket() as wire:
        wire.drain()


def _attachments(references: int, size: int) -> bytes:
    places = _lists(references, item='{"_placeholder":true,"num":0}')
    return _text(f'451-["copy",{places}]') + client_frame(BINARY, b"x" * size)


def _deflated(text: str) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = deflate.compress(text.encode()) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return client_frame(COMPRESSED, data[:-4])  # RFC 7692, section 7.2.1


def _compressed(text: str) -> Callable[[Attacker], None]:
    return _flood(*_many(_deflated(text)), is_compressed=True)


def _mailbox(attacker: Attacker) -> None:
    """Join and leave again and again over one WebSocket, and acknowledge nothing."""
    cycle = _text("41") + _text("40")
    while attacker.left:
        with attacker.websocket(query=f"&identity={MAILBOX}") as wire:
            while wire.call(cycle, b"40{"):
                attacker.units += 1
            attacker.settle()


def _requests(*requests: bytes) -> Callable[[Attacker], None]:
    """Return an attack that sends HTTP requests one after the other over one TCP connection."""

    def run(attacker: Attacker) -> None:
        while attacker.left:
            with attacker.dial() as wire:
                attacker.opened += 1
                while attacker.left and all(wire.ask(one) for one in requests):
                    attacker.units += len(requests)
                attacker.settle()

    return run


def _posts(body: str, units: int) -> Callable[[Attacker], None]:
    """Return an attack that posts *body* without end, in a new session when one is closed."""

    def run(attacker: Attacker) -> None:
        while attacker.left:
            wire, address = attacker.poller()
            post = request("POST", address, body.encode())
            with wire:
                while attacker.left and b" 200 " in wire.ask(post)[:20]:
                    attacker.units += units
                attacker.settle()

    return run


def _trickle(attacker: Attacker) -> None:
    """Hold a hundred requests open, by sending a byte of each body now and then."""
    wires: list[WebSocketTransport] = []
    for _ in range(100):
        wire, address = attacker.poller()
        wire.write(request("POST", address, b"4" * 1000)[:-1000])
        wires.append(wire)
    while attacker.left:
        for wire in wires:
            attacker.units += wire.write(b"4")
        wires[0].drain(0.05)
    held = sum(wire.is_open for wire in wires)
    attacker.told[f"{held} held"] += 1
    attacker.settle()
    for wire in wires:
        wire.close()


_LIMITED = _event("limited", "1") * 5 + _text("41") + _text("40")
_PACKETS = "\x1e".join(['42["sink"]'] * (_LARGE // 11))
_FORM = "d=" + quote(f'42["sink","{"%" * (_LARGE // 3 - 20)}"]', safe="")

ATTACKS = {
    "nothing": Attack("nothing: others alone", _nothing),
    "echo": Attack(
        "small events with an acknowledgement", _flood(*_many(_event("echo", "1", "0"))), "echo"
    ),
    "unread": Attack(
        "echo of 100 kB, never read",
        _flood(_event("echo", f'"{"x" * 100_000}"', "0"), is_reading=False),
        "echo",
    ),
    "text": Attack("1 MB of text", _flood(_event("sink", f'"{"x" * _LARGE}"')), "sink"),
    "brackets": Attack(
        "1 MB of text with 101 `[`", _flood(_event("sink", f'"{"[" * 101}{"x" * _LARGE}"')), "sink"
    ),
    "lists": Attack("1 MB of `,[]`", _flood(_event("sink", _lists(_LARGE // 3))), "sink"),
    "allowed lists": Attack(
        "0.3 MB of `,[]`, within the bound", _flood(_event("sink", _lists(_ALLOWED))), "sink"
    ),
    "nested": Attack(
        "1 MB nested 100 deep",
        _flood(_event("sink", _lists(_LARGE // 197, item="[" * 98 + "]" * 98))),
        "sink",
    ),
    "slow": Attack(
        "64 slow events of 1 MB of `,{}`",
        _some(_event("slow", _lists(_LARGE // 3, item="{}")), 64),
        "slow",
    ),
    "allowed slow": Attack(
        "64 slow events of 0.3 MB of `,{}`, within the bound",
        _some(_event("slow", _lists(_ALLOWED, item="{}")), 64),
        "slow",
    ),
    "attachments": Attack(
        "one attachment of 0.9 MB named 200 times, 4 events",
        _some(_attachments(200, 900_000), 4),
        "copy",
    ),
    "deflated text": Attack(
        "compressed: 1 MB of text each",
        _compressed(f'42["sink","{"x" * _LARGE}"]'),
        is_guard_only=True,
        needs_compression=True,
    ),
    "deflated lists": Attack(
        "compressed: 0.3 MB of `,[]` each",
        _compressed(f'42["sink",{_lists(_ALLOWED)}]'),
        is_guard_only=True,
        needs_compression=True,
    ),
    "fragments": Attack(
        "messages in fragments of 1 byte",
        _flood(
            client_frame(0x01, b"4") + client_frame(0x00, b"x") * 2000 + client_frame(0x80, b"x"), 1
        ),
    ),
    "pings": Attack("WebSocket pings", _flood(*_many(client_frame(PING, b"x" * 8)))),
    "unknown events": Attack(
        "unknown events with an acknowledgement", _flood(*_many(_event("nobody", "1", "0")))
    ),
    "unknown namespaces": Attack(
        "CONNECTs to unknown namespaces", _flood(*_many(_text("40/nowhere,")))
    ),
    "acknowledgements": Attack(
        "acknowledgements that nobody awaits", _flood(*_many(_text("431[]")))
    ),
    "failures": Attack("events whose handler raises", _flood(*_many(_text('42["fail"]'))), "fail"),
    "refused": Attack("refused CONNECTs", _flood(*_many(_text("40/refused,"))), "refuse"),
    "rate": Attack(
        "`41`/`40` and 5 events, against a rate of 5 a minute", _flood(*_many(_LIMITED)), "limited"
    ),
    "mailbox": Attack(
        "`41`/`40` with 400 waiting messages of 100 kB",
        _mailbox,
        is_guard_only=True,
        needs_mailbox=True,
    ),
    "handshakes": Attack(
        "handshakes over one TCP connection",
        _requests(request("GET", "/socket.io/?EIO=4&transport=polling")),
    ),
    "headers": Attack(
        "requests with 60 kB of `Connection`",
        _requests(request("GET", "/", headers=f"Connection: {'a,' * 30_000}a\r\n")),
    ),
    "packets": Attack("POSTs of 90,000 packets", _posts(_PACKETS, 90_000)),
    "few packets": Attack("POSTs of 16 packets", _posts(_PACKETS[: 16 * 11 - 1], 16), "sink"),
    "jsonp": Attack("JSONP POSTs of 1 MB", _posts(_FORM, 1), "sink"),
    "trickle": Attack("100 bodies of which a byte comes each 0.05 s", _trickle),
}


def main() -> None:
    """Run one attack; the arguments are its name, the port and the seconds it may last."""
    name, port, seconds = sys.argv[1:]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    attacker = Attacker(int(port), float(seconds))
    ATTACKS[name].run(attacker)
    if not attacker.opened or attacker.sent <= 0:
        raise UselessAttackError(f"{name}: nothing was sent: {vars(attacker)}")
    answer = {what: getattr(attacker, what) for what in ("units", "sent", "received", "opened")}
    sys.stdout.write(json.dumps(answer | {"told": attacker.told}) + "\n")


if __name__ == "__main__":
    main()

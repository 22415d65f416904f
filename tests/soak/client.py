"""A Socket.IO client for tests that look at every packet: polling, WebSocket, and the upgrade.

It runs on threads, or on greenlets where the standard library is patched.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.raw_clients import RawWebSocket, prefix_of
from tests.support.raw_websocket import (
    BINARY,
    SEPARATOR,
    TEXT,
    RawConnection,
    encode_frame,
    request_bytes,
    target,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)

_WAIT_TIMEOUT = 5.0
_PACKET = re.compile(
    r"(?P<kind>\d)(?:(?P<count>\d+)-)?(?P<namespace>/[^,]*,)?(?P<id>\d+)?(?P<data>.*)", re.DOTALL
)


@dataclass(frozen=True)
class Packet:
    """A Socket.IO packet as it was received, attachments in their places."""

    kind: int
    namespace: str
    number: int | None
    content: Any

    def __str__(self) -> str:
        # The numbers under which a server wants answers are its own affair.
        number = self.number if self.kind in (ACK, BINARY_ACK) else self.number is not None
        return f"{self.kind} {self.namespace} {number} {self.content!r}"


class Client:
    """A client that answers whatever wants an answer, on polling or on a WebSocket.

    A thread of its own reads.
    """

    def __init__(
        self, port: int, *, query: str = "", cookie: str = "", timeout: float = 30.0
    ) -> None:
        self.packets: list[Packet] = []
        self.sids: dict[str, str] = {}
        self.polls = False
        self.has_ended = False
        self._timeout = timeout
        self._query = query
        self._headers = {"Cookie": cookie, "User-Agent": "sameness", "X-Client": "Größe"}
        self._changed = threading.Condition()
        self._sending = threading.RLock()
        self._held: list[str | bytes] | None = None
        self._is_pausing = False
        self._session = ""
        self._reader: threading.Thread | None = None
        self._websocket = RawWebSocket(port, timeout=timeout)
        self._gets = RawConnection(port, timeout=timeout)
        self._posts = RawConnection(port, timeout=timeout)
        self._unfinished: tuple[re.Match[str], list[bytes]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a session, as far as this client knows."""
        return self._reader is not None and not self.has_ended

    def open(self, *, polls: bool) -> None:
        """Begin a session."""
        self.polls = polls
        if polls:
            first, *packets = self._request(self._gets, "GET")
            self._session = json.loads(first[1:])["sid"]
            for packet in packets:
                self._take(packet)
            self._read_in_thread(self._poll)
        else:
            self._shake_hands(None)
            self._read_in_thread(self._listen)

    def join(self, namespace: str, auth: Any = None) -> bool:
        """Join a namespace; return whether the server let this client in."""
        before = len(self.packets)
        content = "" if auth is None else json.dumps(auth)
        self._send([f"4{CONNECT}{prefix_of(namespace)}{content}"])

        def answer() -> Packet | None:
            wanted = (CONNECT, CONNECT_ERROR)
            for packet in self.packets[before:]:
                if packet.kind in wanted and packet.namespace == namespace:
                    return packet
            return None

        if not self.wait_until(answer):
            return False
        packet = answer()
        assert packet is not None
        if packet.kind == CONNECT:
            self.sids[namespace] = packet.content["sid"]
        return packet.kind == CONNECT

    def leave(self, namespace: str) -> None:
        """Leave a namespace."""
        self._send([f"4{DISCONNECT}{prefix_of(namespace)}"])

    def emit(self, namespace: str, *events: tuple[str, list[Any], int | None]) -> None:
        """Send events at once: name, arguments, number of the wanted answer."""
        packets: list[str | bytes] = []
        for name, args, number in events:
            packets += _encoded(EVENT, namespace, number, [name, *args])
        self._send(packets)

    def upgrade(self) -> None:
        """Go over from polling to a WebSocket, as Engine.IO's client does."""
        with self._sending:
            self._held = []
        self._is_pausing = True
        self._shake_hands(self._session)
        self._websocket.send("2probe")
        self._websocket.read_until("3probe")
        assert self._reader is not None
        self._reader.join(self._timeout)
        assert not self._reader.is_alive(), "the poll did not end while upgrading"
        self._websocket.send("5")
        with self._sending:
            held, self._held, self.polls = self._held, None, False
            self._send(held)
        self._read_in_thread(self._listen)

    def close(self, *, is_polite: bool = True) -> None:
        """End the session; without a word where it is a WebSocket and so wished."""
        if is_polite or self.polls:
            with contextlib.suppress(OSError):
                self._send(["1"])
        self.end()

    def end(self) -> None:
        """Leave nothing behind."""
        self.has_ended = True
        for connection in (self._websocket, self._gets, self._posts):
            connection.hang_up()
        if self._reader is not None:
            self._reader.join(self._timeout)
        for connection in (self._websocket, self._gets, self._posts):
            connection.shut()

    def wait_until(self, condition: Callable[[], object], timeout: float = _WAIT_TIMEOUT) -> bool:
        """Wait until *condition* holds, which is looked at with each packet; return whether."""
        with self._changed:
            return bool(
                self._changed.wait_for(lambda: condition() or self.has_ended, timeout)
                and condition()
            )

    def receive(self, packet: Packet) -> None:
        """Keep a packet that has come."""
        with self._changed:
            self.packets.append(packet)
            self._changed.notify_all()

    def _shake_hands(self, session: str | None) -> None:
        self._websocket.open(query=self._query, session=session, headers=self._encoded_headers())

    def _encoded_headers(self) -> dict[str, str | None]:
        # Bytes of UTF-8 in a header, each as the character that Latin-1 has for it.
        return {
            name: value.encode().decode("latin-1") for name, value in self._headers.items() if value
        }

    def _request(self, connection: RawConnection, method: str, body: str = "") -> list[str]:
        address = target("polling", session=self._session, query=self._query)
        request = request_bytes(
            method, address, headers=self._encoded_headers(), body=body.encode()
        )
        connection.dial().write(request)
        answer = connection.read_answer()
        if answer.status != 200:
            raise ConnectionError(f"{answer.status}: {answer.text}")
        return answer.packets

    def _send(self, packets: list[str | bytes]) -> None:
        with self._sending:
            if self._held is not None:
                self._held += packets
            elif not packets:
                return
            elif self.polls:
                texts = [
                    packet if isinstance(packet, str) else "b" + base64.b64encode(packet).decode()
                    for packet in packets
                ]
                self._request(self._posts, "POST", SEPARATOR.join(texts))
            else:
                self._websocket.write(
                    b"".join(
                        encode_frame(TEXT, packet.encode())
                        if isinstance(packet, str)
                        else encode_frame(BINARY, packet)
                        for packet in packets
                    )
                )

    def _read_in_thread(self, read: Callable[[], None]) -> None:
        def run() -> None:
            try:
                read()
            except (OSError, ValueError):
                with self._changed:
                    self.has_ended = True
                    self._changed.notify_all()

        self._reader = threading.Thread(target=run, daemon=True)
        self._reader.start()

    def _poll(self) -> None:
        while not self._is_pausing:
            for packet in self._request(self._gets, "GET"):
                self._take(base64.b64decode(packet[1:]) if packet[0] == "b" else packet)

    def _listen(self) -> None:
        while (frame := self._websocket.receive_frame()) is not None:
            if frame.opcode not in (TEXT, BINARY):
                break
            self._take(frame.text if frame.opcode == TEXT else frame.payload)
        raise ConnectionError("the server closes")

    def _take(self, packet: str | bytes) -> None:
        if isinstance(packet, bytes):
            assert self._unfinished is not None
            self._unfinished[1].append(packet)
        elif packet[0] == "2":
            self._send(["3"])
            return
        elif packet[0] == "4":
            match = _PACKET.fullmatch(packet[1:])
            assert match is not None, packet
            self._unfinished = (match, [])
        else:
            return
        match, attachments = self._unfinished
        if len(attachments) == int(match["count"] or 0):
            self._unfinished = None
            self._finish(match, attachments)

    def _finish(self, match: re.Match[str], attachments: list[bytes]) -> None:
        packet = Packet(
            int(match["kind"]),
            (match["namespace"] or "/,")[:-1],
            None if match["id"] is None else int(match["id"]),
            _filled(json.loads(match["data"]), attachments) if match["data"] else None,
        )
        self.receive(packet)
        if packet.kind in (EVENT, BINARY_EVENT) and packet.number is not None:
            self._send(_encoded(ACK, packet.namespace, packet.number, packet.content[1:]))


def _encoded(kind: int, namespace: str, number: int | None, content: Any) -> list[str | bytes]:
    """Return the Engine.IO packets of a Socket.IO packet."""
    attachments: list[bytes] = []

    def without_bytes(value: Any) -> Any:
        if isinstance(value, bytes):
            attachments.append(value)
            return {"_placeholder": True, "num": len(attachments) - 1}
        if isinstance(value, list):
            return [without_bytes(item) for item in value]
        if isinstance(value, dict):
            return {key: without_bytes(item) for key, item in value.items()}
        return value

    text = json.dumps(without_bytes(content))
    head = str(kind) if not attachments else f"{kind + 3}{len(attachments)}-"
    number_text = "" if number is None else str(number)
    return [f"4{head}{prefix_of(namespace)}{number_text}{text}", *attachments]


def _filled(value: Any, attachments: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_filled(item, attachments) for item in value]
    if isinstance(value, dict):
        if value.get("_placeholder") and attachments:
            return attachments[value["num"]]
        return {key: _filled(item, attachments) for key, item in value.items()}
    return value

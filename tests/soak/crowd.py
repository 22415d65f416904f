"""The clients of the soak, each in a greenlet of its own, and the numbers they have seen."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import gevent
import gevent.event
from gevent.event import AsyncResult

from tests.soak.app import BINARY_ROOM, LARGE_ROOM, ROOMS
from tests.soak.client import ACK, BINARY_ACK, EVENT, Client, Packet

if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_TIMEOUT = 30.0
_SOCKET_TIMEOUT = 60.0
_BURST = 5


class Ledger:
    """What has gone wrong, and how much was done."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.lost = 0
        self.reordered = 0

    def note(self, problem: str) -> None:
        """Remember a problem; the first hundred with their text."""
        self.counts["problems"] += 1
        if len(self.problems) < 100:
            self.problems.append(problem)


class Member(Client):
    """A client that checks the numbers of the streams it receives."""

    def __init__(self, port: int, ledger: Ledger, *, name: str) -> None:
        super().__init__(port, query=f"name={name}", timeout=_SOCKET_TIMEOUT)
        self.name = name
        self.last: dict[str, int] = {}
        """The number of the last event of each stream."""
        self.first: dict[str, int] = {}
        """The number of the first event of each stream."""
        self.wanted: set[str] = set()
        """The streams of the rooms that it is in."""
        self._is_silent = False
        self._ledger = ledger
        self._answers: dict[int, AsyncResult] = {}
        self._next_ack = 0

    @property
    def sid(self) -> str:
        """The session id."""
        return self.sids["/"]

    def arrive(self, *, polls: bool = False) -> None:
        """Connect."""
        self.open(polls=polls)
        if not self.join("/"):
            raise ConnectionError(f"{self.name} was not let in")
        self._ledger.counts["arrivals"] += 1

    def ask(self, event: str, *args: Any) -> AsyncResult:
        """Send an event; return what its answer will be in."""
        self._next_ack += 1
        answer = self._answers[self._next_ack] = AsyncResult()
        self.emit("/", (event, list(args), self._next_ack))
        return answer

    def call(self, event: str, *args: Any) -> Any:
        """Send an event and return its answer."""
        (value,) = self.ask(event, *args).get(timeout=_ANSWER_TIMEOUT)
        return value

    def enter(self, *rooms: str) -> None:
        """Enter rooms, and expect the next number of each stream of the same process."""
        for stream, number in self.call("enter", list(rooms)).items():
            # Some may have come before the answer.
            first = self.first.get(stream, number + 1)
            if first != number + 1:
                self._ledger.lost += first - number - 1
                self._ledger.note(f"{self.name}: {stream} began with {first}, not {number + 1}")
            self.last.setdefault(stream, number)

    def reset(self) -> None:
        """Vanish with a RST, as a process that is killed does."""
        self.has_ended = True
        for connection in (self._websocket, self._gets, self._posts):
            connection.reset()

    def fall_silent(self) -> None:
        """Read nothing from now on, and answer nothing."""
        self._is_silent = True

    def receive(self, packet: Packet) -> None:
        """Check a packet that has come; only what :meth:`join` waits for is kept."""
        counts = self._ledger.counts
        if packet.kind in (ACK, BINARY_ACK):
            counts["answers"] += 1
            assert packet.number is not None
            self._answers.pop(packet.number).set(packet.content)
        elif packet.kind in (EVENT, EVENT + 3):
            if packet.content[0] == "stream":
                counts["stream events"] += 1
                _, stream, number, _payload = packet.content
                self._check(stream, number)
            else:
                counts["questions"] += 1
        else:
            super().receive(packet)

    def _take(self, packet: str | bytes) -> None:
        if self._is_silent:
            raise ConnectionAbortedError("this client reads no more")
        super()._take(packet)

    def _check(self, stream: str, number: int) -> None:
        last = self.last.get(stream)
        self.first.setdefault(stream, number)
        if last is not None and number <= last:
            self._ledger.reordered += 1
            self._ledger.note(f"{self.name}: {stream} {number} after {last}")
            return
        if last is not None and number > last + 1:
            self._ledger.lost += number - last - 1
            self._ledger.note(f"{self.name}: {stream} {number} after {last}")
        self.last[stream] = number


class Crowd:
    """All clients.

    Args:
        ports: Of the two processes.
        count: How many clients there are at any time.
        ledger: Takes what they see.
    """

    def __init__(self, ports: list[int], count: int, ledger: Ledger) -> None:
        self.ledger = ledger
        self.permanent: list[Member] = []
        self._ports = ports
        self._count = count
        self._present: set[Member] = set()
        self._greenlets: list[gevent.Greenlet] = []
        self._is_over = gevent.event.Event()
        self._told: dict[str, tuple[Member, int]] = {}
        self._random = random.Random(1)

    @property
    def present(self) -> int:
        """How many clients are connected now."""
        return sum(member.is_open for member in self._present)

    def arrive(self) -> None:
        """Let all arrive and begin."""
        shares: list[tuple[Callable[[int], None], float]] = [
            (self._echo, 0.20),
            (self._pair, 0.10),
            (self._listen, 0.20),
            (self._send_binary, 0.08),
            (self._upgrade, 0.12),
            (self._come_and_go, 0.12),
            (self._vanish, 0.08),
        ]
        number = 0
        for role, share in shares:
            for _ in range(round(self._count * share)):
                self._greenlets.append(gevent.spawn(self._play, role, number))
                number += 1
                gevent.sleep(0.01)

    def end_sending(self) -> None:
        """Let all of them end what they are about, and those that come and go leave."""
        self._is_over.set()
        gevent.joinall(self._greenlets, timeout=2 * _ANSWER_TIMEOUT, raise_error=False)
        for greenlet in self._greenlets:
            if not greenlet.dead:
                self.ledger.note("a client does not come to an end")

    def missing(self, streams: dict[str, int]) -> list[str]:
        """Say what permanent clients have not received of *streams* and of each other."""
        found = []
        for member in self.permanent:
            for stream, last in streams.items():
                everyone = stream.endswith(":everyone")
                if (everyone or stream in member.wanted) and member.last.get(stream, 0) != last:
                    found.append(
                        f"{member.name}: {stream} ends with {member.last.get(stream)}, not {last}"
                    )
        for stream, (member, last) in self._told.items():
            if member.last.get(stream, 0) != last:
                found.append(f"{member.name}: {stream} ends with {member.last.get(stream)}")
        return found

    def leave(self) -> None:
        """Let all leave."""
        for member in list(self._present):
            member.close()
            self._present.discard(member)

    def _play(self, role: Callable[[int], None], number: int) -> None:
        while not self._is_over.is_set():
            try:
                role(number)
            except (OSError, AssertionError, gevent.Timeout) as error:
                self.ledger.note(f"{role.__name__} {number}: {error!r}")
                self._rest(1.0)

    def _rest(self, seconds: float) -> None:
        self._is_over.wait(seconds * self._random.uniform(0.7, 1.3))

    def _arrive(
        self, number: int, *rooms: str, polls: bool = False, is_permanent: bool = False
    ) -> Member:
        name = f"client-{number}"
        member = Member(self._ports[number % 2], self.ledger, name=name)
        self._present.add(member)
        member.arrive(polls=polls)
        rooms = (f"room-{number % ROOMS}", *rooms)
        member.enter(*rooms)
        member.wanted = {f"{process}:{room}" for process in "AB" for room in rooms}
        if is_permanent:
            self.permanent.append(member)
        return member

    def _depart(self, member: Member, *, is_polite: bool) -> None:
        if not member.is_open:
            self.ledger.note(f"{member.name} was thrown out")
        self._present.discard(member)
        member.close(is_polite=is_polite)

    def _echo(self, number: int) -> None:
        member = self._arrive(number, is_permanent=True)
        member.emit("/", ("be asked", [], None))
        sent = 0
        while not self._is_over.is_set():
            answers = []
            for _ in range(_BURST):
                sent += 1
                answers.append((sent, member.ask("echo", sent)))
            for value, answer in answers:
                if answer.get(timeout=_ANSWER_TIMEOUT) != [value]:
                    self.ledger.note(f"{member.name}: a wrong answer to {value}")
            self._rest(2.0)

    def _pair(self, number: int) -> None:
        """Pass numbers to a client of the other process."""
        member = self._arrive(number, is_permanent=True)
        partner = self._arrive(number + 10_001, is_permanent=True)
        stream, told = f"from {member.name}", 0
        while not self._is_over.is_set():
            told += 1
            if member.call("tell", partner.sid, stream, told) != told:
                self.ledger.note(f"{member.name}: a wrong answer")
            self._told[stream] = (partner, told)
            self._rest(0.5)

    def _listen(self, number: int) -> None:
        rooms = [LARGE_ROOM] if number % 50 == 0 else []
        self._arrive(number, *rooms, is_permanent=True)
        self._is_over.wait()

    def _send_binary(self, number: int) -> None:
        member = self._arrive(number, BINARY_ROOM, is_permanent=True)
        while not self._is_over.is_set():
            value = [self._random.randbytes(200), {"more": self._random.randbytes(3_000)}, "ä"]
            if member.call("echo", value) != value:
                self.ledger.note(f"{member.name}: a wrong answer")
            self._rest(3.0)

    def _upgrade(self, number: int) -> None:
        """Poll, go over to a WebSocket while the streams flow, and leave."""
        member = self._arrive(number, polls=True)
        self._rest(1.5)
        member.upgrade()
        self.ledger.counts["upgrades"] += 1
        for value in range(3):
            if member.call("echo", value) != value:
                self.ledger.note(f"{member.name}: a wrong answer")
            self._rest(3.0)
        self._depart(member, is_polite=True)

    def _come_and_go(self, number: int) -> None:
        member = self._arrive(number)
        member.call("echo", number)
        self._rest(4.0)
        self._depart(member, is_polite=number % 2 == 0)
        self._rest(1.0)

    def _vanish(self, number: int) -> None:
        """Stay away without a word: with a RST, or by reading nothing until thrown out."""
        member = self._arrive(number, polls=number % 4 == 3)
        self._rest(4.0)
        self._present.discard(member)
        self.ledger.counts["vanished"] += 1
        if number % 2:
            member.reset()
        else:
            member.fall_silent()
            self._rest(15.0)
            with contextlib.suppress(OSError):
                member.reset()

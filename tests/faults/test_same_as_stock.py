"""What clients of guarded processes receive is what clients of stock processes receive.

Hypothesis writes programs of what happens to a few clients of two processes on one Redis; a fleet
without the guard and one with it run each program, and everything that the clients received and
the application saw is compared. After each step of a program all messages on their way are waited
for, so that what is left open is what stock leaves open:

- Events of one client that come at once are handled side by side. What they emit first reaches
  the clients of the same process in their order; beyond that only the set of packets is compared.
- What two processes emit at the same time has an order for each process only.
- What is emitted to a client before it is connected reaches it before it knows on stock, and then
  with the guard.
- A disconnect handler runs beside what goes on, and so do callbacks and tasks of a handler; their
  packets are compared as a set.
- Where clients that poll and others are connected to one process, nothing is emitted with
  attachments: stock sends each packet to all as its first recipient needs it, and so to the
  wrong ones in a form that they cannot read.

Environment:
    SAMENESS_EXAMPLES: Programs for each of the tests; with it they are new ones in each run, and
        one that fails is made as short as may be, which takes minutes.
    SAMENESS_CONTROL: With ``1`` both fleets are stock: what differs is the test's own fault.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flask_socketio_guard.settings import PREFIX
from tests.faults.fleet import Fleet, FleetOptions
from tests.faults.sameness_app import (
    NAMESPACES,
    REFUSING,
    SAMENESS_APP,
    decode,
    encode,
)
from tests.soak.client import ACK, BINARY_ACK, BINARY_EVENT, CONNECT, EVENT, Client, Packet
from tests.support import wait_until
from tests.support.raw_websocket import RawConnection, request_bytes
from tests.support.scale import IS_WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.apart

_EXAMPLES = int(os.environ.get("SAMENESS_EXAMPLES", 30 if IS_WHOLE else 12))
_IS_SEARCHING = "SAMENESS_EXAMPLES" in os.environ
_SHRINKING = 400
"""Seconds in which Hypothesis, which takes 300 for it, finds the least program that fails."""
_PROCESSES = (0, 1)
_CLIENTS = 3
_TIMEOUT = 5.0
_NOBODY = "0" * 20
_NOWHERE = "/nowhere"
"""A namespace that there is not."""
_REFUSAL = ("{'message': 'Invalid namespace'}", "'Unable to connect'")
"""What clients are told of a namespace that there is not: as the protocol says, and by stock."""
_BESIDE = ("again", "worked", "later")
"""What tasks and callbacks emit, beside the handler that they belong to."""
_numbers = itertools.count()


# Programs


@dataclass(frozen=True)
class Visitor:
    """A client as it comes at the beginning.

    Attributes:
        process: To which it connects.
        polls: Whether it begins with polling.
        namespaces: Which it joins.
        is_greeted: Whether the connect handler sends it something.
        has_visited: Whether it brings the session of a page that it has visited.
    """

    process: int
    polls: bool
    namespaces: tuple[str, ...]
    is_greeted: bool
    has_visited: bool


@dataclass(frozen=True)
class ByProcess:
    """A process does one thing after the other, in a request or in a task."""

    process: int
    in_request: bool
    actions: list[Any]


@dataclass(frozen=True)
class ByClient:
    """A client sends an event whose handler does one thing after the other."""

    client: int
    namespace: str
    actions: list[Any]


@dataclass(frozen=True)
class Burst:
    """A client sends several events at once: name, arguments, whether it wants an answer."""

    client: int
    namespace: str
    events: list[tuple[str, list[Any], bool]]


@dataclass(frozen=True)
class Both:
    """Both processes emit at the same time."""

    first: list[Any]
    second: list[Any]


@dataclass(frozen=True)
class Upgrade:
    """A client that polls goes over to a WebSocket while a process emits."""

    client: int
    process: int
    actions: list[Any]


@dataclass(frozen=True)
class Join:
    """A client joins a namespace, with what it says of itself."""

    client: int
    namespace: str
    auth: Any


@dataclass(frozen=True)
class LeaveNamespace:
    """A client leaves a namespace."""

    client: int
    namespace: str


@dataclass(frozen=True)
class Close:
    """A client ends its session, with a word or by ending the connection of its WebSocket."""

    client: int
    is_polite: bool


@dataclass(frozen=True)
class Return:
    """A client that has gone comes back."""

    client: int


@dataclass(frozen=True)
class Visit:
    """A client asks for a page, which reads and writes the session."""

    client: int


def _listed(items: st.SearchStrategy[Any], least: int, most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(items, min_size=least, max_size=most)


_clients = st.integers(0, _CLIENTS - 1)
_processes = st.sampled_from(_PROCESSES)
# Mostly such that somebody is there.
_namespaces = st.sampled_from(("/", "/", "/", "/", *NAMESPACES))
_rooms = st.sampled_from(("one", "lobby", "lobby", "Größe 💥", 7))
_texts = st.text(max_size=6) | st.sampled_from(("\x1e", "ä\u2028\u2029", "💥" * 3, "<&'\">", "\0"))
_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _texts
    | st.binary(max_size=6)
    | st.sampled_from(
        (
            {"$large": ["x", 127]},
            {"$large": ["é", 40_000]},
            {"$large": ["x", 70_000]},
        )
    )
)
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abä/,-[ ", max_size=3), inner)
    ),
    max_leaves=5,
)
_arguments = st.lists(_values, max_size=3)
# Source: Socket.IO protocol v5, CONNECT: the payload is an object. (Text would be decoded as a
# packet that is none: stock logs a traceback for it, the guard closes the connection.)
_auths = st.none() | st.dictionaries(st.sampled_from(["token", "name"]), st.text(max_size=5))
_one_client = st.builds(lambda number: {"client": number}, _clients)
_somewhere = _rooms | _one_client
_anywhere = st.none() | st.none() | _somewhere | st.lists(_somewhere, min_size=1, max_size=3)
_skipped = (
    st.none()
    | _one_client
    | st.lists(_one_client, min_size=2, max_size=2, unique_by=lambda one: one["client"])
)


def _action(do: str, **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(do), st.fixed_dictionaries(options))


def _emits(*, in_context: bool, namespace: str | None = None) -> st.SearchStrategy[Any]:
    options: dict[str, st.SearchStrategy[Any]] = {
        "to": _anywhere,
        "skip_sid": _skipped,
        "args": _arguments,
        "as_tuple": st.booleans(),
        "in_context": st.just(in_context),
    }
    if in_context:
        options |= {"broadcast": st.booleans(), "include_self": st.booleans()}
    else:
        options |= {"namespace": _namespaces if namespace is None else st.just(namespace)}

    def as_flask_takes_it(action: Any) -> Any:
        """Several arguments are a tuple; as positional arguments they would be a TypeError."""
        do, chosen = action
        return do, chosen if chosen["as_tuple"] else {**chosen, "args": chosen["args"][:1]}

    return _action("emit", **options).map(as_flask_takes_it)


def _sends(*, in_context: bool) -> st.SearchStrategy[Any]:
    options: dict[str, st.SearchStrategy[Any]] = {
        "to": _anywhere,
        "args": st.lists(_values, min_size=1, max_size=1),
        "in_context": st.just(in_context),
    }
    if in_context:
        options |= {"broadcast": st.booleans()}
    else:
        options |= {"namespace": _namespaces}
    return _action("send", **options)


def _asking(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    options["args"] = st.lists(_values, max_size=1)
    return _action("call", **options) | _action("ask", count=st.sampled_from((1, 1, 3)), **options)


_asks = _asking(to=_one_client, namespace=_namespaces, in_context=st.just(False))
_asks_in_context = _asking(to=st.none(), in_context=st.just(True))
# More than one, and more than all of the bounds on what may wait for a client.
_counts = st.sampled_from((2, 100, 300, 1_200))
_many = _action(
    "emit_many", count=_counts, to=_anywhere, namespace=_namespaces, in_context=st.just(False)
)
_many_in_context = _action("emit_many", count=_counts, to=_anywhere, in_context=st.just(True))
_moves = (
    st.sampled_from(("join", "join", "leave")).flatmap(
        lambda do: _action(do, room=_rooms, sid=_one_client, namespace=_namespaces)
    )
    | _action("close_room", room=_rooms, namespace=_namespaces)
    | _action("rooms", sid=_one_client, namespace=_namespaces)
)
_moves_in_context = (
    st.sampled_from(("join", "join", "leave")).flatmap(lambda do: _action(do, room=_rooms))
    | _action("close_room", room=_rooms)
    | _action("rooms")
)
_outside = _emits(in_context=False) | _sends(in_context=False) | _asks | _moves | _many
_inside = (
    _emits(in_context=True)
    | _sends(in_context=True)
    | _asks_in_context
    | _moves_in_context
    | _many_in_context
)
_disconnects = _action("disconnect", sid=_one_client, namespace=_namespaces)
# Only as the last action: the disconnect handler of a client of the other process runs beside
# whatever would follow.
_last = st.just([]) | st.just([]) | st.lists(_disconnects, min_size=1, max_size=1)


def _actions(kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.builds(lambda some, last: some + last, _listed(kinds, 1, 5), _last)


_events = (
    st.tuples(
        st.sampled_from(
            ("echo", "facts", "nothing", "fail", "forbid", "unknown", "contexts", "later")
        ),
        _arguments,
    )
    | st.tuples(st.just("remember"), st.lists(_texts, min_size=1, max_size=1))
    | st.tuples(st.just("recall"), st.just([]))
)
_emitting = st.tuples(
    st.just("run"),
    st.lists(st.lists(_emits(in_context=True), min_size=1, max_size=1), min_size=1, max_size=1),
)


def _with_ack(events: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda event, wants_ack: (*event, wants_ack), events, st.booleans())


_bursts = st.builds(Burst, _clients, _namespaces, _listed(_with_ack(_events), 1, 6)) | st.builds(
    Burst, _clients, _namespaces, _listed(_with_ack(_events | _emitting), 1, 6)
)
_steps = st.one_of(
    st.builds(ByProcess, _processes, st.booleans(), _actions(_outside)),
    st.builds(ByClient, _clients, _namespaces, _actions(_inside | _outside)),
    _bursts,
    st.builds(
        Both, _listed(_emits(in_context=False), 1, 4), _listed(_emits(in_context=False), 1, 4)
    ),
    st.builds(Upgrade, _clients, _processes, _listed(_emits(in_context=False), 1, 12)),
    st.builds(Join, _clients, st.sampled_from((*NAMESPACES, REFUSING, "/unknown")), _auths),
    st.builds(LeaveNamespace, _clients, _namespaces),
    st.builds(Close, _clients, st.booleans()),
    st.builds(Return, _clients),
    st.builds(Visit, _clients),
)
_visitors = st.builds(
    Visitor,
    process=_processes,
    polls=st.booleans(),
    namespaces=st.sampled_from((("/",), ("/", "/class"), ("/func", "/"), NAMESPACES)),
    is_greeted=st.sampled_from((True, True, False)),
    has_visited=st.booleans(),
)
_programs = st.tuples(
    st.lists(_visitors, min_size=_CLIENTS, max_size=_CLIENTS), _listed(_steps, 1, 10)
)


# Playing a program


class Control:
    """Talks to one process, on one connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = RawConnection(port, timeout=4 * _TIMEOUT)

    def post(self, path: str, **values: Any) -> Any:
        """Post *values* as JSON, and return the JSON of the answer."""
        headers = {"Content-Type": "application/json"}
        return self._ask("POST", path, headers, json.dumps(values).encode())

    def visit(self, play: str, cookie: str) -> tuple[Any, str]:
        """Ask for the page; return what it says and the session's cookie, if one is set."""
        address = f"/visit?play={play}"
        self._connection.dial().write(request_bytes("GET", address, headers={"Cookie": cookie}))
        answer = self._connection.read_answer()
        assert answer.status == 200, answer
        cookie = answer.headers.get("set-cookie", "").partition(";")[0]
        return json.loads(answer.body), cookie if cookie.startswith("session=") else ""

    def close(self) -> None:
        """End the connection."""
        self._connection.shut()

    def _ask(self, method: str, path: str, headers: dict[str, str | None], body: bytes) -> Any:
        self._connection.dial().write(request_bytes(method, path, headers=headers, body=body))
        answer = self._connection.read_answer()
        assert answer.status == 200, answer
        return json.loads(answer.body)


@dataclass
class Seat:
    """A client of a program, through all its sessions."""

    visitor: Visitor
    name: str
    cookie: str
    client: Client | None = None
    joined: set[str] = field(default_factory=set)
    known: dict[str, str] = field(default_factory=dict)
    """The session ids that it has, or had last, by namespace."""

    def is_in(self, namespace: str) -> bool:
        """Whether it has a session in *namespace*, as far as the program knows."""
        return namespace in self.joined


@dataclass
class Observed:
    """What is compared."""

    lines: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    """What was waited for in vain."""


class Play:
    """One program on one fleet."""

    def __init__(self, controls: list[Control], program: Any, number: int) -> None:
        visitors, self._steps = program
        self._controls = controls
        self._name = str(number)
        self._seats = [
            Seat(visitor, name=f"c{index}", cookie=f"key={number}-{index}")
            for index, visitor in enumerate(visitors)
        ]
        self._done = [0, 0]
        self._departed = [0, 0]
        self._fence = 0
        self._dirty: set[int] = set()
        self._names: dict[str, str] = {}
        self._seen: dict[Client, int] = {}
        self._clients: list[tuple[Client, str]] = []
        self._gone: set[Client] = set()
        self._observed = Observed()

    def run(self) -> Observed:
        """Run it, and return what was observed."""
        try:
            for seat in self._seats:
                self._seat(seat)
            self._settle("arrival", None)
            for index, step in enumerate(self._steps):
                play: Callable[[Any], Any] = getattr(self, f"_play_{type(step).__name__.lower()}")
                self._note(f"step {index}", play(step))
                self._settle(f"step {index}", step)
            for seat in self._seats:
                self._close(seat, is_polite=True)
                self._settle(f"departure of {seat.name}", None)
        finally:
            for client, _ in self._clients:
                client.end()
            states = [control.post("/finish", play=self._name) for control in self._controls]
        for process, state in zip("AB", states, strict=True):
            self._note(f"process {process}", state)
        if self._names:
            known = re.compile("|".join(map(re.escape, self._names)))
            lines = self._observed.lines
            lines[:] = [known.sub(lambda it: self._names[it[0]], line) for line in lines]
        return self._observed

    def _note(self, of: str, what: Any) -> None:
        if what is not None:
            line = f"{of}: {what!r}".replace(*_REFUSAL)
            self._observed.lines.append(line)

    def _expect(self, what: str, is_met: bool) -> None:
        if not is_met:
            self._observed.overdue.append(what)
            self._observed.lines.append(f"in vain: {what}")

    # Steps

    def _play_byprocess(self, step: ByProcess) -> Any:
        self._dirty.add(step.process)
        actions = self._resolved(step.actions, "p")
        self._foresee(step.actions)
        return self._controls[step.process].post(
            "/run", actions=actions, in_request=step.in_request
        )

    def _play_byclient(self, step: ByClient) -> Any:
        seat = self._seats[step.client]
        if not seat.is_in(step.namespace):
            return None
        process = seat.visitor.process
        self._dirty.add(process)
        self._done[process] += 1
        actions = self._resolved(step.actions, "c", own=seat, namespace=step.namespace)
        self._foresee(step.actions)
        assert seat.client is not None
        seat.client.emit(step.namespace, ("run", [actions], 0))
        self._expect_answers(seat, step.namespace, [0])
        return None

    def _play_burst(self, step: Burst) -> Any:
        seat = self._seats[step.client]
        client, process = seat.client, seat.visitor.process
        if client is None or not client.is_open:
            return None
        events, wanted = [], []
        for index, (name, args, wants_ack) in enumerate(step.events):
            if name == "run":
                values: list[Any] = [
                    self._resolved(args[0], f"b{index}-", own=seat, namespace=step.namespace)
                ]
            else:
                values = decode(args)
            events.append((name, values, index if wants_ack else None))
            if seat.is_in(step.namespace) and (name != "unknown" or step.namespace == "/func"):
                self._done[process] += 1
                wanted += [index] if wants_ack else []
        self._dirty.add(process)
        with contextlib.suppress(OSError):
            client.emit(step.namespace, *events)
        self._expect_answers(seat, step.namespace, wanted)
        return None

    def _play_both(self, step: Both) -> Any:
        self._dirty |= {0, 1}
        sides = [self._resolved(step.first, "A"), self._resolved(step.second, "B")]
        with ThreadPoolExecutor(2) as pool:
            posts = [
                pool.submit(control.post, "/run", actions=actions, in_request=True)
                for control, actions in zip(self._controls, sides, strict=True)
            ]
            return [post.result() for post in posts]

    def _play_upgrade(self, step: Upgrade) -> Any:
        self._dirty.add(step.process)
        actions = self._resolved(step.actions, "u")
        client = self._seats[step.client].client
        with ThreadPoolExecutor(1) as pool:
            control = self._controls[step.process]
            post = pool.submit(control.post, "/run", actions=actions, in_request=True)
            if client is not None and client.is_open and client.polls:
                try:
                    client.upgrade()
                except (OSError, AssertionError) as error:
                    self._expect(f"an upgrade: {error}", is_met=False)
            return post.result()

    def _play_join(self, step: Join) -> Any:
        seat = self._seats[step.client]
        if seat.client is None or not seat.client.is_open or seat.is_in(step.namespace):
            return None
        return self._join(seat, step.namespace, encode(decode(step.auth)))

    def _play_leavenamespace(self, step: LeaveNamespace) -> Any:
        seat = self._seats[step.client]
        if seat.is_in(step.namespace):
            assert seat.client is not None
            self._foresee_departure(seat, step.namespace)
            seat.client.leave(step.namespace)
        return None

    def _play_close(self, step: Close) -> Any:
        self._close(self._seats[step.client], is_polite=step.is_polite)

    def _play_return(self, step: Return) -> Any:
        seat = self._seats[step.client]
        if seat.client is None or not seat.client.is_open:
            self._open(seat)
        return None

    def _play_visit(self, step: Visit) -> Any:
        return self._visit(self._seats[step.client])

    # What steps consist of

    def _seat(self, seat: Seat) -> None:
        if seat.visitor.has_visited:
            self._visit(seat)
        self._open(seat)

    def _visit(self, seat: Seat) -> Any:
        answer, cookie = self._controls[seat.visitor.process].visit(self._name, seat.cookie)
        if cookie:
            seat.cookie = "; ".join([seat.cookie.partition(";")[0], cookie])
        return answer

    def _open(self, seat: Seat) -> None:
        greeted = "&greeted=1" if seat.visitor.is_greeted else ""
        query = f"play={self._name}&name={seat.name}&x=1&x=%C3%A4+b{greeted}"
        control = self._controls[seat.visitor.process]
        seat.client = Client(control.port, query=query, cookie=seat.cookie)
        self._clients.append((seat.client, seat.name))
        seat.client.open(polls=seat.visitor.polls)
        for namespace in seat.visitor.namespaces:
            self._join(seat, namespace)

    def _join(self, seat: Seat, namespace: str, auth: Any = None) -> bool:
        assert seat.client is not None
        is_in = seat.client.join(namespace, auth)
        if is_in:
            sid = seat.client.sids[namespace]
            seat.joined.add(namespace)
            seat.known[namespace] = sid
            self._dirty.add(seat.visitor.process)  # a greeting may be on its way
            self._names[sid] = f"<{seat.name} in {namespace}>"
        return is_in

    def _close(self, seat: Seat, *, is_polite: bool) -> None:
        client = seat.client
        if client is None or not client.is_open:
            return
        for namespace in sorted(seat.joined):
            self._foresee_departure(seat, namespace)
        client.close(is_polite=is_polite)
        # What was still sent to it may have come or not.
        self._gone.add(client)

    def _resolved(
        self, actions: list[Any], prefix: str, *, own: Seat | None = None, namespace: str = "/"
    ) -> list[dict[str, Any]]:
        """Return actions as the application takes them."""
        is_mixed = self._is_mixed()
        resolved = []
        for index, (do, chosen) in enumerate(actions):
            where = chosen.get("namespace", namespace)

            def sid(value: Any, where: str = where) -> Any:
                if isinstance(value, dict):
                    return self._seats[value["client"]].known.get(where, _NOBODY)
                return [sid(item) for item in value] if isinstance(value, list) else value

            action = {"do": do, **chosen}
            for key in {"to", "skip_sid", "sid"} & chosen.keys():
                action[key] = sid(chosen[key])
            if "args" in chosen:
                args = _without_bytes(chosen["args"]) if is_mixed else chosen["args"]
                action["args"] = encode(args)
            if do in ("emit", "emit_many"):
                action["name"] = f"{prefix}{index}"
            if do in ("ask", "call"):
                asked = own if chosen["in_context"] else self._seats[chosen["to"]["client"]]
                assert asked is not None
                action["is_answered"] = asked.is_in(where)
            resolved.append(action)
        return resolved

    def _is_mixed(self) -> bool:
        """Whether clients of one process poll and others do not, or one may be about to change.

        Stock encodes a packet once for all its recipients, and so sends attachments to
        WebSockets as polling wants them, or breaks a poll, as the first recipient has it.
        """
        for process in _PROCESSES:
            open_clients = [
                seat.client
                for seat in self._seats
                if seat.visitor.process == process and seat.client and seat.client.is_open
            ]
            if len(open_clients) > 1 and any(client.polls for client in open_clients):
                return True
        return False

    def _foresee(self, actions: list[Any]) -> None:
        for do, chosen in actions:
            if do == "disconnect":
                seat = self._seats[chosen["sid"]["client"]]
                if seat.is_in(chosen["namespace"]):
                    self._foresee_departure(seat, chosen["namespace"])

    def _foresee_departure(self, seat: Seat, namespace: str) -> None:
        seat.joined.discard(namespace)
        self._departed[seat.visitor.process] += 1
        self._dirty.add(seat.visitor.process)

    def _expect_answers(self, seat: Seat, namespace: str, numbers: list[int]) -> None:
        client = seat.client
        assert client is not None
        begin = self._seen.get(client, 0)

        def are_there() -> bool:
            there = {
                packet.number
                for packet in client.packets[begin:]
                if packet.kind in (ACK, BINARY_ACK) and packet.namespace == namespace
            }
            return there.issuperset(numbers)

        self._expect(f"answers {numbers} to {seat.name}", client.wait_until(are_there))

    def _settle(self, of: str, step: Any) -> None:
        """Wait until all that a step has set in motion has come to rest, and note it."""
        dirty = sorted(self._dirty)
        self._dirty.clear()
        fenced = [
            (seat.client, seat.known[min(seat.joined)], min(seat.joined))
            for seat in self._seats
            if seat.joined and seat.client is not None
        ]
        self._fence += 1
        fences = [(sid, namespace) for _, sid, namespace in fenced]
        if len(dirty) > 1:
            for process in dirty:
                self._expect_settled(process, [])
        for process in dirty:
            self._expect_settled(process, fences)
        if not dirty:
            fenced = []
        for client, _, _ in fenced:

            def is_fenced(client: Client = client) -> bool:
                fence = ["fence", self._name, self._fence]
                return sum(packet.content == fence for packet in client.packets) == len(dirty)

            name = next(name for known, name in self._clients if known is client)
            self._expect(f"fences of {name}", client.wait_until(is_fenced))
        for seat in self._seats if dirty else ():
            if seat.client is not None and seat.client.is_open and not seat.joined:
                # What still comes to it comes before this answer.
                seat.client.join(_NOWHERE)
        for client, name in self._clients:
            begin, end = self._seen.get(client, 0), len(client.packets)
            self._seen[client] = end
            packets = [packet for packet in client.packets[begin:end] if self._is_news(packet)]
            if packets and client not in self._gone:
                self._note(f"{of}, {name}", self._comparable(packets, step, name))

    def _is_news(self, packet: Packet) -> bool:
        """Whether it is no fence, and no client of another program that has left late."""
        if packet.namespace == _NOWHERE:
            return False
        event = _event(packet)
        return event != "fence" and (event != "left" or packet.content[1] == self._name)

    def _expect_settled(self, process: int, fences: list[tuple[str, str]]) -> None:
        done, departed = self._done[process], self._departed[process]
        has_settled = self._controls[process].post(
            "/settle",
            play=self._name,
            done=done,
            departed=departed,
            fences=fences,
            number=self._fence,
        )
        what = f"{done} events and {departed} departures in {'AB'[process]}"
        self._expect(what, has_settled)

    def _comparable(self, packets: list[Packet], step: Any, name: str) -> Any:
        """Return packets so that what stock leaves open does not differ."""
        packets = _in_order_of_connecting(packets)
        left = sorted(str(packet.content[2:]) for packet in packets if _event(packet) == "left")
        beside = sorted(str(packet) for packet in packets if _event(packet) in _BESIDE)
        rest = [packet for packet in packets if _event(packet) not in ("left", *_BESIDE)]
        ordered: Any = [str(packet) for packet in rest]
        if isinstance(step, Both):
            ordered = {
                side: [str(packet) for packet in rest if _event(packet).startswith(side)]
                for side in "AB"
            }
        elif isinstance(step, Burst) and any(event == "run" for event, _, _ in step.events):
            actor = self._seats[step.client]
            here = next(seat for seat in self._seats if seat.name == name).visitor.process
            if here == actor.visitor.process:
                events = [str(packet) for packet in rest if _event(packet).startswith("b")]
                ordered = [events, sorted(map(str, rest))]
            else:
                ordered = sorted(map(str, rest))
        elif isinstance(step, Burst) and {"contexts", "later"} & {name for name, *_ in step.events}:
            ordered = sorted(map(str, rest))
        return [ordered, left, beside] if left or beside else ordered


def _without_bytes(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_without_bytes(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_bytes(item) for key, item in value.items()}
    return value


def _in_order_of_connecting(packets: list[Packet]) -> list[Packet]:
    """Return packets with those of a namespace behind the one that lets the client in."""
    ordered: list[Packet] = []
    for packet in packets:
        at = len(ordered)
        if packet.kind == CONNECT:
            early = (known.namespace == packet.namespace for known in ordered)
            at = next(itertools.compress(itertools.count(), early), at)
        ordered.insert(at, packet)
    return ordered


def _event(packet: Packet) -> str:
    """Return the name of the event, empty for what is none."""
    return packet.content[0] if packet.kind in (EVENT, BINARY_EVENT) else ""


# The tests


class Pair:
    """A stock fleet and a guarded one."""

    def __init__(self, *, manage_session: bool, guard_config: dict[str, Any]) -> None:
        is_control = os.environ.get("SAMENESS_CONTROL") == "1"
        self._fleets = [
            Fleet(
                FleetOptions(
                    app=SAMENESS_APP,
                    is_guarded=is_guarded and not is_control,
                    socketio=json.dumps({"manage_session": manage_session}),
                    config=json.dumps(guard_config),
                )
            )
            for is_guarded in (False, True)
        ]
        self._pool = ThreadPoolExecutor(2)
        self._controls: list[list[Control]] = []
        self._residents: list[Client] = []

    def compare(self, program: Any) -> None:
        """Run a program on both, at the same time, and compare what was observed."""
        number = next(_numbers)
        plays = [Play(controls, program, number) for controls in self._controls]
        futures = [self._pool.submit(play.run) for play in plays]
        stock, guarded = [future.result() for future in futures]
        if stock.lines != guarded.lines:
            raise AssertionError(_difference(stock.lines, guarded.lines))
        assert not stock.overdue, f"neither did what the program expects: {stock.overdue}"

    def start(self) -> None:
        """Start the servers, and let each listen to the queue, which stock does with a client."""
        list(self._pool.map(Fleet.start, self._fleets))
        for fleet in self._fleets:
            self._controls.append([Control(server.port) for server in fleet.servers])
            residents = []
            for server in fleet.servers:
                resident = Client(server.port, query="play=none&name=resident", cookie="")
                residents.append(resident)
                resident.open(polls=False)
                resident.join(REFUSING)
                self._residents.append(resident)
            wait_until(lambda fleet=fleet: fleet.redis.subscribers() == 2)

    def close(self) -> None:
        """Stop everything."""
        for resident in self._residents:
            resident.end()
        for control in itertools.chain.from_iterable(self._controls):
            control.close()
        list(self._pool.map(Fleet.close, self._fleets))
        self._pool.shutdown()


def _difference(stock: list[str], guarded: list[str]) -> str:
    only_stock, only_guarded = Counter(stock) - Counter(guarded), Counter(guarded) - Counter(stock)
    lines = [f"stock   {line}" for line in stock if only_stock[line]]
    lines += [f"guarded {line}" for line in guarded if only_guarded[line]]
    return "\n".join(["what was observed is not the same", *lines])


@pytest.fixture
def make_pair(guard_config: dict[str, Any]) -> Iterator[Callable[..., Pair]]:
    """Return a function that starts a pair of fleets."""
    started: list[Pair] = []

    def make(*, manage_session: bool, **config: Any) -> Pair:
        pair = Pair(manage_session=manage_session, guard_config=guard_config | config)
        started.append(pair)
        pair.start()
        return pair

    yield make
    for pair in started:
        pair.close()


@pytest.mark.timeout(_SHRINKING + 2 * _EXAMPLES)
@pytest.mark.parametrize("manage_session", [True, False])
def test_clients_receive_what_stock_sends(
    make_pair: Callable[..., Pair], manage_session: bool
) -> None:
    """Whatever is done, guarded clients receive what stock ones do, in the same order."""
    _compare(make_pair(manage_session=manage_session), _EXAMPLES)


@pytest.mark.long
@pytest.mark.timeout(_SHRINKING + 2 * _EXAMPLES)
def test_clients_receive_what_stock_sends_without_what_makes_it_fast(
    make_pair: Callable[..., Pair],
) -> None:
    """It can be switched off, and changes nothing but the speed."""
    switched_off = {f"{PREFIX}FAST": False}
    _compare(make_pair(manage_session=True, **switched_off), max(1, _EXAMPLES // 2))


def _compare(pair: Pair, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=not _IS_SEARCHING,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if _IS_SEARCHING else (Phase.generate,),
    )
    @given(program=_programs)
    def compare(program: Any) -> None:
        pair.compare(program)

    compare()

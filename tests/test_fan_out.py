"""Broadcasts: each client gets all of them, in order and once, and nobody waits for that."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_socketio_guard.clients import fan_out as fan_out_module
from flask_socketio_guard.clients.fan_out import MAX_BYTES, MAX_DELIVERIES, Batch, FanOut
from flask_socketio_guard.core.runtime import GeventRuntime
from tests.support import unit_support
from tests.support.scale import examples
from tests.support.unit_support import longest_run_without, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

nothing_left_behind = unit_support.nothing_left_behind

WRITE_TIME = 0.001


class Turns:
    """A runtime whose turns are taken when the test says so, with a clock that writing moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: deque[Callable[[], object]] = deque()

    def call_soon(self, target: Callable[[], object]) -> None:
        self.due.append(target)

    def call_later(self, delay: float, target: Callable[[], object]) -> None:
        assert delay == 0.0
        self.due.append(target)

    def clock(self) -> float:
        return self.now

    def take(self) -> bool:
        """Take one turn; say whether there was one."""
        if self.due:
            self.due.popleft()()
            return True
        return False

    def take_all(self) -> int:
        count = 0
        while self.take():
            count += 1
        return count


class Text:
    """A message that is its name."""

    is_event = True
    is_volatile = False

    def __init__(self, name: object, size: int = 100) -> None:
        self.name = name
        self.size = size
        self.frames = str(name).encode()


class Client:
    """A recipient that notes what it gets."""

    def __init__(self, turns: Turns) -> None:
        self.got: list[object] = []
        self.writes = 0
        self.then: Callable[[], object] = lambda: None
        self._turns = turns

    def write(self, batch: Batch) -> None:
        self.got += [message.name for message in batch.messages]
        assert batch.frames == b"".join(message.frames for message in batch.messages)
        self.writes += 1
        self._turns.now += WRITE_TIME
        self.then()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    made = Turns()
    monkeypatch.setattr(fan_out_module, "clock", made.clock)
    return made


def make(turns: Turns, clients: int) -> tuple[FanOut, list[Client]]:
    return FanOut(turns), [Client(turns) for _ in range(clients)]  # type: ignore[arg-type]


def test_everybody_gets_a_broadcast_once(turns: Turns) -> None:
    fan_out, clients = make(turns, 100)
    fan_out.add(Text("news"), [*clients, *clients])
    assert fan_out.is_busy
    turns.take_all()
    assert [client.got for client in clients] == [["news"]] * 100
    assert (len(fan_out), fan_out.is_busy) == (0, False)


def test_nothing_is_written_before_the_next_turn(turns: Turns) -> None:
    """Who emits does not pay for the system calls."""
    fan_out, clients = make(turns, 20)
    fan_out.add(Text("news"), clients)
    assert not any(client.got for client in clients)


def test_a_turn_is_a_few_milliseconds_long(turns: Turns) -> None:
    fan_out, clients = make(turns, 1000)
    fan_out.add(Text("news"), clients)
    longest = 0.0
    while turns.due:
        began_at = turns.now
        turns.take()
        longest = max(longest, turns.now - began_at)
    assert longest < 9 * WRITE_TIME
    assert all(client.got == ["news"] for client in clients)


def test_what_several_broadcasts_have_for_a_client_goes_out_in_one_piece(turns: Turns) -> None:
    fan_out, clients = make(turns, 50)
    for number in range(5):
        fan_out.add(Text(number), clients)
    turns.take_all()
    assert all(client.got == [0, 1, 2, 3, 4] for client in clients)
    assert all(client.writes == 1 for client in clients)


def test_what_some_have_got_already_goes_out_with_the_rest_for_the_others(turns: Turns) -> None:
    fan_out, clients = make(turns, 60)
    fan_out.add(Text(0), clients)
    turns.take()
    assert 0 < sum(client.writes for client in clients) < 60
    fan_out.add(Text(1), clients[::2])
    fan_out.add(Text(2), clients)
    turns.take_all()
    assert [client.got for client in clients] == [[0, 1, 2], [0, 2]] * 30
    assert sum(client.writes for client in clients) < 90


def test_large_messages_go_out_one_by_one(turns: Turns) -> None:
    """To join them would copy them, once for each client."""
    fan_out, clients = make(turns, 20)
    for number in range(3):
        fan_out.add(Text(number, size=40_000), clients)
    turns.take_all()
    assert all((client.got, client.writes) == ([0, 1, 2], 3) for client in clients)


def test_who_is_sent_something_else_gets_its_broadcasts_first(turns: Turns) -> None:
    fan_out, clients = make(turns, 100)
    for number in range(3):
        fan_out.add(Text(number), clients)
    fan_out.settle(clients[7])
    clients[7].got.append("something else")
    turns.take_all()
    assert clients[7].got == [0, 1, 2, "something else"]
    assert all(client.got == [0, 1, 2] for client in clients if client is not clients[7])
    assert len(fan_out) == 0


def test_many_deliveries_are_a_matter_of_who_asks_for_them(turns: Turns) -> None:
    """A loop that broadcasts without end holds no memory without end."""
    fan_out, clients = make(turns, 2000)
    for number in range(100):
        fan_out.add(Text(number), clients)
        assert len(fan_out) <= MAX_DELIVERIES
    turns.take_all()
    assert all(client.got == list(range(100)) for client in clients)


def test_large_broadcasts_are_a_matter_of_who_asks_for_them(turns: Turns) -> None:
    fan_out, clients = make(turns, 20)
    size = MAX_BYTES // 4
    for number in range(20):
        fan_out.add(Text(number, size=size), clients)
        assert fan_out._bytes <= MAX_BYTES
    turns.take_all()
    assert all(client.got == list(range(20)) for client in clients)
    assert fan_out._bytes == 0


def test_one_message_beyond_the_bound_waits_like_any_other(turns: Turns) -> None:
    fan_out, clients = make(turns, 20)
    fan_out.add(Text("huge", size=2 * MAX_BYTES), clients)
    assert len(fan_out) == 20
    turns.take_all()
    assert all(client.got == ["huge"] for client in clients)


def test_a_write_may_cause_the_next_broadcast(turns: Turns) -> None:
    """A client that is too slow is closed, and who hears of that may tell the others."""
    fan_out, clients = make(turns, 40)
    told = []

    def tell() -> None:
        if not told:
            told.append(True)
            fan_out.settle(clients[3])
            fan_out.add(Text("somebody left"), clients)

    for client in clients[10:20]:
        client.then = tell
    fan_out.add(Text("news"), clients)
    turns.take_all()
    assert all(client.got == ["news", "somebody left"] for client in clients)
    assert (len(fan_out), fan_out._bytes, fan_out.is_busy) == (0, 0, False)


def test_a_write_may_cause_a_broadcast_to_just_those_who_are_left(turns: Turns) -> None:
    """It does not join what is being written: some of that is out already."""
    fan_out, clients = make(turns, 20)
    told = []

    def tell() -> None:
        if not told:
            told.append([client for client in clients if not client.got])
            fan_out.add(Text("more"), told[0])

    for client in clients:
        client.then = tell
    fan_out.add(Text("news"), clients)
    turns.take_all()
    assert len(told[0]) == 19
    for client in clients:
        assert client.got == (["news", "more"] if client in told[0] else ["news"])


def test_a_write_may_work_off_everything(turns: Turns) -> None:
    fan_out, clients = make(turns, 40)
    told = []

    def tell() -> None:
        if not told:
            told.append(True)
            for number in range(5):
                fan_out.add(Text(number, size=MAX_BYTES), clients)

    clients[20].then = tell
    fan_out.add(Text("news"), clients)
    turns.take_all()
    assert all(client.got == ["news", 0, 1, 2, 3, 4] for client in clients)
    assert (len(fan_out), fan_out._bytes, fan_out.is_busy) == (0, 0, False)


programs = st.lists(
    st.one_of(
        st.sets(st.integers(0, 29), min_size=1).map(lambda who: ("broadcast", who)),
        st.integers(0, 29).map(lambda who: ("send", who)),
        st.just(("turn", None)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=examples(150))
@given(program=programs)
def test_each_client_gets_everything_in_the_order_of_the_calls(
    program: list[tuple[str, object]],
) -> None:
    turns = Turns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fan_out_module, "clock", turns.clock)
        fan_out, clients = make(turns, 30)
        wanted: list[list[int]] = [[] for _ in clients]
        for number, (what, who) in enumerate(program):
            if what == "turn":
                turns.take()
            elif what == "send":
                assert isinstance(who, int)
                if fan_out.is_busy:
                    fan_out.settle(clients[who])
                clients[who].got.append(number)
                wanted[who].append(number)
            else:
                assert isinstance(who, set)
                fan_out.add(Text(number, size=30_000), [clients[one] for one in who])
                for one in who:
                    wanted[one].append(number)
        turns.take_all()
    assert [client.got for client in clients] == wanted
    assert (len(fan_out), fan_out._bytes, fan_out.is_busy) == (0, 0, False)


def test_others_have_their_turn_meanwhile(
    nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks something waits for some milliseconds of the broadcast, not for all."""
    turns = Turns()
    monkeypatch.setattr(fan_out_module, "clock", turns.clock)
    runtime = GeventRuntime()
    fan_out = FanOut(runtime)
    log: list[object] = []
    clients = [Client(turns) for _ in range(400)]
    for client in clients:
        client.then = lambda: log.append("write")
    with unit_support.busy_socket(lambda: log.append("other")):
        fan_out.add(Text("news"), clients)
        wait_for(runtime, lambda: not fan_out.is_busy)
    assert all(client.got == ["news"] for client in clients)
    assert longest_run_without(log, "other") <= 16

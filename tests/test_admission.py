"""Who is let in, and who is counted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flask_socketio_guard.clients import admission
from flask_socketio_guard.clients.admission import Admission
from flask_socketio_guard.errors import RateLimited
from flask_socketio_guard.events.rates import RateLimiter
from tests.support import unit_support
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

HERE = "192.0.2.1"
THERE = "2001:db8::1"


class GivingWay(dict[str, int]):
    """Lets other threads run between reading a count and writing it."""

    def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
        count = super().get(key, default)
        time.sleep(0)
        return count


@dataclass
class Gate:
    """A limit that lets in so many, and what else may happen while it is asked."""

    room: int
    keys: list[str] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None

    def hit(self, key: str) -> None:
        self.keys.append(key)
        self.meanwhile()
        if len(self.keys) > self.room:
            raise RateLimited(retry_after=1.0)


def make(
    *,
    max_connections: int | None = None,
    max_per_address: int | None = None,
    count_open: Callable[[], int] = lambda: 0,
    limit: Any = None,
) -> Admission:
    return Admission(
        max_connections=max_connections,
        max_per_address=max_per_address,
        count_open=count_open,
        limit=limit,
    )


def test_everyone_is_let_in_without_bounds() -> None:
    admission = make(count_open=lambda: 1_000_000)
    for _ in range(100):
        assert admission.refusal(HERE) is None
        admission.opened(HERE)
    assert admission.count(HERE) == 100


def test_nobody_is_let_in_while_draining() -> None:
    admission = make()
    assert not admission.is_draining
    admission.is_draining = True
    assert admission.refusal(HERE) == "draining"


def test_nobody_is_let_in_when_all_places_are_taken() -> None:
    taken = [2]
    admission = make(max_connections=3, count_open=lambda: taken[0])
    assert admission.refusal(HERE) is None
    taken[0] = 3
    assert admission.refusal(HERE) == "full"
    taken[0] = 4
    assert admission.refusal(HERE) == "full"


def test_an_address_has_so_many_places() -> None:
    admission = make(max_per_address=2)
    for _ in range(2):
        assert admission.refusal(HERE) is None
        admission.opened(HERE)
    assert admission.refusal(HERE) == "address"
    assert admission.refusal(THERE) is None
    admission.closed(HERE)
    assert admission.refusal(HERE) is None


def test_clients_without_an_address_are_not_taken_for_one() -> None:
    """Over a Unix socket nobody has one."""
    admission = make(max_per_address=1)
    for _ in range(3):
        assert admission.refusal("") is None
        admission.opened("")


def test_the_rate_is_that_of_all_addresses_together() -> None:
    gate = Gate(room=2)
    admission = make(limit=gate)
    assert admission.refusal(HERE) is None
    assert admission.refusal(THERE) is None
    assert admission.refusal(HERE) == "rate"
    assert len(set(gate.keys)) == 1


def test_a_limit_of_the_library_fits() -> None:
    clock = FakeClock()
    limiter = RateLimiter(on_storage_failure=lambda exc: None, clock=clock)
    admission = make(limit=limiter.limit("2/second"))
    assert [admission.refusal(HERE) for _ in range(3)] == [None, None, "rate"]
    clock.advance(2.0)
    assert admission.refusal(HERE) is None


def test_the_reasons_have_an_order() -> None:
    """Who is refused for another reason does not count against the rate."""
    gate = Gate(room=0)
    admission = make(max_connections=1, max_per_address=1, count_open=lambda: 1, limit=gate)
    admission.opened(HERE)
    admission.is_draining = True
    assert admission.refusal(HERE) == "draining"
    admission.is_draining = False
    assert admission.refusal(HERE) == "full"
    admission = make(max_connections=2, max_per_address=1, count_open=lambda: 1, limit=gate)
    admission.opened(HERE)
    assert admission.refusal(HERE) == "address"
    assert gate.keys == []
    assert admission.refusal(THERE) == "rate"


@pytest.mark.parametrize("reason", ["draining", "full", "address"])
def test_what_happens_while_the_limit_is_asked_counts(reason: str) -> None:
    """It may be in Redis, and others come in meanwhile."""
    taken = [0]
    gate = Gate(room=10)
    admission = make(max_connections=1, max_per_address=1, count_open=lambda: taken[0], limit=gate)

    def meanwhile() -> None:
        if reason == "draining":
            admission.is_draining = True
        elif reason == "full":
            taken[0] = 1
        else:
            admission.opened(HERE)

    gate.meanwhile = meanwhile
    assert admission.refusal(HERE) == reason


def test_more_closes_than_opens_are_ignored() -> None:
    admission = make(max_per_address=1)
    admission.closed(HERE)
    admission.opened(HERE)
    admission.closed(HERE)
    admission.closed(HERE)
    assert admission.count(HERE) == 0
    admission.opened(HERE)
    assert admission.count(HERE) == 1
    assert admission.refusal(HERE) == "address"


def test_nothing_is_kept_of_an_address_that_has_gone() -> None:
    admission = make()
    for number in range(1000):
        admission.opened(str(number))
        admission.opened(HERE)
    for number in range(1000):
        admission.closed(str(number))
    assert admission._counts == {HERE: 1000}
    for number in range(1000):
        admission.closed(HERE)
        assert admission.count(HERE) == 999 - number
    assert admission._counts == {}


def test_counts_are_right_when_threads_meet() -> None:
    admission = make()
    admission._counts = GivingWay()

    def come_and_go() -> None:
        for _ in range(500):
            admission.opened(HERE)
            admission.opened(THERE)
            admission.closed(THERE)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert admission._counts == {HERE: 2000}


class Addresses(RuleBasedStateMachine):
    """Beside a plain count, over any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = make(max_per_address=2)
        self.inside: Counter[str] = Counter()

    @rule(address=st.sampled_from([HERE, THERE, ""]))
    def come(self, address: str) -> None:
        if self.admission.refusal(address) is None:
            self.admission.opened(address)
            self.inside[address] += 1
        else:
            assert self.inside[address] == 2

    @rule(address=st.sampled_from([HERE, THERE, ""]))
    def go(self, address: str) -> None:
        self.admission.closed(address)
        self.inside[address] = max(0, self.inside[address] - 1)

    @invariant()
    def is_the_same(self) -> None:
        assert self.admission._counts == dict(+self.inside)


TestAddresses = Addresses.TestCase


def test_connections_with_a_selector_each_take_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gunicorn's threads wait for a request with a selector of their own."""
    monkeypatch.setattr(admission.resource, "getrlimit", lambda _: (200, 200))
    monkeypatch.setattr(admission, "_open_files", lambda: 26)
    assert admission.fit_to_files(1000) == 150
    assert admission.fit_to_files(1000, selectors=40) == 110
    assert admission.fit_to_files(1000, selectors=200) == 75
    assert admission.fit_to_files(60, selectors=200) == 60

"""Delays before trying again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_socketio_guard.backoff import DELIVERY_STORE, RATE_STORAGE, Backoff, backoff_delay

attempts = st.integers(min_value=0, max_value=10**9)
first_delays = st.floats(min_value=0.001, max_value=10.0)
max_delays = st.floats(min_value=10.0, max_value=3600.0)


def lowest(low: float, high: float) -> float:
    del high
    return low


def highest(low: float, high: float) -> float:
    del low
    return high


@given(attempts, first_delays, max_delays)
def test_a_delay_is_positive_and_never_above_its_cap(
    attempt: int, first_delay: float, max_delay: float
) -> None:
    """With the real randomness."""
    assert 0 < backoff_delay(attempt, first_delay=first_delay, max_delay=max_delay) <= max_delay


@given(attempts, first_delays, max_delays)
def test_jitter_spreads_over_the_upper_half_of_the_delay(
    attempt: int, first_delay: float, max_delay: float
) -> None:
    low = backoff_delay(attempt, first_delay=first_delay, max_delay=max_delay, uniform=lowest)
    high = backoff_delay(attempt, first_delay=first_delay, max_delay=max_delay, uniform=highest)
    assert low == high / 2


@given(attempts, first_delays, max_delays)
def test_a_delay_doubles_until_it_meets_its_cap(
    attempt: int, first_delay: float, max_delay: float
) -> None:
    def delay(number: int) -> float:
        return backoff_delay(number, first_delay=first_delay, max_delay=max_delay, uniform=highest)

    assert delay(attempt + 1) == min(max_delay, 2 * delay(attempt))


def test_the_first_delay_is_the_one_asked_for() -> None:
    assert backoff_delay(0, first_delay=0.1, max_delay=5.0, uniform=highest) == 0.1
    assert backoff_delay(0, first_delay=0.1, max_delay=5.0, uniform=lowest) == 0.05


def test_a_fleet_at_the_cap_does_not_return_in_one_instant() -> None:
    """The usual mistake is a cap that takes the jitter away."""
    delays = {backoff_delay(10**6, first_delay=0.1, max_delay=5.0) for _ in range(100)}
    assert len(delays) > 90
    assert all(2.5 <= delay <= 5.0 for delay in delays)


@given(attempts, max_delays)
def test_a_broker_is_tried_again_within_the_cap(failures: int, max_delay: float) -> None:
    assert 0 < Backoff(max_delay).delay(failures) <= max_delay


def test_the_first_reconnection_is_tried_soon() -> None:
    assert all(0.025 <= Backoff(0.3).delay(0) <= 0.05 for _ in range(50))


@pytest.mark.parametrize("max_delay", [0.001, 0.049])
def test_a_cap_below_the_first_delay_holds(max_delay: float) -> None:
    assert all(Backoff(max_delay).delay(number) <= max_delay for number in range(50))


def test_stores_are_tried_again_in_the_time_that_who_waits_for_them_can_bear() -> None:
    """A task of the guard waits for one, an event for the other."""
    assert all(0.025 <= DELIVERY_STORE.delay(0) <= 0.05 for _ in range(100))
    assert all(0.25 <= DELIVERY_STORE.delay(9) <= 0.5 for _ in range(100))
    assert all(2.5 <= RATE_STORAGE.delay(0) <= 5.0 for _ in range(100))

"""Cases that share one test fail as loudly as those that have one each."""

from __future__ import annotations

import inspect

import pytest

from tests.support.cases import in_turn


def test_every_case_runs_and_each_that_fails_is_named() -> None:
    seen: list[tuple[int, str]] = []

    @in_turn("number", [1, 2, pytest.param(3, id="three")])
    @in_turn(("text", "other"), [("a", 0), ("b", 0)])
    def check(number: int, text: str, other: int) -> None:
        seen.append((number, text))
        assert number != 2, "is two"
        if text == "b" and number == 3:
            pytest.fail("is b")

    assert not inspect.signature(check).parameters
    with pytest.raises(AssertionError) as caught:
        check()
    assert len(seen) == 6
    message = str(caught.value)
    for part in ("with {'number': 2}", "with {'text': 'a', 'other': 0}", "is two", "is b"):
        assert part in message
    assert "with {'number': 1}" not in message


def test_a_case_that_passes_says_nothing() -> None:
    in_turn("number", [1, 2])(lambda number: None)()

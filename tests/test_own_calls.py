"""Which entries of the change feed were answered for, and which have been told."""

from __future__ import annotations

import threading

from flask_socketio_guard.delivery.own_calls import OwnCalls


def answered(calls: OwnCalls, *counts: int) -> None:
    calls.end(calls.begin(), list(counts))


def test_an_entry_is_held_as_long_as_a_call_runs_that_may_have_written_it() -> None:
    calls = OwnCalls(10)
    first = calls.begin()
    calls.read(1, b"one")
    calls.passed(1)
    later = calls.begin()
    assert calls.lost() == {}
    assert calls.told_up_to() == 0
    calls.end(first, None)
    assert calls.lost() == {1: b"one"}, "the later call cannot have written it"
    assert calls.lost() == {1: b"one"}, "until it is told"
    assert calls.told_up_to() == 0
    calls.lost_are_told([1])
    assert calls.lost() == {}
    assert calls.told_up_to() == 1
    calls.end(later, [])


def test_an_answer_after_the_entry_ends_the_wait() -> None:
    calls = OwnCalls(10)
    serial = calls.begin()
    calls.read(1, b"one")
    calls.passed(1)
    calls.end(serial, [1])
    assert calls.lost() == {}
    assert calls.told_up_to() == 0, "it is being told"
    calls.told()
    assert calls.told_up_to() == 1


def test_what_one_task_has_told_says_nothing_of_another() -> None:
    calls = OwnCalls(10)
    answered(calls, 5)
    other = threading.Thread(target=answered, args=(calls, 4))
    other.start()
    other.join()
    calls.passed(6)
    calls.told()
    assert calls.told_up_to() == 3


def test_the_first_answer_that_is_not_told_counts() -> None:
    calls = OwnCalls(10)
    answered(calls, 2, 3)
    answered(calls, 4)
    calls.passed(4)
    assert calls.told_up_to() == 1


def test_answers_that_nobody_reads_are_bounded() -> None:
    calls = OwnCalls(10)
    for count in range(1, 1001):
        answered(calls, count)
    assert len(calls._answered) <= 20
    calls.read(1000, b"")
    assert calls.lost() == {}


def test_numbers_that_are_used_again_are_not_taken_for_answers() -> None:
    """Redis was emptied, or came back older."""
    calls = OwnCalls(10)
    answered(calls, 7)
    calls.passed(6)
    calls.passed(3)
    calls.read(7, b"other")
    assert calls.lost() == {7: b"other"}
    calls = OwnCalls(10)
    answered(calls, 7)
    calls.restart(0)
    calls.read(7, b"other")
    assert calls.lost() == {7: b"other"}


def test_a_process_is_settled_when_all_is_told_and_no_failed_call_may_have_done_something() -> None:
    calls = OwnCalls(10)
    assert calls.is_settled
    serial = calls.begin()
    assert not calls.is_settled
    calls.end(serial, None)
    assert not calls.is_settled
    answered(calls, 3)
    calls.told()
    assert not calls.is_settled
    calls.read(3, b"")
    calls.passed(3)
    assert calls.is_settled
    answered(calls, 4)
    assert not calls.is_settled
    calls.told()
    assert calls.is_settled

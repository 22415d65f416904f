"""Which messages of other processes are known to have been acted on."""

from __future__ import annotations

from flask_socketio_guard.queue.duplicates import Duplicates


def test_the_same_number_with_the_same_content_is_a_duplicate() -> None:
    duplicates = Duplicates()
    assert not duplicates.has_seen("x", 7, 1)
    assert duplicates.has_seen("x", 7, 1)
    assert not duplicates.has_seen("y", 7, 1)
    assert not duplicates.has_seen("x", 7, 2)


def test_a_whole_batch_is_remembered_and_no_more_than_a_thousand() -> None:
    duplicates = Duplicates()
    for number in range(1, 1025):
        assert not duplicates.has_seen("x", number, number)
    assert all(duplicates.has_seen("x", number, number) for number in range(1, 1025))
    assert not duplicates.has_seen("x", 1025, 1025)
    assert not duplicates.has_seen("x", 1, 1)


def test_hosts_that_are_made_up_push_out_who_was_silent_the_longest() -> None:
    duplicates = Duplicates()
    for number in range(5000):
        duplicates.has_seen("real", number, number)
        duplicates.has_seen(f"made up {number}", 1, 1)
    assert len(duplicates) == 1024
    assert all(duplicates.has_seen("real", number, number) for number in range(4000, 5000))

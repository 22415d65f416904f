"""Repeats of one line: the first is written, the rest are counted and told."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engineio
import geventwebsocket
import pytest
import socketio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flask_socketio_guard.telemetry import log_deduplication as folding
from flask_socketio_guard.telemetry.log_deduplication import (
    MAX_CLASSES,
    OTHERS,
    Folded,
    Line,
    LogDeduplicator,
    LoggerDeduplication,
)
from tests.support.scale import examples
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

INTERVAL = 60.0
LOGGER = logging.getLogger("tests.folding")
LINE = Line(LOGGER, logging.WARNING, "it rains")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def folder(clock: FakeClock) -> LogDeduplicator:
    return LogDeduplicator(INTERVAL, clock=clock)


def admitted(folder: LogDeduplicator, times: int, key: Hashable = "rain", **options: Any) -> int:
    """Return how many of so many lines were to be written."""
    return sum(folder.admit(key, LINE, **options) for _ in range(times))


def test_the_first_of_a_class_passes_and_repeats_are_told_in_one(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    assert admitted(folder, 413) == 1
    assert folder.due() == []
    clock.advance(INTERVAL)
    assert folder.due() == [Folded("rain", LINE, count=412, lines=412, seconds=INTERVAL)]
    assert folder.due() == []


def test_nothing_is_told_before_the_interval_is_over(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    admitted(folder, 2)
    clock.advance(INTERVAL - 0.001)
    assert folder.due() == []
    assert admitted(folder, 1) == 0
    clock.advance(0.001)
    assert [folded.count for folded in folder.due()] == [2]


def test_classes_are_folded_each_for_itself(folder: LogDeduplicator, clock: FakeClock) -> None:
    assert admitted(folder, 3, "rain") == 1
    clock.advance(1)
    assert admitted(folder, 5, "snow") == 1
    clock.advance(INTERVAL - 1)
    assert [(folded.key, folded.count) for folded in folder.due()] == [("rain", 2)]
    clock.advance(1)
    assert [(folded.key, folded.count) for folded in folder.due()] == [("snow", 4)]


def test_a_single_line_is_not_told_again_and_the_next_passes(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    admitted(folder, 1)
    clock.advance(INTERVAL)
    assert folder.due() == []
    assert admitted(folder, 1) == 1


def test_a_flood_costs_one_line_in_each_interval(folder: LogDeduplicator, clock: FakeClock) -> None:
    """The line that tells of repeats is the first of the next interval."""
    passed = told = 0
    for _ in range(600):
        passed += admitted(folder, 10)
        clock.advance(1)
        told += len(folder.due())
    assert (passed, told) == (1, 10)


def test_a_class_that_fell_silent_passes_again(folder: LogDeduplicator, clock: FakeClock) -> None:
    admitted(folder, 2)
    for _ in range(2):
        clock.advance(INTERVAL)
        folder.due()
    assert admitted(folder, 1) == 1


def test_a_line_passes_after_the_interval_also_if_nobody_asked_what_is_due(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    admitted(folder, 1)
    clock.advance(INTERVAL)
    assert admitted(folder, 2) == 1
    clock.advance(INTERVAL - 1)
    assert folder.due() == []  # the second line opened an interval of its own
    clock.advance(1)
    assert [folded.count for folded in folder.due()] == [1]


def test_a_class_that_began_anew_holds_up_no_other(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    """What is due is found at the head of a queue."""
    admitted(folder, 1, "rain")
    clock.advance(1)
    admitted(folder, 2, "snow")
    clock.advance(INTERVAL - 1)
    assert admitted(folder, 2, "rain") == 1
    clock.advance(1)
    assert [folded.key for folded in folder.due()] == ["snow"]


def test_repeats_that_are_overdue_wait_for_who_asks(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    """A line that passed would hide them."""
    admitted(folder, 3)
    clock.advance(2 * INTERVAL)
    assert admitted(folder, 1) == 0
    assert folder.due() == [Folded("rain", LINE, count=3, lines=3, seconds=2 * INTERVAL)]


def test_a_burst_passes_in_each_interval(folder: LogDeduplicator, clock: FakeClock) -> None:
    assert admitted(folder, 7, burst=5) == 5
    clock.advance(INTERVAL)
    assert [folded.count for folded in folder.due()] == [2]
    # What told of the rest was one of the next five.
    assert admitted(folder, 7, burst=5) == 4


def test_things_are_told_and_lines_are_counted(folder: LogDeduplicator, clock: FakeClock) -> None:
    """One line may tell of many lost messages."""
    admitted(folder, 3, count=10)
    clock.advance(INTERVAL)
    (folded,) = folder.due()
    assert (folded.count, folded.lines) == (20, 2)
    assert folder.counts == {"rain": 2}


def test_repeats_are_told_in_the_words_of_the_first(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    folder.admit("rain", LINE)
    folder.admit("rain", Line(LOGGER, logging.ERROR, "it pours"))
    clock.advance(INTERVAL)
    assert folder.due()[0].line == LINE


def test_counts_go_on_for_ever_by_class(folder: LogDeduplicator, clock: FakeClock) -> None:
    for _ in range(3):
        admitted(folder, 2, "rain")
        admitted(folder, 1, "snow")
        clock.advance(2 * INTERVAL)
        folder.due()
        folder.flush()
    assert folder.counts == {"rain": 3}
    folder.counts["rain"] = 7
    assert folder.counts == {"rain": 3}


def test_a_flush_tells_all_at_once_and_begins_anew(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    admitted(folder, 4, "rain")
    admitted(folder, 1, "snow")
    clock.advance(7.5)
    assert folder.flush() == [Folded("rain", LINE, count=3, lines=3, seconds=7.5)]
    assert folder.flush() == []
    assert admitted(folder, 1, "rain") == admitted(folder, 1, "snow") == 1


def test_more_classes_than_can_be_told_apart_are_one(
    folder: LogDeduplicator, clock: FakeClock
) -> None:
    """Else who varies the text fills the log all the same."""
    assert sum(admitted(folder, 1, number) for number in range(10_000)) == MAX_CLASSES + 1
    assert len(folder._windows) == MAX_CLASSES + 1
    assert folder.counts == {OTHERS: 10_000 - MAX_CLASSES - 1}
    clock.advance(INTERVAL)
    (folded,) = folder.due()
    assert folded == Folded(
        OTHERS,
        Line(LOGGER, logging.WARNING, "lines of other kinds"),
        count=10_000 - MAX_CLASSES - 1,
        lines=10_000 - MAX_CLASSES - 1,
        seconds=INTERVAL,
    )
    assert admitted(folder, 2, 10_001) == 1  # there is room again


def test_a_class_that_is_known_is_told_apart_also_among_many(folder: LogDeduplicator) -> None:
    admitted(folder, 1, "rain")
    for number in range(2 * MAX_CLASSES):
        admitted(folder, 2, number)
    admitted(folder, 3, "rain")
    folded = {each.key: each.count for each in folder.flush()}
    assert folded["rain"] == 3
    assert len(folded) == MAX_CLASSES + 1


def test_other_kinds_have_no_burst(folder: LogDeduplicator) -> None:
    for number in range(MAX_CLASSES):
        admitted(folder, 1, number)
    assert sum(admitted(folder, 1, -number, burst=5) for number in range(1, 10)) == 1


def test_the_counts_are_bounded_over_time(folder: LogDeduplicator) -> None:
    """An application that runs for months meets many classes, one after another."""
    for number in range(10 * MAX_CLASSES):
        admitted(folder, 2, number)
        folder.flush()
    assert len(folder.counts) == MAX_CLASSES + 1
    assert sum(folder.counts.values()) == 10 * MAX_CLASSES
    assert folder.counts[OTHERS] == 9 * MAX_CLASSES


def test_threads_lose_no_line(folder: LogDeduplicator) -> None:
    passed: list[int] = []

    def flood() -> None:
        passed.append(admitted(folder, 500))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(passed) == 1
    (folded,) = folder.flush()
    assert folded.lines == folder.counts["rain"] == 3999


def test_code_that_a_garbage_collection_runs_may_log(folder: LogDeduplicator) -> None:
    """It may come in the midst of any step."""

    class Collecting:
        def __hash__(self) -> int:
            folder.admit("finalizer", LINE)
            return 0

    thread = threading.Thread(target=folder.admit, args=(Collecting(), LINE), daemon=True)
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive(), "deadlock"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (60.3, "it rains ... 412 more in 60 s"),
        (1.6, "it rains ... 412 more in 2 s"),
        (0.0, "it rains ... 412 more in 1 s"),
    ],
)
def test_the_line_that_tells(caplog: pytest.LogCaptureFixture, seconds: float, text: str) -> None:
    Folded("rain", LINE, count=412, lines=5, seconds=seconds).tell()
    (line,) = caplog.records
    assert (line.name, line.levelno, line.getMessage()) == (LOGGER.name, logging.WARNING, text)
    assert line.folded == 5  # type: ignore[attr-defined]


class FoldingMachine(RuleBasedStateMachine):
    """Lines of three classes at any time; whoever asks may come late."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.folder = LogDeduplicator(INTERVAL, clock=self.clock)
        self.happened: Counter[Hashable] = Counter()
        self.told: Counter[Hashable] = Counter()
        self.kept: Counter[Hashable] = Counter()
        self.waiting_since: dict[Hashable, float] = {}
        self.written_at: dict[Hashable, float] = {}

    def _write(self, key: Hashable) -> None:
        now = self.clock.now
        assert now - self.written_at.get(key, float("-inf")) >= INTERVAL, "two lines too close"
        self.written_at[key] = now

    @rule(key=st.sampled_from("abc"), count=st.integers(1, 5))
    def line(self, key: str, count: int) -> None:
        self.happened[key] += count
        if self.folder.admit(key, LINE, count=count):
            self._write(key)
            assert key not in self.waiting_since, "a line passed those that wait"
            self.told[key] += count
        else:
            self.kept[key] += 1
            self.waiting_since.setdefault(key, self.clock.now)

    @rule(seconds=st.sampled_from([0.5, 1.0, 20.0, 59.0, 60.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def somebody_asks(self) -> None:
        for folded in self.folder.due():
            self._write(folded.key)
            self.told[folded.key] += folded.count
            del self.waiting_since[folded.key]
        for since in self.waiting_since.values():
            assert self.clock.now - since < INTERVAL, "repeats were forgotten"

    @rule()
    def the_process_ends(self) -> None:
        for folded in self.folder.flush():
            self.told[folded.key] += folded.count
        assert self.told == self.happened
        self.waiting_since.clear()
        self.written_at.clear()

    @invariant()
    def every_kept_line_is_counted(self) -> None:
        assert self.folder.counts == self.kept

    def teardown(self) -> None:
        self.the_process_ends()


TestFoldingMachine = FoldingMachine.TestCase
TestFoldingMachine.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None
)


# The loggers of the packages underneath


@pytest.fixture
def engine_logger() -> Iterator[logging.Logger]:
    """A logger that goes by the name of python-engineio's."""
    logger = logging.getLogger("engineio.tests")
    logger.setLevel(logging.DEBUG)
    yield logger
    assert logger.filters == [], "a filter was left behind"


@pytest.fixture
def own_logger() -> Iterator[logging.Logger]:
    """A logger of the application, which python-engineio was given to use."""
    logger = logging.getLogger("tests.shop")
    logger.setLevel(logging.WARNING)
    yield logger
    assert logger.filters == [], "a filter was left behind"


@pytest.fixture
def folded() -> list[str]:
    """What was kept back."""
    return []


def attach(
    logger: logging.Logger, clock: FakeClock, folded: list[str], name: str = "x"
) -> LoggerDeduplication:
    return LoggerDeduplication(logger, INTERVAL, on_folded=lambda: folded.append(name), clock=clock)


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_warnings_and_errors_of_upstream_are_folded_by_text_before_formatting(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
    level: int,
) -> None:
    fold = attach(engine_logger, clock, folded)
    for number in range(413):
        engine_logger.log(level, "Cannot send to sid %s", number)
    engine_logger.log(level, "something else")
    fold.tick()
    assert [line.getMessage() for line in caplog.records] == [
        "Cannot send to sid 0",
        "something else",
    ]
    assert len(folded) == 412
    assert fold.counts == {("engineio.tests", "Cannot send to sid %s"): 412}
    caplog.clear()
    clock.advance(INTERVAL)
    fold.tick()
    (line,) = caplog.records
    assert line.getMessage() == "'Cannot send to sid %s' ... 412 more in 60 s"
    assert (line.name, line.levelno) == ("engineio.tests", level)


def test_a_line_that_tells_is_not_folded_itself(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fold = attach(engine_logger, clock, folded)
    for _ in range(3):
        for _ in range(2):
            engine_logger.warning("it rains")
            engine_logger.warning("it snows")
        clock.advance(INTERVAL)
        fold.tick()
    assert [line.getMessage() for line in caplog.records] == [
        "it rains",
        "it snows",
        "'it rains' ... 1 more in 60 s",
        "'it snows' ... 1 more in 60 s",
        *["'it rains' ... 2 more in 60 s", "'it snows' ... 2 more in 60 s"] * 2,
    ]


def test_what_is_no_repeat_of_a_plain_warning_passes(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A traceback may be another one; and whoever wants to debug wants every line."""
    caplog.set_level(logging.DEBUG)
    fold = attach(engine_logger, clock, folded)
    for _ in range(3):
        engine_logger.debug("rain")
        engine_logger.info("rain")
        engine_logger.critical("rain")
        engine_logger.error("rain", exc_info=ValueError())
        engine_logger.warning("rain", exc_info=ValueError())
    assert len(caplog.records) == 15
    assert folded == []
    assert fold.counts == {}


def test_lines_of_the_application_pass_through_a_logger_that_upstream_uses_too(
    own_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A real server logs there; only what it says is folded."""
    fold = attach(own_logger, clock, folded)
    server = engineio.Server(async_mode="threading", logger=own_logger)
    for number in range(3):
        own_logger.warning("payment %s failed", number)
        server.send(f"sid-{number}", "hello")
    assert [line.getMessage() for line in caplog.records] == [
        "payment 0 failed",
        "Cannot send to sid sid-0",
        "payment 1 failed",
        "payment 2 failed",
    ]
    assert fold.counts == {("tests.shop", "Cannot send to sid %s"): 2}


@pytest.mark.parametrize("package", [engineio, socketio, geventwebsocket])
def test_every_package_underneath_is_known_by_its_folder(package: Any) -> None:
    folders = {Path(folder) for folder in folding._upstream_folders()}
    assert Path(package.__file__).parent in folders
    assert all(folder.endswith(("/", "\\")) for folder in folding._upstream_folders())


def test_applications_that_share_a_logger_have_one_filter_for_as_long_as_one_lives(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = attach(engine_logger, clock, folded, "first")
    second = attach(engine_logger, clock, folded, "second")
    assert len(engine_logger.filters) == 1
    for _ in range(3):
        engine_logger.warning("it rains")
    assert folded == ["first", "first"]
    assert first.counts == second.counts
    del first
    gc.collect()
    engine_logger.warning("it rains")
    assert folded == ["first", "first", "second"]
    clock.advance(INTERVAL)
    second.tick()
    second.tick()
    assert [line.getMessage() for line in caplog.records] == [
        "it rains",
        "'it rains' ... 3 more in 60 s",
    ]
    del second
    gc.collect()
    assert engine_logger.filters == []
    caplog.clear()
    for _ in range(3):
        engine_logger.warning("it rains")
    assert len(caplog.records) == 3


def test_a_filter_of_somebody_else_stays(
    engine_logger: logging.Logger, clock: FakeClock, folded: list[str]
) -> None:
    other = logging.Filter()
    engine_logger.addFilter(other)
    fold = attach(engine_logger, clock, folded)
    assert len(engine_logger.filters) == 2
    del fold
    gc.collect()
    assert engine_logger.filters == [other]
    engine_logger.removeFilter(other)


def test_an_application_that_never_ticks_tells_with_the_next_line(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fold = attach(engine_logger, clock, folded)
    for _ in range(3):
        engine_logger.warning("it rains")
    clock.advance(INTERVAL)
    engine_logger.warning("it snows")
    assert [line.getMessage() for line in caplog.records] == [
        "it rains",
        "'it rains' ... 2 more in 60 s",
        "it snows",
    ]
    fold.flush()


def test_a_flush_tells_of_upstream_at_once(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fold = attach(engine_logger, clock, folded)
    for _ in range(3):
        engine_logger.warning("it rains")
    fold.flush()
    assert caplog.records[-1].getMessage() == "'it rains' ... 2 more in 1 s"


def test_what_upstream_puts_into_its_text_cannot_forge_or_fill_the_log(
    engine_logger: logging.Logger,
    clock: FakeClock,
    folded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fold = attach(engine_logger, clock, folded)
    forged = "\nERROR all is lost" + 100_000 * "!"
    for _ in range(2):
        engine_logger.warning(forged)
    caplog.clear()
    fold.flush()
    (line,) = caplog.records
    assert "\n" not in line.getMessage()
    assert len(line.getMessage()) < 300
    (key,) = fold.counts
    assert len(str(key)) < 300


def test_a_message_may_be_any_object(
    engine_logger: logging.Logger, clock: FakeClock, folded: list[str]
) -> None:
    fold = attach(engine_logger, clock, folded)
    engine_logger.warning(ValueError("a"))
    engine_logger.warning(ValueError("b"))
    assert fold.counts == {("engineio.tests", "ValueError"): 1}

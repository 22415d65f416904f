"""Finding out what keeps an event loop from running, without an event loop."""

from __future__ import annotations

import json
import linecache
import re
import sys
import sysconfig
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

import flask_socketio_guard
from flask_socketio_guard.core.loop_monitor import UNKNOWN, Frame, LoopMonitor, frames_of, place_of
from tests.support import unit_support, wait_until
from tests.support.cases import in_turn
from tests.support.unit_support import FakeClock

nothing_left_behind = unit_support.nothing_left_behind

STDLIB = sysconfig.get_paths()["stdlib"]
INSTALLED = f"{STDLIB}/site-packages"
GUARD = Path(flask_socketio_guard.__file__).parent


class Rig:
    """A monitor of a loop that answers when it is told to; its thread is that of the test."""

    def __init__(self, threshold: float = 0.4) -> None:
        self.clock = FakeClock()
        self.processor_clock = FakeClock()
        self.told: list[tuple[str, str | float]] = []
        self.is_open = False
        self.slept: list[float] = []
        self.oversleeps = 0.0
        self.while_telling = lambda: None
        self.monitor = LoopMonitor(
            threshold,
            ask=self.ask,
            thread_ident=threading.get_ident(),
            on_block=self.on_block,
            on_unblock=lambda place, seconds: self.told.append((f"over: {place}", seconds)),
            sleep=self.sleep,
            clock=self.clock,
            processor_clock=self.processor_clock,
        )
        self.look()
        self.answer()

    def ask(self) -> None:
        assert not self.is_open, "one question at a time"
        self.is_open = True

    def answer(self) -> None:
        assert self.is_open
        self.is_open = False
        self.monitor.answer()

    def look(self, *, after: float | None = None, worked: float = 0.0) -> None:
        """Look once more, an interval or so many seconds after the last time."""
        self.clock.advance(self.monitor.interval if after is None else after)
        self.processor_clock.advance(worked)
        self.monitor.look()

    def look_until_told(self) -> float:
        """Return the seconds that it takes until a block is told."""
        began_at, told = self.clock.now, len(self.told)
        while len(self.told) == told:
            self.look()
            assert self.clock.now - began_at < 1000.0
        return self.clock.now - began_at

    def on_block(self, place: str, stack: str) -> None:
        self.told.append((place, stack))
        self.while_telling()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds + self.oversleeps)

    def rounded(self, intervals: float, seconds: float = 0.0) -> float:
        """Return so many intervals and seconds, rounded as :attr:`lengths`."""
        return round(intervals * self.monitor.interval + seconds, 3)

    @property
    def lengths(self) -> list[float]:
        """The lengths that were told, rounded to milliseconds."""
        return [round(what, 3) for _, what in self.told if isinstance(what, float)]


def test_a_loop_that_answers_is_never_told_of() -> None:
    rig = Rig()
    for _ in range(1000):
        rig.look()
        rig.answer()
    assert rig.told == []


def test_a_loop_that_answers_just_in_time_is_not_told_of() -> None:
    """Again and again, so that nothing adds up."""
    rig = Rig()
    for _ in range(100):
        for _ in range(8):
            rig.look()
        rig.answer()
    assert rig.told == []


@in_turn("threshold", [0.1, 0.4, 1.0, 2.0, 2.2, 7.3, 60.0])
def test_a_block_is_told_after_the_threshold_give_or_take_half_an_interval(
    threshold: float,
) -> None:
    rig = Rig(threshold)
    interval = rig.monitor.interval
    assert 0.005 <= interval <= 0.25
    assert interval < threshold / 8
    # It began right after the last answer, or right before the next question.
    took_at_most = rig.look_until_told()
    took_at_least = took_at_most - interval
    assert took_at_most == pytest.approx(threshold + interval / 2)
    assert took_at_least == pytest.approx(threshold - interval / 2)


def test_a_block_of_the_default_threshold_is_known_within_half_a_second() -> None:
    """With time to spare, for looks that come late."""
    assert 0.4 < Rig(0.4).look_until_told() < 0.43


@pytest.mark.parametrize("threshold", [0.001, 0.01])
def test_looks_are_never_too_many(threshold: float) -> None:
    """The shortest of blocks are told a little later than asked for."""
    rig = Rig(threshold)
    assert rig.monitor.interval == 0.005
    assert threshold <= rig.look_until_told() <= threshold + 0.01


def test_a_block_is_told_once_with_its_place_and_stack() -> None:
    rig = Rig()
    rig.look_until_told()
    for _ in range(100):
        rig.look()
    ((place, stack),) = rig.told
    assert isinstance(stack, str)
    # The loop's thread is that of the test, which is looking at this moment.
    assert f"in {test_a_block_is_told_once_with_its_place_and_stack.__name__}" in stack
    assert "rig.look_until_told()" in stack
    # Outermost first, as everybody knows it from tracebacks; the guard is not to blame.
    assert stack.index("in look_until_told") < stack.index(f"{GUARD.name}/core/loop_monitor.py")
    name, _, function = place.partition(" in ")
    assert name.rpartition(":")[0] == __file__
    assert function == "look"


def test_the_end_of_a_block_is_told_with_its_length_in_the_answer_of_the_loop() -> None:
    """So by the loop's thread, which asks nothing of the thread of the monitor."""
    rig = Rig()
    rig.look_until_told()
    place = rig.told[0][0]
    rig.clock.advance(1.0)
    rig.answer()
    rig.look()
    assert rig.lengths == []
    rig.answer()
    assert rig.told[1][0] == f"over: {place}"
    assert rig.lengths == [rig.rounded(8.5, 1.0)]


def test_the_next_block_is_told_anew() -> None:
    rig = Rig()
    for _ in range(3):
        rig.look_until_told()
        rig.answer()
        rig.look()
        rig.answer()
    assert len(rig.told) == 6
    assert rig.lengths == [rig.rounded(8.5)] * 3


def test_a_block_that_ends_while_it_is_told_ends_after_that() -> None:
    """Logging may take a while."""
    rig = Rig()

    def go_on() -> None:
        rig.clock.advance(0.25)
        rig.answer()
        rig.clock.advance(5.0)
        rig.processor_clock.advance(5.0)

    rig.while_telling = go_on
    rig.look_until_told()
    for _ in range(3):
        rig.look()
        rig.answer()
    assert len(rig.told) == 2
    assert rig.lengths == [rig.rounded(8.5, 0.25)]


def test_a_loop_that_has_not_run_yet_does_not_hang() -> None:
    """An application that is being loaded, or a test without a loop."""
    told: list[str] = []
    clock = FakeClock()
    monitor = LoopMonitor(
        0.4,
        ask=lambda: None,
        thread_ident=threading.get_ident(),
        on_block=lambda place, _stack: told.append(place),
        on_unblock=lambda place, _seconds: told.append(place),
        sleep=clock.advance,
        clock=clock,
    )
    for _ in range(100):
        clock.advance(monitor.interval)
        monitor.look()
    assert told == []
    monitor.answer()
    for _ in range(12):
        clock.advance(monitor.interval)
        monitor.look()
    assert len(told) == 1


def test_a_process_that_was_halted_with_a_question_open_is_no_block() -> None:
    """No processor time went by; the loop answers as soon as it may."""
    rig = Rig()
    rig.look()
    rig.look(after=3600.0)
    rig.answer()
    rig.look()
    assert rig.told == []


def test_a_process_that_was_halted_with_no_question_open_is_no_block() -> None:
    rig = Rig()
    for _ in range(100):
        rig.look(worked=rig.monitor.interval)
        rig.answer()
    rig.look(after=2.0)
    rig.answer()
    rig.look()
    assert rig.told == []


def test_a_block_goes_on_after_a_halt() -> None:
    rig = Rig()
    rig.look()
    rig.look(after=3600.0)
    rig.look_until_told()
    assert len(rig.told) == 1


def test_looks_that_come_late_because_the_interpreter_is_taken_count_in_full() -> None:
    """As in a loop over calls that do not let go of it for a while each."""
    rig = Rig()
    rig.look()
    rig.look(after=0.3, worked=0.3)
    assert rig.told == []
    rig.look(after=0.3, worked=0.3)
    assert len(rig.told) == 1


def test_what_does_not_let_go_of_the_interpreter_is_told_when_it_does() -> None:
    """Nobody could look meanwhile, and the last question had been answered before it began."""
    rig = Rig()
    rig.look(after=2.0, worked=1.9)
    ((_, stack),) = rig.told
    assert "    rig.look(after=2.0, worked=1.9)\n" in str(stack)
    rig.clock.advance(0.01)
    rig.answer()
    rig.look()
    rig.answer()
    # It began within an interval of the last look.
    assert rig.lengths == [rig.rounded(-0.5, 2.01)]
    for _ in range(20):
        rig.look()
        rig.answer()
    assert len(rig.told) == 2


@pytest.mark.parametrize(("after", "expected"), [(0.39, 0), (0.41, 1)])
def test_what_does_not_let_go_of_the_interpreter_is_told_from_the_threshold_on(
    after: float, expected: int
) -> None:
    """An interval passes between the looks anyway."""
    rig = Rig()
    rig.look(after=after, worked=after)
    assert len(rig.told) == expected


@pytest.mark.parametrize(("worked", "expected"), [(0.2, 0), (0.3, 1)])
def test_work_of_other_processes_is_no_block(worked: float, expected: int) -> None:
    """On a machine with too much to do the monitor is late as well."""
    rig = Rig()
    rig.look(after=0.9, worked=worked)
    rig.answer()
    assert len(rig.told) == expected


@pytest.mark.parametrize("raised", [RuntimeError("x"), SystemExit(3), KeyboardInterrupt()])
def test_an_error_while_a_block_is_told_does_not_end_the_watch(raised: BaseException) -> None:
    rig = Rig()

    def fail() -> None:
        raise raised

    rig.while_telling = fail
    for _ in range(2):
        rig.look_until_told()
        rig.answer()
        rig.look()
        rig.answer()
    assert rig.lengths == [rig.rounded(8.5)] * 2


def test_the_monitor_looks_at_regular_times() -> None:
    """What looking takes is no part of the interval; looks that were missed are over."""
    rig = Rig(0.85)
    looks: list[float] = []

    def look() -> None:
        looks.append(round(rig.clock.now, 3))
        rig.clock.advance(0.03 if len(looks) != 3 else 0.57)
        if len(looks) == 6:
            rig.monitor.stop()

    rig.monitor.look = look  # type: ignore[method-assign]
    began_at = rig.clock.now
    rig.monitor.run()
    assert [round(at - began_at, 3) for at in looks] == [0.1, 0.2, 0.3, 0.87, 0.97, 1.07]
    assert all(0.0 <= seconds <= 0.1001 for seconds in rig.slept)


def test_the_monitor_asks_only_while_it_is_not_stopped() -> None:
    """Once it has been stopped it asks nothing, so the watcher that it asks may be gone."""
    rig = Rig()
    rig.is_open = False

    def stop_meanwhile(seconds: float) -> None:
        rig.clock.advance(seconds)
        rig.monitor.stop()

    rig.monitor._sleep = stop_meanwhile
    rig.monitor.run()
    assert not rig.is_open


def test_the_monitor_ends_with_its_loop() -> None:
    clock = FakeClock()
    asked: list[float] = []

    def ask() -> None:
        asked.append(clock.now)
        if len(asked) == 3:
            raise ValueError("operation on destroyed loop")
        monitor.answer()

    monitor = LoopMonitor(
        0.4,
        ask=ask,
        thread_ident=threading.get_ident(),
        on_block=lambda *_: None,
        on_unblock=lambda *_: None,
        sleep=clock.advance,
        clock=clock,
    )
    monitor.run()
    assert len(asked) == 3


def frame(filename: str, name: str = "f", lineno: int = 7) -> Frame:
    return Frame(filename, lineno, name)


@in_turn(
    "inner",
    [
        f"{STDLIB}/socket.py",
        f"{INSTALLED}/requests/api.py",
        "/usr/lib/python3/dist-packages/requests/api.py",
        f"{GUARD}/events/handlers.py",
        "<frozen importlib._bootstrap>",
    ],
)
def test_the_place_is_in_the_application(inner: str) -> None:
    """What it called is in the stack."""
    frames = [frame(f"{INSTALLED}/gevent/x.py"), frame("/srv/a.py"), frame("/srv/b.py", "g", 8)]
    assert place_of([*frames, frame(inner)]) == "/srv/b.py:8 in g"


def test_an_application_among_the_installed_packages_is_found_too() -> None:
    frames = [frame(f"{INSTALLED}/shop/views.py", "pay"), frame(f"{STDLIB}/socket.py", "connect")]
    assert place_of(frames) == f"{INSTALLED}/shop/views.py:7 in pay"


def test_without_an_application_the_place_is_the_innermost() -> None:
    frames = [frame(f"{STDLIB}/threading.py"), frame(f"{STDLIB}/socket.py", "connect", 9)]
    assert place_of(frames) == f"{STDLIB}/socket.py:9 in connect"


def test_without_a_stack_the_place_is_unknown() -> None:
    assert place_of([]) == UNKNOWN


def test_code_without_a_file_belongs_to_the_application() -> None:
    """It was given to ``exec`` or to ``python -c``."""
    assert place_of([frame("<string>", "<module>")]) == "<string>:7 in <module>"


def test_a_thread_that_has_ended_has_no_frames() -> None:
    assert list(frames_of(-1)) == []


def test_the_frames_are_those_of_the_thread(nothing_left_behind: None) -> None:
    began, release = threading.Event(), threading.Event()

    def inner() -> None:
        began.set()
        release.wait(10.0)

    def outer() -> None:
        inner()

    thread = threading.Thread(target=outer)
    thread.start()
    assert began.wait(10.0)
    frames = frames_of(thread.ident or 0)
    release.set()
    thread.join()
    names = [each.name for each in frames]
    assert names[names.index("outer") :][:2] == ["outer", "inner"]
    assert place_of(frames).endswith("in inner")


def test_of_a_deep_stack_the_innermost_frames_are_told() -> None:
    def descend(depth: int) -> list[Frame]:
        return descend(depth - 1) if depth else list(frames_of(threading.get_ident()))

    frames = descend(300)
    assert len(frames) == 100
    assert frames[-1].name == "frames_of"
    assert {each.name for each in frames[:-1]} == {"descend"}


def test_the_files_of_the_standard_library_are_known() -> None:
    """Also in a virtual environment, which has them elsewhere."""
    assert place_of([frame("/srv/a.py"), frame(json.__file__)]) == "/srv/a.py:7 in f"


def test_sources_are_read_while_a_block_is_not_one_yet(tmp_path: Path) -> None:
    """Reading them takes time, and more of it the busier the interpreter is."""
    source = tmp_path / "hanging.py"
    source.write_text("def hang(look):\n    return look()\n")
    names: dict[str, Any] = {}
    exec(compile(source.read_text(), str(source), "exec"), names)
    rig = Rig()

    def look_until_told() -> None:
        for _ in range(6):
            rig.look()
        source.unlink()
        rig.look_until_told()

    names["hang"](look_until_told)
    ((_, stack),) = rig.told
    assert f'File "{source}", line 2, in hang\n    return look()\n' in str(stack)


def test_sources_that_were_not_read_in_time_are_left_out(tmp_path: Path) -> None:
    """Innermost frames have the first turn, half an interval at each look for all together."""
    rig = Rig()
    frames = []
    for number in range(9):
        path = tmp_path / f"module{number}.py"
        path.write_text(f"call({number})\n")
        frames.append(frame(str(path), lineno=1))
    sources = rig.monitor._sources
    sources._clock = lambda: rig.clock.advance(0.01) or rig.clock.now  # type: ignore[func-returns-value]
    sources.read(frames, 0.025)
    text = sources.text_of(frames)
    assert re.findall(r"call\((\d)\)", text) == ["6", "7", "8"]
    assert text.count("in f\n") == 9
    sources.read(frames, 0.025)
    assert re.findall(r"call\((\d)\)", sources.text_of(frames)) == ["3", "4", "5", "6", "7", "8"]


def test_a_stack_is_written_as_in_a_traceback() -> None:
    """Of a thread that stays where it is."""
    began, release = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        release.wait(10.0)

    thread = threading.Thread(target=hang)
    thread.start()
    assert began.wait(10.0)
    sources = Rig().monitor._sources
    ident = thread.ident or 0
    # Until it has come to rest.
    frames = wait_until(lambda: (f := frames_of(ident))[-1].name == "wait" and f)
    sources.read(frames, 10.0)
    written = sources.text_of(frames)
    expected = "".join(traceback.format_stack(sys._current_frames()[ident]))
    release.set()
    thread.join()
    assert written == expected


def test_a_stack_without_sources_is_written_too() -> None:
    """Of a zipped application, or of one that came without them."""
    sources = Rig().monitor._sources
    frames = [frame("/srv/gone.py"), frame("<string>", "g", 8), frame(__file__, "h", 10**6)]
    sources.read(frames, 10.0)
    assert sources.text_of(frames) == (
        '  File "/srv/gone.py", line 7, in f\n'
        '  File "<string>", line 8, in g\n'
        f'  File "{__file__}", line 1000000, in h\n'
    )


def test_the_time_of_reading_sources_is_no_oversleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk: the loop goes on meanwhile, and works."""
    rig = Rig()

    def read(_name: str) -> list[str]:
        rig.clock.advance(0.5)
        rig.processor_clock.advance(0.5)
        if rig.is_open:
            rig.answer()
        return []

    monkeypatch.setattr(linecache, "getlines", read)
    for _ in range(3):
        rig.look()
    assert not rig.is_open
    rig.look()
    rig.answer()
    assert rig.told == []

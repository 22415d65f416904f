"""Blocks of the event loop as signals, and as log lines of a process that hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.loop_blocks import MAX_PLACES, LoopBlockReports
from flask_socketio_guard.telemetry.records import LoopBlock, Telemetry

if TYPE_CHECKING:
    from pathlib import Path


class Sender:
    """Stands for an application."""


class Hearer:
    """Blocks of one sender, as they were signalled."""

    def __init__(self) -> None:
        self.sender = Sender()
        self.heard: list[LoopBlock] = []
        self.reports = LoopBlockReports(Telemetry(self.sender))
        self._subscription = signals.subscribe(signals.loop_blocked, self.sender, self.heard.append)

    def block(self, place: str, stack: str = "stack", seconds: float = 1.0) -> None:
        """Let a block begin and end."""
        self.reports.blocked(place, stack)
        self.reports.unblocked(place, seconds)


@pytest.fixture
def hearer() -> Hearer:
    return Hearer()


def test_the_first_block_at_a_place_is_told_while_it_lasts_and_afterwards(hearer: Hearer) -> None:
    hearer.reports.blocked("a.py:1 in f", "the stack")
    assert hearer.heard == [LoopBlock("a.py:1 in f", "the stack", None)]
    hearer.reports.unblocked("a.py:1 in f", 1.5)
    assert hearer.heard[1:] == [LoopBlock("a.py:1 in f", "the stack", 1.5)]


def test_further_blocks_at_a_place_are_told_afterwards_only(hearer: Hearer) -> None:
    hearer.block("a.py:1 in f")
    hearer.heard.clear()
    hearer.block("a.py:1 in f", "another way there", 2.0)
    hearer.block("a.py:1 in f", "a third way", 3.0)
    assert hearer.heard == [
        LoopBlock("a.py:1 in f", "another way there", 2.0),
        LoopBlock("a.py:1 in f", "a third way", 3.0),
    ]


def test_each_place_is_told_for_itself(hearer: Hearer) -> None:
    for place in ("a.py:1 in f", "a.py:2 in f", "b.py:1 in f"):
        hearer.block(place)
    assert [block.duration for block in hearer.heard] == [None, 1.0] * 3


def test_two_applications_are_told_each_of_its_own(hearer: Hearer) -> None:
    other = Hearer()
    hearer.block("a.py:1 in f")
    assert other.heard == []
    other.block("a.py:1 in f")
    assert len(hearer.heard) == len(other.heard) == 2


def test_a_block_may_begin_before_it_is_told_that_the_last_one_is_over(hearer: Hearer) -> None:
    """A task tells of the end, and may have to wait for its turn."""
    hearer.reports.blocked("a.py:1 in f", "first")
    hearer.reports.blocked("b.py:1 in f", "second")
    hearer.reports.unblocked("a.py:1 in f", 1.0)
    hearer.reports.unblocked("b.py:1 in f", 2.0)
    assert hearer.heard[2:] == [
        LoopBlock("a.py:1 in f", "first", 1.0),
        LoopBlock("b.py:1 in f", "second", 2.0),
    ]


def test_the_oldest_of_too_many_places_is_forgotten(hearer: Hearer) -> None:
    for number in range(MAX_PLACES + 1):
        hearer.block(f"a.py:{number} in f")
    hearer.heard.clear()
    hearer.block("a.py:1 in f")
    assert [block.duration for block in hearer.heard] == [1.0], "was still known"
    hearer.block("a.py:0 in f")
    assert [block.duration for block in hearer.heard[1:]] == [None, 1.0], "was forgotten"
    assert len(hearer.reports._places) == MAX_PLACES


def test_no_stack_is_kept_of_what_is_over(hearer: Hearer) -> None:
    for number in range(10):
        hearer.block(f"a.py:{number} in f", "x" * 100_000)
    assert hearer.reports._stacks == {}


def test_the_end_of_a_block_that_nobody_told_of_is_told(hearer: Hearer) -> None:
    hearer.reports.unblocked("a.py:1 in f", 1.0)
    assert hearer.heard == [LoopBlock("a.py:1 in f", "", 1.0)]


def test_a_subscriber_that_raises_does_not_keep_others_from_hearing(
    hearer: Hearer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it reach the thread of the monitor."""

    def fail(_record: LoopBlock) -> None:
        raise RuntimeError("x")

    subscription = signals.subscribe(signals.loop_blocked, hearer.sender, fail)
    thread = threading.Thread(target=hearer.reports.blocked, args=("a.py:1 in f", "stack"))
    thread.start()
    thread.join(10.0)
    assert len(hearer.heard) == 1
    assert [record.message for record in caplog.records] == [
        "a subscriber of 'loop-blocked' raised"
    ]
    del subscription


PROGRAM = """
from gevent import monkey; monkey.patch_all()
import _socket, logging, re, sys, time
import gevent
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.loop_blocks import LoopBlockReports
from flask_socketio_guard.core.runtime import GeventRuntime, clock

native_sleep = monkey.get_original("time", "sleep")
start_new_thread = monkey.get_original("_thread", "start_new_thread")

class Stderr(logging.StreamHandler):
    # Says, and that in one write, at which moment of the block the line was written.
    def format(self, record):
        return f"{clock() - began_at:.3f} {is_blocking} {super().format(record)}"

logger = logging.getLogger("test")
logger.addHandler(Stderr())
logger.setLevel(logging.INFO)
is_blocking = "before"
began_at = clock()
late = 0.0

class Sender:
    pass

def log(block):
    function, sources = block.place.rpartition(" ")[2], block.stack.count("    return module")
    logger.warning("%s in %s, %d sources", block.duration, function, sources)

def sleeping():
    native_sleep(1.0)

def working():
    deadline = clock() + 1.0
    while clock() < deadline:
        sum(range(100))

def descending():
    # Through a file for each frame, as a web application does.
    import module0
    module0.descend(working)

def matching():
    # One call that does not let go of the interpreter, and takes some seconds.
    re.match(r"(a+)+b", "a" * 24)

def resolving():
    # As a look-up in C: it waits in the system for an answer of the network.
    left, right = _socket.socketpair()
    start_new_thread(lambda: (native_sleep(1.0), right.send(b"x")), ())
    left.recv(1)

def logging_slowly():
    # While it holds the lock of a handler, which the line about it needs as well.
    logger.info("slow")

class Slow(logging.Handler):
    def emit(self, record):
        if record.getMessage() == "slow":
            native_sleep(1.0)

logger.addHandler(Slow())
sender = Sender()
subscription = signals.subscribe(signals.loop_blocked, sender, log)
runtime = GeventRuntime()
runtime.bind_loop()
reports = LoopBlockReports(signals.Telemetry(sender))
stop = runtime.watch_loop(0.4, reports.blocked, reports.unblocked)
gevent.sleep(0.2)

def control():
    # How late this machine lets any thread run that waits for as long as the monitor does.
    global late
    native_sleep(0.4)
    late = clock() - began_at - 0.4

def block():
    global is_blocking, began_at
    is_blocking, began_at = "during", clock()
    if sys.argv[1] != "matching":  # which no thread can run beside
        start_new_thread(control, ())
    globals()[sys.argv[1]]()
    is_blocking = "after"

chatter = gevent.spawn(lambda: [gevent.sleep(0.001) or logger.debug("x") for _ in range(10**9)])
for _ in range(int(sys.argv[2])):
    gevent.spawn(block).join()
    gevent.sleep(0.2)
chatter.kill()
logger.info("alive %.3f", late)
stop()
"""

LINE = re.compile(
    r"(?P<at>[\d.]+) (?P<moment>\w+) (?P<duration>\S+) "
    r"in (?P<place>\w+), (?P<sources>\d+) sources"
)


class Told(NamedTuple):
    """What a process said that hung.

    Attributes:
        lines: One for each line of its log about that.
        late: How long a thread of that process that slept had to wait for its turn, in seconds.
    """

    lines: list[dict[str, Any]]
    late: float

    @property
    def is_fair(self) -> bool:
        """Whether the machine let the process run in time, so that times say something."""
        return self.late < 0.02


def run_blocking(kind: str, *, times: int = 1, path: str = "") -> Told:
    """Let a patched process hang *times* times.

    Its last line says that it still logs, from its loop's thread.
    """
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, str(times)],
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if not line.endswith(" slow")]
    *lines, last = lines
    assert " alive " in last, answer.stderr
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), answer.stderr
    return Told(
        [match.groupdict() for match in matches if match is not None],
        float(last.rpartition(" ")[2]),
    )


def run_on_a_quiet_machine(kind: str, function: str, *, path: str = "") -> Told:
    """Run up to three times: a machine with too much to do makes everything late.

    What else it halts meanwhile, in other places, is no part of what is returned.
    """
    for _ in range(3):
        told = run_blocking(kind, path=path)
        lines = [line for line in told.lines if line["place"] == function]
        told = Told(lines, told.late)
        if told.is_fair and len(lines) == 2 and float(lines[0]["at"]) < 0.5:
            break
    return told


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("sleeping", "sleeping"),
        ("working", "working"),
        ("resolving", "resolving"),
        ("logging_slowly", "emit"),
    ],
)
def test_a_process_that_hangs_says_so_while_it_hangs(kind: str, function: str) -> None:
    """Through its own log, half a second after it began, where nothing else is to be done."""
    told = run_on_a_quiet_machine(kind, function)
    first, second = told.lines
    assert (first["moment"], first["duration"], first["place"]) == ("during", "None", function)
    assert float(first["at"]) >= 0.36
    assert (second["moment"], second["place"]) == ("after", function)
    assert float(second["duration"]) >= 0.9
    if told.is_fair:
        assert float(first["at"]) < 0.75
        assert float(second["duration"]) <= 1.1


def test_a_deep_stack_makes_nobody_wait(tmp_path: Path) -> None:
    """Work that hangs gives the interpreter back slowly, and for every access to a file anew."""
    filler = "# a line of the source\n" * 300
    for number in range(25):
        call = "target()" if number == 24 else f"module{number + 1}.descend(target)"
        source = (
            f"import module{(number + 1) % 25}\n{filler}def descend(target):\n    return {call}\n"
        )
        (tmp_path / f"module{number}.py").write_text(source)
    told = run_on_a_quiet_machine("descending", "working", path=str(tmp_path))
    first, second = told.lines
    assert (first["moment"], first["place"]) == ("during", "working")
    if told.is_fair:
        assert float(first["at"]) < 0.75
    # Some sources may be missing; all would be as fine.
    assert int(first["sources"]) >= 1
    assert second["moment"] == "after"


@pytest.mark.alone  # who hardly gets the processor counts as halted, and has nothing to say
def test_a_process_that_hangs_in_the_interpreter_says_so_as_soon_as_it_can() -> None:
    """Nobody else can run before, in any thread."""
    for _ in range(3):
        lines = [line for line in run_blocking("matching").lines if line["place"] == "matching"]
        if len(lines) == 2:
            break
    first, second = lines
    assert first["duration"] == "None"
    assert float(second["duration"]) == pytest.approx(float(first["at"]), rel=0.5)


def test_a_process_that_hangs_often_at_one_place_says_so_once_and_every_length() -> None:
    lines = run_blocking("sleeping", times=3).lines
    assert [line["duration"] == "None" for line in lines] == [True, False, False, False]
    assert {line["place"] for line in lines} == {"sleeping"}

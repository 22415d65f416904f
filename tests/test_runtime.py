"""The same few verbs over greenlets and over threads."""

from __future__ import annotations

import contextvars
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import gevent.local
import gevent.thread
import greenlet
import pytest

from flask_socketio_guard.core import runtime_gevent, runtime_greenlets
from flask_socketio_guard.core.loop_monitor import LoopMonitor
from flask_socketio_guard.core.runtime import (
    MAX_LOOP_QUEUE,
    GeventRuntime,
    Runtime,
    ThreadRuntime,
    clock,
    is_patched,
    runtime_for,
)
from flask_socketio_guard.errors import ConfigError, HandlerTimeout, LoopQueueFull
from tests.support import unit_support, wait_until
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


class UnheardOfError(BaseException):
    """What no application should raise."""


@pytest.fixture
def gevent_runtime(nothing_left_behind: None) -> GeventRuntime:
    return GeventRuntime()


@pytest.fixture
def settled(nothing_left_behind: None) -> GeventRuntime:
    """A runtime whose home is the thread of the tests."""
    runtime = GeventRuntime()
    runtime.bind_loop()
    return runtime


@pytest.fixture
def thread_runtime(nothing_left_behind: None) -> ThreadRuntime:
    return ThreadRuntime()


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        gevent.GreenletExit(),
        gevent.Timeout(1.0),
        UnheardOfError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_a_job_is_told_and_goes_no_further(
    runtime: Runtime, raised: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed, and no exit reaches the process."""

    def fail() -> None:
        raise raised

    told: list[BaseException | None] = []
    job = runtime.spawn(fail, name="failing", on_exit=told.append)
    wait_for(runtime, lambda: told)
    assert told == [raised]
    assert job.exception is raised
    assert job.join(1.0)
    assert capfd.readouterr() == ("", "")


def test_a_job_that_returns_tells_of_its_end_without_an_error(runtime: Runtime) -> None:
    told: list[BaseException | None] = []
    job = runtime.spawn(lambda: "done", name="done", on_exit=told.append)
    wait_for(runtime, lambda: told)
    assert told == [None]
    assert job.exception is None
    assert job.join(1.0)
    assert not job.is_alive()


def test_a_job_is_alive_until_it_ends(runtime: Runtime) -> None:
    release = runtime.flag()
    job = runtime.spawn(release.wait, name="waiting")
    assert job.is_alive()
    assert not job.join(0.01)
    release.set()
    assert job.join(5.0)


def test_a_job_is_known_by_its_name(runtime: Runtime) -> None:
    names = []

    def note() -> None:
        current = gevent.getcurrent()
        names.append(getattr(current, "name", None) or threading.current_thread().name)

    job = runtime.spawn(note, name="socketio-guard:somebody")
    assert job.join(5.0)
    assert job.name == "socketio-guard:somebody"
    assert names == ["socketio-guard:somebody"]


def test_a_job_may_join_itself(thread_runtime: ThreadRuntime) -> None:
    """It is alive, so the answer is no; a deadlock would be worse."""
    answers = []
    ready = thread_runtime.flag()

    def join_myself() -> None:
        ready.wait()
        answers.append(job.join(None))

    job = thread_runtime.spawn(join_myself, name="myself")
    ready.set()
    assert job.join(5.0)
    assert answers == [False]


def test_a_killed_greenlet_tells_that_it_was_killed(gevent_runtime: GeventRuntime) -> None:
    told: list[BaseException | None] = []
    job = gevent_runtime.spawn(gevent_runtime.flag().wait, name="deaf", on_exit=told.append)
    gevent_runtime.sleep(0)
    job.kill()
    wait_for(gevent_runtime, lambda: told)
    assert isinstance(told[0], gevent.GreenletExit)
    assert not job.is_alive()


def test_a_greenlet_killed_before_its_first_step_tells_that_it_was_killed(
    gevent_runtime: GeventRuntime,
) -> None:
    """Its own code never ran, so only gevent knows."""
    told: list[BaseException | None] = []
    ran: list[bool] = []
    job = gevent_runtime.spawn(lambda: ran.append(True), name="unborn", on_exit=told.append)
    job.kill()
    wait_for(gevent_runtime, lambda: told)
    assert isinstance(told[0], gevent.GreenletExit)
    assert ran == []


def test_a_thread_cannot_be_killed(thread_runtime: ThreadRuntime) -> None:
    release = thread_runtime.flag()
    job = thread_runtime.spawn(release.wait, name="stubborn")
    job.kill()
    assert not job.join(0.05)
    assert not thread_runtime.can_kill
    release.set()
    assert job.join(5.0)


def test_an_end_handler_may_wait(runtime: Runtime) -> None:
    """It does not run in gevent's hub, where nothing may block."""
    told = []

    def on_exit(exc: BaseException | None) -> None:
        runtime.sleep(0.01)
        told.append(exc)

    job = runtime.spawn(lambda: None, name="ended", on_exit=on_exit)
    wait_for(runtime, lambda: told)
    assert told == [None]
    assert job.join(1.0)


def test_calls_are_made_later_each_in_its_time(runtime: Runtime) -> None:
    called: list[str] = []
    runtime.call_later(0.2, lambda: called.append("second"))
    runtime.call_later(0.05, lambda: called.append("first"))
    assert called == []
    wait_for(runtime, lambda: len(called) == 2)
    assert called == ["first", "second"]


def test_a_cancelled_call_is_not_made(runtime: Runtime) -> None:
    called: list[bool] = []
    timer = runtime.call_later(0.05, lambda: called.append(True))
    timer.cancel()
    timer.cancel()
    runtime.sleep(0.1)
    assert called == []


def test_an_event_wakes_who_waits_for_it(runtime: Runtime) -> None:
    event = runtime.flag()
    assert not event.is_set()
    assert event.wait(0.01) is False
    woken: list[bool] = []
    job = runtime.spawn(lambda: woken.append(event.wait(5.0)), name="waiting")
    runtime.sleep(0.01)
    event.set()
    assert job.join(5.0)
    assert woken == [True]
    event.clear()
    assert not event.is_set()


def test_an_event_set_by_a_native_thread_wakes_a_greenlet(gevent_runtime: GeventRuntime) -> None:
    """``emit`` is called from thread pools too; its outbox is emptied by a greenlet."""
    event = gevent_runtime.flag()
    woken: list[float] = []

    def wait() -> None:
        event.wait(5.0)
        woken.append(clock())

    job = gevent_runtime.spawn(wait, name="waiting")
    gevent_runtime.sleep(0.01)
    thread = threading.Timer(0.05, event.set)
    began_at = clock()
    thread.start()
    assert job.join(5.0)
    thread.join()
    assert woken[0] - began_at < 2.0


def test_a_call_within_its_timeout_returns_or_raises_as_ever(runtime: Runtime) -> None:
    assert runtime.call_with_timeout(lambda: "done", 5.0) == "done"
    with pytest.raises(ZeroDivisionError):
        runtime.call_with_timeout(lambda: 1 // 0, 5.0)
    with pytest.raises(SystemExit):
        runtime.call_with_timeout(lambda: sys.exit(3), 5.0)


def test_a_call_beyond_its_timeout_raises(runtime: Runtime) -> None:
    release = runtime.flag()
    with pytest.raises(HandlerTimeout, match=r"^the handler took longer than 0\.05 s$") as caught:
        runtime.call_with_timeout(release.wait, 0.05)
    assert caught.value.seconds == 0.05
    release.set()


def test_a_greenlet_beyond_its_timeout_is_interrupted_where_it_waits(
    gevent_runtime: GeventRuntime,
) -> None:
    steps = []

    def call() -> None:
        steps.append("began")
        try:
            gevent_runtime.flag().wait()
        finally:
            steps.append("cleaned up")

    with pytest.raises(HandlerTimeout):
        gevent_runtime.call_with_timeout(call, 0.02)
    assert steps == ["began", "cleaned up"]


def test_a_thread_beyond_its_timeout_runs_on_unheard(thread_runtime: ThreadRuntime) -> None:
    release, ended = thread_runtime.flag(), thread_runtime.flag()

    def call() -> None:
        release.wait()
        ended.set()
        raise RuntimeError("nobody hears this")

    with pytest.raises(HandlerTimeout):
        thread_runtime.call_with_timeout(call, 0.02)
    release.set()
    assert ended.wait(5.0)


def test_a_timeout_that_is_the_applications_own_passes_through(
    gevent_runtime: GeventRuntime,
) -> None:
    """``with gevent.Timeout(...)`` in a handler is not the guard's timeout."""
    own = gevent.Timeout(0.01)

    def call() -> None:
        own.start()
        gevent_runtime.flag().wait()

    with pytest.raises(gevent.Timeout) as caught:
        gevent_runtime.call_with_timeout(call, 5.0)
    assert caught.value is own


def test_a_timeout_does_not_fire_after_its_call_has_returned(
    gevent_runtime: GeventRuntime,
) -> None:
    gevent_runtime.call_with_timeout(lambda: None, 0.01)
    gevent_runtime.sleep(0.03)


def test_a_call_with_a_timeout_sees_the_context_of_its_caller(runtime: Runtime) -> None:
    """Flask's request lives in context variables."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    variable.set("the caller's")
    assert runtime.call_with_timeout(variable.get, 5.0) == "the caller's"


@pytest.mark.parametrize(
    ("async_mode", "expected"), [("gevent", GeventRuntime), ("threading", ThreadRuntime)]
)
def test_an_application_gets_the_runtime_of_its_async_mode(
    async_mode: str, expected: type[Runtime]
) -> None:
    assert isinstance(runtime_for(async_mode, is_write_only=False), expected)


@pytest.mark.parametrize("async_mode", ["aiohttp", "asgi"])
def test_another_async_mode_is_refused_with_the_two_that_work(async_mode: str) -> None:
    with pytest.raises(ConfigError) as caught:
        runtime_for(async_mode, is_write_only=False)
    assert str(caught.value) == (
        f"async_mode {async_mode!r} is not supported: "
        'create SocketIO with async_mode="gevent" or async_mode="threading"'
    )


@pytest.mark.parametrize("async_mode", ["gevent", "threading", "eventlet"])
def test_a_write_only_process_gets_threads_unless_it_is_patched(async_mode: str) -> None:
    """Its mode says no more than that gevent is installed."""
    assert not is_patched()
    assert isinstance(runtime_for(async_mode, is_write_only=True), ThreadRuntime)


def test_a_patched_write_only_process_gets_greenlets() -> None:
    """In a process of its own, for patching cannot be undone."""
    program = (
        "from gevent import monkey; monkey.patch_all()\n"
        "from flask_socketio_guard.core.runtime import is_patched, runtime_for\n"
        "print(is_patched(), type(runtime_for('threading', is_write_only=True)).__name__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert answer.stdout.split() == ["True", "GeventRuntime"]


def test_the_clock_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock may be set at any time."""
    before = clock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock() >= before


def test_sleep_gives_way_to_others(runtime: Runtime) -> None:
    steps: list[str] = []
    job = runtime.spawn(lambda: steps.append("other"), name="other")
    wait_for(runtime, lambda: steps)
    assert job.join(1.0)


@pytest.mark.parametrize("raised", [None, ValueError("x")])
def test_no_job_needs_anyone_to_be_told(
    runtime: Runtime, raised: Exception | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        if raised is not None:
            raise raised

    job = runtime.spawn(run, name="alone")
    assert job.join(5.0)
    assert job.exception is raised
    assert capfd.readouterr().err == ""


def in_thread(target: Callable[[], object]) -> None:
    """Call *target* in a native thread and wait for its end, while the loop does not run."""
    thread = threading.Thread(target=target)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()


def run_program(program: str, *, timeout: float = 30.0, **options: str) -> tuple[str, str]:
    """Run *program* in a process of its own, for patching cannot be undone.

    Returns:
        What it wrote to stdout and to stderr.
    """
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **options},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout, answer.stderr


def test_calls_are_made_in_the_next_turn_in_their_order(gevent_runtime: GeventRuntime) -> None:
    called: list[int] = []
    for number in range(200):
        gevent_runtime.call_soon(partial(called.append, number))
    assert called == []
    wait_for(gevent_runtime, lambda: len(called) == 200)
    assert called == list(range(200))


def test_the_loop_itself_makes_the_calls(gevent_runtime: GeventRuntime) -> None:
    """No greenlet is made for them."""
    can_wait: list[bool] = []
    gevent_runtime.call_soon(lambda: can_wait.append(gevent_runtime.can_wait()))
    wait_for(gevent_runtime, lambda: can_wait)
    assert can_wait == [False]


def test_a_call_of_another_thread_is_made_at_home(settled: GeventRuntime) -> None:
    called_by: list[int] = []
    in_thread(lambda: settled.call_soon(lambda: called_by.append(threading.get_ident())))
    wait_for(settled, lambda: called_by)
    assert called_by == [threading.get_ident()]


def test_without_a_loop_calls_are_made_at_once(thread_runtime: ThreadRuntime) -> None:
    called: list[str] = []
    thread_runtime.bind_loop()
    thread_runtime.call_soon(lambda: called.append("soon"))
    in_thread(lambda: thread_runtime.call_soon_threadsafe(lambda: called.append("home")))
    assert called == ["soon", "home"]
    with pytest.raises(ZeroDivisionError):
        thread_runtime.call_soon_threadsafe(lambda: 1 // 0)


def test_every_thread_is_at_home_until_a_runtime_settles(runtime: Runtime) -> None:
    at_home = [runtime.on_loop()]
    in_thread(lambda: at_home.append(runtime.on_loop()))
    assert at_home == [True, True]


def test_without_a_loop_every_thread_is_at_home(thread_runtime: ThreadRuntime) -> None:
    thread_runtime.bind_loop()
    at_home = [thread_runtime.on_loop()]
    in_thread(lambda: at_home.append(thread_runtime.on_loop()))
    assert at_home == [True, True]


def test_the_thread_of_the_loop_is_home_with_all_its_greenlets(settled: GeventRuntime) -> None:
    at_home = [settled.on_loop()]
    job = settled.spawn(lambda: at_home.append(settled.on_loop()), name="greenlet")
    assert job.join(5.0)
    settled.call_soon(lambda: at_home.append(settled.on_loop()))
    wait_for(settled, lambda: len(at_home) == 3)
    assert at_home == [True, True, True]


def test_another_thread_is_not_at_home(settled: GeventRuntime) -> None:
    """Whether it runs an event loop of its own or not."""
    at_home: list[bool] = []

    def ask() -> None:
        at_home.append(settled.on_loop())
        gevent.spawn(lambda: at_home.append(settled.on_loop())).join()

    in_thread(ask)
    assert at_home == [False, False]


def test_to_settle_again_at_home_changes_nothing(settled: GeventRuntime) -> None:
    called: list[int] = []
    settled.call_soon_threadsafe(partial(called.append, 1))
    settled.bind_loop()
    settled.call_soon_threadsafe(partial(called.append, 2))
    wait_for(settled, lambda: len(called) == 2)
    assert called == [1, 2]


def test_to_settle_elsewhere_moves_what_comes_from_then_on(settled: GeventRuntime) -> None:
    """What had been handed over is still called where it was handed to."""
    called_by: dict[str, int] = {}
    settled.call_soon_threadsafe(lambda: called_by.update(before=threading.get_ident()))
    moved: list[int] = []

    def move() -> None:
        settled.bind_loop()
        moved.append(threading.get_ident())
        settled.call_soon_threadsafe(lambda: called_by.update(after=threading.get_ident()))
        wait_for(settled, lambda: "after" in called_by)

    in_thread(move)
    assert not settled.on_loop()
    gevent.sleep(0)
    settled.bind_loop()
    wait_for(settled, lambda: len(called_by) == 2)
    assert called_by == {"before": threading.get_ident(), "after": moved[0]}


def test_what_is_handed_over_is_called_in_order_in_a_task_at_home(settled: GeventRuntime) -> None:
    called: list[tuple[int, int, bool]] = []

    def note(number: int) -> None:
        settled.sleep(0.001 if number % 3 else 0)
        called.append((number, threading.get_ident(), settled.can_wait()))

    def hand_over() -> None:
        for number in range(30):
            settled.call_soon_threadsafe(partial(note, number))

    in_thread(hand_over)
    assert called == []
    wait_for(settled, lambda: len(called) == 30)
    assert called == [(number, threading.get_ident(), True) for number in range(30)]


def test_what_waits_keeps_waiting_what_is_handed_over_later(settled: GeventRuntime) -> None:
    """One task calls everything, however often the loop is woken."""
    called: list[str] = []
    is_waiting, release = settled.flag(), settled.flag()

    def wait() -> None:
        is_waiting.set()
        release.wait(5.0)
        called.append("first")

    settled.call_soon_threadsafe(wait)
    assert is_waiting.wait(5.0)
    in_thread(lambda: settled.call_soon_threadsafe(lambda: called.append("second")))
    settled.sleep(0.02)
    settled.call_soon_threadsafe(lambda: called.append("third"))
    settled.sleep(0.02)
    assert called == []
    release.set()
    wait_for(settled, lambda: len(called) == 3)
    assert called == ["first", "second", "third"]


def test_what_is_handed_over_at_home_keeps_its_place(settled: GeventRuntime) -> None:
    """Behind what another thread handed over before, and never within the call."""
    called: list[str] = []
    in_thread(lambda: settled.call_soon_threadsafe(lambda: called.append("thread")))
    settled.call_soon_threadsafe(lambda: called.append("home"))
    assert called == []
    wait_for(settled, lambda: len(called) == 2)
    assert called == ["thread", "home"]


def test_a_runtime_that_has_not_settled_hands_over_to_a_task_of_its_own(
    gevent_runtime: GeventRuntime,
) -> None:
    called: list[str] = []
    gevent_runtime.call_soon_threadsafe(lambda: called.append("first"))
    gevent_runtime.call_soon_threadsafe(lambda: called.append("second"))
    assert called == []
    wait_for(gevent_runtime, lambda: len(called) == 2)
    assert called == ["first", "second"]


def test_many_threads_hand_over_at_once(settled: GeventRuntime) -> None:
    """Everything is called, and what one thread handed over in its order."""
    called: list[tuple[int, int]] = []
    barrier = threading.Barrier(8)

    def hand_over(thread_number: int) -> None:
        barrier.wait()
        for number in range(1000):
            settled.call_soon_threadsafe(partial(called.append, (thread_number, number)))

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hand_over, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_for(settled, lambda: len(called) == 8000, timeout=20.0)
    finally:
        sys.setswitchinterval(switch_interval)
    for thread in threads:
        thread.join()
    for thread_number in range(8):
        numbers = [number for by, number in called if by == thread_number]
        assert numbers == list(range(1000))


def test_no_wake_up_is_lost(settled: GeventRuntime) -> None:
    """Each hand-over meets a loop that has just nothing more to do, or is about to wait."""
    failed: list[int] = []
    all_done = settled.flag()
    barrier = threading.Barrier(2)

    def hand_over() -> None:
        for number in range(2000):
            called = threading.Event()
            settled.call_soon_threadsafe(called.set)
            if not called.wait(5.0):
                failed.append(number)
                break
        if barrier.wait(10.0) == 0:
            settled.call_soon_threadsafe(all_done.set)

    threads = [threading.Thread(target=hand_over) for _ in range(2)]
    for thread in threads:
        thread.start()
    # One long wait: nothing else wakes the loop.
    assert all_done.wait(60.0)
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        gevent.GreenletExit(),
        UnheardOfError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_handed_over_may_raise(
    settled: GeventRuntime, raised: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is up to who handed it over to tell; those behind it are called."""

    def fail() -> None:
        raise raised

    called: list[bool] = []
    for _ in range(3):
        settled.call_soon_threadsafe(fail)
    settled.call_soon_threadsafe(lambda: called.append(True))
    wait_for(settled, lambda: called)
    assert capfd.readouterr() == ("", "")


def test_a_task_that_is_killed_before_its_first_step_is_replaced(settled: GeventRuntime) -> None:
    called: list[int] = []
    killed: list[gevent.Greenlet] = []

    def kill_the_first(greenlet: gevent.Greenlet) -> None:
        if not killed:
            killed.append(greenlet)
            greenlet.kill(block=False)

    gevent.Greenlet.add_spawn_callback(kill_the_first)
    try:
        for number in range(3):
            settled.call_soon_threadsafe(partial(called.append, number))
        wait_for(settled, lambda: len(called) == 3)
    finally:
        gevent.Greenlet.remove_spawn_callback(kill_the_first)
    assert called == [0, 1, 2]
    assert len(killed) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_to_kill_all_greenlets_ends_no_handing_over(settled: GeventRuntime, steps: int) -> None:
    """As some applications and tests do."""
    born: list[gevent.Greenlet] = []
    gevent.Greenlet.add_spawn_callback(born.append)
    called: list[int] = []

    def wait(number: int) -> None:
        settled.sleep(0.01)
        called.append(number)

    try:
        for number in range(5):
            settled.call_soon_threadsafe(partial(wait, number))
        wait_for(settled, lambda: born)
        for _ in range(steps):
            gevent.sleep(0)
        gevent.killall(list(born))
    finally:
        gevent.Greenlet.remove_spawn_callback(born.append)
    # What was running may be lost, and nothing else.
    wait_for(settled, lambda: called and called[-1] == 4)
    assert called == sorted(called)
    assert len(called) >= 4


def test_what_is_handed_over_is_bounded(settled: GeventRuntime) -> None:
    called: list[int] = []
    refused: list[LoopQueueFull] = []

    def hand_over() -> None:
        for number in range(MAX_LOOP_QUEUE):
            settled.call_soon_threadsafe(partial(called.append, number))
        for _ in range(3):
            try:
                settled.call_soon_threadsafe(partial(called.append, -1))
            except LoopQueueFull as exc:
                refused.append(exc)

    in_thread(hand_over)
    assert [str(error) for error in refused] == ["10000 calls wait for the event loop"] * 3
    with pytest.raises(LoopQueueFull):
        settled.call_soon_threadsafe(partial(called.append, -1))
    wait_for(settled, lambda: len(called) >= MAX_LOOP_QUEUE)
    assert called == list(range(MAX_LOOP_QUEUE))
    in_thread(lambda: settled.call_soon_threadsafe(partial(called.append, -2)))
    wait_for(settled, lambda: called[-1] == -2)


def test_a_long_queue_gives_way_to_others(settled: GeventRuntime) -> None:
    turns: list[int] = []
    called: list[int] = []

    def work(number: int) -> None:
        deadline = clock() + 0.0002
        while clock() < deadline:
            pass
        called.append(number)

    def take_turns() -> None:
        while len(called) < 1000:
            turns.append(len(called))
            settled.sleep(0)

    other = settled.spawn(take_turns, name="other")
    for number in range(1000):
        settled.call_soon_threadsafe(partial(work, number))
    wait_for(settled, lambda: len(called) == 1000)
    assert other.join(5.0)
    assert len({turn for turn in turns if turn}) >= 5


def test_what_is_handed_over_sees_no_context(settled: GeventRuntime) -> None:
    """Neither that of who handed over, a request's perhaps, nor what another call left."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def look() -> None:
        seen.append(variable.get())
        variable.set("what another left")

    variable.set("the caller's")
    settled.call_soon_threadsafe(look)
    settled.call_soon_threadsafe(look)
    GeventRuntime().call_soon_threadsafe(look)
    wait_for(settled, lambda: len(seen) == 3)
    assert seen == ["none", "none", "none"]


def test_a_runtime_is_forgotten_after_what_was_handed_over_has_been_called(
    nothing_left_behind: None,
) -> None:
    """Its watcher would keep it for as long as the loop lives."""
    runtime = GeventRuntime()
    runtime.bind_loop()
    home = weakref.ref(runtime._inbox)
    called: list[int] = []
    for number in range(3):
        runtime.call_soon_threadsafe(partial(called.append, number))
    del runtime
    gc.collect()
    wait_for(GeventRuntime(), lambda: len(called) == 3)
    gevent.sleep(0)
    gc.collect()
    assert home() is None


def test_a_runtime_may_outlive_its_loop() -> None:
    """A thread with a loop ends; the runtime is collected later."""

    def settle_and_end() -> None:
        runtimes.append(GeventRuntime())
        runtimes[0].bind_loop()
        gevent.get_hub().destroy(destroy_loop=True)

    runtimes: list[GeventRuntime] = []
    in_thread(settle_and_end)
    runtimes.clear()
    gc.collect()


PATCHED_HAND_OVER = """
from gevent import monkey; monkey.patch_all()
import os, gevent
from flask_socketio_guard.core.runtime import GeventRuntime
start_new_thread = monkey.get_original("_thread", "start_new_thread")
get_ident = monkey.get_original("_thread", "get_ident")

def check():
    runtime = GeventRuntime()
    runtime.bind_loop()
    home, called, away = get_ident(), [], []
    def hand_over(base):
        away.append(runtime.on_loop())
        for number in range(500):
            note = lambda number=number: called.append((base, number, get_ident()))
            runtime.call_soon_threadsafe(note)
    for base in range(4):
        start_new_thread(hand_over, (base,))
    with gevent.Timeout(10):
        while len(called) < 2000:
            gevent.sleep(0.01)
    assert away == [False] * 4 and runtime.on_loop()
    assert gevent.spawn(runtime.on_loop).get()
    assert {by for _, _, by in called} == {home}
    for base in range(4):
        assert [number for each, number, _ in called if each == base] == list(range(500))
    blocks = []
    stop = runtime.watch_loop(0.1, lambda *a: blocks.append(a), lambda *a: blocks.append(a))
    gevent.sleep(0.1)
    monkey.get_original("time", "sleep")(0.3)
    with gevent.Timeout(10):
        while len(blocks) < 2:
            gevent.sleep(0.01)
    stop()

check()
pid = os.fork()
if pid == 0:
    try:
        check()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
print(os.waitpid(pid, 0)[1])
"""


def test_a_patched_process_hands_over_and_watches_and_so_does_its_child() -> None:
    """Before and after a fork; with the threads that gevent has not replaced."""
    assert run_program(PATCHED_HAND_OVER) == ("0\n", "")


watches: list[Watch] = []
"""Those of the test that runs."""


@pytest.fixture(autouse=True)
def _stop_watches() -> Iterator[None]:
    """Let a test that fails leave no thread to those behind it."""
    yield
    while watches:
        watches.pop().stop()


class Watch:
    """Blocks of the event loop, as they are told."""

    def __init__(self, runtime: Runtime, threshold: float = 0.1) -> None:
        self.runtime = runtime
        self.blocked: list[tuple[str, str, float, int]] = []
        self.unblocked: list[tuple[str, float, bool, int]] = []
        self.stop = runtime.watch_loop(threshold, self.on_block, self.on_unblock)
        watches.append(self)
        runtime.sleep(0.05)  # until the loop has answered for the first time

    def on_block(self, place: str, stack: str) -> None:
        self.blocked.append((place, stack, clock(), threading.get_ident()))

    def on_unblock(self, place: str, seconds: float) -> None:
        can_wait = self.runtime.can_wait()
        self.unblocked.append((place, seconds, can_wait, threading.get_ident()))

    def wait(self, count: int = 1) -> None:
        wait_for(self.runtime, lambda: len(self.unblocked) >= count)


def block_by_sleeping(seconds: float) -> float:
    """Hold up the whole thread, for gevent has not patched this process; return the end."""
    time.sleep(seconds)
    return clock()


def test_a_block_is_told_while_it_lasts_and_its_length_afterwards(settled: GeventRuntime) -> None:
    watch = Watch(settled)
    began_at = clock()
    ended_at = block_by_sleeping(0.6)
    took = clock() - began_at
    watch.wait()
    watch.stop()
    ((place, stack, told_at, told_by),) = watch.blocked
    assert began_at + 0.09 <= told_at < ended_at
    assert told_by != threading.get_ident()
    file_and_line, _, function = place.partition(" in ")
    assert file_and_line.rpartition(":")[0] == __file__
    assert function == "block_by_sleeping"
    assert "ended_at = block_by_sleeping(0.6)" in stack
    ((place_afterwards, seconds, can_wait, told_by),) = watch.unblocked
    assert place_afterwards == place
    assert seconds == pytest.approx(took, abs=0.05)
    assert can_wait
    assert told_by == threading.get_ident()


def test_what_blocks_the_loop_without_a_greenlet_is_told_too(settled: GeventRuntime) -> None:
    """A count of greenlet switches would not show it."""
    watch = Watch(settled)

    def was_told() -> bool:
        # On a busy machine the monitor may miss it, for it has not run meanwhile either.
        if not watch.unblocked:
            settled.call_soon(lambda: block_by_sleeping(0.3))
            settled.sleep(0.5)
        return bool(watch.unblocked)

    wait_for(settled, was_told)
    watch.stop()
    assert any(place.endswith(" in block_by_sleeping") for place, *_ in watch.blocked)


def test_work_that_keeps_the_processor_is_told(settled: GeventRuntime) -> None:
    was_told: list[bool] = []

    def work() -> None:
        deadline = clock() + 20.0
        while not watch.blocked and clock() < deadline:
            pass
        was_told.append(bool(watch.blocked))

    watch = Watch(settled)
    job = settled.spawn(work, name="working")
    assert job.join(30.0)
    watch.wait()
    watch.stop()
    assert was_told == [True], "told while it lasts"
    assert watch.blocked[0][0].endswith(" in work")


class PatientMonitor(LoopMonitor):
    """A monitor whose time stands still while it waits for an answer that is on its way.

    So a machine that keeps the loop from its turns is not taken for a loop that blocks.
    """

    def __init__(self, threshold: float, **options: Any) -> None:
        self.looks = 0
        self._now = 0.0
        options |= {"sleep": self._pass, "clock": lambda: self._now, "processor_clock": lambda: 0}
        super().__init__(threshold, **options)

    def _pass(self, seconds: float) -> None:
        deadline = clock() + 5.0
        while self._answered_at is None and clock() < deadline:
            time.sleep(0.001)
        self.looks += 1
        self._now += seconds


def test_an_idle_loop_and_a_busy_one_are_no_blocks(
    settled: GeventRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitors: list[PatientMonitor] = []

    def make(threshold: float, **options: Any) -> PatientMonitor:
        monitors.append(PatientMonitor(threshold, **options))
        return monitors[-1]

    monkeypatch.setattr(runtime_gevent, "LoopMonitor", make)
    watch = Watch(settled)
    (monitor,) = monitors
    wait_for(settled, lambda: monitor.looks > 40)

    def take_turns() -> None:
        while monitor.looks <= 80:
            settled.sleep(0)

    jobs = [settled.spawn(take_turns, name="busy") for _ in range(10)]
    assert all(job.join(10.0) for job in jobs)
    watch.stop()
    assert watch.blocked == []


def test_what_is_told_of_a_block_may_raise(
    settled: GeventRuntime, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next is told all the same, and nothing is printed."""
    told: list[str] = []

    def fail(what: str, place: str, _detail: object) -> None:
        told.append(what)
        raise UnheardOfError

    stop = settled.watch_loop(0.1, partial(fail, "block"), partial(fail, "unblock"))
    settled.sleep(0.05)
    for count in (2, 4):
        block_by_sleeping(0.3)
        wait_for(settled, lambda count=count: len(told) == count)  # type: ignore[misc]
    stop()
    assert told == ["block", "unblock"] * 2
    assert capfd.readouterr() == ("", "")


def watching_threads() -> int:
    """Return how many native threads watch a loop; ``threading`` does not know them."""
    return sum(
        any(frame.f_code is LoopMonitor.run.__code__ for frame, _ in traceback.walk_stack(top))
        for top in sys._current_frames().values()
    )


@pytest.fixture
def nobody_watches(nothing_left_behind: None) -> None:
    """Wait for the end of what other tests have stopped."""
    wait_until(lambda: watching_threads() == 0, message="somebody watches a loop")


def test_a_watch_that_is_stopped_leaves_no_thread(
    nobody_watches: None, settled: GeventRuntime
) -> None:
    """Stopped at home or elsewhere, and more than once."""
    watches = [Watch(settled), Watch(settled)]
    wait_for(settled, lambda: watching_threads() == 2)
    watches[0].stop()
    in_thread(watches[1].stop)
    wait_for(settled, lambda: watching_threads() == 0)
    block_by_sleeping(0.3)
    settled.sleep(0.05)
    for watch in watches:
        watch.stop()
        assert watch.blocked == []


def test_neither_a_home_nor_a_watch_keeps_a_loop_going(nobody_watches: None) -> None:
    """``gevent.wait()`` returns when there is nothing else to wait for."""
    answers: list[bool] = []

    def wait() -> None:
        runtime = GeventRuntime()
        runtime.bind_loop()
        watch = Watch(runtime)
        answers.append(gevent.wait(timeout=5.0))
        watch.stop()
        gevent.get_hub().destroy(destroy_loop=True)

    in_thread(wait)
    assert answers == [True]


def test_a_watch_ends_with_its_loop(nobody_watches: None) -> None:
    stops: list[Callable[[], None]] = []

    def watch_and_end() -> None:
        stops.append(Watch(GeventRuntime()).stop)
        gevent.get_hub().destroy(destroy_loop=True)

    in_thread(watch_and_end)
    wait_for(ThreadRuntime(), lambda: watching_threads() == 0)
    stops[0]()


def test_without_a_loop_nothing_is_watched(
    nobody_watches: None, thread_runtime: ThreadRuntime
) -> None:
    watch = Watch(thread_runtime, 0.01)
    assert watching_threads() == 0
    watch.stop()
    assert watch.blocked == []


def test_a_watch_does_not_keep_a_process_alive() -> None:
    """Not even while it tells of a block that nobody wants to hear of."""
    program = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import gevent\n"
        "from flask_socketio_guard.core.runtime import GeventRuntime\n"
        "sleep, told = monkey.get_original('time', 'sleep'), []\n"
        "def tell(*block):\n"
        "    told.append(block)\n"
        "    sleep(1000)\n"
        "GeventRuntime().watch_loop(0.1, tell, print)\n"
        "gevent.sleep(0.1)\n"
        "sleep(0.3)\n"
        "print(len(told))\n"
    )
    assert run_program(program) == ("1\n", "")


def test_gevents_own_monitor_stays_as_it_is() -> None:
    """An application may use it; both tell, each in its own way."""
    program = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import gevent, greenlet\n"
        "from gevent.events import EventLoopBlocked, subscribers\n"
        "from flask_socketio_guard.core.runtime import GeventRuntime\n"
        "told = set()\n"
        "def hear(event):\n"
        "    if isinstance(event, EventLoopBlocked):\n"
        "        told.add('gevent')\n"
        "subscribers.append(hear)\n"
        "gevent.sleep(0)\n"  # a hub that has not begun is gone for it
        "theirs = gevent.get_hub().start_periodic_monitoring_thread()\n"
        "tracer = greenlet.gettrace()\n"
        "stop = GeventRuntime().watch_loop(0.1, lambda *_: told.add('ours'), print)\n"
        "gevent.sleep(0.1)\n"
        "for _ in range(200):\n"
        "    if len(told) < 2:\n"
        "        monkey.get_original('time', 'sleep')(0.05)\n"
        "stop()\n"
        "gevent.sleep(0.1)\n"
        "print(sorted(told), greenlet.gettrace() is tracer is not None, theirs.should_run)\n"
    )
    out, _ = run_program(program, GEVENT_MONITOR_THREAD_ENABLE="1", GEVENT_MAX_BLOCKING_TIME="0.1")
    assert out.splitlines()[-1] == "['gevent', 'ours'] True True"


def test_no_trace_function_is_installed(settled: GeventRuntime) -> None:
    """Each switch of greenlets would pay for it."""
    watch = Watch(settled)
    assert greenlet.gettrace() is None
    watch.stop()


# Short tasks


def leave_marks(found: list[object], name: str) -> None:
    """Note what another task has left where this one can see it, and leave the same."""
    me = gevent.getcurrent()
    ident = gevent.thread.get_ident()
    found += [getattr(_local, "mark", None), _variable.get(), _by_ident.get(ident)]
    found += [getattr(me, "mark", None), me.spawn_tree_locals.get("mark")]
    me.spawn_tree_locals["mark"] = me.mark = name
    _local.mark = _by_ident[ident] = name
    _variable.set(name)


_local = gevent.local.local()
_variable: contextvars.ContextVar[str | None] = contextvars.ContextVar("mark", default=None)
_by_ident: dict[int, str] = {}


@pytest.mark.parametrize("way", ["start", "call_apart"])
def test_no_task_sees_what_another_left(gevent_runtime: GeventRuntime, way: str) -> None:
    """Also one that begins when the last one has ended and its memory is free."""
    _by_ident.clear()
    _local.mark = "of the starter"
    found: list[object] = []
    done: list[int] = []
    token = _variable.set("of the starter")

    def task() -> None:
        leave_marks(found, "of a task")
        done.append(1)

    for number in range(200):
        if way == "start":
            gevent_runtime.start(task)
        else:
            gevent_runtime.call_apart(task, contextvars.Context())
        if number % 20 == 0:
            wait_for(gevent_runtime, lambda: len(done) == number + 1)  # noqa: B023
    wait_for(gevent_runtime, lambda: len(done) == 200)
    assert set(found) == {None}
    assert _variable.get() == "of the starter"
    assert not hasattr(gevent.getcurrent(), "mark")
    _variable.reset(token)


@pytest.mark.parametrize("way", ["spawn", "start", "call_later"])
def test_no_task_sees_the_context_that_it_is_started_from(
    runtime: Runtime, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request's perhaps; also where threads begin in a copy, as with free-threaded Python."""
    start = threading.Thread.start

    def inherit(thread: threading.Thread) -> None:
        monkeypatch.setattr(thread, "run", partial(contextvars.copy_context().run, thread.run))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", inherit)
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def look() -> None:
        seen.append(variable.get())

    def begin() -> None:
        variable.set("the caller's")
        if way == "spawn":
            runtime.spawn(look, name="look")
        elif way == "start":
            runtime.start(look)
        else:
            runtime.call_later(0.0, look)

    contextvars.copy_context().run(begin)
    wait_for(runtime, lambda: seen)
    assert seen == ["none"]


def test_a_task_can_be_killed_by_no_one_who_holds_another(gevent_runtime: GeventRuntime) -> None:
    greenlets: list[gevent.Greenlet] = []
    ended: list[int] = []

    def task(number: int) -> None:
        greenlets.append(gevent.getcurrent())
        if number == 1:
            greenlets[0].kill(block=False)
            gevent.sleep(0.01)
        ended.append(number)

    gevent_runtime.start(partial(task, 0))
    wait_for(gevent_runtime, lambda: ended == [0])
    gevent_runtime.start(partial(task, 1))
    wait_for(gevent_runtime, lambda: ended == [0, 1])
    assert len(set(greenlets)) == 2


def test_who_is_told_of_greenlets_is_told_of_tasks(gevent_runtime: GeventRuntime) -> None:
    """Tracers and leak detectors ask gevent to tell them."""
    told: list[object] = []
    ran: list[object] = []
    gevent.Greenlet.add_spawn_callback(told.append)
    try:
        gevent_runtime.start(lambda: ran.append(gevent.getcurrent()))
        wait_for(gevent_runtime, lambda: ran)
    finally:
        gevent.Greenlet.remove_spawn_callback(told.append)
    assert ran[0] in told


@pytest.mark.parametrize("wait", [lambda: gevent.sleep(0.001), lambda: 1 // 0])
def test_no_spawn_callback_stops_a_timer(
    gevent_runtime: GeventRuntime, wait: Callable[[], object]
) -> None:
    """A callback that fails or waits is somebody else's fault; flushes and deadlines go on."""
    called: list[int] = []

    def callback(_greenlet: object) -> None:
        wait()

    gevent.Greenlet.add_spawn_callback(callback)
    try:
        for number in range(3):
            gevent_runtime.call_later(0.001 * number, lambda number=number: called.append(number))
        wait_for(gevent_runtime, lambda: len(called) == 3)
    finally:
        gevent.Greenlet.remove_spawn_callback(callback)
    assert called == [0, 1, 2]


def test_what_is_called_apart_answers_its_caller(runtime: Runtime) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    context = contextvars.Context()
    context.run(variable.set, "given")
    assert runtime.call_apart(lambda: (runtime.sleep(0.01), variable.get()), context) == (
        None,
        "given",
    )

    def fail() -> None:
        raise LookupError("x")

    with pytest.raises(LookupError, match="x"):
        runtime.call_apart(fail, contextvars.Context())


def test_who_ends_the_caller_ends_what_is_called_apart(gevent_runtime: GeventRuntime) -> None:
    ends: list[object] = []

    def target() -> str:
        try:
            gevent.sleep(60)
        except gevent.GreenletExit as exc:
            ends.append(type(exc))
        return "cleaned up"

    caller = gevent.spawn(lambda: gevent_runtime.call_apart(target, contextvars.Context()))
    gevent.sleep(0.01)
    caller.kill(timeout=5.0)
    assert ends == [gevent.GreenletExit]
    assert caller.value == "cleaned up"


def test_who_is_ended_before_what_it_calls_apart_begins_is_ended(
    gevent_runtime: GeventRuntime,
) -> None:
    began: list[bool] = []
    caller = gevent.spawn(
        lambda: gevent_runtime.call_apart(lambda: began.append(True), contextvars.Context())
    )
    gevent.get_hub().loop.run_callback(caller.throw, gevent.GreenletExit)
    caller.join(5.0)
    assert not began
    assert isinstance(caller.value, gevent.GreenletExit)


def test_tasks_are_started_in_order_and_a_task_that_waits_keeps_none(runtime: Runtime) -> None:
    release = runtime.flag()
    began: list[int] = []
    ended: list[int] = []

    def task(number: int) -> None:
        began.append(number)
        if number % 3 == 0:
            release.wait(10.0)
        ended.append(number)

    for number in range(30):
        runtime.start(partial(task, number))
    wait_for(runtime, lambda: len(began) == 30 and len(ended) == 20)
    if isinstance(runtime, GeventRuntime):
        assert began == list(range(30))
        assert ended == [number for number in range(30) if number % 3]
    release.set()
    wait_for(runtime, lambda: sorted(ended) == list(range(30)))


def test_a_task_that_has_waited_ends_with_its_greenlet(gevent_runtime: GeventRuntime) -> None:
    greenlets: list[gevent.Greenlet] = []

    def task() -> None:
        greenlets.append(gevent.getcurrent())
        gevent.sleep(0)

    for _ in range(3):
        gevent_runtime.start(task)
    wait_for(gevent_runtime, lambda: len(greenlets) == 3 and all(one.dead for one in greenlets))
    assert len(set(greenlets)) == 3


def test_a_task_begins_with_an_empty_context(runtime: Runtime) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    found: list[str] = []

    def task() -> None:
        found.append(variable.get())
        variable.set("of a task")

    token = variable.set("of the starter")
    for _ in range(3):
        runtime.start(task)
    variable.reset(token)
    wait_for(runtime, lambda: len(found) == 3)
    assert found == ["none"] * 3


def test_many_tasks_let_others_have_their_turn(gevent_runtime: GeventRuntime) -> None:
    """Sockets too, which the loop looks at only after all that is ready."""
    done: list[int] = []
    seen: list[int] = []

    def task() -> None:
        deadline = clock() + 0.001
        while clock() < deadline:
            pass
        done.append(1)

    def look() -> None:
        gevent.sleep(0.001)
        seen.append(len(done))

    looker = gevent.spawn(look)
    for _ in range(200):
        gevent_runtime.start(task)
    looker.join(10.0)
    assert seen[0] < 100
    wait_for(gevent_runtime, lambda: len(done) == 200)


def test_owners_of_tasks_take_turns(
    gevent_runtime: GeventRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand events of one client are not in front of one of another, nor of its answer."""
    monkeypatch.setattr(runtime_greenlets, "clock", lambda: 0.0)  # time for all of them
    begun: list[str] = []

    def start(name: str, owner: str) -> None:
        gevent_runtime.start(partial(begun.append, name), owner)

    for number in range(1000):
        start(f"a{number}", "a")
    start("b0", "b")
    start("b1", "b")
    gevent_runtime.start(lambda: gevent_runtime.call_soon(lambda: begun.append("sent")))
    wait_for(gevent_runtime, lambda: len(begun) == 1003)
    assert begun[:7] == ["a0", "b0", "sent", "a1", "b1", "a2", "a3"]
    assert [name for name in begun if name[0] == "a"] == [f"a{number}" for number in range(1000)]


def test_who_gives_way_waits_for_tasks_that_have_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever reads on before puts more in front of what others send; but not for ever."""
    ticks = itertools.count()
    monkeypatch.setattr(runtime_greenlets, "clock", lambda: float(next(ticks)))
    monkeypatch.setattr(runtime_greenlets, "TIME_SLICE", 1.5)  # one task in each turn
    runtime = GeventRuntime()
    begun: list[int] = []
    for number in range(20):
        runtime.start(partial(begun.append, number))
    runtime.yield_control()
    assert begun == list(range(20))
    is_over = False

    def again() -> None:
        if not is_over:
            runtime.start(again)

    runtime.start(again)
    runtime.yield_control()
    is_over = True
    runtime.yield_control()


def test_on_the_loop_a_call_runs_at_once_and_elsewhere_it_is_handed_over(
    settled: GeventRuntime,
) -> None:
    calls: list[str] = []
    settled.run_on_loop(calls.append, "here")
    assert calls == ["here"]
    in_thread(lambda: settled.run_on_loop(calls.append, "there"))
    assert calls == ["here"], "it ran in the other thread"
    wait_for(settled, lambda: calls == ["here", "there"])

    def fail(exc: BaseException) -> None:
        raise exc

    with pytest.raises(UnheardOfError):
        settled.run_on_loop(fail, UnheardOfError())


def test_a_call_runs_at_once_where_there_is_no_loop(thread_runtime: ThreadRuntime) -> None:
    calls: list[int] = []
    in_thread(lambda: thread_runtime.run_on_loop(lambda: calls.append(threading.get_ident())))
    assert calls
    assert calls != [threading.get_ident()]

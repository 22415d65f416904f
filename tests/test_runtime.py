"""The same few verbs over greenlets and over threads."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
import time

import gevent
import pytest

from flask_socketio_guard.errors import ConfigError, HandlerTimeout
from flask_socketio_guard.runtime import (
    GeventRuntime,
    Runtime,
    ThreadRuntime,
    clock,
    is_patched,
    runtime_for,
)
from tests import unit_support
from tests.unit_support import wait_for

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


class UnheardOfError(BaseException):
    """What no application should raise."""


@pytest.fixture
def gevent_runtime(nothing_left_behind: None) -> GeventRuntime:
    return GeventRuntime()


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
    release = runtime.event()
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
    ready = thread_runtime.event()

    def join_myself() -> None:
        ready.wait()
        answers.append(job.join(None))

    job = thread_runtime.spawn(join_myself, name="myself")
    ready.set()
    assert job.join(5.0)
    assert answers == [False]


def test_a_killed_greenlet_tells_that_it_was_killed(gevent_runtime: GeventRuntime) -> None:
    told: list[BaseException | None] = []
    job = gevent_runtime.spawn(gevent_runtime.event().wait, name="deaf", on_exit=told.append)
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
    release = thread_runtime.event()
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
    event = runtime.event()
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
    event = gevent_runtime.event()
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
    release = runtime.event()
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
            gevent_runtime.event().wait()
        finally:
            steps.append("cleaned up")

    with pytest.raises(HandlerTimeout):
        gevent_runtime.call_with_timeout(call, 0.02)
    assert steps == ["began", "cleaned up"]


def test_a_thread_beyond_its_timeout_runs_on_unheard(thread_runtime: ThreadRuntime) -> None:
    release, ended = thread_runtime.event(), thread_runtime.event()

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
        gevent_runtime.event().wait()

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


@pytest.mark.parametrize("async_mode", ["eventlet", "gevent_uwsgi", "asgi"])
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
        "from flask_socketio_guard.runtime import is_patched, runtime_for\n"
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

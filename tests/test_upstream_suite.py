"""Flask-SocketIO's own tests, stock and with every ``SocketIO`` guarded."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.config import GuardConfig
from tests.support.upstream_suite import SuiteUnavailable, UpstreamSuite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.upstream_suite import SuiteRun

pytestmark = pytest.mark.timeout(300)  # a download and up to two runs

DISTRIBUTION = "Flask-SocketIO"
MODES = ("gevent", "threading")
SWITCHES = [field.name for field in fields(GuardConfig) if field.default is True]
# Each switch alone is for the programs beside stock: the test client has no wire and no queue.
SETTINGS: list[Any] = [
    {},
    pytest.param(dict.fromkeys(SWITCHES, False), marks=pytest.mark.long),
]


def identify(settings: dict[str, Any]) -> str:
    return "switched_off" if settings else "default"


@pytest.fixture(scope="module")
def suite(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> UpstreamSuite:
    """The tests; where they cannot be had, the reason."""
    cache = getattr(request.config, "cache", None)
    downloads = (
        tmp_path_factory.mktemp("downloads") if cache is None else cache.mkdir("upstream-suites")
    )
    try:
        return UpstreamSuite(DISTRIBUTION, cache=downloads, folder=tmp_path_factory.mktemp("suite"))
    except SuiteUnavailable as exc:
        reason = str(exc)
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def stock_run(suite: UpstreamSuite) -> Callable[[str], SuiteRun]:
    """Return a function that returns the run without the guard, the control, in one mode."""
    runs: dict[str, SuiteRun] = {}

    def control(mode: str) -> SuiteRun:
        if mode not in runs:
            runs[mode] = suite.run(mode)
        return runs[mode]

    return control


@pytest.mark.parametrize("mode", MODES)
def test_the_suite_passes_without_the_guard(
    stock_run: Callable[[str], SuiteRun], mode: str
) -> None:
    run = stock_run(mode)
    assert run.names, run.output
    assert run.failures == {}, run.output
    assert run.guarded_count == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=identify)
@pytest.mark.parametrize("mode", MODES)
def test_the_suite_passes_guarded(
    suite: UpstreamSuite,
    stock_run: Callable[[str], SuiteRun],
    mode: str,
    settings: dict[str, Any],
) -> None:
    control = stock_run(mode)
    run = suite.run(mode, guarded=settings)
    assert run.names == control.names, run.output
    assert run.guarded_count > 0
    assert not run.failures_beyond(control), run.output


def test_the_suite_fails_where_the_guard_lets_no_event_pass(
    suite: UpstreamSuite, stock_run: Callable[[str], SuiteRun]
) -> None:
    """That the guard is in the way of the events, and that a difference is seen."""
    run = suite.run("threading", guarded={"event_rate": "1/hour"})
    assert run.names == stock_run("threading").names, run.output
    assert "test_socketio.TestSocketIO.test_room" in run.failures_beyond(stock_run("threading"))


def test_a_suite_that_cannot_be_downloaded_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SuiteUnavailable, match=r"Flask-SocketIO==.* cannot be downloaded"):
        UpstreamSuite(DISTRIBUTION, cache=tmp_path, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []

"""Fixtures for all tests, the stock mode, and the table of what was measured."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import settings

from tests.support import GunicornServer, RawClient, RedisServer, SocketIOClient, wait_until
from tests.support.processes import reaper_pid
from tests.support.scale import examples
from tests.support.turns import Turns
from tests.tools import fault_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAULTS_MARKER = (
    "faults(fault, *, stock, because): a row of the table of faults. *stock* says what happens "
    "without the guard; *because* is a regular expression that the failure must match then."
)
ALONE_MARKER = "alone: measures times, so that no other test runs meanwhile"
LONG_MARKER = "long: takes many seconds, so that it runs in `make test-long` only"
SAMPLED_MARKER = (
    "sampled(every): of the combinations of its parameters, `make test` runs one in *every*, each "
    "value among them, and `make test-long` the others"
)
APART_MARKER = "apart: shares no fixture with the others of its module, and may run in any process"
LONGEST_FIRST = (
    "two_processes",
    "example_test_demo",
    "arrivals",
    "example_test_page",
    "tests_test_upstream_engine",
    "connections",
    "faults_test_celery",
    "tests_test_blocking",
    "faults_test_deployments",
    "faults_test_last_emits",
    "tests_test_upstream_suite",
    "tests_test_runtime",
    "faults_test_same_as_stock",
)
"""The groups that take more than twenty seconds, the longest first."""
_FAULT_PROPERTY = "fault"
_MEASURED_PROPERTY = "measured"
_GROUP = re.compile(r"@\w+$")  # what xdist writes behind the name of a test
_outcome = pytest.StashKey[dict[str, pytest.TestReport]]()
_turns = pytest.StashKey[Turns]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this project."""
    parser.addoption(
        "--stock",
        action="store_true",
        help="run only the fault tests, without the guard; each must fail for its stated reason",
    )
    parser.addoption(
        "--long", action="store_true", help="run only what takes long, and is left out otherwise"
    )
    parser.addoption(
        "--write-faults",
        type=Path,
        metavar="PAGE",
        help="write what the fault tests measured into that page: docs/faults.md",
    )
    parser.addoption(
        "--guard-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="settings of the guard for the servers of the fault tests, without their prefix, "
        """such as '{"FAST": false}'; what a test sets itself goes before""",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line("markers", FAULTS_MARKER)
    config.addinivalue_line("markers", ALONE_MARKER)
    config.addinivalue_line("markers", APART_MARKER)
    config.addinivalue_line("markers", LONG_MARKER)
    config.addinivalue_line("markers", SAMPLED_MARKER)
    config.stash[_turns] = Turns()
    # What is collected stays: to look through it again and again takes a tenth of the time.
    gc.disable()
    usual = settings.get_profile(settings.get_current_profile_name())
    settings.register_profile("scaled", usual, max_examples=examples(usual.max_examples))
    settings.load_profile("scaled")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a module together, which share servers, and those that run alone."""
    if _is_alone(item):
        item.add_marker(pytest.mark.xdist_group("alone"))
    elif not any(map(item.get_closest_marker, ("apart", "xdist_group"))):
        item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}_{item.path.stem}"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long; in stock mode keep the fault tests, and expect each to fail."""
    is_named = any("::" in argument for argument in config.args)
    if not config.getoption("--stock") and not is_named:
        wanted = config.getoption("--long")
        seen: dict[object, list[object]] = {}
        others = [item for item in items if _is_long(item, seen) is not wanted]
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]
    # Those that have the machine to themselves come last, one behind the other in one process:
    # anywhere else, every process would wait for each of them. The longest come first, so that no
    # process is left with one of them when the others have ended.
    items.sort(key=lambda item: (_is_alone(item), _rank(item)))
    for item in items:
        marker = item.get_closest_marker("faults")
        if marker is not None:
            item.user_properties.append((_FAULT_PROPERTY, marker.args[0]))
    if not config.getoption("--stock"):
        return
    kept = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    for item in kept:
        reason = item.get_closest_marker("faults").kwargs["stock"]  # type: ignore[union-attr]
        # An error in the tests' own machinery is no AssertionError, and so remains a failure.
        item.add_marker(
            pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"stock: {reason}")
        )
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what was collected out of the sight of the garbage collector, and use that again.

    Refuse to run where xdist and pytest do not agree on how groups are told.

    Raises:
        pytest.UsageError: Each test would run in any process, and shared servers start often.
    """
    gc.freeze()
    gc.enable()
    is_grouping = getattr(session.config.option, "loadgroup", False)
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if is_grouping and grouped and not any("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("this pytest-xdist does not group the tests of this pytest")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Wait for the turn of a test, outside its timeout."""
    turns = item.config.stash[_turns]
    with turns.taken(is_alone=_is_alone(item), is_next_alone=_is_alone(nextitem)):
        return (yield)


def _rank(item: pytest.Item) -> int:
    """Return the place of *item* in the order: that of its group among the longest, if it is."""
    marker = item.get_closest_marker("xdist_group")
    group = marker.args[0] if marker else f"{item.path.parent.name}_{item.path.stem}"
    return LONGEST_FIRST.index(group) if group in LONGEST_FIRST else len(LONGEST_FIRST)


def _is_long(item: pytest.Item, seen: dict[object, list[object]]) -> bool:
    """Tell whether *item* is left out of `make test`; to be asked in the order of the items.

    Args:
        item: A test.
        seen: The values of each parameter so far.
    """
    sampled = item.get_closest_marker("sampled")
    total = 0
    if sampled is not None:
        # As the diagonal of a table, in which each row and each column occurs.
        for name, value in item.callspec.params.items():  # type: ignore[attr-defined]
            values = seen.setdefault((item.path, item.originalname, name), [])  # type: ignore[attr-defined]
            if value not in values:
                values.append(value)
            total += values.index(value)
    return bool(item.get_closest_marker("long") or (sampled and total % sampled.args[0]))


def _is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the outcome for the fixtures; in stock mode check why a test failed.

    With ``CI`` in the environment a skipped test has failed.
    """
    report: pytest.TestReport = yield  # type: ignore[assignment]
    item.stash.setdefault(_outcome, {})[report.when or ""] = report
    marker = item.get_closest_marker("faults")
    if marker is not None and report.when == "call" and hasattr(report, "wasxfail"):
        text = str(call.excinfo.value) if call.excinfo else ""
        report.user_properties.append((_MEASURED_PROPERTY, f"seen: {text.splitlines()[0]}"))
        if report.skipped and not re.search(marker.kwargs["because"], text):
            report.outcome = "failed"
            report.longrepr = (
                f"stock failed, but not for the stated reason {marker.kwargs['because']!r}:\n{text}"
            )
            del report.wasxfail
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome = "failed"  # where everything can be installed, nothing may be left out
        report.longrepr = f"skipped: {report.longrepr}"
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print fault, test and measured figures."""
    rows = []
    measured: dict[tuple[str, str], list[str]] = {}
    for outcome in ("passed", "failed", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = getattr(report, "user_properties", [])
            fault = dict(properties).get(_FAULT_PROPERTY)
            figures = [text for name, text in properties if name == _MEASURED_PROPERTY]
            if (fault is not None or figures) and getattr(report, "when", "") == "call":
                test = _GROUP.sub("", report.nodeid.rsplit("::", 1)[-1])
                rows.append((fault or "all at once", test, outcome, "; ".join(figures)))
                if fault is not None and outcome == "passed":
                    measured.setdefault((fault, test.partition("[")[0]), []).extend(figures)
    if not rows:
        return
    is_stock = terminalreporter.config.getoption("--stock")
    terminalreporter.section(f"faults, {'without' if is_stock else 'with'} the guard")
    for fault, test, outcome, figures in sorted(rows):
        terminalreporter.write_line(f"{fault} | {test} | {outcome} | {figures}")
    if (page := terminalreporter.config.getoption("--write-faults")) and not is_stock:
        fault_page.write(measured, page)


@pytest.fixture(scope="session")
def is_stock(request: pytest.FixtureRequest) -> bool:
    """Whether the guard is to be left out."""
    return bool(request.config.getoption("--stock"))


@pytest.fixture(scope="session")
def guard_config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the servers of the fault tests have in ``app.config`` beside their own."""
    given = request.config.getoption("--guard-config")
    return {f"SOCKETIO_GUARD_{name}": value for name, value in given.items()}


@pytest.fixture(scope="session", autouse=True)
def _leave_no_process_behind() -> Iterator[None]:
    yield

    def left() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child.pid != reaper_pid()]

    wait_until(lambda: not left(), message="the tests leave processes behind")


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Return a function that notes a figure for the table at the end of the run."""

    def note(name: str, value: object) -> None:
        text = f"{value:.2f} s" if isinstance(value, float) else str(value)
        record_property(_MEASURED_PROPERTY, f"{name}: {text}")

    return note


@pytest.fixture
def has_failed(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Return a function that says, during teardown, whether the test failed."""

    def tell() -> bool:
        reports = request.node.stash.get(_outcome, {}).values()
        return any(not report.passed for report in reports)

    return tell


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis of this module's own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def make_redis() -> Iterator[Callable[[], RedisServer]]:
    """Return a function that starts a Redis for this test alone."""
    started: list[RedisServer] = []

    def make() -> RedisServer:
        server = RedisServer()
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.close()


@pytest.fixture
def make_server() -> Iterator[Callable[..., GunicornServer]]:
    """Return a function that starts a gunicorn server for this test alone.

    It takes the arguments of :class:`tests.support.GunicornServer`.
    """
    started: list[GunicornServer] = []

    def make(app: str, **options: Any) -> GunicornServer:
        server = GunicornServer(app, **options)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.close()


@pytest.fixture
def sio_client() -> Iterator[Callable[..., SocketIOClient]]:
    """Return a function that connects a Socket.IO client to a server, or to a URL.

    Further arguments are those of :class:`tests.support.SocketIOClient`.
    """
    connected: list[SocketIOClient] = []

    def connect(server: GunicornServer | str, **options: Any) -> SocketIOClient:
        url = server if isinstance(server, str) else server.url
        client = SocketIOClient(url, **options)
        connected.append(client)
        client.connect()
        return client

    yield connect
    for client in connected:
        client.close()


@pytest.fixture
def raw_client() -> Iterator[Callable[..., RawClient]]:
    """Return a function that connects a client which can send any frame.

    With ``join=False`` the client stays outside its namespace. Further arguments are those of
    :class:`tests.support.RawClient`.
    """
    opened: list[RawClient] = []

    def connect(server: GunicornServer | str, *, join: bool = True, **options: Any) -> RawClient:
        url = server if isinstance(server, str) else server.websocket_url
        client = RawClient(url, **options)
        opened.append(client)
        if join:
            client.connect()
        else:
            client.open()
        return client

    yield connect
    for client in opened:
        client.close()

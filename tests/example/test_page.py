"""The page in a real browser, on real servers.

The browser is the Chromium of the system, which `playwright` only drives. Where it is missing
these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect, sync_playwright

from demo.runner import broker_control
from tests.example.deployed import DEMO, DeployedServer
from tests.support import RedisServer, wait_until
from tests.support.javascript import require_client
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Page

    OpenPage = Callable[[DeployedServer], Page]

pytestmark = pytest.mark.timeout(90)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# A browser that looks for nothing outside of this machine.
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=BackForwardCache",  # a page that was left is gone
]
SECOND = 1000.0  # playwright counts in milliseconds
TIMEOUT = 20 * SECOND


@dataclass
class Exchange:
    """Two processes of the demo, and the Redis between them that the panel may stop."""

    redis: RedisServer
    a: DeployedServer
    b: DeployedServer


@pytest.fixture(scope="module")
def _client_for_javascript() -> None:
    """The client from npm."""
    require_client()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(
            "the page is tested in Chromium, which is missing (Debian: apt install chromium)"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def exchange(browser: Browser, _client_for_javascript: None) -> Iterator[Exchange]:
    """The demo's servers, as its runner starts them, but with a Redis of the tests."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="guard-page-"))
        control = stack.enter_context(broker_control(redis, Path(folder)))  # type: ignore[arg-type]
        env = {
            "FLASK_MESSAGE_QUEUE": redis.url,
            "FLASK_BROKER_CONTROL": control,
        }
        servers = [DeployedServer(DEMO, env=env), DeployedServer(DEMO, env=env)]
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_until_serving(path="/readyz")
        yield Exchange(redis, *servers)


@pytest.fixture(scope="module")
def _windows() -> list[Page]:
    """Empty windows, to be used again: a new one is a new process, which takes its time."""
    return []


@pytest.fixture
def open_page(browser: Browser, _windows: list[Page]) -> Iterator[OpenPage]:
    """Return a function that opens the page of a server in a window of its own."""
    errors: list[object] = []
    opened: list[Page] = []

    def note(error: object) -> None:
        errors.append(error)

    def open_page(server: DeployedServer) -> Page:
        if _windows:
            page = _windows.pop()
        else:
            context = browser.new_context(viewport={"width": 1280, "height": 1000})
            page = context.new_page()
            page.set_default_timeout(TIMEOUT)
        opened.append(page)
        page.on("pageerror", note)
        page.goto(server.url)
        return page

    yield open_page
    for page in opened:
        if not page.is_closed():
            page.evaluate("sessionStorage.clear()")  # all that the page keeps in the browser
            page.goto("about:blank")
            page.remove_listener("pageerror", note)
            _windows.append(page)
    assert errors == []


@pytest.fixture
def two_pages(exchange: Exchange, open_page: OpenPage) -> tuple[Page, Page]:
    """A page on each of the two processes, each of which sees the other's trader."""
    pages = open_page(exchange.a), open_page(exchange.b)
    for page in pages:
        expect_text(page, "#connection", "connected")
        expect(page.locator("#traders li")).to_have_count(2, timeout=TIMEOUT)
    return pages


def expect_text(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until the element has *text*."""
    expect(page.locator(selector)).to_have_text(text, timeout=TIMEOUT)


def expect_log(page: Page, text: str | re.Pattern[str]) -> None:
    """Wait until *text* is in the list of what happened."""
    expect(page.locator("#log")).to_contain_text(text, timeout=TIMEOUT)


def expect_ticking(page: Page, *servers: DeployedServer) -> None:
    """Wait until the page has heard of each server within the last seconds."""
    for server in servers:
        row = page.locator("#processes li", has_text=server.name)
        expect(row).to_contain_text("ticking", timeout=TIMEOUT)


def break_it(page: Page, fault: str) -> None:
    """Click a button of the panel."""
    page.locator(f'button[data-fault="{fault}"]').click()


def test_page_shows_connection_process_and_health(exchange: Exchange, open_page: OpenPage) -> None:
    """It connects by itself, moves on to a WebSocket, and asks its process how it is."""
    page = open_page(exchange.a)
    expect_text(page, "#connection", "connected")
    expect_text(page, "#transport", "websocket")
    (worker,) = exchange.a.worker_pids()
    expect_text(page, "#process", f"{exchange.a.name} · pid {worker}")
    expect_text(page, "#health-short", "pass")
    expect_text(page, "#health-code", "HTTP 200")
    expect_text(page, "#listener", "running")
    expect(page.locator("#client-missing")).to_be_hidden()


def test_ticker_moves(exchange: Exchange, open_page: OpenPage) -> None:
    """Each tick adds a second to the line."""
    page = open_page(exchange.a)
    line = page.locator("#chart-line")
    expect(line).to_have_attribute("d", re.compile("M.+"), timeout=TIMEOUT)
    seen = line.get_attribute("d") or ""
    expect(line).not_to_have_attribute("d", seen, timeout=TIMEOUT)
    expect_text(page, "#price", re.compile(r"^\d+\.\d\d$"))
    expect_ticking(page, exchange.a, exchange.b)
    row = page.locator("#processes li", has_text=exchange.a.name)
    expect(row).to_contain_text("1 connection", timeout=TIMEOUT)


def test_traders_of_both_processes_see_each_other(
    exchange: Exchange, two_pages: tuple[Page, Page]
) -> None:
    """Presence goes through the message queue."""
    for page, here, there in (
        (two_pages[0], exchange.a, exchange.b),
        (two_pages[1], exchange.b, exchange.a),
    ):
        own = page.locator("#traders li", has_text="you")
        other = page.locator("#traders li", has_text="Ask for a price")
        expect(own).to_contain_text(here.name)
        expect(other).to_contain_text(there.name)


def test_trade_is_seen_on_the_other_process(two_pages: tuple[Page, Page]) -> None:
    """The acknowledgement says what one paid; the tape of the pit shows it to everybody."""
    a, _ = two_pages
    a.locator("#lots").fill("7")
    a.get_by_role("button", name="Buy", exact=True).click()
    expect_log(a, re.compile("You buy 7 . Coffee at"))
    for page in two_pages:
        expect(page.locator("#tape li")).to_contain_text(["buys7 lots"], timeout=TIMEOUT)


def test_question_is_answered_by_a_trader_of_the_other_process(
    two_pages: tuple[Page, Page],
) -> None:
    """The answer is the acknowledgement of an event that another process sent."""
    a, b = two_pages
    a.get_by_role("button", name="Ask for a price").click()
    expect(b.locator("#question")).to_be_visible(timeout=TIMEOUT)
    expect_text(b, "#question-text", re.compile("asks: what is your price for a lot of Coffee"))
    b.locator("#answer-price").fill("123.45")
    b.get_by_role("button", name="Answer", exact=True).click()
    expect(b.locator("#question")).to_be_hidden()
    for page in two_pages:
        expect_log(page, "asked for a price of Coffee: 123.45")


def test_question_to_a_page_that_is_closed_has_no_answer(two_pages: tuple[Page, Page]) -> None:
    """The asker is told when the other is gone, and not after the deadline of 20 s."""
    a, b = two_pages
    a.get_by_role("button", name="Ask for a price").click()
    expect(b.locator("#question")).to_be_visible(timeout=TIMEOUT)
    b.close()
    expect_log(a, "asked for a price of Coffee: no answer")


def test_handler_that_raises_is_acknowledged_with_an_error_id(
    exchange: Exchange, open_page: OpenPage
) -> None:
    """By the id the log of the server tells what happened."""
    page = open_page(exchange.a)
    expect_text(page, "#connection", "connected")
    break_it(page, "handler")
    expect_log(page, re.compile(r'The handler raised.*"code":"internal_error"'))
    found = re.search(r'"id":"(\w+)"', page.locator("#log").inner_text())
    assert found, page.locator("#log").inner_text()
    assert found[1] in exchange.a.log()
    assert "DemoFault: the panel made this handler raise" in exchange.a.log()


def test_callbacks_and_the_listener_broken_from_the_panel_do_no_harm(
    exchange: Exchange, two_pages: tuple[Page, Page]
) -> None:
    """All three at once; the workers stay, and both pages hear of both processes."""
    page = two_pages[0]
    workers = exchange.a.worker_pids()
    for fault in ("callback-raises", "callback-hangs", "kill-listener"):
        break_it(page, fault)
    for label in ("Callback raises", "Callback hangs", "Kill the listener"):
        expect_log(page, f"{label}: done")
    # What is sent in the meantime, Redis does not keep.
    wait_until(lambda: exchange.a.get("/readyz").json()["listener"] == "running")
    two_pages[1].get_by_role("button", name="Sell", exact=True).click()
    expect(page.locator("#tape li")).to_contain_text(["sells5 lots"], timeout=TIMEOUT)
    expect_ticking(page, exchange.a, exchange.b)
    expect_text(page, "#health-short", "pass")
    assert exchange.a.worker_pids() == workers


def test_flood_and_rubbish_from_the_panel_cost_only_the_page_that_sends_them(
    exchange: Exchange, two_pages: tuple[Page, Page]
) -> None:
    """Too many events wait, a malformed packet ends the connection; the worker stays."""
    page, other = two_pages
    workers = exchange.a.worker_pids()
    break_it(page, "flood")
    other.get_by_role("button", name="Buy", exact=True).click()
    expect(page.locator("#tape li")).to_contain_text(["buys5 lots"], timeout=TIMEOUT)
    expect_log(page, "at most 64 ran at a time, 2000 were handled")
    break_it(page, "malformed")
    expect_log(page, "Disconnected: transport close")
    expect_log(page, "Connected again")
    assert exchange.a.worker_pids() == workers
    assert "Disconnected" not in other.locator("#log").inner_text()


def test_page_finds_the_next_worker_when_its_own_is_stopped(
    exchange: Exchange, two_pages: tuple[Page, Page]
) -> None:
    """The worker drains at SIGTERM, and its master starts another."""
    page = two_pages[0]
    (before,) = exchange.a.worker_pids()
    break_it(page, "stop-worker")
    expect_log(page, "Disconnected: transport close")
    expect_log(page, "Connected again")
    expect_log(page, f"Process {exchange.a.name} has a new worker")
    (after,) = exchange.a.worker_pids()
    assert after != before
    expect_text(page, "#process", f"{exchange.a.name} · pid {after}")
    expect_ticking(page, exchange.a, exchange.b)


def test_page_tells_that_the_broker_is_away_and_back(
    exchange: Exchange, open_page: OpenPage
) -> None:
    """Stopped and started by the panel: the health warns, and the other process falls silent."""
    page = open_page(exchange.a)
    expect_ticking(page, exchange.a, exchange.b)
    break_it(page, "broker/stop")
    expect_text(page, "#health-short", "warn")
    expect_text(page, "#health-code", "HTTP 200")
    expect_text(page, "#listener", "reconnecting")
    expect_text(page, "#silence", re.compile(f"^Nothing heard from {exchange.b.name}"))
    expect_ticking(page, exchange.a)
    assert exchange.redis.pid is None
    break_it(page, "broker/start")
    expect_text(page, "#health-short", "pass")
    expect_text(page, "#listener", "running")
    expect_ticking(page, exchange.a, exchange.b)
    expect_text(page, "#silence", "")
    expect_text(page, "#connection", "connected")


def test_page_reconnects_when_its_process_was_restarted(
    exchange: Exchange, open_page: OpenPage
) -> None:
    """It says so while it tries, and goes on in the pit where it was."""
    server = exchange.a
    page = open_page(server)
    page.get_by_role("button", name="Saffron").click()
    expect_text(page, "#pit-name", "Saffron")
    expect_ticking(page, server)
    assert server.stop(timeout=10)
    expect_text(page, "#connection", re.compile("^reconnecting"))
    expect(page.locator("#transport")).not_to_have_text("websocket")
    expect_text(page, "#health-short", "no answer")
    expect(page.get_by_role("button", name="Buy", exact=True)).to_be_disabled()
    server.launch()
    expect_text(page, "#connection", "connected")
    expect_text(page, "#health-short", "pass")
    (worker,) = server.worker_pids()
    expect_text(page, "#process", f"{server.name} · pid {worker}")
    expect_log(page, f"Process {server.name} has a new worker, pid {worker}")
    expect(page.locator("#traders li", has_text="you")).to_have_count(1, timeout=TIMEOUT)
    expect_text(page, "#pit-name", "Saffron")
    expect_ticking(page, exchange.a, exchange.b)


@pytest.fixture(scope="module")
def clientless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedServer]:
    """A server of a copy of the example without what npm fetches."""
    folder = tmp_path_factory.mktemp("clientless")
    leave_out = shutil.ignore_patterns("node_modules", "__pycache__")
    shutil.copytree(PROJECT_ROOT / "example_app", folder / "example_app", ignore=leave_out)
    path = os.pathsep.join([str(folder), str(PROJECT_ROOT)])
    server = DeployedServer(env={"PYTHONPATH": path})
    try:
        server.start(path="/readyz")
        yield server
    finally:
        server.close()


def test_page_without_its_client_says_what_is_missing(
    clientless: DeployedServer, open_page: OpenPage
) -> None:
    """It names the command that mends it, and shows what it can: the health."""
    page = open_page(clientless)
    expect(page.locator("#client-missing")).to_be_visible()
    expect(page.locator("#client-missing code")).to_have_text("npm ci --prefix example_app")
    expect_text(page, "#connection", "client missing")
    expect_text(page, "#health-short", "pass")
    assert clientless.get("/client.js").status_code == 404


def test_contract_note_arrives_through_a_lost_connection(
    exchange: Exchange, open_page: OpenPage
) -> None:
    page = open_page(exchange.a)
    page.get_by_role("button", name="Buy").click()
    expect(page.locator("#notes li")).to_have_count(1, timeout=TIMEOUT)
    page.get_by_role("button", name="Sell").click()
    expect(page.locator("#log")).to_contain_text("You sell")
    page.get_by_role("button", name="Disconnect").click()
    expect(page.locator("#connection")).to_have_text("disconnected")
    page.wait_for_timeout(3 * SECOND)  # its confirmation is due, and nobody is there
    expect(page.locator("#notes li")).to_have_count(1)
    expect(page.locator("#connection")).to_have_text("connected", timeout=TIMEOUT)
    expect(page.locator("#notes li")).to_have_count(2, timeout=TIMEOUT)
    expect(page.locator("#notes li").first).to_contain_text("You sell")

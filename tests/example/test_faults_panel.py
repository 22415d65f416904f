from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from demo.app import create_app as create_demo
from demo.waiting import HEADER
from example_app.app import create_app, guard, socketio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask

ADMITTED = {HEADER: "yes"}
COMMANDS = [
    "callback-raises",
    "callback-hangs",
    "kill-listener",
    "pour",
    "stop-worker",
    "broker/stop",
    "broker/start",
]
EVENTS = {"demo:watch": [], "demo:raise": [], "demo:slow": [], "demo:echo": ["words"]}


@pytest.fixture
def demo_app() -> Iterator[Flask]:
    """The application as the demo starts it."""
    app = create_demo()
    yield app
    with app.app_context():
        guard.stop(timeout=1.0)


@pytest.fixture
def plain_app() -> Iterator[Flask]:
    """The application as it is without the demo, after one with it in the same process."""
    create_demo()
    app = create_app()
    yield app
    with app.app_context():
        guard.stop(timeout=1.0)


def post(app: Flask, command: str = "kill-listener", **options: Any) -> Any:
    """Send the request of a button of the panel, changed by *options*."""
    options = {"headers": ADMITTED, "json": {}} | options
    return app.test_client().post(f"/demo/{command}", **options)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1", "127.0.0.1:5001"),
        ("127.0.0.1", "localhost"),
        ("127.8.8.8", "localhost:5001"),
        ("::1", "[::1]:5001"),
    ],
)
def test_panel_answers_this_machine(demo_app: Flask, address: str, host: str) -> None:
    """By any of its loopback addresses."""
    sender = {"environ_overrides": {"REMOTE_ADDR": address}, "headers": {"Host": host}}
    assert demo_app.test_client().get("/demo/worker", **sender).status_code == 200
    assert 'id="faults"' in demo_app.test_client().get("/", **sender).text
    sender["headers"] = ADMITTED | {"Host": host}
    response = post(demo_app, **sender)
    assert (response.status_code, response.get_json()) == (200, {"killed": 0})


@pytest.mark.parametrize("address", ["192.0.2.7", "10.0.0.1", "0.0.0.0", "::", "fe80::1", ""])
def test_panel_refuses_other_machines(demo_app: Flask, address: str) -> None:
    """Whatever they send; the page does not even show it."""
    sender = {"environ_overrides": {"REMOTE_ADDR": address}}
    for command in COMMANDS:
        assert post(demo_app, command, **sender).status_code == 403
    assert demo_app.test_client().get("/demo/worker", **sender).status_code == 403
    assert 'id="faults"' not in demo_app.test_client().get("/", **sender).text


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5001", "localhost.evil.example", "127.0.0.1.evil.example"],
)
def test_panel_refuses_a_host_that_is_not_this_machine(demo_app: Flask, host: str) -> None:
    """A page whose name was bound to a loopback address still sends its own name."""
    for command in COMMANDS:
        response = post(demo_app, command, headers=ADMITTED | {"Host": host})
        assert response.status_code == 403
    headers = {"Host": host}
    assert demo_app.test_client().get("/demo/worker", headers=headers).status_code == 403
    assert 'id="faults"' not in demo_app.test_client().get("/", headers=headers).text


@pytest.mark.parametrize(
    "header",
    [
        "Forwarded",
        "Via",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Real-IP",
    ],
)
def test_panel_refuses_what_came_through_a_proxy(demo_app: Flask, header: str) -> None:
    """A proxy on this machine has a loopback address, and its clients may be anywhere."""
    response = post(demo_app, headers=ADMITTED | {header: "127.0.0.1"})
    assert response.status_code == 403
    page = demo_app.test_client().get("/", headers={header: "127.0.0.1"})
    assert 'id="faults"' not in page.text


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {}},
        {"headers": {}, "json": None, "data": {"sid": "x"}},
        {"json": None, "data": {"sid": "x"}},
        {"json": None, "data": '{"sid": "x"}', "content_type": "text/plain"},
        {"json": None},
    ],
    ids=["no header", "a plain form", "a form", "text", "nothing"],
)
def test_panel_refuses_what_a_page_of_another_site_could_send(
    demo_app: Flask, options: dict[str, Any]
) -> None:
    """Without asking first, a page may send neither JSON nor a header of its own."""
    for command in COMMANDS:
        assert post(demo_app, command, **options).status_code == 403


def test_page_of_another_site_is_not_allowed_to_ask(demo_app: Flask) -> None:
    """The preflight of a browser gets no permission."""
    response = demo_app.test_client().options(
        "/demo/kill-listener",
        headers={
            "Origin": "https://evil.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": HEADER,
        },
    )
    assert not [name for name, _ in response.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("body", [{}, {"sid": 3}, {"sid": None}, ["x"], "x", 3])
@pytest.mark.parametrize("command", ["callback-raises", "callback-hangs", "pour"])
def test_panel_asks_which_client_is_meant(demo_app: Flask, command: str, body: object) -> None:
    """It does not guess, and fails on no JSON."""
    assert post(demo_app, command, json=body).status_code == 400


def test_panel_does_not_stop_a_broker_that_the_demo_did_not_start(demo_app: Flask) -> None:
    """It says why, and the page disables the button by the same sign."""
    assert post(demo_app, "broker/stop").status_code == 409
    assert post(demo_app, "broker/pause").status_code == 404
    assert '<fieldset id="broker" disabled>' in demo_app.test_client().get("/").text


def test_events_of_the_panel_are_refused_to_other_machines(
    demo_app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """They are checked as its requests are, and the stream does not start for them."""
    client = socketio.test_client(demo_app, auth={"name": "Ada"}, headers={"Host": "evil.example"})
    for name, arguments in EVENTS.items():
        answer = client.emit(name, *arguments, callback=True)
        assert answer["error"]["code"] == 403
    client.disconnect()
    assert not [record for record in caplog.records if record.exc_info]
    assert not [task for task in _tasks(demo_app) if task.startswith("demo:")]


def test_outside_the_demo_there_is_no_panel(plain_app: Flask) -> None:
    """Neither the routes nor the events nor the part of the page exist."""
    for command in COMMANDS:
        assert post(plain_app, command).status_code == 404
    assert plain_app.test_client().get("/demo/worker").status_code == 404
    page = plain_app.test_client().get("/").text
    assert "Break it" not in page
    assert not [rule for rule in plain_app.url_map.iter_rules() if "demo" in rule.rule]
    assert not [name for name in socketio.server.handlers["/"] if name.startswith("demo:")]
    assert not [task for task in _tasks(plain_app) if task.startswith("demo:")]


def _tasks(app: Flask) -> list[str]:
    app.debug = True  # admits to the details
    checks = app.test_client().get("/healthz").get_json()["checks"]
    assert any("tick" in name for name in checks), checks
    return list(checks)

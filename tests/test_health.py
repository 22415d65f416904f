"""What a load balancer is told: the table of the health contract, row by row."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from werkzeug.test import Client
from werkzeug.wrappers import Request

from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.core.component import Check, Component, Status
from flask_socketio_guard.delivery.component import Deliveries
from flask_socketio_guard.delivery.store import Usage
from flask_socketio_guard.queue import component as queue_module
from flask_socketio_guard.queue.component import MessageQueue
from flask_socketio_guard.states import ListenerState, TaskState
from flask_socketio_guard.telemetry import health as health_module
from flask_socketio_guard.telemetry.health import Health, HealthEndpoints, Sources
from tests.support import unit_support
from tests.support.unit_support import FakeClock, Guarded

if TYPE_CHECKING:
    from collections.abc import Callable

    from werkzeug.test import TestResponse

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

PATHS = ("/livez", "/readyz", "/healthz")
SECRET = "s3cret"


class Telemetry:
    """Everything that a snapshot is taken from, and it can be set."""

    def __init__(self, clock: FakeClock, **config: Any) -> None:
        self.clock = clock
        self.is_serving = True
        self.is_debug = False
        self.listener = SimpleNamespace(
            state=ListenerState.RUNNING, heard_at=clock.now, restarts=0, trouble=""
        )
        self.broker = SimpleNamespace(is_reachable=True, is_refusing=False, trouble="")
        self.is_probing = True
        self.outbox = FakeOutbox()
        self.supervisor = SimpleNamespace(tasks=[])
        self.counts = {"handler_failures": 0}
        self.is_store_reachable: bool | None = None
        self.usage: Usage | None = None
        config_object = GuardConfig(**config)
        self.health = Health(
            Sources(
                supervisor=self.supervisor,  # type: ignore[arg-type]
                is_serving=lambda: self.is_serving,
                listener_state=lambda: self.listener.state,
                counts=lambda: self.counts,
                components=lambda: [self.queue(config_object), self.deliveries(), Gauged()],
            ),
        )
        self.endpoints = HealthEndpoints(self.health, config_object, is_debug=lambda: self.is_debug)
        self.http = Client(self.endpoints)

    def queue(self, config: GuardConfig) -> MessageQueue:
        """Return a queue that is how it is told to be."""
        queue = MessageQueue.__new__(MessageQueue)
        parts = {"listener": self.listener, "broker": self.broker, "outbox": self.outbox}
        vars(queue).update(parts, _config=config, _transport=self)
        return queue

    def deliveries(self) -> Component:
        service = Deliveries.__new__(Deliveries)
        shared = None if self.is_store_reachable is None else object()
        server = SimpleNamespace(is_reachable=self.is_store_reachable)
        vars(service).update(
            _shared=shared,
            _server=server,
            store=SimpleNamespace(usage=self.usage),
            dispatcher=SimpleNamespace(in_flight=0),
        )
        return service

    def add_task(self, state: TaskState, **marks: Any) -> None:
        task = {
            "name": "ticker",
            "state": state,
            "is_critical": False,
            "is_internal": False,
            "is_flapping": False,
            "last_error": None,
        }
        self.supervisor.tasks.append(SimpleNamespace(**{**task, **marks}))

    def tick(self) -> None:
        self.health.tick()

    def get(self, path: str, **options: Any) -> TestResponse:
        return self.http.get(path, **options)

    def answers(self) -> list[tuple[int, str]]:
        """Status code and status of each path."""
        answers = [self.get(path) for path in PATHS]
        return [(answer.status_code, json.loads(answer.data)["status"]) for answer in answers]


class Gauged(Component):
    """Something that is counted."""

    def gauges(self) -> dict[str, int]:
        return {"connections:open": 3}


class FakeOutbox:
    """An outbox as full as it is told to be."""

    fill = 0.0
    size = 0
    trouble = ""

    def __len__(self) -> int:
        return int(self.fill * 100)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(health_module, "clock", fake)
    monkeypatch.setattr(queue_module, "clock", fake)
    return fake


@pytest.fixture
def facts(clock: FakeClock) -> Telemetry:
    facts = Telemetry(clock)
    facts.tick()
    return facts


PASS, WARN, FAIL = (200, "pass"), (200, "warn"), (503, "fail")


# The table


def test_all_is_well(facts: Telemetry) -> None:
    assert facts.answers() == [PASS, PASS, PASS]


def test_a_late_event_loop_fails_everywhere(facts: Telemetry) -> None:
    facts.clock.advance(2.9)
    facts.tick()
    assert facts.answers() == [PASS, PASS, PASS]
    facts.clock.advance(3.1)
    facts.tick()
    assert facts.answers() == [FAIL, FAIL, FAIL]
    facts.clock.advance(1.0)
    facts.tick()
    assert facts.answers() == [PASS, PASS, PASS]


def test_a_stale_tick_fails_everywhere(facts: Telemetry) -> None:
    """Three ticks are missing: whoever should take snapshots is gone."""
    facts.clock.advance(2.9)
    assert facts.answers() == [PASS, PASS, PASS]
    facts.clock.advance(0.2)
    assert facts.answers() == [FAIL, FAIL, FAIL]


def test_a_change_between_ticks_does_not_hide_a_stale_tick(facts: Telemetry) -> None:
    facts.clock.advance(3.1)
    facts.health.refresh()
    assert facts.answers() == [FAIL, FAIL, FAIL]


@pytest.mark.parametrize(
    "state",
    [ListenerState.STALLED, ListenerState.STARTING, ListenerState.IDLE, ListenerState.STOPPED],
    ids=str,
)
@pytest.mark.parametrize("broker_down", ["warn", "fail"])
def test_a_listener_that_is_broken_while_the_broker_works_takes_no_traffic(
    clock: FakeClock, state: ListenerState, broker_down: str
) -> None:
    """A local fault: other processes are better off."""
    facts = Telemetry(clock, broker_down=broker_down)
    facts.listener.state = state
    facts.tick()
    assert facts.answers() == [PASS, FAIL, FAIL]


def test_a_store_of_messages_that_does_not_answer_is_a_warning(clock: FakeClock) -> None:
    """Other processes have the same trouble with it."""
    facts = Telemetry(clock)
    facts.tick()
    assert "deliveries:store" not in facts.health.snapshot.checks
    for is_reachable, ready in ((True, PASS), (False, WARN)):
        facts.is_store_reachable = is_reachable
        facts.tick()
        assert facts.answers() == [PASS, ready, ready]
        assert facts.health.snapshot.checks["deliveries:store"].value is is_reachable


@pytest.mark.parametrize(
    ("usage", "ready", "output", "percent"),
    [
        (Usage(49, 10, 100, 1000), PASS, "", 49),
        (Usage(50, 10, 100, 1000), WARN, "", 50),
        (Usage(1, 500, 100, 1000), WARN, "", 50),
        (Usage(100, 1000, 100, 1000), WARN, "", 100),
        (Usage(1, 1, 100, 1000, is_out_of_memory=True), WARN, "memory", 1),
    ],
)
def test_a_store_of_messages_that_fills_up_is_a_warning(
    clock: FakeClock, usage: Usage, ready: tuple[int, str], output: str, percent: int
) -> None:
    """Never a failure: other traffic goes on."""
    facts = Telemetry(clock)
    facts.tick()
    assert "deliveries:messages" not in facts.health.snapshot.checks, "nothing is known yet"
    facts.usage = usage
    facts.tick()
    assert facts.answers() == [PASS, ready, ready]
    found = facts.health.snapshot.checks
    messages, size = found["deliveries:messages"], found["deliveries:size"]
    assert (messages.value, messages.output) == (usage.messages, output)
    assert (size.value, size.unit) == (usage.size, "B")
    assert found["deliveries:fillPercent"].value == percent


@pytest.mark.parametrize(
    ("broker_down", "ready"), [("warn", WARN), ("fail", FAIL)], ids=["warn", "fail"]
)
@pytest.mark.parametrize(
    ("state", "is_reachable"),
    [
        (ListenerState.RECONNECTING, False),
        (ListenerState.RECONNECTING, True),
        (ListenerState.RUNNING, False),
    ],
)
def test_an_unreachable_broker_is_a_warning_or_a_failure_as_configured(
    clock: FakeClock,
    broker_down: str,
    ready: tuple[int, str],
    state: ListenerState,
    is_reachable: bool,
) -> None:
    """A shared fault: no other process would be better off. Nobody shall restart for it."""
    facts = Telemetry(clock, broker_down=broker_down)
    facts.listener.state = state
    facts.broker.is_reachable = is_reachable
    facts.tick()
    assert facts.answers() == [PASS, ready, ready]


@pytest.mark.parametrize(
    ("heard_at", "is_refusing", "ready"),
    [(None, False, FAIL), (None, True, FAIL), (1.0, True, FAIL), (1.0, False, WARN)],
    ids=["never-reached", "never-let-in", "let-in-no-more", "away"],
)
def test_a_broker_that_was_never_reached_or_refuses_takes_no_traffic(
    facts: Telemetry, heard_at: float | None, is_refusing: bool, ready: tuple[int, str]
) -> None:
    """Others may be better off: a broken deploy does not pass. Waiting mends nothing."""
    facts.listener.heard_at = heard_at
    facts.listener.state = ListenerState.RECONNECTING
    facts.broker.is_reachable = False
    facts.broker.is_refusing = is_refusing
    facts.broker.trouble = "authentication"
    facts.tick()
    assert facts.answers() == [PASS, ready, ready]
    assert facts.health.snapshot.checks["broker:reachable"].output == "authentication"


@pytest.mark.parametrize("fill", [0.1, 1.0])
def test_a_broker_that_takes_nothing_is_a_warning(facts: Telemetry, fill: float) -> None:
    """It lets in, and refuses what is published: clients of this process are served."""
    facts.outbox.trouble = "permission"
    facts.outbox.fill = fill
    facts.tick()
    assert facts.answers() == [PASS, WARN, WARN]
    assert facts.health.snapshot.checks["outbox:messages"].output == "permission"


@pytest.mark.parametrize(
    ("fill", "ready"),
    [(0.0, PASS), (0.49, PASS), (0.5, WARN), (0.99, WARN), (1.0, FAIL), (1.2, FAIL)],
)
def test_an_outbox_that_fills_is_a_warning_and_a_full_one_a_failure(
    facts: Telemetry, fill: float, ready: tuple[int, str]
) -> None:
    facts.outbox.fill = fill
    facts.tick()
    assert facts.answers() == [PASS, ready, ready]


@pytest.mark.parametrize(
    ("state", "is_critical", "ready"),
    [
        (TaskState.FAILED, True, FAIL),
        (TaskState.FAILED, False, WARN),
        (TaskState.BACKING_OFF, True, WARN),
        (TaskState.BACKING_OFF, False, WARN),
        (TaskState.RUNNING, True, PASS),
        (TaskState.STARTING, True, PASS),
    ],
    ids=str,
)
def test_a_critical_task_that_has_failed_takes_no_traffic(
    facts: Telemetry, state: TaskState, is_critical: bool, ready: tuple[int, str]
) -> None:
    facts.add_task(state, is_critical=is_critical)
    facts.tick()
    assert facts.answers() == [PASS, ready, ready]


def test_a_process_that_starts_or_drains_is_alive_and_takes_no_traffic(
    facts: Telemetry,
) -> None:
    facts.is_serving = False
    facts.tick()
    assert facts.answers() == [PASS, FAIL, FAIL]


def test_a_process_that_has_not_started_is_alive_and_takes_no_traffic(clock: FakeClock) -> None:
    """Not one snapshot was taken yet, however long ago that is."""
    facts = Telemetry(clock)
    clock.advance(1000.0)
    assert facts.answers() == [PASS, FAIL, FAIL]


def test_the_worst_check_decides(facts: Telemetry) -> None:
    facts.outbox.fill = 0.7
    facts.add_task(TaskState.FAILED, is_critical=True)
    facts.tick()
    assert facts.answers() == [PASS, FAIL, FAIL]


def test_without_a_queue_the_listener_is_absent_and_all_is_well(clock: FakeClock) -> None:
    sources = Sources(
        supervisor=SimpleNamespace(tasks=[]),  # type: ignore[arg-type]
        is_serving=lambda: True,
        listener_state=lambda: ListenerState.ABSENT,
        counts=dict,
    )
    health = Health(sources)
    health.tick()
    assert health.readiness() is Status.PASS
    assert health.snapshot.listener is ListenerState.ABSENT
    assert set(health.snapshot.checks) == {"process:phase", "eventloop:lag"}


# The answer


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_has_the_form_of_the_draft(facts: Telemetry, path: str) -> None:
    answer = facts.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/health+json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Length"] == str(len(answer.data))
    assert json.loads(answer.data) == {"status": "pass", "listener": "running"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_failing", [False, True])
def test_a_head_request_gets_the_headers_of_a_get_and_no_body(
    facts: Telemetry, path: str, is_failing: bool
) -> None:
    if is_failing:
        facts.clock.advance(10.0)
    get, head = facts.get(path), facts.http.head(path)
    assert head.status_code == get.status_code
    assert dict(head.headers) == dict(get.headers)
    assert head.data == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_another_method_is_refused_with_those_that_work(facts: Telemetry, method: str) -> None:
    answer = facts.http.open("/healthz", method=method)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD"
    assert answer.data == b""


def test_paths_can_be_moved_or_left_out(clock: FakeClock) -> None:
    facts = Telemetry(clock, healthz_path="/status", livez_path=None, readyz_path="/up")
    assert facts.endpoints.handles("/status")
    assert facts.endpoints.handles("/up")
    for path in ("/healthz", "/livez", "/readyz", "", "/", "/status/", "/up/x"):
        assert not facts.endpoints.handles(path)


def test_an_answer_comes_from_the_snapshot_and_asks_nobody(facts: Telemetry) -> None:
    """No I/O: a broker that hangs must not hang the health check."""
    facts.outbox.fill = 1.0
    assert facts.answers() == [PASS, PASS, PASS]
    facts.health.refresh()
    assert facts.answers() == [PASS, FAIL, FAIL]


# Details


def with_details(clock: FakeClock, details: Any) -> Telemetry:
    facts = Telemetry(clock, health_details=details)
    facts.add_task(TaskState.BACKING_OFF, last_error=RuntimeError(SECRET))
    facts.counts = {"handler_failures": 4}
    facts.tick()
    return facts


def checks(answer: TestResponse) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(answer.data).get("checks")
    return found


def bearer(token: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


def test_nobody_sees_details_by_default(clock: FakeClock) -> None:
    facts = with_details(clock, None)
    for path in PATHS:
        assert checks(facts.get(path)) is None
        assert checks(facts.get(path, **bearer("None"))) is None


@pytest.mark.parametrize(
    ("header", "is_admitted"),
    [
        (f"Bearer {SECRET}", True),
        (f"Bearer {SECRET}x", False),
        (f"Bearer {SECRET[:-1]}", False),
        (f"bearer {SECRET}", False),
        (f"Basic {SECRET}", False),
        (SECRET, False),
        ("Bearer ", False),
        ("", False),
        ("Bearer \xff", False),
    ],
)
def test_details_are_for_those_who_have_the_token(
    clock: FakeClock, header: str, is_admitted: bool
) -> None:
    facts = with_details(clock, SECRET)
    answer = facts.get("/healthz", headers={"Authorization": header})
    assert answer.status_code == 200
    assert (checks(answer) is not None) is is_admitted


def test_a_token_may_hold_any_character(clock: FakeClock) -> None:
    """Servers hand headers over as Latin-1."""
    facts = with_details(clock, "schlüssel")
    header = "Bearer schlüssel".encode().decode("latin-1")
    answer = facts.http.get("/healthz", environ_overrides={"HTTP_AUTHORIZATION": header})
    assert checks(answer) is not None


def test_a_callable_decides_by_the_request(clock: FakeClock) -> None:
    asked: list[Request] = []

    def admit(request: Request) -> bool:
        asked.append(request)
        return request.args.get("who") == "me"

    facts = with_details(clock, admit)
    assert checks(facts.get("/healthz?who=me")) is not None
    assert checks(facts.get("/healthz?who=you")) is None
    assert all(isinstance(request, Request) for request in asked)


@pytest.mark.parametrize(
    "raised", [RuntimeError(SECRET), KeyError(SECRET)], ids=lambda error: type(error).__name__
)
def test_a_callable_that_raises_admits_nobody_and_is_logged(
    clock: FakeClock, raised: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def admit(request: Request) -> bool:
        raise raised

    facts = with_details(clock, admit)
    with caplog.at_level(logging.ERROR, "flask_socketio_guard"):
        answer = facts.get("/healthz")
    assert answer.status_code == 200
    assert checks(answer) is None
    assert SECRET not in answer.text
    assert [record.getMessage() for record in caplog.records] == [
        "SOCKETIO_GUARD_HEALTH_DETAILS raised"
    ]
    assert caplog.records[0].exc_info


def test_everyone_sees_details_in_debug_mode(clock: FakeClock) -> None:
    facts = with_details(clock, SECRET)
    facts.is_debug = True
    assert checks(facts.get("/healthz")) is not None


def test_details_are_keyed_by_component_and_measurement(clock: FakeClock) -> None:
    """draft-inadarei-api-health-check-06, section 4: arrays of objects with these keys."""
    facts = with_details(clock, SECRET)
    found = checks(facts.get("/healthz", **bearer(SECRET)))
    assert found is not None
    assert set(found) == {
        "process:phase",
        "eventloop:lag",
        "deliveries:inFlight",
        "listener:state",
        "listener:probeAge",
        "listener:probes",
        "listener:restarts",
        "broker:reachable",
        "outbox:messages",
        "outbox:size",
        "task ticker:state",
        "connections:open",
        "handler_failures:count",
    }
    for key, entries in found.items():
        assert ":" in key
        assert len(entries) == 1
        assert {"status", "observedValue", "time"} <= set(entries[0])
    assert found["task ticker:state"][0]["status"] == "warn"
    assert found["task ticker:state"][0]["observedValue"] == "backing-off"
    assert found["task ticker:state"][0]["output"] == "RuntimeError"
    assert found["handler_failures:count"][0]["observedValue"] == 4
    assert found["connections:open"][0]["observedValue"] == 3
    assert found["outbox:size"][0]["observedUnit"] == "B"


def test_the_age_of_the_last_probe_is_told(facts: Telemetry) -> None:
    facts.listener.heard_at = facts.clock.now - 1.5
    facts.tick()
    assert facts.health.snapshot.checks["listener:probeAge"] == Check(Status.PASS, 1.5, "s")
    facts.listener.heard_at = None
    facts.tick()
    assert facts.health.snapshot.checks["listener:probeAge"].value is None


@pytest.mark.parametrize(("is_probing", "told"), [(True, "end to end"), (False, "connection only")])
def test_it_is_told_how_far_probes_go(facts: Telemetry, is_probing: bool, told: str) -> None:
    facts.is_probing = is_probing
    facts.tick()
    assert facts.health.snapshot.checks["listener:probes"] == Check(Status.PASS, told)


def test_the_guards_own_tasks_are_told_of_only_when_something_is_wrong(
    facts: Telemetry,
) -> None:
    facts.add_task(TaskState.RUNNING, name="socketio-guard:tick", is_internal=True)
    facts.add_task(TaskState.BACKING_OFF, name="socketio-guard:outbox", is_internal=True)
    facts.tick()
    names = set(facts.health.snapshot.checks)
    assert "task socketio-guard:outbox:state" in names
    assert "task socketio-guard:tick:state" not in names


def test_a_task_that_crashes_again_and_again_is_a_warning_while_it_runs(
    facts: Telemetry,
) -> None:
    """It is restarted at once, and so never seen waiting for it."""
    facts.add_task(
        TaskState.RUNNING,
        name="socketio-guard:tick",
        is_internal=True,
        is_flapping=True,
        last_error=KeyError("x"),
    )
    facts.tick()
    check = facts.health.snapshot.checks["task socketio-guard:tick:state"]
    assert check == Check(Status.WARN, "running", output="KeyError")


def test_nothing_secret_is_ever_in_an_answer(clock: FakeClock) -> None:
    """Not the token, not the text of an error, not where the broker is."""
    facts = with_details(clock, SECRET)
    facts.listener.state = ListenerState.RECONNECTING
    facts.broker.is_reachable = False
    facts.tick()
    for path in PATHS:
        for options in ({}, bearer(SECRET)):
            text = facts.get(path, **options).text
            assert SECRET not in text
            assert "redis" not in text
            assert "Traceback" not in text


# In an application


def test_the_application_itself_is_not_asked(guarded: Guarded) -> None:
    """Its ``before_request`` may need a login, a session or a database."""

    @guarded.app.before_request
    def refuse() -> None:
        raise AssertionError("asked")

    for path in PATHS:
        answer = guarded.app.test_client().get(path)
        assert answer.status_code == 200
        assert answer.json == {"status": "pass", "listener": "absent"}


def test_debug_mode_of_the_application_shows_details(guarded: Guarded) -> None:
    guarded.app.debug = True
    answer = guarded.app.test_client().get("/healthz")
    assert "connections:open" in answer.get_json(force=True)["checks"]


def test_an_application_that_drains_is_alive_for_as_long_as_it_takes(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard has stopped; its process still finishes what is under way."""
    http = guarded.app.test_client()
    assert http.get("/readyz").status_code == 200
    with guarded.app.app_context():
        guarded.guard.stop(1.0)
    fake = FakeClock()
    fake.now = health_module.clock() + 60.0
    monkeypatch.setattr(health_module, "clock", fake)
    monkeypatch.setattr(queue_module, "clock", fake)
    assert [http.get(path).status_code for path in PATHS] == [200, 503, 503]


def test_settings_move_the_paths_of_an_application(
    make_guarded: Callable[..., Guarded],
) -> None:
    guarded = make_guarded(config={"SOCKETIO_GUARD_HEALTHZ_PATH": "/status"}, livez_path=None)
    http = guarded.app.test_client()
    assert http.get("/status").status_code == 200
    assert http.get("/healthz").status_code == 404
    assert http.get("/livez").status_code == 404
    assert http.get("/readyz").status_code == 200

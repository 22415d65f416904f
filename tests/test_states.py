"""The transition tables: every state with every event, and random walks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flask_socketio_guard.errors import InvalidTransition
from flask_socketio_guard.states import (
    CONNECTION_TRANSITIONS,
    LISTENER_TRANSITIONS,
    SENDING_TRANSITIONS,
    TASK_TRANSITIONS,
    ConnectionEvent,
    ConnectionState,
    ListenerEvent,
    ListenerState,
    SendingEvent,
    SendingState,
    StateMachine,
    TaskEvent,
    TaskState,
)
from tests.support.cases import in_turn
from tests.support.scale import examples

Table = Mapping[tuple[Any, Any], Any]

# Written out a second time, by state: the events that are legal, and where they lead.
LISTENER = {
    "absent": {},
    "idle": {"start": "starting", "stop": "stopped"},
    "starting": {
        "heard": "running",
        "broker-lost": "reconnecting",
        "probe-overdue": "stalled",
        "crashed": "stalled",
        "stop": "stopped",
    },
    "running": {
        "heard": "running",
        "broker-lost": "reconnecting",
        "probe-overdue": "stalled",
        "crashed": "stalled",
        "stop": "stopped",
    },
    "reconnecting": {
        "heard": "running",
        "broker-lost": "reconnecting",
        "probe-overdue": "stalled",
        "crashed": "stalled",
        "stop": "stopped",
    },
    "stalled": {
        "heard": "running",
        "broker-lost": "reconnecting",
        "probe-overdue": "stalled",
        "crashed": "stalled",
        "stop": "stopped",
    },
    "stopped": {"start": "starting", "stop": "stopped"},
}
TASK = {
    "starting": {
        "started": "running",
        "crashed": "backing-off",
        "gave-up": "failed",
        "stop": "stopped",
    },
    "running": {
        "crashed": "backing-off",
        "gave-up": "failed",
        "returned": "finished",
        "stop": "stopped",
    },
    "backing-off": {"retry": "starting", "stop": "stopped"},
    "failed": {"stop": "failed"},
    "finished": {"stop": "finished"},
    "stopped": {"stop": "stopped"},
}
CONNECTION = {
    "connecting": {"accepted": "open", "refused": "closed", "close": "closing"},
    "open": {"handshake": "ready", "close": "closing"},
    "ready": {"handshake": "ready", "close": "closing"},
    "closing": {
        "accepted": "closing",
        "refused": "closed",
        "close": "closing",
        "finished": "closed",
    },
    "closed": {"close": "closed"},
}

SENDING: dict[str, dict[str, str]] = {
    "queued": {
        "send": "awaiting",
        "skip": "idle",
        "schedule": "scheduled",
        "settled": "queued",
        "drop": "dropped",
    },
    "awaiting": {
        "schedule": "scheduled",
        "settled": "idle",
        "park": "parked",
        "drop": "dropped",
    },
    "scheduled": {
        "queue": "queued",
        "send": "awaiting",
        "skip": "idle",
        "schedule": "scheduled",
        "settled": "idle",
        "drop": "dropped",
    },
    "idle": {
        "queue": "queued",
        "send": "awaiting",
        "skip": "idle",
        "schedule": "scheduled",
        "settled": "idle",
        "drop": "dropped",
    },
    "parked": {"queue": "queued", "settled": "parked", "drop": "dropped"},
    "dropped": {"settled": "dropped"},
}

CASES = [
    pytest.param(table, expected, state, events, id=f"{events.__name__}-{state}")
    for table, expected, states, events in (
        (LISTENER_TRANSITIONS, LISTENER, ListenerState, ListenerEvent),
        (TASK_TRANSITIONS, TASK, TaskState, TaskEvent),
        (CONNECTION_TRANSITIONS, CONNECTION, ConnectionState, ConnectionEvent),
        (SENDING_TRANSITIONS, SENDING, SendingState, SendingEvent),
    )
    for state in states
]


@in_turn(("table", "expected", "state", "events"), CASES)
def test_every_event_in_every_state_moves_or_is_refused(
    table: Table, expected: dict[str, dict[str, str]], state: Any, events: Iterable[Any]
) -> None:
    for event in events:
        changes: list[tuple[Any, Any, str]] = []
        machine: StateMachine[Any, Any] = StateMachine(
            state, table, on_change=lambda *change, into=changes: into.append(change)
        )
        target = expected[str(state)].get(str(event))
        assert machine.allows(event) is (target is not None), event
        if target is None:
            with pytest.raises(InvalidTransition) as caught:
                machine.send(event, "why")
            assert str(caught.value) == f"{event} is not allowed in state {state}"
            assert machine.state is state, event
            assert changes == []
        else:
            assert str(machine.send(event, "why")) == target, event
            assert str(machine.state) == target
            assert changes == ([] if target == str(state) else [(state, machine.state, "why")])


def test_every_state_is_described() -> None:
    assert set(LISTENER) == {str(state) for state in ListenerState}
    assert set(TASK) == {str(state) for state in TaskState}
    assert set(CONNECTION) == {str(state) for state in ConnectionState}
    assert set(SENDING) == {str(state) for state in SendingState}


def test_every_event_is_described() -> None:
    """One that no state takes would be a word without a meaning."""
    for table, events in (
        (LISTENER, ListenerEvent),
        (TASK, TaskEvent),
        (CONNECTION, ConnectionEvent),
        (SENDING, SendingEvent),
    ):
        taken = {event for moves in table.values() for event in moves}
        assert taken == {str(event) for event in events}


@pytest.mark.parametrize(
    ("table", "states", "end"),
    [
        (TASK, TaskState, "stop"),
        (LISTENER, ListenerState, "stop"),
        (CONNECTION, ConnectionState, "close"),
    ],
)
def test_an_end_is_legal_in_every_state_and_repeatable(
    table: dict[str, dict[str, str]], states: Any, end: str
) -> None:
    """Only a listener that is absent can never be stopped: there is none."""
    for state in states:
        if state is not ListenerState.ABSENT:
            after = table[str(state)][end]
            assert table[after][end] == after


def test_a_connection_that_closes_never_opens_again() -> None:
    """And from wherever it is, it gets to its end."""
    for state in ("closing", "closed"):
        assert set(CONNECTION[state].values()) <= {"closing", "closed"}
    for moves in CONNECTION.values():
        closing = moves["close"]
        assert closing == "closed" or CONNECTION[closing]["finished"] == "closed"


def test_a_machine_needs_nobody_who_is_told() -> None:
    machine: StateMachine[TaskState, TaskEvent] = StateMachine(TaskState.STARTING, TASK_TRANSITIONS)
    assert machine.send(TaskEvent.STARTED) is TaskState.RUNNING


def test_a_listener_that_raises_finds_the_new_state() -> None:
    """The change has happened before anyone is told of it."""
    seen = []

    def told(old: TaskState, new: TaskState, reason: str) -> None:
        del old, new, reason
        seen.append(machine.state)
        raise RuntimeError("a subscriber failed")

    machine: StateMachine[TaskState, TaskEvent] = StateMachine(
        TaskState.STARTING, TASK_TRANSITIONS, on_change=told
    )
    with pytest.raises(RuntimeError, match="a subscriber failed"):
        machine.send(TaskEvent.STARTED)
    assert seen == [TaskState.RUNNING]
    assert machine.state is TaskState.RUNNING


class _Walk(RuleBasedStateMachine):
    """Sends any event at any time and follows the table by hand."""

    table: ClassVar[Table]
    expected: ClassVar[dict[str, dict[str, str]]]
    initial: ClassVar[Any]
    by_name: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []
        self.machine: StateMachine[Any, Any] = StateMachine(
            self.initial, self.table, on_change=self._told
        )
        self.model = str(self.initial)
        self.changes: list[tuple[str, str]] = []

    def _told(self, old: Any, new: Any, reason: str) -> None:
        assert reason == "walking"
        self.told.append((str(old), str(new)))

    def walk(self, name: str) -> None:
        target = self.expected[self.model].get(name)
        if target is None:
            with pytest.raises(InvalidTransition):
                self.machine.send(self.by_name[name], "walking")
            return
        self.machine.send(self.by_name[name], "walking")
        if target != self.model:
            self.changes.append((self.model, target))
        self.model = target

    @invariant()
    def the_table_was_followed(self) -> None:
        assert str(self.machine.state) == self.model
        assert self.told == self.changes


class ListenerWalk(_Walk):
    table = LISTENER_TRANSITIONS
    expected = LISTENER
    initial = ListenerState.IDLE
    by_name = {str(event): event for event in ListenerEvent}

    @rule(name=st.sampled_from([str(event) for event in ListenerEvent]))
    def event(self, name: str) -> None:
        self.walk(name)


class TaskWalk(_Walk):
    table = TASK_TRANSITIONS
    expected = TASK
    initial = TaskState.STARTING
    by_name = {str(event): event for event in TaskEvent}

    @rule(name=st.sampled_from([str(event) for event in TaskEvent]))
    def event(self, name: str) -> None:
        self.walk(name)


class ConnectionWalk(_Walk):
    table = CONNECTION_TRANSITIONS
    expected = CONNECTION
    initial = ConnectionState.CONNECTING
    by_name = {str(event): event for event in ConnectionEvent}

    @rule(name=st.sampled_from([str(event) for event in ConnectionEvent]))
    def event(self, name: str) -> None:
        self.walk(name)


TestListenerWalk = ListenerWalk.TestCase
TestTaskWalk = TaskWalk.TestCase
TestConnectionWalk = ConnectionWalk.TestCase
TestListenerWalk.settings = TestTaskWalk.settings = TestConnectionWalk.settings = settings(
    max_examples=examples(50), stateful_step_count=40, deadline=None
)

"""One question to a room: who has answered, who has not, and which process said nothing."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.core.runtime import clock
from flask_socketio_guard.events.acknowledgements import (
    BROADCAST_ANSWER,
    BROADCAST_CALL,
    BROADCAST_PARTICIPANTS,
)
from flask_socketio_guard.events.broadcast_ack import BroadcastAcks, BroadcastAnswers
from tests.support import unit_support
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from flask_socketio_guard.core.runtime import Runtime
    from flask_socketio_guard.events.acknowledgements import Awaiting, Question

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


class Process:
    """One process of a fleet whose queue hands messages over at once."""

    def __init__(self, runtime: Runtime, name: str, *sids: str, others: int | None = 0) -> None:
        self.runtime = runtime
        self.name = name
        self.sids = list(sids)
        self.gone: set[str] = set()
        self.prompt: dict[str, tuple[object, ...]] = {}
        """What clients answer while others are still being asked."""
        self.others = others
        self.peers: list[Process] = []
        self.asked: dict[str, Awaiting] = {}
        self.told: list[dict[str, Any]] = []
        self.broadcast_acks = BroadcastAcks(
            runtime,
            self,
            publish=self.publish,
            spawn=lambda _, target: target(),
            recording=lambda target: target,  # type: ignore[arg-type]
            count_others=lambda _: self.others,
            host_id=lambda: self.name,
        )

    def publish(self, message: dict[str, Any]) -> None:
        self.told.append(message)
        assert list(message)[-1] == "host_id", "by which a process knows its own messages"
        for peer in self.peers:
            peer.broadcast_acks.take(json.loads(json.dumps(message)))

    def find(self, recipient: str, namespace: str) -> list[str]:
        assert (recipient, namespace) == ("hall", "/")
        return self.sids

    def ask(self, sid: str, question: Question) -> int | None:
        namespace, event, arguments, callback, ack_id = question
        assert (namespace, event, json.loads(arguments)) == ("/", "ready?", [1])
        assert ack_id is None
        if sid in self.gone:
            return None
        self.asked[sid] = callback
        if sid in self.prompt:
            callback.function(*self.prompt[sid])
        return 1

    def answer(self, sid: str, *answer: object) -> None:
        self.asked[sid].function(*answer)

    def begin(self, timeout: float = 10.0) -> Asking:
        return Asking(self, timeout)


class Asking:
    """A question under way."""

    def __init__(self, process: Process, timeout: float) -> None:
        self._process = process
        self._results: list[BroadcastAnswers] = []
        self._job = process.runtime.spawn(lambda: self._ask(timeout), name="asking")
        wait_for(process.runtime, lambda: {*process.sids} <= process.asked.keys() | process.gone)

    def _ask(self, timeout: float) -> None:
        self._results.append(
            self._process.broadcast_acks.ask(
                "ready?", [1], room="hall", namespace="/", timeout=timeout
            )
        )

    def result(self) -> BroadcastAnswers:
        assert self._job.join(5.0), "it waits on"
        return self._results[0]

    @property
    def is_over(self) -> bool:
        return bool(self._results)


@pytest.fixture
def pair(runtime: Runtime, nothing_left_behind: None) -> tuple[Process, Process]:
    one = Process(runtime, "one", "a", "b", others=1)
    two = Process(runtime, "two", "c", others=1)
    one.peers, two.peers = [two], [one]
    return one, two


def test_it_is_over_when_all_in_all_processes_have_answered(pair: tuple[Process, Process]) -> None:
    one, two = pair
    asking = one.begin()
    one.answer("a", "yes")
    two.answer("c", 1, 2)
    assert not asking.is_over
    one.answer("b")
    answers = asking.result()
    assert answers == BroadcastAnswers({"a": "yes", "b": None, "c": [1, 2]}, (), 0)
    assert answers.is_complete


def test_who_does_not_answer_in_time_is_told(pair: tuple[Process, Process]) -> None:
    one, _ = pair
    one.prompt = {"a": ("yes",)}
    asking = one.begin(timeout=0.2)
    assert asking.result() == BroadcastAnswers({"a": "yes"}, ("b", "c"), 0)


def test_an_answer_that_json_cannot_hold_is_missing_and_not_waited_for(
    pair: tuple[Process, Process],
) -> None:
    """It comes from a client of another process; one's own may answer with bytes."""
    one, two = pair
    asking = one.begin()
    one.answer("a", b"raw")
    one.answer("b")
    with pytest.raises(TypeError):  # which is recorded where the packets of "c" are read
        two.answer("c", b"raw")
    assert asking.result() == BroadcastAnswers({"a": b"raw", "b": None}, ("c",), 0)


def test_who_has_left_is_not_waited_for(pair: tuple[Process, Process]) -> None:
    one, two = pair
    two.gone.add("c")
    asking = one.begin()
    one.answer("a", "yes")
    on_lost = one.asked["b"].on_lost
    assert on_lost is not None
    on_lost("gone")
    assert asking.result() == BroadcastAnswers({"a": "yes"}, ("b", "c"), 0)


def test_a_process_that_says_nothing_is_told(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.others = 2
    one.prompt = {"a": (1,), "b": (2,)}
    two.prompt = {"c": (3,)}
    asking = one.begin(timeout=0.2)
    assert asking.result() == BroadcastAnswers({"a": 1, "b": 2, "c": 3}, (), 1)


def test_where_nobody_knows_how_many_there_are_it_lasts_the_whole_time(
    pair: tuple[Process, Process],
) -> None:
    one, two = pair
    one.others = None
    one.prompt = {"a": ("yes",), "b": ("yes",)}
    two.prompt = {"c": ("yes",)}
    began_at = clock()
    result = one.begin(timeout=0.3).result()
    assert clock() - began_at >= 0.3
    assert (result.missing, result.silent_processes) == ((), None)
    assert not result.is_complete, "somebody may have been left out"


def test_a_process_without_a_queue_asks_its_own(
    runtime: Runtime, nothing_left_behind: None
) -> None:
    process = Process(runtime, "one", "a")
    process.broadcast_acks._publish = None
    results: list[BroadcastAnswers] = []
    job = runtime.spawn(
        lambda: results.append(
            process.broadcast_acks.ask("ready?", [1], room="hall", namespace="/", timeout=5.0)
        ),
        name="asking",
    )
    wait_for(runtime, lambda: "a" in process.asked)
    process.answer("a", "yes")
    assert job.join(5.0)
    assert results == [BroadcastAnswers({"a": "yes"}, (), 0)]


@pytest.mark.parametrize(
    "message",
    [
        {"method": BROADCAST_PARTICIPANTS, "survey": "made up", "to": "one", "sids": ["x"]},
        {"method": BROADCAST_ANSWER, "survey": "made up", "to": "one", "sid": "a", "answer": [1]},
        {"method": BROADCAST_PARTICIPANTS, "survey": None, "to": "one", "sids": None},
        {"method": BROADCAST_ANSWER},
        {"method": BROADCAST_PARTICIPANTS},
    ],
)
def test_answers_to_nothing_are_ignored(
    pair: tuple[Process, Process], message: dict[str, Any]
) -> None:
    pair[0].broadcast_acks.take(message)


def test_answers_of_others_than_those_asked_are_ignored(pair: tuple[Process, Process]) -> None:
    one, two = pair
    asking = one.begin()
    survey = one.told[0]["survey"]
    reply = {"survey": survey, "to": "one", "host_id": "three"}
    one.broadcast_acks.take(
        {"method": BROADCAST_ANSWER, **reply, "sid": "stranger", "answer": ["mine"]}
    )
    one.broadcast_acks.take({"method": BROADCAST_PARTICIPANTS, **reply, "sids": [1, None, {}]})
    one.broadcast_acks.take(
        {"method": BROADCAST_ANSWER, **reply, "to": "two", "sid": "a", "answer": [0]}
    )
    for process, sid in ((one, "a"), (one, "b"), (two, "c")):
        process.answer(sid, "yes")
    assert asking.result() == BroadcastAnswers({"a": "yes", "b": "yes", "c": "yes"}, (), 0)


def test_others_are_asked_in_turns(
    runtime: Runtime, nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A room of thousands does not keep everybody else waiting."""
    turns: list[int] = []
    process = Process(runtime, "two", *(str(number) for number in range(200)))
    monkeypatch.setattr(runtime, "yield_control", lambda: turns.append(threading.get_ident()))
    process.broadcast_acks.take(
        {
            "method": BROADCAST_CALL,
            "survey": "1",
            "event": "ready?",
            "data": [1],
            "namespace": "/",
            "room": "hall",
            "timeout": 1.0,
            "host_id": "one",
        }
    )
    assert len(process.asked) == 200
    assert len(turns) >= 3

"""The steps of the delivery store, and their words on the wire to Redis."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.delivery import redis_store, steps
from flask_socketio_guard.delivery.records import Delivery, Retry
from flask_socketio_guard.delivery.redis_script import SCRIPT
from flask_socketio_guard.delivery.steps import (
    SHARED_STEPS,
    STEPS,
    Acknowledge,
    DeadLetters,
    End,
    Expire,
    FailAll,
    Find,
    Finish,
    Heartbeat,
    Join,
    Leave,
    Mark,
    Page,
    Put,
    Reap,
    Stored,
    Waiting,
)
from flask_socketio_guard.states import DeliveryState

if TYPE_CHECKING:
    from flask_socketio_guard.delivery.steps import Step

ID = "0" * 31 + "1"
PLAIN = Delivery(ID, "ann", "news", '[{"a":1}]', 60.0)
KEYED = Delivery(
    ID,
    "bøb",
    "price",
    "[]",
    3600,
    "/chat",
    Retry(1, 2.5, 30),
    key='q"√',
    is_ordered=True,
    requires_all=True,
    has_id=True,
)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            Put(PLAIN),
            [
                b"put",
                b"8",
                b"00000000000000000000000000000001",
                b'[2, "00000000000000000000000000000001", "ann", "news", "/", [10.0, 0.5, 30.0], '
                b'null, false, false, false]\n[{"a":1}]',
                b"/,ann",
                b"news",
                b"",
                b"0",
                b"60.0",
                b"884",
            ],
        ),
        (
            Put(KEYED),
            [
                b"put",
                b"8",
                b"00000000000000000000000000000001",
                b'[2, "00000000000000000000000000000001", "b\\u00f8b", "price", "/chat", '
                b'[1, 2.5, 30], "q\\"\\u221a", true, true, true]\n[]',
                b"/chat,b\xc3\xb8b",
                b"price",
                b'["/chat,b\\u00f8b", "q\\"\\u221a"]',
                b"1",
                b"3600",
                b"1464",
            ],
        ),
        (Mark(ID, 2, is_in_flight=True), [b"mark", b"3", ID.encode(), b"2", b"in_flight"]),
        (Mark(ID, 0, is_in_flight=False), [b"mark", b"3", ID.encode(), b"0", b"pending"]),
        (Acknowledge(ID, "phone", 1), [b"acknowledge", b"3", ID.encode(), b"phone", b"1"]),
        (
            Finish(ID, DeliveryState.CANCELLED),
            [b"finish", b"3", ID.encode(), b"cancelled", b"0"],
        ),
        (Finish(ID, DeliveryState.REFUSED), [b"finish", b"3", ID.encode(), b"refused", b"1"]),
        (
            FailAll("/,ann", DeliveryState.GONE, 1000),
            [b"fail_all", b"4", b"/,ann", b"gone", b"1", b"1000"],
        ),
        (
            Waiting("/,ann", 7, 128, 1048576),
            [b"waiting", b"4", b"/,ann", b"7", b"128", b"1048576"],
        ),
        (Find(ID), [b"find", b"1", ID.encode()]),
        (DeadLetters(9), [b"dead_letters", b"1", b"9"]),
        (Expire(200), [b"expire", b"1", b"200"]),
        (Join("/,ø", "phone"), [b"join", b"3", b"/,\xc3\xb8", b"phone", b'["/,\\u00f8", "phone"]']),
        (Leave("/,ann", 'a"'), [b"leave", b"3", b"/,ann", b'a"', b'["/,ann", "a\\""]']),
        (Heartbeat(3000, 7, has_moved=True), [b"heartbeat", b"3", b"3000", b"7", b"1"]),
        (Reap("one", 200), [b"reap", b"2", b"one", b"200"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_step_has_these_words(step: Step[Any], words: list[bytes]) -> None:
    """Other releases share the same Redis: a change needs another version."""
    assert redis_store.VERSION == b"3"
    assert step.words() == words


def test_the_script_has_a_function_for_each_step() -> None:
    examples: list[Step[Any]] = [
        Put(PLAIN),
        Mark("", 0, is_in_flight=False),
        Acknowledge("", "", 0),
        Finish("", DeliveryState.GONE),
        FailAll("", DeliveryState.GONE, 1),
        Waiting("", 0, 1, 1),
        Find(""),
        DeadLetters(1),
        Expire(1),
        Join("", ""),
        Leave("", ""),
        Heartbeat(1, 0, has_moved=False),
        Reap("", 1),
    ]
    assert {type(step) for step in examples} == SHARED_STEPS
    names = {step.words()[0].decode() for step in examples}
    assert names == set(re.findall(r"^function steps\.(\w+)", SCRIPT, re.MULTILINE))


def test_no_class_of_steps_is_forgotten() -> None:
    defined = {each for each in vars(steps).values() if isinstance(each, type)}
    assert {
        each for each in defined if hasattr(each, "words") and each is not steps.Step
    } == SHARED_STEPS
    assert {Heartbeat, Reap} == SHARED_STEPS - STEPS


@pytest.mark.parametrize(
    "step",
    [
        Put(PLAIN._replace(recipient="\ud800")),
        Find("\ud800"),
        Acknowledge(ID, "\ud800", 1),
        Join("/,\ud800", "phone"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_text_that_utf8_cannot_represent_has_no_words(step: Step[Any]) -> None:
    with pytest.raises(UnicodeEncodeError):
        step.words()


ENDED = [ID, "/,ann", "news", "3", "2", "delivered", None]
BY_TWO = [*ENDED[:6], [70, b"phone", b"laptop"]]
OVER = Delivery.ended(ID, "/,ann", "news", 3, 2, DeliveryState.DELIVERED)


@pytest.mark.parametrize(
    ("step", "answer", "result"),
    [
        (Put(PLAIN), [1, 3, None], Stored(PLAIN.numbered(3))),
        (Put(PLAIN), [1, 3, ENDED], Stored(PLAIN.numbered(3), OVER)),
        (Put(PLAIN), [0, None, None, b"size"], Stored(None, full="size")),
        (Put(PLAIN), [0, ENDED, None], Stored(OVER)),
        (Mark(ID, 1, is_in_flight=True), 1, None),
        (Acknowledge(ID, "phone", 1), None, None),
        (Acknowledge(ID, "phone", 1), [1, ENDED], End(OVER, is_new=True)),
        (
            Acknowledge(ID, "phone", 1),
            [1, BY_TWO],
            End(OVER.acknowledged(("phone", "laptop"), 70), is_new=True),
        ),
        (Finish(ID, DeliveryState.GONE), [0, None], End(None, is_new=False)),
        (FailAll("/,ann", DeliveryState.GONE, 9), [ENDED], [OVER]),
        (Waiting("/,ann", 0, 9, 9), [[], b"0", 0], Page([], 0, has_more=False)),
        (Find(ID), [0, None], None),
        (Find(ID), [0, ENDED], OVER),
        (DeadLetters(9), [], []),
        (Expire(9), [ENDED], [OVER]),
        (Join("/,ann", "phone"), 1, None),
        (Leave("/,ann", "phone"), [ENDED], [OVER]),
        (Heartbeat(9, 0, has_moved=False), 1, True),
        (Reap("one", 9), [[ENDED], 2], ([OVER], 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_step_reads_its_answer(step: Step[Any], answer: object, result: object) -> None:
    assert step.read(answer) == result

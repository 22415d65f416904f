"""The exception tree, its texts and its attributes."""

from __future__ import annotations

import pickle
import re

from flask_socketio_guard import errors
from flask_socketio_guard.errors import (
    BrokerError,
    ConfigError,
    ConnectionClosed,
    DeliveryError,
    DeliveryFormatError,
    DeliveryInvalid,
    DeliveryStoreError,
    DeliveryStoreFull,
    DuplicateTask,
    EventInvalid,
    EventRejected,
    GuardError,
    HandlerTimeout,
    IncompatibleVersion,
    InvalidTransition,
    LoopQueueFull,
    OutboxFull,
    OutputTooLarge,
    PublishError,
    PublishRefused,
    RateLimited,
    RoomInvalid,
    TaskError,
    UnknownDelivery,
)
from tests.support.cases import in_turn

PARENTS = {
    GuardError: (Exception,),
    ConfigError: (GuardError, ValueError),
    IncompatibleVersion: (GuardError,),
    EventRejected: (GuardError,),
    EventInvalid: (EventRejected,),
    RoomInvalid: (EventInvalid, ValueError),
    OutputTooLarge: (EventRejected,),
    RateLimited: (EventRejected,),
    HandlerTimeout: (GuardError, TimeoutError),
    ConnectionClosed: (GuardError,),
    LoopQueueFull: (GuardError,),
    BrokerError: (GuardError,),
    PublishError: (BrokerError,),
    PublishRefused: (PublishError,),
    OutboxFull: (BrokerError,),
    DeliveryError: (GuardError,),
    DeliveryInvalid: (DeliveryError, ValueError),
    DeliveryStoreFull: (DeliveryError,),
    DeliveryStoreError: (DeliveryError,),
    DeliveryFormatError: (DeliveryStoreError,),
    UnknownDelivery: (DeliveryError, LookupError),
    TaskError: (GuardError,),
    DuplicateTask: (TaskError,),
    InvalidTransition: (GuardError,),
}


def _defined() -> set[type]:
    return {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }


@in_turn(("error", "parents"), PARENTS.items(), ids=lambda value: str(value))
def test_every_error_has_its_place_in_the_tree(
    error: type[BaseException], parents: tuple[type, ...]
) -> None:
    assert error.__bases__ == parents


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every class, at the depth that it has."""
    assert _defined() == set(PARENTS)
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)", line):
            drawn[match["name"]] = (len(match["indent"]) - 4) // 4
    depths = {
        error.__name__: sum(issubclass(other, GuardError) for other in error.__mro__) - 1
        for error in PARENTS
    }
    assert {name: drawn.get(name) for name in depths} == depths


def test_every_error_that_an_application_can_meet_is_public() -> None:
    """``PublishRefused`` stays between publisher and outbox."""
    assert {error.__name__ for error in PARENTS} - set(errors.__all__) == {"PublishRefused"}


def test_errors_carry_their_facts_as_attributes() -> None:
    assert EventRejected("no", code="full").code == "full"
    assert EventRejected("no").message == "no"
    assert EventRejected().code == "rejected"
    assert EventInvalid().code == "invalid"
    assert RoomInvalid().code == "invalid_room"
    assert OutputTooLarge().code == "output_too_large"
    assert RateLimited().code == "rate_limited"
    assert RateLimited().retry_after == 0.0
    assert RateLimited("slowly", retry_after=2.5).retry_after == 2.5
    assert RateLimited("slowly").message == "slowly"
    assert HandlerTimeout(1.5).seconds == 1.5
    assert PublishError("gone", published=3).published == 3
    assert PublishRefused("no", published=1, refused=2).refused == 2
    assert OutboxFull(messages=5, size=60).messages == 5
    assert OutboxFull(messages=5, size=60).size == 60
    assert InvalidTransition("running", "start").state == "running"
    assert InvalidTransition("running", "start").event == "start"


def test_error_texts_say_what_happened() -> None:
    assert str(HandlerTimeout(1.5)) == "the handler took longer than 1.5 s"
    assert str(OutboxFull(messages=5, size=60)) == (
        "the outbox is full (5 messages, 60 bytes wait for the message queue)"
    )
    assert str(InvalidTransition("running", "start")) == "start is not allowed in state running"
    assert str(EventRejected()) == "event rejected"
    assert str(EventInvalid()) == "invalid event"
    assert str(RateLimited()) == "too many events"


@in_turn(
    "error",
    [
        EventRejected("no", code="x"),
        EventInvalid("no", code="x"),
        RoomInvalid("no"),
        OutputTooLarge("much"),
        RateLimited("slowly", retry_after=2.5),
        HandlerTimeout(2.0),
        OutboxFull(messages=5, size=60),
        ConnectionClosed("gone"),
        LoopQueueFull("full"),
        DeliveryInvalid("too large"),
        UnknownDelivery("5f"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_an_application_meets_can_be_pickled(error: Exception) -> None:
    """Celery and multiprocessing send exceptions to another process."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)

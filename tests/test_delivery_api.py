"""The delivery API: senders learn how their messages ended, in whichever process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.delivery.api import DeliveryApi
from flask_socketio_guard.delivery.memory import MemoryStore
from flask_socketio_guard.delivery.records import Retry
from flask_socketio_guard.delivery.request import delivery_request
from flask_socketio_guard.delivery.steps import Finish
from flask_socketio_guard.delivery.store_client import DirectStoreClient
from flask_socketio_guard.states import DeliveryState
from tests.support import unit_support
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from flask_socketio_guard.core.runtime import Runtime
    from flask_socketio_guard.delivery.receipts import Receipt

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


class Sending:
    """A delivery API, and the calls of its hooks."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.store = MemoryStore(
            max_messages=100,
            max_size=10**6,
            retention=60.0,
            max_ended_size=10**6,
            max_dead_letters=10,
            max_dead_size=10**6,
            dead_retention=60.0,
        )
        self.told: list[tuple[str, str]] = []
        self.api = DeliveryApi(
            runtime,
            DirectStoreClient(self.store, on_end=lambda delivery, _: self.api.ended(delivery)),
            encode=json.dumps,
            max_size=1000,
            run=lambda function, arguments: function(*arguments),
        )

    def put(self, *args: Any) -> Receipt:
        request = delivery_request(
            "news",
            args or (1,),
            to="ann",
            ttl=None,
            retry=None,
            key=None,
            ordered=False,
            require="any",
            with_id=False,
            namespace=None,
            on_delivered=lambda receipt: self.told.append(("delivered", receipt.id)),
            on_expired=lambda receipt: self.told.append(("expired", receipt.id)),
        )
        return self.api.put(request, ttl=60.0, retry=Retry())


@pytest.fixture
def sending(runtime: Runtime) -> Sending:
    return Sending(runtime)


@pytest.mark.parametrize(
    ("state", "hook"),
    [
        (DeliveryState.DELIVERED, "delivered"),
        (DeliveryState.EXPIRED, "expired"),
        (DeliveryState.GONE, "expired"),
        (DeliveryState.REFUSED, "expired"),
        (DeliveryState.CANCELLED, None),
        (DeliveryState.REPLACED, None),
    ],
)
def test_each_end_calls_the_hook_for_it_once(
    sending: Sending, state: DeliveryState, hook: str | None
) -> None:
    receipt = sending.put()
    end = sending.store.do(Finish(receipt.id, state))
    assert end.delivery is not None
    for _ in range(2):
        sending.api.ended(end.delivery)
    assert sending.told == ([] if hook is None else [(hook, receipt.id)])
    assert not sending.api._watches


def test_an_end_that_was_missed_is_found_by_a_lookup(sending: Sending) -> None:
    receipts = [sending.put() for _ in range(3)]
    sending.store.do(Finish(receipts[0].id, DeliveryState.DELIVERED))
    waited: list[DeliveryState] = []
    job = sending.runtime.spawn(lambda: waited.append(receipts[1].wait(30.0)), name="waiting")
    wait_for(sending.runtime, lambda: bool(sending.api._waiting))
    sending.store.do(Finish(receipts[1].id, DeliveryState.EXPIRED))
    sending.api.look_again()
    assert job.join(5.0)
    assert waited == [DeliveryState.EXPIRED]
    assert set(sending.told) == {("delivered", receipts[0].id), ("expired", receipts[1].id)}
    assert list(sending.api._watches) == [receipts[2].id]


def test_a_wait_ends_when_the_message_is_unknown(sending: Sending) -> None:
    """The store was emptied."""
    receipt = sending.put()
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            receipt.wait(30.0)
        except LookupError as exc:
            failures.append(exc)

    job = sending.runtime.spawn(wait, name="waiting")
    wait_for(sending.runtime, lambda: bool(sending.api._waiting))
    sending.store._open.clear()
    sending.api.look_again()
    assert job.join(5.0)
    assert len(failures) == 1
    assert not sending.api._watches
    assert not sending.api._waiting


def test_a_wait_for_an_ended_message_returns_at_once(sending: Sending) -> None:
    receipt = sending.put()
    assert receipt.cancel()
    assert receipt.wait() is DeliveryState.CANCELLED
    assert receipt.wait(0.0) is DeliveryState.CANCELLED

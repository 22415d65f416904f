"""The dispatcher: recipients, redelivery, order and bounds."""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_socketio_guard.delivery import dispatcher as dispatcher_module
from flask_socketio_guard.delivery import mailboxes as mailboxes_module
from flask_socketio_guard.delivery import presence as presence_module
from flask_socketio_guard.delivery.dispatcher import Dispatcher, is_refusal
from flask_socketio_guard.delivery.memory import MemoryStore
from flask_socketio_guard.delivery.records import Delivery, Retry
from flask_socketio_guard.delivery.steps import Finish, Put
from flask_socketio_guard.delivery.store_client import DirectStoreClient
from flask_socketio_guard.errors import InvalidTransition
from flask_socketio_guard.states import DeliveryState, SendingEvent, SendingState
from tests.support.scale import examples
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio_guard.delivery.store import Page
    from flask_socketio_guard.events.acknowledgements import Awaiting, Question

RETRY = Retry(ack_timeout=1.0, first_delay=2.0, max_delay=8.0)
MAX_IN_FLIGHT = 3


@dataclass
class Asked:
    """An event that a client has and may acknowledge."""

    sid: str
    arguments: list[Any]
    callback: Awaiting

    @property
    def number(self) -> int:
        return int(self.arguments[0])

    def answer(self, *arguments: Any) -> None:
        self.callback.function(*arguments)


class SlowStoreClient(DirectStoreClient):
    """Answers when the test says so, if it is slow."""

    def __init__(self, store: MemoryStore, *, on_end: Callable[[Delivery, bool], None]) -> None:
        super().__init__(store, on_end=on_end)
        self.is_slow = False
        self.answers: list[Callable[[], object]] = []

    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        page: list[Page] = []
        super().load(address, after, limit, max_size, page.append)
        self._later(lambda: then(page[0]))

    def acknowledged(self, delivery: Delivery, device: str) -> None:
        self._later(lambda: DirectStoreClient.acknowledged(self, delivery, device))

    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        self._later(lambda: DirectStoreClient.give_up(self, delivery, state))

    def _later(self, answer: Callable[[], object]) -> None:
        if self.is_slow:
            self.answers.append(answer)
        else:
            answer()

    def answer(self) -> None:
        """Answer what was asked so far."""
        answers, self.answers = self.answers, []
        for answer in answers:
            answer()


@dataclass
class World:
    """Clients, a clock and what is due, around a dispatcher with a store."""

    clock: FakeClock = field(default_factory=FakeClock)
    rooms: dict[str, list[str]] = field(default_factory=dict)
    here: set[str] = field(default_factory=set)
    coming: set[str] = field(default_factory=set)
    deaf: set[str] = field(default_factory=set)  # about to leave
    transports: dict[str, str] = field(default_factory=dict)
    questions: int = 0
    asked: dict[int, Asked] = field(default_factory=dict)
    history: list[Asked] = field(default_factory=list)
    ended: list[Delivery] = field(default_factory=list)
    due: list[tuple[float, int, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers = itertools.count(1)
        self.store = MemoryStore(
            max_messages=10_000,
            max_size=10**9,
            retention=10**6,
            max_ended_size=10**8,
            max_dead_letters=100,
            max_dead_size=10**8,
            dead_retention=10**6,
            clock=self.clock,
        )
        self.store_client = SlowStoreClient(self.store, on_end=self._ended)
        self.dispatcher = Dispatcher(
            self.store_client,
            self,
            self,
            max_in_flight=MAX_IN_FLIGHT,
            backoff=lambda attempt, *, first_delay, max_delay: min(
                max_delay, first_delay * 2**attempt
            ),
        )

    def _ended(self, delivery: Delivery, is_new: bool) -> None:
        if is_new:
            self.ended.append(delivery)
        self.dispatcher.ended(delivery)

    # The ports of the dispatcher

    def find(self, recipient: str, namespace: str) -> list[str]:
        if namespace != "/":
            return []
        own = [recipient] if recipient in self.here else []
        return own + [sid for sid in self.rooms.get(recipient, []) if sid in self.here]

    def is_open(self, sid: str) -> bool:
        return sid in self.here

    def is_here(self, sid: str) -> bool:
        return sid in self.here or sid in self.coming

    def transport_of(self, sid: str) -> str | None:
        return self.transports.get(sid)

    def ask(self, sid: str, question: Question) -> int | None:
        namespace, event, arguments, callback, ack_id = question
        assert (namespace, event) == ("/", "news")
        self.questions += 1
        if sid not in self.here or sid in self.deaf:
            self.asked.pop(ack_id or 0, None)
            return None
        if ack_id is None:
            ack_id = next(self.numbers)
            self.asked[ack_id] = Asked(sid, json.loads(arguments), callback)
        self.history.append(Asked(sid, json.loads(arguments), self.asked[ack_id].callback))
        return ack_id

    def forget(self, ack_id: int, sid: str) -> None:
        entry = self.asked.pop(ack_id, None)
        assert entry is None or entry.sid == sid

    def call_later(self, delay: float, target: Callable[[], object]) -> Any:
        entry = Due(target)
        heapq.heappush(self.due, (self.clock.now + delay, next(self.numbers), entry))
        return entry

    # Events

    def connect(self, sid: str, identity: str | None = None, room: str | None = None) -> None:
        self.here.add(sid)
        if room is not None:
            self.rooms.setdefault(room, []).append(sid)
            self.dispatcher.recipient_online(room, "/")
        if identity is not None:
            self.dispatcher.identify(sid, "/", identity)

    def leave(self, sid: str) -> None:
        self.here.discard(sid)
        for members in self.rooms.values():
            if sid in members:
                members.remove(sid)
        for ack_id, entry in list(self.asked.items()):
            if entry.sid == sid:
                del self.asked[ack_id]
                assert entry.callback.on_lost is not None
                entry.callback.on_lost("gone")
        self.dispatcher.session_closed(sid, "/", self.transports.get(sid))

    def deliver(self, number: int, to: str, **options: Any) -> str:
        options = {"ttl": 1000.0, "retry": RETRY} | options
        delivery = Delivery(f"{number:032x}", to, "news", json.dumps([number]), **options)
        put = self.store_client.put(delivery)
        assert put.delivery is not None
        self.dispatcher.offer(put.delivery)
        return delivery.id

    def acknowledge(self, sid: str, number: int, *answer: Any) -> None:
        for ack_id, entry in list(self.asked.items()):
            if entry.sid == sid and entry.number == number:
                del self.asked[ack_id]
                entry.answer(*answer)
                return
        raise AssertionError(f"{sid} was not asked {number}")

    def pass_time(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.due and self.due[0][0] <= until:
            at, _, entry = heapq.heappop(self.due)
            self.clock.now = max(self.clock.now, at)
            entry.run()
        self.clock.now = until
        self.store_client.expire()

    def sent(self) -> list[tuple[str, int]]:
        return [(entry.sid, entry.number) for entry in self.history]

    def state(self, number: int) -> DeliveryState:
        delivery = self.store_client.find(f"{number:032x}")
        assert delivery is not None
        return delivery.state


@dataclass
class Due:
    """A call that is due later."""

    target: Callable[[], object] | None

    def cancel(self) -> None:
        self.target = None

    def run(self) -> None:
        target, self.target = self.target, None
        if target is not None:
            target()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return new_world(monkeypatch)


def new_world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    for module in (dispatcher_module, mailboxes_module, presence_module):
        monkeypatch.setattr(module, "clock", world.clock)
    return world


def test_a_connected_recipient_gets_it_at_once_and_its_acknowledgement_ends_it(
    world: World,
) -> None:
    world.connect("a")
    world.deliver(1, to="a")
    assert world.state(1) is DeliveryState.IN_FLIGHT
    world.acknowledge("a", 1)
    assert world.state(1) is DeliveryState.DELIVERED
    assert world.sent() == [("a", 1)]
    assert world.dispatcher.in_flight == 0
    assert not [*world.dispatcher._mailboxes]


@pytest.mark.parametrize("way", ["identity", "room"])
def test_an_absent_recipient_gets_it_when_it_connects(world: World, way: str) -> None:
    world.deliver(1, to="ann")
    assert world.state(1) is DeliveryState.PENDING
    world.connect("a", **{way: "ann"})
    world.acknowledge("a", 1)
    assert [delivery.state for delivery in world.ended] == [DeliveryState.DELIVERED]


def test_redelivery_backs_off_without_an_acknowledgement(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    instants = [world.clock.now]
    while len(instants) < 6:
        world.pass_time(0.5)
        if len(world.history) > len(instants):
            instants.append(world.clock.now)
    waits = [after - before for before, after in itertools.pairwise(instants)]
    # A second for the acknowledgement, and the delay.
    assert waits == [3.0, 5.0, 9.0, 9.0, 9.0]


def test_a_late_acknowledgement_counts_and_ends_redelivery(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(3.5)
    assert len(world.history) == 2
    assert len(world.asked) == 1, "one acknowledgement is waited for, whichever comes"
    world.acknowledge("a", 1)
    assert world.state(1) is DeliveryState.DELIVERED
    assert not world.asked
    world.pass_time(100)
    assert len(world.history) == 2


def test_redelivery_is_immediate_when_the_recipient_reconnects(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(1.5)  # it has been given up for now
    world.connect("b", identity="ann")
    assert world.sent() == [("a", 1), ("b", 1)]
    world.leave("a")
    world.leave("b")
    assert world.state(1) is DeliveryState.PENDING
    world.pass_time(50.0)
    assert len(world.history) == 2
    world.connect("c", identity="ann")
    assert world.sent()[2:] == [("c", 1)]


def test_a_second_device_gets_what_the_first_has_not_acknowledged(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.connect("b", identity="ann")
    assert world.sent() == [("a", 1), ("b", 1)]
    world.leave("a")
    world.acknowledge("b", 1)
    assert world.state(1) is DeliveryState.DELIVERED


def test_all_devices_have_to_acknowledge_where_asked(world: World) -> None:
    world.connect("a", identity="ann")
    world.connect("b", identity="ann")
    world.connect("c", identity="ann")
    world.deliver(1, to="ann", requires_all=True)
    world.acknowledge("a", 1)
    world.acknowledge("b", 1)
    assert world.state(1) is DeliveryState.IN_FLIGHT
    world.pass_time(50.0)
    assert [sid for sid, _ in world.sent()].count("a") == 1
    world.leave("c")
    assert world.state(1) is DeliveryState.DELIVERED


def test_a_device_that_comes_late_has_to_acknowledge_too(world: World) -> None:
    world.connect("a", identity="ann")
    world.connect("b", identity="ann")
    world.deliver(1, to="ann", requires_all=True)
    world.acknowledge("a", 1)
    world.connect("c", identity="ann")
    world.acknowledge("b", 1)
    assert world.state(1) is DeliveryState.IN_FLIGHT
    world.acknowledge("c", 1)
    assert world.state(1) is DeliveryState.DELIVERED


def test_a_message_to_a_connection_is_gone_with_it(world: World) -> None:
    world.connect("a")
    world.deliver(1, to="a")
    world.leave("a")
    world.deliver(2, to="a")
    assert [delivery.state for delivery in world.ended] == [DeliveryState.GONE] * 2


def test_a_client_that_is_not_let_in_yet_gets_it_when_it_is(world: World) -> None:
    world.coming.add("a")
    world.deliver(1, to="a")
    assert world.history == []
    world.coming.remove("a")
    world.here.add("a")
    world.dispatcher.session_opened("a", "/")
    assert world.sent() == [("a", 1)]
    assert not world.dispatcher.presence._awaited


def test_a_timer_that_is_cancelled_too_late_sends_nothing(world: World) -> None:
    """In another thread it may have begun, and wait for the lock."""
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(1.0)
    (retry,) = [entry.target for _, _, entry in world.due if entry.target is not None]
    world.connect("b", identity="ann")
    assert world.sent() == [("a", 1), ("b", 1)]
    assert retry is not None
    retry()
    assert world.sent() == [("a", 1), ("b", 1)]
    assert world.dispatcher.in_flight == 1


def test_a_message_that_has_ended_is_never_sent_again(world: World) -> None:
    world.connect("a")
    world.deliver(1, to="a")
    mailboxes = world.dispatcher._mailboxes
    (mailbox,) = mailboxes
    (pending,) = mailbox.pending_messages.values()
    world.acknowledge("a", 1)
    with pytest.raises(InvalidTransition, match=r"^send is not allowed in state dropped$"):
        mailboxes.move(mailbox, pending, SendingEvent.SEND)
    assert (pending.state, mailboxes.in_flight) == (SendingState.DROPPED, 0)


def test_a_recipient_may_refuse(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.acknowledge("a", 1, {"error": {"code": "rejected"}})
    assert world.state(1) is DeliveryState.REFUSED


@pytest.mark.parametrize(
    ("answer", "is_one"),
    [((), False), (({"error": None},), False), (({"error": 1},), True), (({"error": 1}, 2), False)],
)
def test_only_an_object_with_an_error_is_a_refusal(answer: tuple[Any, ...], is_one: bool) -> None:
    assert is_refusal(answer) is is_one


def test_no_more_are_in_flight_than_the_bound(world: World) -> None:
    world.connect("a", identity="ann")
    for number in range(1, 10):
        world.deliver(number, to="ann")
    assert world.sent() == [("a", 1), ("a", 2), ("a", 3)]
    world.acknowledge("a", 2)
    assert world.sent()[3:] == [("a", 4)]
    world.pass_time(1.0)  # what is not acknowledged holds nobody up
    assert {number for _, number in world.sent()[4:]} == {5, 6, 7}


def test_messages_beyond_the_window_come_from_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW", 4)
    for number in range(1, 21):
        world.deliver(number, to="ann")
    world.connect("a", identity="ann")
    for number in range(21, 31):
        world.deliver(number, to="ann")
    for number in range(1, 31):
        assert (
            max(
                map(
                    len,
                    (mailbox.pending_messages for mailbox in world.dispatcher._mailboxes),
                )
            )
            <= 6
        )
        world.acknowledge("a", number)
    assert [number for _, number in world.sent()] == list(range(1, 31))
    assert not [*world.dispatcher._mailboxes]


def test_ordered_messages_are_sent_one_after_the_other(world: World) -> None:
    world.connect("a", identity="ann")
    for number in (1, 2, 3):
        world.deliver(number, to="ann", is_ordered=True)
    world.deliver(4, to="ann")
    assert world.sent() == [("a", 1), ("a", 4)]
    world.pass_time(20.0)
    assert 2 not in {number for _, number in world.sent()}
    world.acknowledge("a", 1)
    assert world.sent()[-1] == ("a", 2)
    world.leave("a")
    world.connect("b", identity="ann")
    assert world.sent()[-2:] == [("b", 2), ("b", 4)] or world.sent()[-2:] == [("b", 4), ("b", 2)]
    world.acknowledge("b", 2)
    world.acknowledge("b", 3)
    assert world.state(3) is DeliveryState.DELIVERED


def test_an_expired_message_is_not_sent(world: World) -> None:
    world.deliver(1, to="ann", ttl=5.0)
    world.clock.now += 6.0
    world.connect("a", identity="ann")
    assert world.history == []
    world.pass_time(0.1)
    assert world.state(1) is DeliveryState.EXPIRED


def test_the_id_comes_last_where_asked_for(world: World) -> None:
    world.connect("a", identity="ann")
    id = world.deliver(1, to="ann", has_id=True)
    world.pass_time(3.5)
    assert [entry.arguments for entry in world.history] == [
        [1, {"delivery_id": id, "attempt": 1}],
        [1, {"delivery_id": id, "attempt": 2}],
    ]


def test_a_message_for_a_namespace_without_the_recipient_holds_nobody_up(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.deliver(2, to="ann", namespace="/chat")
    world.deliver(3, to="ann")
    assert world.sent() == [("a", 1), ("a", 3)]
    world.pass_time(3.5)
    assert world.sent()[2:] == [("a", 1), ("a", 3)]
    world.acknowledge("a", 1)
    world.acknowledge("a", 3)
    assert [world.state(number) for number in (1, 2, 3)] == [
        DeliveryState.DELIVERED,
        DeliveryState.PENDING,
        DeliveryState.DELIVERED,
    ]


def test_a_message_that_is_stored_during_a_load_is_not_forgotten(world: World) -> None:
    world.store_client.is_slow = True
    world.deliver(1, to="ann")
    world.connect("a", identity="ann")
    world.deliver(2, to="ann")  # after the store was asked, before it has answered
    world.store_client.answer()
    world.store_client.answer()
    assert world.sent() == [("a", 1), ("a", 2)]


def test_a_page_for_a_removed_mailbox_is_not_sent_from_it(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.dispatcher.look_again()
    world.leave("a")
    world.pass_time(0.1)
    world.connect("b", identity="ann")
    for _ in range(4):
        world.store_client.answer()
    assert world.sent() == [("a", 1), ("b", 1)]


def test_an_end_that_was_missed_is_found_by_a_lookup(world: World) -> None:
    world.connect("a", identity="ann")
    ids = [world.deliver(number, to="ann", is_ordered=True) for number in (1, 2)]
    world.store.do(Finish(ids[0], DeliveryState.CANCELLED))
    world.dispatcher.look_again()
    assert world.sent() == [("a", 1), ("a", 2)]
    world.pass_time(3.5)
    assert world.sent()[2:] == [("a", 2)]


def test_a_message_that_is_stored_during_a_lookup_is_kept(world: World) -> None:
    world.connect("a", identity="ann")
    world.store_client.is_slow = True
    world.dispatcher.look_again([("ann", "/")])
    world.deliver(1, to="ann")
    world.dispatcher.look_again()
    for _ in range(3):
        world.store_client.answer()
    world.acknowledge("a", 1)
    world.store_client.answer()
    assert world.state(1) is DeliveryState.DELIVERED
    assert world.sent() == [("a", 1)]
    assert not [*world.dispatcher._mailboxes]


def test_a_message_that_others_ended_first_is_forgotten_too(world: World) -> None:
    """As when the answer of the store was lost, and the acknowledgement is repeated."""
    world.connect("a", identity="ann")
    ids = [world.deliver(number, to="ann", is_ordered=True) for number in (1, 2)]
    world.store.do(Finish(ids[0], DeliveryState.DELIVERED))
    world.acknowledge("a", 1)
    assert world.sent() == [("a", 1), ("a", 2)]
    assert world.ended == [], "it was told of where it ended"


def test_an_acknowledged_message_is_not_sent_again_before_the_store_knows(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.acknowledge("a", 1)
    world.connect("b", identity="ann")
    world.pass_time(50.0)
    assert world.sent() == [("a", 1)]
    world.store_client.answer()
    assert world.state(1) is DeliveryState.DELIVERED


def test_all_that_waits_for_a_connection_is_gone_with_it(world: World) -> None:
    world.connect("a")
    for number in range(1, 301):
        world.deliver(number, to="a")
    world.leave("a")
    assert [delivery.state for delivery in world.ended] == [DeliveryState.GONE] * 300


@pytest.mark.parametrize("is_let_in", [False, True])
def test_a_message_for_a_client_that_then_leaves_is_gone(world: World, is_let_in: bool) -> None:
    world.coming.add("a")
    world.deliver(1, to="a")
    if is_let_in:
        world.here.add("a")
        world.dispatcher.session_opened("a", "/")
        assert world.sent() == [("a", 1)]
    world.leave("a")
    assert world.state(1) is DeliveryState.GONE


def test_messages_without_acknowledgement_are_parked_in_favor_of_the_rest(world: World) -> None:
    world.connect("a", identity="ann")
    for number in range(1, 300):
        world.deliver(number, to="ann", ttl=10**6)
    for _ in range(1000):
        world.pass_time(1.0)
        for ack_id, entry in list(world.asked.items()):
            if entry.number > 200:
                del world.asked[ack_id]
                entry.answer()
    delivered = [world.state(number) is DeliveryState.DELIVERED for number in range(1, 300)]
    assert delivered == [False] * 200 + [True] * 99
    times = Counter(number for _, number in world.sent())
    assert min(times[number] for number in range(1, 201)) > 1, "some were set parked for good"
    assert len(world.asked) <= 200
    for _ in range(300):
        while world.asked:
            world.asked.pop(next(iter(world.asked))).answer()
        world.pass_time(1.0)
    assert [delivery.state for delivery in world.ended] == [DeliveryState.DELIVERED] * 299
    assert not [*world.dispatcher._mailboxes], "those that were set parked have come back"


def test_a_new_device_gets_it_and_the_others_do_not_get_it_again(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(1.5)  # taken for lost, and not due yet
    for sid in "bcd":
        world.connect(sid, identity="ann")
    assert world.sent() == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def test_a_client_that_is_about_to_leave_is_not_asked_all_the_time(world: World) -> None:
    world.connect("a", identity="ann")
    world.deaf.add("a")
    world.deliver(1, to="ann", has_id=True)
    for _ in range(1000):
        world.pass_time(0.05)
    assert world.sent() == []
    assert world.questions < 80, "more than once a second"
    found = world.store_client.find(f"{1:032x}")
    assert found is not None
    assert found.attempts == 0
    world.deaf.clear()
    world.pass_time(1.0)
    assert world.history[0].arguments[-1]["attempt"] == 1


def test_a_client_that_has_left_is_not_a_device(world: World) -> None:
    world.connect("a", identity="ann")
    world.leave("a")
    world.dispatcher.identify("a", "/", "ann")
    assert not world.dispatcher.presence._identities
    assert not world.dispatcher.presence._addresses


@pytest.mark.parametrize("name", ["\ud800", "a\udfff"])
def test_a_room_that_no_sender_can_name_is_ignored(world: World, name: str) -> None:
    world.store_client.is_slow = True
    world.connect("a", room=name)
    assert world.store_client.answers == []


def test_ordered_messages_of_other_senders_keep_their_place(world: World) -> None:
    """The notice of a message that another process stored earlier may come later."""
    world.connect("a", identity="ann")
    first = Delivery(f"{1:032x}", "ann", "news", "[1]", 1000.0, retry=RETRY, is_ordered=True)
    world.store.do(Put(first))
    world.deliver(2, to="ann", is_ordered=True)
    world.dispatcher.stored("/,ann")
    world.acknowledge("a", 1)
    assert world.sent() == [("a", 1), ("a", 2)]


def test_a_page_that_was_asked_for_before_a_lookup_does_not_count(world: World) -> None:
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.connect("a", identity="ann")
    world.store.do(Finish(f"{1:032x}", DeliveryState.CANCELLED))  # after the store was asked
    world.dispatcher.look_again()
    for _ in range(3):
        world.store_client.answer()
    assert world.sent() == []
    assert not [*world.dispatcher._mailboxes]


def test_a_message_that_ends_while_it_is_loaded_is_not_sent(world: World) -> None:
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.connect("a", identity="ann")
    world.store_client.end(f"{1:032x}", DeliveryState.CANCELLED)
    world.store_client.answer()
    assert world.sent() == []


def test_a_late_acknowledgement_takes_it_out_of_the_queue(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(1.5)
    for number in (2, 3, 4):
        world.deliver(number, to="ann")
    world.pass_time(0.6)
    for number in (5, 6, 7):  # they take the places of those that have timed out by then
        world.deliver(number, to="ann")
    world.pass_time(1.0)
    before = len(world.history)
    world.store_client.is_slow = True
    world.acknowledge("a", 1)
    world.pass_time(60.0)
    assert ("a", 1) not in world.sent()[before:]


def test_messages_for_a_session_that_is_leaving_are_gone_with_it(world: World) -> None:
    world.connect("a")
    world.deliver(1, to="a")
    world.here.discard("a")
    world.coming.add("a")  # neither open nor gone
    world.pass_time(4.0)
    assert not [*world.dispatcher._mailboxes]
    world.coming.discard("a")
    world.leave("a")
    assert world.state(1) is DeliveryState.GONE


def test_a_message_that_a_leaving_device_had_goes_to_another(world: World) -> None:
    world.connect("a", identity="ann")
    world.connect("b", identity="ann")
    world.deaf.add("b")
    world.deliver(1, to="ann")
    world.deaf.clear()
    world.leave("a")
    world.pass_time(0.05)
    assert world.sent() == [("a", 1), ("b", 1)]


def test_a_lookup_finds_messages_for_the_identities_of_clients(world: World) -> None:
    world.connect("a", identity="ann")
    delivery = Delivery(f"{1:032x}", "ann", "news", "[1]", 1000.0, retry=RETRY)
    world.store.do(Put(delivery))  # by another process, without a notice
    world.dispatcher.look_again([("a", "/")])
    assert world.sent() == [("a", 1)]


def test_late_acknowledgements_count_however_many_wait(world: World) -> None:
    world.connect("a", identity="ann")
    for number in range(1, 201):
        world.deliver(number, to="ann", ttl=10**6)
    given = 0
    late: list[tuple[float, Asked]] = []
    for _ in range(4000):
        world.pass_time(0.1)
        late += [(world.clock.now + 1.2, entry) for entry in world.history[given:]]
        given = len(world.history)
        while late and late[0][0] <= world.clock.now:
            entry = late.pop(0)[1]
            found = [id for id, asked in world.asked.items() if asked.number == entry.number]
            if found:
                world.asked.pop(found[0]).answer()
    assert len(world.ended) == 200
    assert given < 300, "most came once"


def test_a_lookup_does_not_load_everything(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW", 4)
    world.connect("a", identity="ann")
    for number in range(1, 101):
        world.deliver(number, to="ann")
    for number in range(1, 50):
        world.acknowledge("a", number)
    world.dispatcher.look_again()
    (mailbox,) = world.dispatcher._mailboxes
    assert len(mailbox.pending_messages) <= 8
    for number in range(50, 101):
        world.acknowledge("a", number)
    assert len(world.sent()) == 100


def test_a_client_that_is_leaving_for_ever_is_asked_for_ever(world: World) -> None:
    world.connect("a", identity="ann")
    world.deaf.add("a")
    world.deliver(1, to="ann", ttl=10**6)
    world.pass_time(5000.0)
    world.deaf.clear()
    world.pass_time(2.0)
    assert world.sent() == [("a", 1)]


def test_entering_and_leaving_a_room_leaves_no_callbacks_behind(world: World) -> None:
    world.connect("a", room="hall")
    for number in (1, 2, 3):
        world.deliver(number, to="hall")
    for _ in range(20):
        world.rooms["hall"].remove("a")
        world.pass_time(4.0)
        world.rooms["hall"].append("a")
        world.dispatcher.recipient_online("hall", "/")
    assert len(world.asked) <= 3


def test_a_refused_message_is_not_sent_again_before_the_store_knows(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.acknowledge("a", 1, {"error": "no"})
    world.connect("b", identity="ann")
    world.pass_time(50.0)
    assert world.sent() == [("a", 1)]
    world.store_client.answer()
    assert world.state(1) is DeliveryState.REFUSED


def test_a_new_connection_postpones_redelivery_to_the_others(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(1.5)  # due again after 3 s
    world.connect("b", identity="ann")
    world.pass_time(2.5)
    assert world.sent() == [("a", 1), ("b", 1)]
    world.pass_time(3.0)
    assert sorted(world.sent()[2:]) == [("a", 1), ("b", 1)]


def test_a_lookup_past_many_parked_messages_does_not_load_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW", 4)
    world.connect("a", identity="ann")
    for number in range(1, 61):
        world.deliver(number, to="ann")
    (mailbox,) = world.dispatcher._mailboxes
    while mailbox.last < 40:
        world.pass_time(0.5)
    world.dispatcher.look_again()
    assert len(mailbox.pending_messages) <= 8
    assert not mailbox.suspects


def test_each_attempt_is_lost_after_its_own_timeout(world: World) -> None:
    world.connect("a", identity="ann")
    world.deliver(1, to="ann")
    world.pass_time(0.5)
    world.deliver(2, to="ann")
    world.pass_time(0.6)
    assert [world.state(number) for number in (1, 2)] == [
        DeliveryState.PENDING,
        DeliveryState.IN_FLIGHT,
    ]
    world.pass_time(0.5)
    assert world.state(2) is DeliveryState.PENDING


def test_a_parked_message_that_is_cancelled_is_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW", 4)
    world.connect("a", identity="ann")
    ids = [world.deliver(number, to="ann") for number in range(1, 21)]
    (mailbox,) = world.dispatcher._mailboxes
    while len(mailbox.parked) < 5:
        world.pass_time(0.5)
    parked = list(mailbox.parked)
    for id in parked:
        world.store_client.end(id, DeliveryState.CANCELLED)
    assert not {entry.number for entry in world.asked.values()} & {
        ids.index(id) + 1 for id in parked
    }
    for id in ids:
        world.store_client.end(id, DeliveryState.CANCELLED)
    world.pass_time(50.0)
    assert not [*world.dispatcher._mailboxes]


_SIDS = "abc"
_steps = st.one_of(
    st.tuples(st.just("connect"), st.sampled_from(_SIDS), st.sampled_from(["ann", "bob"])),
    st.tuples(st.just("leave"), st.sampled_from(_SIDS)),
    st.tuples(
        st.just("deliver"),
        st.sampled_from(["ann", "bob"]),
        st.booleans(),
        st.booleans(),
    ),
    st.tuples(st.just("acknowledge"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([0.05, 1.0, 3.0])),
    st.tuples(st.sampled_from(["slow", "answer", "look"])),
)


@settings(deadline=None, max_examples=examples(400))
@given(st.lists(_steps, max_size=60), st.sampled_from([2, 4, 128]))
def test_each_message_is_delivered_whatever_happens(steps: list[Any], window: int) -> None:
    """Never concurrently twice to one connection; ordered ones in order; within the bound."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mailboxes_module, "_WINDOW", window)
        world = new_world(monkeypatch)
        names = (f"{letter}{count}" for count in itertools.count() for letter in _SIDS)
        present: dict[str, str] = {}
        count = 0
        ordered: dict[str, list[int]] = {"ann": [], "bob": []}

        def check() -> None:
            awaited = [(entry.sid, entry.number) for entry in world.asked.values()]
            assert len(awaited) == len(set(awaited))
            for name in ("ann", "bob"):
                mailbox = world.dispatcher._mailboxes.get(f"/,{name}")
                waiting = (
                    []
                    if mailbox is None
                    else [
                        p
                        for p in mailbox.pending_messages.values()
                        if p.state is SendingState.AWAITING
                    ]
                )
                assert len(waiting) <= MAX_IN_FLIGHT
                assert mailbox is None or mailbox.in_flight == len(waiting)
            mailboxes = [*world.dispatcher._mailboxes]
            assert world.dispatcher.in_flight == sum(mailbox.in_flight for mailbox in mailboxes)
            for mailbox in mailboxes:
                for pending in mailbox.pending_messages.values():
                    assert pending.state not in (SendingState.PARKED, SendingState.DROPPED)
                    is_scheduled = pending.state is SendingState.SCHEDULED
                    assert is_scheduled is (pending.timer is not None)

        for kind, *rest in steps:
            if kind == "connect":
                letter, identity = rest
                if letter in present:
                    world.leave(present.pop(letter))
                present[letter] = next(names)
                world.connect(present[letter], identity=identity)
            elif kind == "leave" and rest[0] in present:
                world.leave(present.pop(rest[0]))
            elif kind == "deliver":
                count += 1
                to, is_ordered, requires_all = rest
                world.deliver(count, to=to, is_ordered=is_ordered, requires_all=requires_all)
                if is_ordered:
                    ordered[to].append(count)
            elif kind == "acknowledge" and world.asked:
                ack_id = list(world.asked)[rest[0] % len(world.asked)]
                world.asked.pop(ack_id).answer()
            elif kind == "wait":
                world.pass_time(rest[0])
            elif kind == "slow":
                world.store_client.is_slow = True
            elif kind == "answer":
                world.store_client.answer()
            elif kind == "look":
                world.dispatcher.look_again((sid, "/") for sid in present.values())
            check()
        world.store_client.is_slow = False
        while world.store_client.answers:
            world.store_client.answer()
        for identity in ("ann", "bob"):
            world.connect(next(names), identity=identity)
        for _ in range(count * 4):
            while world.asked:
                world.asked.pop(next(iter(world.asked))).answer()
            world.pass_time(10.0)
        assert [world.state(number) for number in range(1, count + 1)] == [
            DeliveryState.DELIVERED
        ] * count
        ends = [int(delivery.id, 16) for delivery in world.ended]
        assert len(ends) == len(set(ends)) == count
        for numbers in ordered.values():
            assert [number for number in ends if number in numbers] == numbers
        assert not [*world.dispatcher._mailboxes]


def test_a_client_back_over_the_same_transport_gets_it_again_when_it_is_overdue(
    world: World,
) -> None:
    world.transports = {"a": "one", "b": "one", "c": "two"}
    world.deliver(1, to="ann")
    world.connect("a", "ann")
    world.leave("a")
    world.connect("b", "ann")
    world.pass_time(0.5)
    world.deliver(2, to="ann")
    assert world.sent() == [("a", 1), ("b", 2)], "what is new is sent at once"
    world.acknowledge("b", 2)
    world.pass_time(1.0)
    assert world.sent()[2:] == [("b", 1)]
    world.leave("b")
    world.connect("c", "ann")
    assert world.sent()[3:] == [("c", 1)], "over another transport it is sent at once"


def test_entering_often_over_one_transport_does_not_multiply_redelivery(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = world.store_client.load
    monkeypatch.setattr(
        world.store_client,
        "load",
        lambda address, *rest: (loads.append(address), load(address, *rest)),
    )
    for number in range(100):
        world.deliver(number, to="ann", is_ordered=number % 7 == 0)
    for number in range(200):
        world.transports[f"sid-{number}"] = "one"
        world.connect(f"sid-{number}", "ann")
        world.leave(f"sid-{number}")
        world.pass_time(0.001)
    assert len(world.history) <= 16 + MAX_IN_FLIGHT
    assert len(loads) <= 20
    world.transports["last"] = "one"
    world.connect("last", "ann")
    for _ in range(200):
        world.pass_time(1.0)
        for entry in list(world.asked.values()):
            world.acknowledge(entry.sid, entry.number)
    assert {number for sid, number in world.sent() if sid == "last"} == set(range(100))
    world.pass_time(100.0)
    assert world.dispatcher.presence.owed == {}, "nothing is remembered for ever"


def test_windows_are_bounded_in_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW_SIZE", 8)
    for number in range(1000, 1020):
        world.deliver(number, to="ann")  # "[1000]" has six characters
    world.connect("a", "ann")
    (mailbox,) = world.dispatcher._mailboxes
    assert (len(world.asked), len(mailbox.pending_messages), mailbox.size) == (1, 1, 6)
    for number in range(1000, 1020):
        world.acknowledge("a", number)
    assert world.asked == {}
    assert (mailbox.size, mailbox.in_flight_size) == (0, 0)


def test_entering_often_over_one_transport_does_not_load_each_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits, and so nothing is owed but the visits."""
    loads: list[str] = []
    load = world.store_client.load
    monkeypatch.setattr(
        world.store_client,
        "load",
        lambda address, *rest: (loads.append(address), load(address, *rest)),
    )
    for number in range(200):
        world.transports[f"sid-{number}"] = "one"
        world.connect(f"sid-{number}", "ann")
        world.leave(f"sid-{number}")
    assert len(loads) <= 20


def test_messages_in_flight_are_bounded_in_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailboxes_module, "_WINDOW_SIZE", 15)
    world.connect("a", "ann")
    for number in range(1000, 1003):
        world.deliver(number, to="ann")
    assert world.sent() == [("a", 1000), ("a", 1001)]
    world.acknowledge("a", 1000)
    assert world.sent()[2:] == [("a", 1002)]


def test_an_attempt_lost_after_a_departure_is_not_repeated_over_its_transport_at_once(
    world: World,
) -> None:
    """With threads a client may be gone before its callbacks are."""
    world.transports = {"a": "one", "b": "one"}
    world.deliver(1, to="ann")
    world.connect("a", "ann")
    world.here.discard("a")
    del world.transports["a"]
    world.dispatcher.session_closed("a", "/", "one")
    ((ack_id, entry),) = world.asked.items()
    del world.asked[ack_id]
    entry.callback.on_lost("gone")
    world.connect("b", "ann")
    assert world.sent() == [("a", 1)]
    world.pass_time(1.5)
    assert world.sent()[1:] == [("b", 1)]


def test_a_member_that_enters_a_room_again_at_once_is_not_sent_its_messages_again(
    world: World,
) -> None:
    world.transports = {"a": "one"}
    world.connect("a", room="hall")
    world.deliver(1, to="hall")
    world.rooms["hall"].remove("a")
    world.deliver(2, to="hall")
    assert world.state(1) is DeliveryState.PENDING, "nobody is in the room who has it"
    world.connect("a", room="hall")
    assert world.sent() == [("a", 1), ("a", 2)]
    world.pass_time(1.5)
    assert world.sent()[2:] == [("a", 1)]


def test_a_message_without_acknowledgement_is_not_parked_while_there_is_room(world: World) -> None:
    """There is more in the store, which takes its time, and room enough here."""
    world.connect("a", "ann")
    world.deliver(1, to="ann")
    world.store_client.is_slow = True
    world.dispatcher.stored("/,ann")
    world.pass_time(3.5)
    assert world.sent() == [("a", 1), ("a", 1)]

"""The guarded managers: callbacks over the queue, and what others may send through it.

Two applications on one bus stand for two processes.
"""

from __future__ import annotations

import json
import logging
import time
from collections import UserList, deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from flask_socketio import SocketIO, close_room, join_room, leave_room
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_socketio_guard.errors import OutboxFull, RoomInvalid
from flask_socketio_guard.queue.transport import QueueMessage
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream.redis.transport import stamp
from tests.support import unit_support, wait_until
from tests.support.scale import examples
from tests.support.unit_support import PollingClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio_guard.signals import Failure
    from tests.support.unit_support import Bus, Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
bus = unit_support.bus


@pytest.fixture
def a(make_process: Callable[..., Guarded]) -> Guarded:
    """The first process."""
    return make_process()


@pytest.fixture
def b(make_process: Callable[..., Guarded]) -> Guarded:
    """The second process."""
    return make_process()


def connected(guarded: Guarded, namespace: str = "/") -> PollingClient:
    guarded.socketio.on_event("echo", lambda *args: args, namespace=namespace)
    client = guarded.polling()
    client.connect(namespace)
    return client


def manager(guarded: Guarded) -> Any:
    return guarded.socketio.server.manager


def emit_and_answer(source: Guarded, client: PollingClient, *answer: Any, **options: Any) -> None:
    source.guard.emit("question", to=client.sid, **options)
    client.answer(client.question()[0], *answer)


def fill(guarded: Guarded, **options: Any) -> int:
    """Emit until the outbox is full, and return how many it took."""
    for number in range(1000):
        try:
            guarded.guard.emit("news", number, **options)
        except OutboxFull:
            return number
    raise AssertionError("the outbox is never full")


# Emitting


def test_an_event_reaches_clients_of_all_processes_once(a: Guarded, b: Guarded, bus: Bus) -> None:
    clients = connected(a), connected(b)
    a.guard.emit("news", {"n": 1})
    a.guard.emit("end")
    for client in clients:
        assert client.receive("42") == '42["news",{"n":1}]'
        assert client.receive("42") == '42["end"]'
    assert bus.methods() == ["emit", "emit"]


def test_an_event_reaches_a_room_and_spares_those_who_shall_not_get_it(
    a: Guarded, b: Guarded
) -> None:
    near, far, spared = connected(a), connected(b), connected(b)
    for guarded, client in ((a, near), (b, far), (b, spared)):
        guarded.socketio.server.enter_room(client.sid, "room")
    a.guard.emit("news", to="room", skip_sid=spared.sid)
    a.guard.emit("end")
    assert near.receive("42") == '42["news"]'
    assert far.receive("42") == '42["news"]'
    assert spared.receive("42") == '42["end"]'


@pytest.mark.parametrize("to", [["one", "two"], ("one", "two")], ids=["list", "tuple"])
def test_an_event_reaches_several_rooms(a: Guarded, b: Guarded, to: Any) -> None:
    client = connected(b)
    b.socketio.server.enter_room(client.sid, "two")
    a.guard.emit("news", to=to)
    assert client.receive("42") == '42["news"]'


def test_several_arguments_and_bytes_go_over_the_queue(a: Guarded, b: Guarded) -> None:
    near, far = connected(a), connected(b)
    a.guard.emit("news", ("one", {"two": 2}))
    a.guard.emit("bytes", {"raw": b"\x00\xff"})
    for client in (near, far):
        assert client.receive("42") == '42["news","one",{"two":2}]'
        assert client.receive("45") == '451-["bytes",{"raw":{"_placeholder":true,"num":0}}]'
        assert client.receive("b") == "bAP8="


@pytest.mark.parametrize("ignore_queue", [False, True])
def test_an_emit_of_another_thread_carries_what_the_data_was_at_the_time(
    a: Guarded, b: Guarded, monkeypatch: pytest.MonkeyPatch, ignore_queue: bool
) -> None:
    """It is sent by the event loop, later; whoever emitted it has gone on meanwhile."""
    clients = [connected(a)] if ignore_queue else [connected(a), connected(b)]
    later: list[Callable[[], object]] = []
    monkeypatch.setattr(a.inner.runtime, "on_loop", lambda: False)
    monkeypatch.setattr(a.inner, "hand_over", later.append)
    data: dict[str, Any] = {"n": 0, "list": []}
    rooms = [client.sid for client in clients]
    for number in range(3):
        data["n"] = number
        data["list"].append(number)
        a.guard.emit("news", data, to=rooms, skip_sid=rooms[2:], ignore_queue=ignore_queue)
    data["list"].clear()
    rooms.append(rooms.pop(0) + "x")
    monkeypatch.undo()
    for call in later:
        call()
    for client in clients:
        for number in range(3):
            name, content = json.loads(client.receive("42")[2:])
            assert (name, content) == ("news", {"n": number, "list": [*range(number + 1)]})


class Rows:
    """A sequence that is no list, as of a database."""

    def __init__(self, *rows: object) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def test_collections_of_rooms_are_those_of_upstream(make_guarded: Callable[..., Guarded]) -> None:
    """Whatever has a length, and can be sliced, is several; a set is as much of an error."""
    seen = []
    for is_guarded in (False, True):
        app = Flask("rooms")
        if is_guarded:
            socketio = make_guarded(app=app).socketio
        else:
            socketio = SocketIO(app, async_mode="threading", monitor_clients=False)
        socketio.on_event("any", print)
        client, other = PollingClient(app), PollingClient(app)
        client.connect()
        other.connect()
        server = socketio.server
        for room in ("a", 7):
            server.enter_room(client.sid, room)
        both, sids = ("a", other.sid), [client.sid, other.sid]
        server.enter_room(other.sid, both)  # the name of a room may be a tuple, and is no help
        raised = []
        calls: dict[str, dict[str, Any]] = {
            "list": {"to": ["a", other.sid]},
            "tuple": {"room": both},
            "twice": {"to": ["a", 7, client.sid]},
            "range": {"to": range(7, 8)},
            "UserList": {"to": UserList(["nobody", "a"])},
            "rows": {"room": Rows("a", other.sid)},
            "number": {"to": 7},
            "string": {"to": "a"},
            "deque": {"to": deque(["a"])},
            "set": {"to": {"a"}},
            "dict": {"to": {"a": 1}},
            "skip list": {"skip_sid": [client.sid]},
            "skip one": {"skip_sid": client.sid},
            "skip tuple": {"skip_sid": tuple(sids)},
            "skip set": {"to": "a", "skip_sid": set(sids)},
        }
        for name, options in calls.items():
            try:
                server.emit(name, **options)
            except (TypeError, KeyError) as exc:
                raised.append((name, type(exc)))
        server.emit("end")
        frames: list[list[str]] = []
        for each in (client, other):
            frames.append([])
            while not frames[-1] or frames[-1][-1] != '42["end"]':
                frames[-1].append(each.receive("42"))
        seen.append((raised, frames))
    assert seen[1] == seen[0]
    assert len(seen[0][1][0]) > 8


@pytest.mark.parametrize("has_client", [False, True])
@pytest.mark.parametrize("has_callback", [False, True])
def test_what_json_cannot_hold_is_a_type_error_and_nothing_is_sent(
    a: Guarded, bus: Bus, has_client: bool, has_callback: bool
) -> None:
    client = connected(a) if has_client else None
    options: dict[str, Any] = {"to": "room", "callback": print} if has_callback else {}
    with pytest.raises(TypeError):
        a.guard.emit("bad", {"tags": {"a", "set"}}, **options)
    assert a.guard.waiting_callbacks == 0
    assert a.guard.flush(5.0)
    assert bus.methods() == []
    if client is not None:
        assert client.call("echo", 1) == [1]


def test_a_full_outbox_refuses_before_anything_is_sent(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """Not even the clients of this process get it: all or nobody."""
    guarded = make_process(outbox_max_messages=1)
    client = connected(guarded)
    bus.is_down = True
    taken = fill(guarded, to=client.sid, callback=print)
    waiting = guarded.guard.waiting_callbacks
    with pytest.raises(OutboxFull):
        guarded.guard.emit("news", "refused", to=client.sid, callback=print)
    assert guarded.guard.waiting_callbacks == waiting
    assert client.call("echo", 1) == [1]
    assert len([frame for frame in client.frames if "news" in frame]) == taken
    assert guarded.guard.counters["outbox_dropped"] == 2
    bus.is_down = False
    assert guarded.guard.flush(5.0)


def test_an_event_that_ignores_the_queue_stays_here(a: Guarded, b: Guarded, bus: Bus) -> None:
    client = connected(a)
    answers: list[object] = []
    a.guard.emit("here", to=client.sid, ignore_queue=True, callback=answers.append)
    client.answer(client.question()[0], "yes")
    wait_until(lambda: answers == ["yes"])
    assert bus.methods() == []


def test_a_callback_needs_a_recipient(a: Guarded, bus: Bus) -> None:
    with pytest.raises(ValueError, match=r"^Cannot use callback without a room set\.$"):
        a.guard.emit("news", callback=print)
    assert a.guard.waiting_callbacks == 0


# Callbacks over the queue


def test_an_event_that_the_outbox_refuses_reaches_nobody(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """Without a callback too."""
    guarded = make_process(outbox_max_messages=1)
    client = connected(guarded)
    bus.is_down = True
    taken = fill(guarded)
    assert client.call("echo", 1) == [1]
    assert len([frame for frame in client.frames if "news" in frame]) == taken
    bus.is_down = False
    assert guarded.guard.flush(5.0)


@pytest.mark.parametrize("place", ["near", "far"])
@pytest.mark.parametrize("to", [["empty", "room"], ("empty", "room")], ids=["list", "tuple"])
def test_an_answer_out_of_several_rooms_comes_back(
    a: Guarded, b: Guarded, place: str, to: Any
) -> None:
    """JSON knows no tuples: what comes back is a list."""
    guarded = a if place == "near" else b
    client = connected(guarded)
    guarded.socketio.server.enter_room(client.sid, "room")
    answers: list[object] = []
    a.guard.emit("question", to=to, callback=answers.append)
    client.answer(client.question()[0], "here")
    wait_until(lambda: answers == ["here"])


@pytest.mark.parametrize("place", ["near", "far"])
@pytest.mark.parametrize("answer", [(), ("one",), ("one", 2), (None,)], ids=repr)
def test_an_answer_comes_back_wherever_the_client_is(
    a: Guarded, b: Guarded, place: str, answer: tuple[Any, ...]
) -> None:
    client = connected(a if place == "near" else b)
    answers: list[tuple[Any, ...]] = []
    emit_and_answer(a, client, *answer, callback=lambda *args: answers.append(args))
    wait_until(lambda: answers == [answer])
    wait_until(lambda: a.guard.waiting_callbacks == b.guard.waiting_callbacks == 0)


def test_a_callback_of_the_stock_api_comes_back_too(a: Guarded, b: Guarded) -> None:
    client = connected(b)
    answers: list[object] = []
    a.socketio.emit("question", to=client.sid, callback=answers.append)
    client.answer(client.question()[0], "yes")
    wait_until(lambda: answers == ["yes"])


def test_a_call_is_answered_by_a_client_of_the_other_process(a: Guarded, b: Guarded) -> None:
    client = connected(b)
    answers: list[object] = []
    task = a.socketio.start_background_task(
        lambda: answers.append(a.guard.call("question", to=client.sid, timeout=5))
    )
    client.answer(client.question()[0], 42)
    task.join(5.0)
    assert answers == [42]


@pytest.mark.parametrize("place", ["near", "far"])
def test_a_client_that_leaves_takes_its_callbacks_with_it(
    a: Guarded, b: Guarded, place: str
) -> None:
    """Known at once in both processes, although only one knew the client."""
    client = connected(a if place == "near" else b)
    lost: list[bool] = []
    a.guard.emit(
        "question",
        to=client.sid,
        callback=print,
        callback_timeout=60,
        on_timeout=lambda: lost.append(True),
    )
    client.question()
    client.leave()
    wait_until(lambda: lost == [True], message="nobody told")
    wait_until(lambda: a.guard.waiting_callbacks == b.guard.waiting_callbacks == 0)
    assert a.guard.counters["callbacks_dropped"] == 1
    assert b.guard.counters["callbacks_dropped"] == 0


@pytest.mark.parametrize("recipient", ["nobody", "an-empty-room"])
def test_a_callback_to_nobody_expires(make_process: Callable[..., Guarded], recipient: str) -> None:
    guarded = make_process(callback_timeout=0.1)
    guarded.guard.emit("question", to=recipient, callback=print)
    assert guarded.guard.waiting_callbacks == 1
    wait_until(lambda: guarded.guard.waiting_callbacks == 0)
    assert guarded.guard.counters["callbacks_expired"] == 1


def test_relayed_callbacks_expire_too(make_process: Callable[..., Guarded]) -> None:
    """The process that has the client keeps an entry for it as well."""
    a, b = make_process(callback_timeout=0.2), make_process(callback_timeout=0.2)
    client = connected(b)
    a.guard.emit("question", to=client.sid, callback=print)
    client.question()
    assert b.guard.waiting_callbacks == 1
    wait_until(lambda: b.guard.waiting_callbacks == a.guard.waiting_callbacks == 0)
    assert a.guard.counters["callbacks_expired"] == 1
    assert b.guard.counters["callbacks_expired"] == 0


def test_in_a_room_the_first_answer_counts(a: Guarded, b: Guarded) -> None:
    near, far = connected(a), connected(b)
    a.socketio.server.enter_room(near.sid, "room")
    b.socketio.server.enter_room(far.sid, "room")
    answers: list[object] = []
    a.guard.emit("question", to="room", callback=answers.append)
    (near_id, _), (far_id, _) = near.question(), far.question()
    far.answer(far_id, "far")
    wait_until(lambda: answers == ["far"])
    near.answer(near_id, "near")
    assert near.call("echo", 1) == [1]
    assert answers == ["far"]


def test_in_a_room_others_may_answer_when_one_has_left(a: Guarded, b: Guarded) -> None:
    leaving, staying = connected(b), connected(b)
    for client in (leaving, staying):
        b.socketio.server.enter_room(client.sid, "room")
    answers: list[object] = []
    a.guard.emit("question", to="room", callback=answers.append)
    leaving.question()
    ack_id, _ = staying.question()
    leaving.leave()
    wait_until(lambda: len(list(manager(b).get_participants("/", "room"))) == 1)
    staying.answer(ack_id, "here")
    wait_until(lambda: answers == ["here"])


@pytest.mark.parametrize("place", ["near", "far"])
def test_an_answer_that_json_cannot_hold_costs_nobody_else(
    a: Guarded, b: Guarded, place: str
) -> None:
    """A client answers with bytes: nothing that the queue can carry."""
    client = connected(a if place == "near" else b)
    answers: list[object] = []
    a.guard.emit("question", to=client.sid, callback=answers.append)
    ack_id, _ = client.question()
    client.send(f'461-{ack_id}[{{"_placeholder":true,"num":0}}]\x1ebAAE=')
    assert client.call("echo", 1) == [1]
    if place == "near":
        wait_until(lambda: answers == [b"\x00\x01"])
    else:
        wait_until(lambda: b.guard.counters["task_failures"] == 1, message="nobody was told")
    emit_and_answer(a, client, "text", callback=answers.append)
    wait_until(lambda: answers[-1:] == ["text"])


def test_a_full_outbox_does_not_stand_in_the_way_of_a_client_that_leaves(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """Another process waits for the answer and cannot be told now."""
    a, b = make_process(), make_process(outbox_max_messages=1)
    client, other = connected(b), connected(b)
    left: list[str] = []
    for namespace in ("/", "/other"):
        b.socketio.on_event("disconnect", left.append, namespace=namespace)
    client.connect_too("/other")
    a.guard.emit("question", to=client.sid, callback=print)
    client.question()
    bus.is_down = True
    fill(b)
    client.leave()
    wait_until(lambda: len(list(manager(b).get_participants("/", None))) == 1)
    wait_until(lambda: len(left) == 2, message="the other namespace of the client was left out")
    wait_until(lambda: b.guard.waiting_callbacks == 0)
    assert other.call("echo", 1) == [1]
    bus.is_down = False
    assert b.guard.flush(5.0)


# What others send through the queue


def hear(guarded: Guarded, message: Any) -> None:
    """Hand a message to the guarded manager, as the listener does."""
    manager(guarded).deliver(message)


def test_the_process_does_not_act_on_its_own_messages_again(a: Guarded, bus: Bus) -> None:
    client = connected(a)
    a.guard.emit("news")
    assert a.guard.flush(5.0)
    wait_until(lambda: all(queue.empty() for queue in bus.queues))
    a.guard.emit("end")
    assert client.receive("42") == '42["news"]'
    assert client.receive("42") == '42["end"]'


@pytest.mark.parametrize("is_own", [True, False])
def test_text_as_redis_carries_it_is_known_by_its_host(
    a: Guarded, b: Guarded, is_own: bool
) -> None:
    """One's own is skipped without being decoded; that of another guarded process is not."""
    sent: list[bytes] = []
    source = a if is_own else b
    source.inner.publish = sent.append  # type: ignore[method-assign]
    source.guard.emit("news", {"host_id": manager(a).host_id, "guard_seq": 1})
    client = connected(a)
    hear(a, stamp(QueueMessage(5, sent[0])))
    hear(a, stamp(QueueMessage(6, sent[0].replace(b"news", b"more"))))
    a.guard.emit("end", ignore_queue=True)
    names = []
    while not names or names[-1] != "end":
        names.append(json.loads(client.receive("42")[2:])[0])
    assert names == (["end"] if is_own else ["news", "more", "end"])


@pytest.mark.parametrize("is_fast", [True, False])
def test_ones_own_is_decoded_only_if_asked_for(
    a: Guarded, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    decoded: list[object] = []
    a.inner.publish = sent.append  # type: ignore[method-assign]
    a.guard.emit("news")
    loads = manager(a).json.loads

    class Noting:
        dumps = staticmethod(manager(a).json.dumps)

        @staticmethod
        def loads(text: Any) -> Any:
            decoded.append(text)
            return loads(text)

    monkeypatch.setattr(manager(a), "json", Noting)
    monkeypatch.setattr(a.inner, "config", replace(a.inner.config, fast=is_fast))
    hear(a, stamp(QueueMessage(5, sent[0])))
    assert len(decoded) == (not is_fast)


def test_messages_of_processes_without_the_guard_are_acted_on(a: Guarded) -> None:
    """Stock emitters write no sequence number. JSON text, bytes and dicts all come."""
    client = connected(a)
    message = {
        "method": "emit",
        "event": "news",
        "data": ["x"],
        "namespace": "/",
        "room": None,
        "skip_sid": None,
        "callback": None,
        "host_id": "stock",
    }
    for form in (message, json.dumps(message), json.dumps(message).encode(), message):
        hear(a, form)
        assert client.receive("42") == '42["news","x"]'


def numbered(host: str, number: int, event: str = "") -> dict[str, Any]:
    return {
        "method": "emit",
        "event": event or f"{host}-{number}",
        "data": [None],
        "namespace": "/",
        "room": None,
        "skip_sid": None,
        "callback": None,
        "host_id": host,
        "guard_seq": number,
    }


def events_until_end(client: PollingClient) -> list[str]:
    received = []
    while not received or received[-1] != "end":
        received.append(json.loads(client.receive("42")[2:])[0])
    return received


FORMS = {"dict": lambda message: message, "bytes": lambda message: json.dumps(message).encode()}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_message_that_comes_twice_is_acted_on_once(
    a: Guarded, form: Callable[[dict[str, Any]], Any]
) -> None:
    """A publisher whose connection broke sends again what may have gone out."""
    client = connected(a)
    for host, number in (("x", 1), ("x", 2), ("x", 1), ("x", 2), ("y", 1), ("x", 5), ("x", 4)):
        hear(a, form(numbered(host, number)))
    hear(a, form(numbered("end", 1, "end")))
    assert events_until_end(client) == ["x-1", "x-2", "y-1", "x-5", "x-4", "end"]
    assert a.guard.counters["messages_repeated"] == 2


@pytest.mark.parametrize("forged", [5, 2**31, 2**64, -1])
def test_a_forged_number_makes_nobody_deaf(a: Guarded, forged: int) -> None:
    """Neither a high one, nor the one that comes next."""
    client = connected(a)
    hear(a, numbered("x", 4))
    hear(a, numbered("x", forged, "forged"))
    for number in range(5, 30):
        hear(a, numbered("x", number))
    hear(a, numbered("end", 1, "end"))
    expected = ["x-4", "forged", *[f"x-{number}" for number in range(5, 30)], "end"]
    assert events_until_end(client) == expected
    assert a.guard.counters["messages_repeated"] == 0


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
methods = st.sampled_from(
    [
        "emit",
        "callback",
        "disconnect",
        "enter_room",
        "leave_room",
        "close_room",
        "guard_callback_gone",
        "guard_probe",
        "unheard-of",
    ]
)
keys = st.sampled_from(
    [
        "event",
        "data",
        "namespace",
        "room",
        "skip_sid",
        "callback",
        "host_id",
        "sid",
        "id",
        "args",
        "binary",
        "guard_seq",
    ]
)


def test_nothing_that_comes_through_the_queue_stops_the_listener(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """Whoever can write to the channel can write anything."""
    guarded = make_process()
    client = connected(guarded)
    crashes: list[Failure] = []
    guarded.guard.on_failure(crashes.append)

    @settings(max_examples=examples(150), deadline=None)
    @given(
        st.binary(max_size=30)
        | st.text(max_size=30)
        | garbage
        | st.builds(
            lambda method, rest: {**rest, "method": method},
            methods,
            st.dictionaries(keys, garbage | st.just("/") | st.just(client.sid), max_size=8),
        )
    )
    def send(message: Any) -> None:
        bus.send(message)

    logging.getLogger("flask_socketio_guard").setLevel(logging.CRITICAL)
    try:
        send()
        wait_until(lambda: all(queue.empty() for queue in bus.queues), timeout=10)
    finally:
        logging.getLogger("flask_socketio_guard").setLevel(logging.NOTSET)
    assert {failure.kind for failure in crashes} <= {"listener"}
    assert guarded.inner.queue is not None
    assert guarded.inner.queue.listener.restarts == 0
    late = connected(guarded)
    guarded.guard.emit("still", to=late.sid)
    assert late.receive('42["still"') == '42["still"]'


@pytest.mark.parametrize("message", [b"", b"not json", b"[]", b"5", b'{"no": "method"}', b"\xff"])
def test_what_is_no_message_of_socketio_is_counted(a: Guarded, message: bytes) -> None:
    hear(a, message)
    assert a.guard.counters["events_rejected"] == 1


def test_an_unknown_method_is_ignored(a: Guarded) -> None:
    """Newer versions may have more."""
    hear(a, {"method": "new-in-version-99", "host_id": "other"})
    assert a.guard.counters["events_rejected"] == 0


def test_an_answer_for_another_process_is_ignored(a: Guarded) -> None:
    a.guard.emit("question", to="sid", callback=print)
    for host in ("other", None):
        answer = {"host_id": host, "sid": "sid", "namespace": "/", "id": 1, "args": []}
        hear(a, {"method": "callback", **answer})
        hear(a, {"method": "guard_callback_gone", **answer})
    assert a.guard.waiting_callbacks == 1


def test_a_disconnect_asked_for_elsewhere_runs_the_handler_in_a_task(
    a: Guarded, b: Guarded
) -> None:
    """A handler that hangs must not make its process deaf."""
    import threading

    entered, release = threading.Event(), threading.Event()

    @b.socketio.on("disconnect")
    def disconnect(reason: str) -> None:
        entered.set()
        release.wait(5.0)

    leaving, staying = connected(b), connected(b)
    a.guard.disconnect(leaving.sid, "/")
    assert entered.wait(5.0)
    began_at = time.monotonic()
    a.guard.emit("news")
    assert staying.receive("42") == '42["news"]'
    assert time.monotonic() - began_at < 2.0
    release.set()
    wait_until(lambda: len(list(manager(b).get_participants("/", None))) == 1)


def test_rooms_can_be_changed_from_elsewhere(a: Guarded, b: Guarded) -> None:
    client = connected(b)
    a.socketio.server.enter_room(client.sid, "room")
    wait_until(lambda: list(manager(b).get_participants("/", "room")))
    a.socketio.server.leave_room(client.sid, "room")
    wait_until(lambda: not list(manager(b).get_participants("/", "room")))
    a.socketio.server.enter_room(client.sid, "room")
    wait_until(lambda: list(manager(b).get_participants("/", "room")))
    a.socketio.close_room("room")
    wait_until(lambda: not list(manager(b).get_participants("/", "room")))


def test_a_loss_in_the_queue_is_signalled_with_its_reason(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    guarded = make_process(outbox_max_messages=2, outbox_overflow="drop_oldest")
    losses: list[signals.OutboxLoss] = []
    subscription = signals.subscribe(signals.outbox_lost, guarded.app, losses.append)
    bus.is_down = True
    for number in range(10):
        guarded.guard.emit("news", number)
    assert {loss.reason for loss in losses} == {"overflow"}
    lost = sum(loss.count for loss in losses)
    assert guarded.guard.counters["outbox_dropped"] == lost >= 7
    bus.is_down = False
    assert guarded.guard.flush(5.0)
    arrived = [data["data"][0] for data in bus.published if data["method"] == "emit"]
    assert arrived[-1] == 9
    assert len(arrived) + lost == 10
    del subscription


# Without a queue


def test_without_a_queue_callbacks_are_called_in_tasks_of_their_own(
    make_guarded: Callable[..., Guarded],
) -> None:
    """Never in the client's receive loop: a slow one would make the client time out."""
    import threading

    guarded = make_guarded()
    client = connected(guarded)
    names: list[str] = []
    release = threading.Event()

    def callback(answer: object) -> None:
        names.append(threading.current_thread().name)
        release.wait(5.0)

    emit_and_answer(guarded, client, 1, callback=callback)
    wait_until(lambda: names)
    assert names == ["socketio-guard:event"]
    assert client.call("echo", 1) == [1]
    release.set()


def test_without_a_queue_a_room_answers_with_each_of_its_clients(
    make_guarded: Callable[..., Guarded],
) -> None:
    """As stock does."""
    guarded = make_guarded()
    clients = connected(guarded), connected(guarded)
    answers: list[object] = []
    guarded.guard.emit("question", to=[client.sid for client in clients], callback=answers.append)
    for number, client in enumerate(clients):
        client.answer(client.question()[0], number)
    wait_until(lambda: sorted(map(str, answers)) == ["0", "1"])
    assert guarded.guard.waiting_callbacks == 0


def test_without_a_queue_a_callback_to_nobody_waits_for_nothing(
    make_guarded: Callable[..., Guarded],
) -> None:
    guarded = make_guarded()
    guarded.guard.emit("question", to="nobody", callback=print)
    assert guarded.guard.waiting_callbacks == 0


def test_what_json_has_not_is_not_passed_on_from_elsewhere(
    a: Guarded, b: Guarded, bus: Bus
) -> None:
    """A process without the guard publishes a NaN; no browser bears to be sent one."""
    client = connected(a)
    message = {"method": "emit", "event": "news", "namespace": "/", "room": None}
    bus.send({**message, "data": [float("nan")], "host_id": "stranger"})
    bus.send({**message, "data": [1], "host_id": "stranger"})
    assert client.receive("42") == '42["news",1]'
    assert a.guard.counters["events_rejected"] == 1
    assert "events_rejected" not in {name for name, count in b.guard.counters.items() if count}


PLACEHOLDER: dict[str, Any] = {"_placeholder": True, "num": 0}


@pytest.mark.parametrize(
    "forged", [[PLACEHOLDER] * 3, {"of": {**PLACEHOLDER, "num": 9}}, {**PLACEHOLDER, "num": -1}]
)
@pytest.mark.parametrize("ignores_queue", [False, True])
def test_what_a_client_says_is_no_place_for_bytes_of_others(
    a: Guarded, b: Guarded, bus: Bus, forged: Any, ignores_queue: bool
) -> None:
    """In the next process one attachment in many places would be gigabytes."""
    near, far = connected(a), connected(b)
    with pytest.raises(ValueError, match="placeholder"):
        a.socketio.server.emit("file", {"of": forged, "raw": b"x"}, ignore_queue=ignores_queue)
    assert a.guard.flush(5.0)
    assert bus.methods() == []
    message = {"method": "emit", "event": "file", "namespace": "/", "room": None, "binary": True}
    hear(b, {**message, "data": [[forged, PLACEHOLDER], "eA=="], "host_id": "stock"})
    assert b.guard.counters["events_rejected"] == 1
    # Where there are no bytes it is data as any other.
    a.guard.emit("plain", forged)
    a.guard.emit(
        "raw", {"no": {"_placeholder": False, "num": 7}, "yes": b"x", "s": '"_placeholder"'}
    )
    for client in (near, far):
        assert client.receive("42") == f'42["plain",{json.dumps(forged, separators=(",", ":"))}]'
        assert client.receive("45").startswith('451-["raw",')


# Rooms that are none


@pytest.mark.parametrize("room", [None, [], {}], ids=repr)
def test_what_is_no_room_is_refused(a: Guarded, b: Guarded, bus: Bus, room: Any) -> None:
    """``close_room(None)`` would make every client of the namespace deaf, in all processes."""
    changes = {
        "enter": lambda sid: join_room(room),
        "leave": lambda sid: leave_room(room),
        "close": lambda sid: close_room(room),
        "enter for another": lambda sid: a.socketio.server.enter_room("elsewhere", room),
    }
    a.socketio.on_event("change", lambda which: changes[which](request.sid))  # type: ignore[attr-defined]
    client, other = connected(a), connected(b)
    for which in changes:
        assert client.call("change", which)[0]["error"]["code"] == "invalid_room"
    for method in ("enter_room", "leave_room", "close_room"):
        hear(b, {"method": method, "room": room, "sid": other.sid, "namespace": "/"})
    assert a.guard.counters["events_rejected"] == len(changes)
    assert b.guard.counters["events_rejected"] == 3
    assert a.guard.counters["handler_failures"] == b.guard.counters["listener_failures"] == 0
    assert a.guard.flush(5.0)
    assert bus.methods() == []
    a.guard.emit("news")
    assert client.receive("42") == other.receive("42") == '42["news"]'


def test_the_session_id_of_another_client_is_no_room(a: Guarded, b: Guarded, bus: Bus) -> None:
    """Who has it for a room would get what others send to that client, and could answer."""
    handlers = {"join": join_room, "close": close_room}
    for name, handler in handlers.items():
        b.socketio.on_event(name, lambda room, handler=handler: handler(room))
    victim, neighbour, attacker = connected(a), connected(b), connected(b)
    for room in (victim.sid, neighbour.sid):
        for name in handlers:
            assert attacker.call(name, room)[0]["error"]["code"] == "invalid_room"
    a.socketio.server.enter_room(attacker.sid, "room")
    with pytest.raises(RoomInvalid):
        a.socketio.server.enter_room(attacker.sid, victim.sid)
    forged = {"room": victim.sid, "sid": attacker.sid, "namespace": "/", "host_id": "stock"}
    hear(b, {"method": "enter_room", **forged})
    hear(a, {"method": "close_room", **forged})
    assert [a.guard.counters["events_rejected"], b.guard.counters["events_rejected"]] == [1, 5]
    assert victim.sid in manager(a).rooms["/"]
    assert victim.sid not in manager(b).rooms["/"]
    assert a.guard.flush(5.0)
    assert bus.methods() == ["enter_room"]


def test_rooms_of_any_other_name_are_rooms(a: Guarded, b: Guarded) -> None:
    """Also those as long as a session id, one's own id, and that of a client which is gone."""
    client, gone = connected(b), connected(b)
    gone.leave()
    wait_until(lambda: b.inner.has_departed(gone.sid))
    names: list[Any] = [
        client.sid,
        gone.sid,
        "-NxQ8v7L2mKpR4sT6uWz",
        "a" * 20,
        "",
        0,
        ("a", 1),
        1.5,
    ]
    for name in names:
        b.socketio.server.enter_room(client.sid, name)
        assert name in b.socketio.server.rooms(client.sid)
    for name in names[1:]:
        b.socketio.server.leave_room(client.sid, name)
        b.socketio.close_room(name)
    assert b.socketio.server.rooms(client.sid) == [client.sid]

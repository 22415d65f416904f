"""The guarded server: packets of clients, and ``call()``."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import socketio as python_socketio
from flask_socketio import emit
from hypothesis import given, settings
from hypothesis import strategies as st
from socketio.exceptions import TimeoutError as CallTimeout
from socketio.packet import Packet

from flask_socketio_guard.errors import ConnectionClosed
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream.engineio.violations import ProtocolViolation
from flask_socketio_guard.upstream.socketio.server import CallRecipientGone
from tests.support import unit_support, wait_until
from tests.support.scale import examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded, PollingClient

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


class InBackground:
    """Runs something that waits, and keeps what came of it."""

    def __init__(self, target: Callable[[], object]) -> None:
        self.result: object = None
        self.error: BaseException | None = None
        self.took = 0.0
        self._target = target
        self._thread = threading.Thread(target=self._run, name="in-background", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began_at = time.monotonic()
        try:
            self.result = self._target()
        except BaseException as exc:
            self.error = exc
        self.took = time.monotonic() - began_at

    def join(self) -> InBackground:
        self._thread.join(10.0)
        assert not self._thread.is_alive(), "it waits for ever"
        return self


@pytest.fixture
def client(guarded: Guarded) -> PollingClient:
    """A connected client."""
    guarded.socketio.on_event("echo", lambda *args: args)
    client = guarded.polling()
    client.connect()
    return client


# What is an event

RESERVED = ("connect", "disconnect", "*")
bodies = json_values | st.lists(st.sampled_from(RESERVED) | st.text() | json_values, max_size=3)


def test_an_event_is_a_list_that_begins_with_a_name_of_its_own(guarded: Guarded) -> None:
    """Whatever a client sends: it is handled or rejected, and nothing else happens."""
    ran: list[object] = []
    guarded.socketio.on_event("*", lambda *args: ran.append(args))
    sender = guarded.client()

    @settings(deadline=None, max_examples=examples(200))
    @given(bodies)
    def send(body: Any) -> None:
        ran.clear()
        before = guarded.guard.counters["events_rejected"]
        try:
            guarded.socketio.server._handle_eio_message(sender.eio_sid, f"2{json.dumps(body)}")
        except ProtocolViolation:
            assert isinstance(body, int | float)  # the digits of an ack id, and more
            return
        is_event = isinstance(body, list) and bool(body) and isinstance(body[0], str)
        is_valid = is_event and body[0] not in RESERVED
        assert len(ran) == is_valid
        assert guarded.guard.counters["events_rejected"] - before == (not is_valid)

    send()
    assert guarded.guard.counters["handler_failures"] == 0


@pytest.mark.parametrize("name", ["connect", "disconnect", "*"])
def test_a_client_that_sends_a_reserved_name_is_told_and_stays(
    guarded: Guarded, client: PollingClient, name: str
) -> None:
    ran: list[object] = []
    for event in ("connect", "disconnect", "*"):
        guarded.socketio.on_event(event, lambda *args: ran.append(args))
    (answer,) = client.call(name, "x", ack_id=4)
    assert answer == {"error": {"code": "reserved_event", "message": "this event name is reserved"}}
    assert ran == []
    assert guarded.guard.counters["events_rejected"] == 1
    assert client.call("echo", 1, ack_id=5) == [1]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("[]", "<list>"),
        ("{}", "<dict>"),
        ('"text"', "text"),
        ("5", "<NoneType>"),
        ("[5]", "<int>"),
        ("[null]", "<NoneType>"),
        ("[[1]]", "<list>"),
        ('[{"a":1}]', "<dict>"),
        ("", "<NoneType>"),
    ],
)
def test_a_body_that_is_no_event_costs_its_sender_nothing_but_the_event(
    guarded: Guarded, client: PollingClient, body: str, name: str
) -> None:
    rejections: list[signals.Rejection] = []
    subscription = signals.subscribe(signals.rejected, guarded.app, rejections.append)
    client.send(f"42{body}")
    wait_until(lambda: rejections, message="it was not rejected")
    assert [(item.event, item.namespace, item.sid) for item in rejections] == [
        (name, "/", client.sid)
    ]
    assert rejections[0].error.code == "invalid"
    assert client.call("echo", 1) == [1]
    del subscription


def test_a_malformed_event_that_wants_an_answer_gets_one(client: PollingClient) -> None:
    client.send("427[5]")
    assert json.loads(client.receive("437")[3:]) == [
        {
            "error": {
                "code": "invalid",
                "message": "an event must be a list that begins with its name",
            }
        }
    ]


def test_an_event_of_a_namespace_that_the_client_is_not_in_is_not_answered(
    guarded: Guarded, client: PollingClient
) -> None:
    """There is no session id that it could come from."""
    client.send('42/other,7["connect"]')
    assert client.call("echo", 1, ack_id=8) == [1]
    assert not [frame for frame in client.frames if frame.startswith("43/other")]


# Acknowledgements


def test_answers_have_the_form_of_the_protocol(guarded: Guarded, client: PollingClient) -> None:
    for number, (result, answer) in enumerate(
        [(None, []), ("x", ["x"]), (["x"], [["x"]]), (("x", 1), ["x", 1]), ((), [])]
    ):
        guarded.socketio.on_event("ask", lambda result=result: result)
        assert client.call("ask", ack_id=number) == answer


def test_an_answer_to_a_client_that_has_left_is_no_failure(guarded: Guarded) -> None:
    entered, release, answered = threading.Event(), threading.Event(), threading.Event()

    @guarded.socketio.on("slow")
    def slow() -> str:
        entered.set()
        release.wait(5.0)
        answered.set()
        return "too late"

    client = guarded.polling()
    client.connect()
    client.send('421["slow"]')
    assert entered.wait(5.0)
    client.leave()
    wait_until(lambda: not any(guarded.socketio.server.manager.get_participants("/", None)))
    release.set()
    assert answered.wait(5.0)
    wait_until(lambda: guarded.inner.handlers.running == 0)
    assert guarded.guard.counters["handler_failures"] == 0


def test_a_binary_answer_that_cannot_be_sent_is_replaced_as_a_whole(
    guarded: Guarded, client: PollingClient
) -> None:
    """No attachment goes out before the error is known."""
    guarded.socketio.on_event("ask", lambda: [b"\x00", {1, 2}])
    (answer,) = client.call("ask", ack_id=3)
    assert answer["error"]["code"] == "internal_error"
    assert client.call("echo", 1, ack_id=4) == [1]


@pytest.mark.parametrize("is_emitted", [False, True])
def test_what_one_event_may_cause_is_bounded(
    make_guarded: Callable[..., Guarded], is_emitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answer or emits: the sender is told with a code, and nothing of it is kept."""
    monkeypatch.setattr("flask_socketio_guard.upstream.socketio.server._OUTPUT_PATIENCE", 0.0)
    guarded = make_guarded(event_output_max_bytes=100_000)
    client = guarded.polling()
    client.connect()
    sockets = guarded.socketio.server.eio.sockets

    def ask(count: int) -> object:
        filling = "x" * 40_000
        if not is_emitted:
            return [filling] * count
        for _ in range(count):
            guarded.socketio.emit("filling", filling, to=client.sid)
        return None

    guarded.socketio.on_event("ask", ask)
    for round_ in range(3):
        client.call("ask", 2, ack_id=3 * round_)
        (answer,) = client.call("ask", 3, ack_id=3 * round_ + 1)
        message = "the event causes too much output"
        assert answer == {"error": {"code": "output_too_large", "message": message}}
        queues = [socket.queue for socket in sockets.values()]
        assert sum(queue.size for queue in queues) < 100_000
    assert guarded.guard.counters["events_rejected"] == 3
    assert guarded.guard.counters["handler_failures"] == 0


def test_what_has_been_sent_counts_no_more(make_guarded: Callable[..., Guarded]) -> None:
    """A handler streams as much as its client takes."""
    guarded = make_guarded(event_output_max_bytes=100_000)
    client = guarded.polling()
    client.connect()
    sent: list[int] = []

    def stream() -> int:
        for number in range(10):
            guarded.socketio.emit("part", "x" * 60_000, to=client.sid)
            sent.append(number)
            wait_until(lambda count=number: taken[0] > count)
        return len(sent)

    guarded.socketio.on_event("stream", stream)
    taken = [0]
    client.send('421["stream"]')
    for _ in range(10):
        assert client.receive('42["part"')
        taken[0] += 1
    assert client.receive("431") == "431[10]"


ATTACHMENT = '{"_placeholder":true,"num":0}'


def test_an_attachment_that_is_named_many_times_is_refused_before_it_is_there(
    guarded: Guarded,
) -> None:
    """A megabyte with 1,500 references to it would be sent on as a gigabyte and a half."""
    ran: list[object] = []
    guarded.socketio.on_event("echo", lambda *args: ran.append(args))
    sender = guarded.client()
    server = guarded.socketio.server
    places = ",".join([ATTACHMENT] * 1500)
    with pytest.raises(ProtocolViolation, match="attachment 0 has two places"):
        server._handle_eio_message(sender.eio_sid, f'51-1["echo",{places}]')
    with pytest.raises(ProtocolViolation, match="none was announced"):
        server._handle_eio_message(sender.eio_sid, b"x" * 1_000_000)
    assert ran == []
    assert not server._binary_packet


class OwnParts(Packet):
    """Looks at attachments, as an application may."""

    taken: list[bytes]

    def add_attachment(self, attachment: bytes) -> Any:
        self.taken.append(attachment)
        return super().add_attachment(attachment)


def test_packets_of_an_application_are_put_together_by_itself(
    make_guarded: Callable[..., Guarded],
) -> None:
    OwnParts.taken = []
    ran: list[object] = []
    guarded = make_guarded()
    guarded.socketio.server.packet_class = OwnParts
    guarded.socketio.on_event("take", lambda *args: ran.append(args))
    sender = guarded.client()
    server = guarded.socketio.server
    server._handle_eio_message(sender.eio_sid, f'51-["take",{ATTACHMENT}]')
    server._handle_eio_message(sender.eio_sid, b"x")
    assert OwnParts.taken == [b"x"]
    wait_until(lambda: ran == [(b"x",)])
    with pytest.raises(ProtocolViolation, match="two places"):
        server._handle_eio_message(sender.eio_sid, f'51-["take",{ATTACHMENT},{ATTACHMENT}]')


# call()


def test_a_handler_that_returns_what_emit_returns_answers_nothing(
    guarded: Guarded, client: PollingClient
) -> None:
    """As of upstream, whose ``emit`` returns nothing; what became of it is not for the client."""
    server = guarded.socketio.server

    class Own(python_socketio.Namespace):  # type: ignore[misc]
        def on_own(self, sid: str) -> Any:
            return self.emit("news", to=sid)

        def on_sent(self, sid: str) -> Any:
            return self.send("news", to=sid)

    server.register_namespace(Own("/own"))
    server.on("native", lambda sid: server.emit("news", to=sid))
    guarded.socketio.on_event("flask", lambda: emit("news"))
    guarded.socketio.on_event("broadcast", lambda: guarded.socketio.emit("news"))
    for number, name in enumerate(("native", "flask", "broadcast")):
        assert client.call(name, ack_id=number) == []
    client.connect_too("/own")
    for number, name in enumerate(("own", "sent")):
        client.send(f'42/own,{number}["{name}"]')
        assert client.receive("43/own") == f"43/own,{number}[]"


def test_a_call_returns_the_answer_of_its_client(guarded: Guarded, client: PollingClient) -> None:
    for given_args, expected in (([], None), (["one"], "one"), (["one", 2], ("one", 2))):
        call = InBackground(
            lambda: guarded.guard.call("question", {"n": 1}, to=client.sid, timeout=5)
        )
        ack_id, body = client.question()
        assert body == ["question", {"n": 1}]
        client.answer(ack_id, *given_args)
        assert call.join().result == expected
    assert guarded.guard.waiting_callbacks == 0


def test_a_call_of_the_stock_api_is_guarded_too(guarded: Guarded, client: PollingClient) -> None:
    call = InBackground(lambda: guarded.socketio.call("question", to=client.sid, timeout=5))
    client.answer(client.question()[0], "answer")
    assert call.join().result == "answer"


def test_a_call_without_an_answer_ends_at_its_timeout(
    guarded: Guarded, client: PollingClient
) -> None:
    call = InBackground(lambda: guarded.guard.call("question", to=client.sid, timeout=0.1)).join()
    assert type(call.error) is CallTimeout
    assert 0.09 <= call.took < 2.0
    wait_until(lambda: guarded.guard.waiting_callbacks == 0, message="the entry stays")


def test_a_call_ends_as_soon_as_its_client_is_gone(guarded: Guarded, client: PollingClient) -> None:
    call = InBackground(lambda: guarded.guard.call("question", to=client.sid, timeout=30))
    client.question()
    client.leave()
    call.join()
    assert isinstance(call.error, ConnectionClosed)
    assert str(call.error) == "the client disconnected before it answered"
    assert call.took < 5.0
    assert guarded.guard.waiting_callbacks == 0


@pytest.mark.parametrize("recipient", ["nobody", "an-empty-room"])
def test_a_call_to_nobody_ends_at_once(guarded: Guarded, recipient: str) -> None:
    call = InBackground(lambda: guarded.guard.call("question", to=recipient, timeout=30)).join()
    assert isinstance(call.error, ConnectionClosed)
    assert str(call.error) == "no client with that session id is connected"
    assert call.took < 2.0
    assert guarded.guard.waiting_callbacks == 0


def test_code_that_expects_a_timeout_catches_a_client_that_is_gone() -> None:
    """It was written for upstream's ``call``."""
    assert issubclass(CallRecipientGone, CallTimeout)
    assert issubclass(CallRecipientGone, ConnectionClosed)


def test_a_call_needs_a_recipient(guarded: Guarded) -> None:
    with pytest.raises(ValueError, match=r"^Cannot use call\(\) to broadcast\.$"):
        guarded.guard.call("question")


def test_a_call_needs_handlers_that_run_on_their_own(make_guarded: Callable[..., Guarded]) -> None:
    """Else it would wait for what its own thread has to read."""
    guarded = make_guarded(options={"async_handlers": False})
    with pytest.raises(RuntimeError, match="async_handlers"):
        guarded.guard.call("question", to="sid")


def test_a_call_in_a_handler_returns(guarded: Guarded, client: PollingClient) -> None:
    """While the handler waits, the client's answer is read."""

    @guarded.socketio.on("ask-me")
    def ask_me() -> Any:
        from flask import request

        return guarded.guard.call("question", to=request.sid, timeout=5)  # type: ignore[attr-defined]

    client.send('429["ask-me"]')
    client.answer(client.question()[0], 42)
    assert json.loads(client.receive("439")[3:]) == [42]


def test_a_call_in_a_callback_returns(guarded: Guarded, client: PollingClient) -> None:
    """Stock waits for ever: the callback runs where the answer would be read."""
    answers: list[object] = []

    def callback(answer: object) -> None:
        answers.append(answer)
        answers.append(guarded.guard.call("second", to=client.sid, timeout=5))

    guarded.guard.emit("first", to=client.sid, callback=callback)
    client.answer(client.question()[0], 1)
    ack_id, body = client.question()
    assert body == ["second"]
    client.answer(ack_id, 2)
    wait_until(lambda: answers == [1, 2])


def test_an_answer_of_the_wrong_client_is_ignored(guarded: Guarded, client: PollingClient) -> None:
    stranger = guarded.polling()
    stranger.connect()
    call = InBackground(lambda: guarded.guard.call("question", to=client.sid, timeout=5))
    ack_id, _ = client.question()
    stranger.answer(ack_id, "forged")
    client.answer(ack_id, "true")
    assert call.join().result == "true"


@pytest.mark.parametrize("packet", ["430[]", "43999[1]", "43[1]", "430{}", '431"x"'])
def test_an_answer_that_nobody_asked_for_is_ignored(
    guarded: Guarded, client: PollingClient, packet: str
) -> None:
    """Upstream keeps a counter under id 0 of the same dict, and calls it."""
    client._http.post(f"/socket.io/?EIO=4&transport=polling&sid={client.eio_sid}", data=packet)
    assert client.call("echo", 1) == [1]
    assert guarded.guard.counters["callback_failures"] == 0

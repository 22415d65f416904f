"""Whom an event reaches, and what it may hold: traps of stock that the guard closes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.plugged_app import PLUGGED_APP
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer, RawClient, SocketIOClient

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process of the application."""
    return make_fleet(app=PLUGGED_APP, processes=1, has_queue=False).a


@pytest.mark.faults(
    "to=[], '', 0",
    stock="every client gets it, or the sender of the event",
    because=r"strangers got \d+",
)
@both_modes
def test_an_event_for_nobody_reaches_nobody(
    server: GunicornServer,
    sio_client: Callable[..., SocketIOClient],
    measured: Callable[[str, object], None],
) -> None:
    """An empty list is nobody; an empty text and a zero are rooms, in which nobody is."""
    sender, stranger = sio_client(server), sio_client(server)
    for to in ([], "", 0):
        for where in ("emit", "broadcast", "socketio"):
            sender.call("tell", to, where)
    for client in (sender, stranger):
        client.call("tell", None, "socketio")  # what was sent before has arrived by then
        client.wait_for("told")
    wait_until(lambda: all(len(client.events("told")) >= 2 for client in (sender, stranger)))
    strangers = len(stranger.events("told")) - 2
    senders = len(sender.events("told")) - 2
    measured("copies", strangers + senders)
    assert not strangers + senders, f"strangers got {strangers} copies, the sender {senders}"


@pytest.mark.faults(
    "NaN, Infinity in a payload or an answer",
    stock="every browser in the room drops its connection with 'parse error'",
    because=r"sent \d+ packets that are no JSON",
)
@both_modes
def test_values_that_json_does_not_have_are_sent_to_no_client(
    server: GunicornServer,
    raw_client: Callable[..., RawClient],
    measured: Callable[[str, object], None],
) -> None:
    """The caller gets a ValueError; who asked is told that the handler failed."""
    client = raw_client(server)
    for number, how in enumerate(("emit", "callback", "acknowledge"), 1):
        client.send(f'42{number}["nan","{how}"]')
        client.wait_for_frame(f"43{number}[")
    texts = [frame for frame, _ in client.frames if frame.startswith(("42", "43"))]
    bad = [text for text in texts if not is_json(text[text.index("[") :])]
    measured("packets", f"{len(bad)} of {len(texts)} are no JSON")
    assert not bad, f"sent {len(bad)} packets that are no JSON"
    answers = [json.loads(text[3:])[0] for text in texts]
    assert [answer["error"]["code"] for answer in answers] == ["internal_error"] * 3


def is_json(text: str) -> bool:
    """Say whether a browser would read it."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True

"""What is plugged into an application works as without the guard: loggers, the admin UI."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import socketio as python_socketio
from socketio.packet import DISCONNECT, Packet

from tests.faults.plugged_app import PLUGGED_APP
from tests.support import wait_until
from tests.support.clients import disconnect

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])
_IDS = re.compile(r"[\w-]{20}")
_NUMBERS = re.compile(r"(?<=data [23])(\d*-?)\d+(?=\[)|(?<=data [56]1-)\d+(?=\[)")


class Client:
    """python-socketio's client over one transport, or both."""

    def __init__(self, server: GunicornServer, *transports: str, namespace: str = "/") -> None:
        self.seen: Counter[str] = Counter()
        self.gone = threading.Event()
        self.client = python_socketio.Client(reconnection=False)
        self.client.on("*", self._take, namespace=namespace)
        self.client.on("disconnect", lambda *_reason: self.gone.set())
        self.client.connect(
            server.url, transports=list(transports), namespaces=[namespace], wait_timeout=5
        )

    def _take(self, event: str, *_args: Any) -> Any:
        self.seen[event] += 1
        return "answer"

    def call(self, *event: Any) -> Any:
        return self.client.call(event[0], event[1:], timeout=5)

    def wait_for(self, event: str, count: int = 1) -> None:
        wait_until(lambda: self.seen[event] >= count, message=f"no {event}")

    def leave(self) -> None:
        """Leave the namespace, and nothing else: what follows may overtake it."""
        self.client._send_packet(Packet(DISCONNECT, namespace="/"))

    def close(self) -> None:
        disconnect(self.client)


POLLING, WEBSOCKET, BOTH = ("polling",), ("websocket",), ("polling", "websocket")


def act(clients: list[Client], *, is_asked: bool) -> None:
    """Let clients do what clients do, one thing after the other."""
    for client in clients:
        assert client.call("echo", "ä") == "ä"
        client.call("room", "enter", "room")
        client.call("room", "enter", "other")
        if is_asked:
            client.call("ask")
            client.wait_for("question")
        client.call("room", "leave", "other")
    clients[0].call("room", "emit", "room")
    clients[0].call("room", "emit", None)
    for client in clients:
        client.wait_for("news")
    clients[0].call("room", "close", "room")


def depart(server: GunicornServer, clients: list[Client]) -> None:
    """Let clients leave, the last of them because the server says so."""
    for client in clients[:-1]:
        client.leave()
    wait_until(lambda: server.state()["clients"] == 1)
    clients[-1].client.emit("kick")
    assert clients[-1].gone.wait(5)
    wait_until(lambda: server.state()["clients"] == 0)


@pytest.fixture
def make_plugged(
    make_server: Callable[..., GunicornServer],
) -> Callable[..., GunicornServer]:
    """Return a function that starts the application, guarded or not."""

    def make(async_mode: str, *, is_guarded: bool, socketio: Any = None, **plugged: Any) -> Any:
        return make_server(
            PLUGGED_APP,
            async_mode=async_mode,
            env={
                "GUARD": "1" if is_guarded else "0",
                "ASYNC_MODE": async_mode,
                "SOCKETIO_OPTIONS": json.dumps(socketio or {}),
                "PLUGGED": json.dumps(plugged),
            },
        )

    return make


def lines(server: GunicornServer) -> Counter[tuple[str, str, str]]:
    """Return the lines of upstream's loggers, without ids.

    Nor with what a client says, or does not say any more, once it was told to go.
    """
    return Counter(
        (record.logger, record.level, _NUMBERS.sub("N", _IDS.sub("ID", record.message)))
        for record in server.records(
            matching=lambda record: (
                record.logger.startswith(("socketio", "engineio"))
                and "Received packet CLOSE" not in record.message
            )
        )
    )


@both_modes
def test_whoever_logs_every_event_and_packet_has_the_same_lines(
    make_plugged: Callable[..., GunicornServer],
    async_mode: str,
    measured: Callable[[str, object], None],
) -> None:
    """Text and level, over each transport and over both."""
    seen = []
    for is_guarded in (False, True):
        logged = {"logger": True, "engineio_logger": True}
        server = make_plugged(async_mode, is_guarded=is_guarded, socketio=logged)
        clients = [Client(server, *transports) for transports in (POLLING, WEBSOCKET, BOTH)]
        act(clients, is_asked=True)
        depart(server, clients)
        seen.append(lines(server))
        for client in clients:
            client.close()
    stock, guarded = seen
    measured("lines", f"{sum(stock.values())} without the guard, {sum(guarded.values())} with it")
    assert (stock - guarded, guarded - stock) == (Counter(), Counter())


def watch(server: GunicornServer, *, is_acting: bool) -> Counter[str]:
    """Return what an administrator sees of a client that comes, acts and is acted upon."""
    admin = Client(server, "websocket", namespace="/admin")
    admin.wait_for("config")
    client = Client(server, "websocket")
    client.call("echo", 1)
    client.call("room", "enter", "room")
    client.call("room", "emit", "room")
    sid = client.client.get_sid()
    if is_acting:
        admin.client.emit("emit", ("/", sid, "news", 1), namespace="/admin")
        client.wait_for("news", 2)
        admin.client.emit("join", ("/", "another", sid), namespace="/admin")
        admin.client.emit("leave", ("/", "another", sid), namespace="/admin")
        admin.wait_for("room_left")
        admin.client.emit("_disconnect", ("/", False, sid), namespace="/admin")
        assert client.gone.wait(5)
    else:
        client.leave()
    wait_until(lambda: server.state()["clients"] == 0)
    server.get("/end")
    admin.wait_for("end")
    seen = admin.seen.copy()
    admin.close()
    client.close()
    return seen


@pytest.mark.parametrize(
    ("async_mode", "instrument", "admin"),
    [
        ("gevent", "before", {}),
        pytest.param("gevent", "after", {"mode": "production"}, marks=pytest.mark.long),
        pytest.param("threading", "before", {"read_only": True}, marks=pytest.mark.long),
        ("threading", "after", {}),
    ],
)
def test_the_admin_ui_shows_the_same_figures(
    make_plugged: Callable[..., GunicornServer],
    async_mode: str,
    instrument: str,
    admin: dict[str, Any],
    measured: Callable[[str, object], None],
) -> None:
    """Whether the server was instrumented before or after it was guarded."""
    seen = []
    for is_guarded in (False, True):
        server = make_plugged(async_mode, is_guarded=is_guarded, instrument=instrument, admin=admin)
        # Ids of questions have other lengths, and answers to polls may hold one packet or two.
        clients = [Client(server, *transports) for transports in (WEBSOCKET, BOTH)]
        act(clients, is_asked=False)
        exact = server.state()["figures"]
        if not is_guarded:
            # An upgrade ends a poll by a packet, which goes over the WebSocket if none waits.
            exact["packetsOut"] -= 1
            exact["bytesOut"] -= 1
        clients.append(Client(server, *POLLING))
        act(clients[2:], is_asked=False)
        polled = server.state()["figures"]
        for client in clients:
            client.close()
        wait_until(lambda server=server: not server.state()["clients"], timeout=20)
        came_in = {name: polled[name] for name in ("bytesIn", "packetsIn", "rawConnection")}
        seen.append((exact, came_in, watch(server, is_acting=not admin)))
    stock, guarded = seen
    measured("seen", f"{stock[0]}, then {dict(stock[2])}")
    assert guarded == stock

"""What upstream races left behind: planted by hand, found, and removed at the second look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from flask import request

from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream import Sweeper
from flask_socketio_guard.upstream.engineio.socket import GuardedSocket
from tests.support import unit_support, unit_websocket
from tests.support.unit_websocket import Peer, Polling

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_served = unit_websocket.make_served

LOOPBACK = "127.0.0.1"


class Scene:
    """An application with clients that are alive, and a sweeper of its own."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.server = served.socketio.server
        self.manager = self.server.manager
        self.reasons: list[tuple[str, str]] = []
        for namespace in ("/", "/other"):
            served.socketio.on_event("echo", lambda *args: args, namespace=namespace)
            served.socketio.on_event("connect", lambda: None, namespace=namespace)
            served.socketio.on_event("disconnect", self._gone, namespace=namespace)
        self.clients: list[Peer | Polling] = [served.websocket(), served.polling()]
        self.sids = []
        for client in self.clients:
            self.sids += [client.join(), client.join("/other")]
        # Alive, and in no namespace.
        self.outsider = served.polling()
        self.sweeper = Sweeper(self.server, served.inner)

    def _gone(self, reason: str) -> None:
        self.reasons.append((request.sid, reason))  # type: ignore[attr-defined]

    def tables(self) -> dict[str, Any]:
        """Return what is in every table that is swept."""
        return {
            "sockets": set(self.served.engine.sockets),
            "environ": set(self.server.environ),
            "rooms": {
                namespace: {room: dict(members) for room, members in rooms.items()}
                for namespace, rooms in self.manager.rooms.items()
            },
            "connections": set(self.served.inner.connections),
            "address": self.served.inner.admission.count(LOOPBACK),
        }

    def expect_all_alive(self) -> None:
        """Each client is answered in each namespace."""
        for client in self.clients:
            send = client.send if isinstance(client, Peer) else client.post
            send('421["echo",1]')
            client.read_until("431[1]")
            send('42/other,2["echo",2]')
            client.read_until("43/other,2[2]")
        assert self.outsider.post("40").status == 200
        self.outsider.read_until("40")


@pytest.fixture(params=["gevent-websocket", "threads"])
def scene(make_served: Callable[..., Served], request: pytest.FixtureRequest) -> Scene:
    """On each server in turn."""
    return Scene(make_served(request.param))


def plant_socket(scene: Scene) -> str:
    """A session that is closed, and still in the table."""
    socket = GuardedSocket(scene.served.engine, "leftover", {"REMOTE_ADDR": LOOPBACK})
    scene.served.inner.admission.opened(LOOPBACK)
    socket.closed = True
    socket.joined()
    scene.served.engine.sockets["leftover"] = socket
    return "sockets"


def plant_environ(scene: Scene) -> str:
    """The environment of a session that is gone."""
    scene.server.environ["environ"] = {"wsgi.version": (1, 0)}
    return "environ"


def plant_room(scene: Scene) -> str:
    """A client that upstream's manager has in rooms, and nobody else knows."""
    for room in (None, "leftover", "a room"):
        scene.manager.basic_enter_room("leftover", "/other", room, eio_sid="gone")
    return "rooms"


def plant_pending_room(scene: Scene) -> str:
    """The same, half way out."""
    plant_room(scene)
    scene.manager.pre_disconnect("leftover", "/other")
    return "rooms"


PLANTS = [plant_socket, plant_environ, plant_room, plant_pending_room]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_leftover_is_removed_at_the_second_sweep(
    scene: Scene, plant: Callable[[Scene], str]
) -> None:
    """And nothing else is touched."""
    before = scene.tables()
    assert scene.sweeper.sweep() == {}
    table = plant(scene)
    planted = scene.tables()
    assert planted != before
    assert scene.sweeper.sweep() == {}
    assert scene.tables() == planted
    assert scene.sweeper.sweep() == {table: 1}
    assert scene.tables() == before
    assert scene.manager.pending_disconnect in ({}, {"/other": []})
    assert scene.sweeper.sweep() == {}
    scene.expect_all_alive()
    assert scene.reasons == []


def test_who_is_gone_in_between_is_not_counted(scene: Scene) -> None:
    plant_environ(scene)
    assert scene.sweeper.sweep() == {}
    del scene.server.environ["environ"]
    assert scene.sweeper.sweep() == {}
    # once more, and so for the first time again
    plant_environ(scene)
    assert scene.sweeper.sweep() == {}
    assert scene.sweeper.sweep() == {"environ": 1}


def test_leftovers_in_several_tables_are_removed_together(scene: Scene) -> None:
    for plant in (plant_socket, plant_environ, plant_room):
        plant(scene)
    scene.server.environ["another"] = {}
    scene.sweeper.sweep()
    assert scene.sweeper.sweep() == {"sockets": 1, "environ": 2, "rooms": 1}
    scene.expect_all_alive()


@pytest.mark.parametrize("lost", ["socket", "rooms"])
def test_a_connection_that_has_lost_its_ground_is_closed(scene: Scene, lost: str) -> None:
    """Disconnect handlers run, once each. Its transport goes as well: browsers then come back."""
    sid, other = scene.sids[2:]
    client = scene.clients.pop()
    assert isinstance(client, Polling)
    if lost == "socket":
        socket = scene.served.engine.sockets.pop(client.sid)
    else:
        scene.manager.basic_disconnect(sid, "/")
    expected = {sid, other}
    scene.sweeper.sweep()
    assert scene.sweeper.sweep() == {"connections": 2 if lost == "socket" else 1}
    scene.served.wait_for(lambda: len(scene.reasons) == len(expected))
    assert set(scene.reasons) == {(each, "transport error") for each in expected}
    scene.served.wait_for(lambda: not expected & set(scene.served.inner.connections))
    assert scene.sweeper.sweep() == {}
    assert scene.sweeper.sweep() == {}
    assert all(scene.manager.eio_sid_from_sid(each, "/") is None for each in expected)
    scene.served.wait_for(lambda: client.sid not in scene.server.environ)
    scene.expect_all_alive()
    if lost == "socket":
        scene.served.engine.sockets[client.sid] = socket  # for the end of the test


def test_a_client_that_is_swept_is_told_by_the_end_of_its_transport(scene: Scene) -> None:
    peer = scene.clients.pop(0)
    assert isinstance(peer, Peer)
    scene.manager.basic_disconnect(scene.sids[0], "/")
    scene.sweeper.sweep()
    assert scene.sweeper.sweep() == {"connections": 1}
    peer.read_rest()
    assert peer.closed == (1012, "service restart")
    scene.expect_all_alive()


def test_the_sweeper_survives_what_it_finds(scene: Scene) -> None:
    """A table without sense, and a leftover that cannot be removed, cost the others nothing."""
    failures = scene.served.collect(signals.failed)
    scene.manager.rooms["/other"][None]["odd"] = "gone"
    scene.manager.rooms["/broken"] = None
    plant_environ(scene)
    plant_socket(scene)
    for _ in range(2):
        removed = scene.sweeper.sweep()
    assert removed == {"environ": 1, "sockets": 1, "rooms": 1}
    assert {type(failure.exception) for failure in failures} == {AttributeError}
    del scene.manager.rooms["/broken"]
    scene.expect_all_alive()


def test_nobody_in_the_namespace_is_no_trouble(scene: Scene) -> None:
    """As a stranger left it who had all leave the room of everybody."""
    del scene.manager.rooms["/other"][None]
    failures = scene.served.collect(signals.failed)
    scene.sweeper.sweep()
    assert scene.sweeper.sweep() == {"connections": 2}
    assert failures == []


def test_a_client_whose_connect_handler_runs_is_left_alone(
    make_served: Callable[..., Served],
) -> None:
    """It is in the table of connections, and in upstream's not yet everywhere."""
    served = make_served()
    entered, release = served.runtime.flag(), served.runtime.flag()

    @served.socketio.on("connect")
    def connect() -> None:
        entered.set()
        release.wait(5.0)

    peer = served.websocket()
    peer.send("40")
    assert entered.wait(5.0)
    sweeper = Sweeper(served.socketio.server, served.inner)
    assert [sweeper.sweep() for _ in range(3)] == [{}] * 3
    release.set()
    peer.read_until("40")


def test_a_client_whose_disconnect_handler_runs_is_left_alone(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    entered, release = served.runtime.flag(), served.runtime.flag()
    environs: list[object] = []

    @served.socketio.on("disconnect")
    def disconnect() -> None:
        entered.set()
        release.wait(5.0)
        environs.append(request.environ.get("REQUEST_METHOD"))

    peer = served.joined()
    peer.vanish()
    assert entered.wait(5.0)
    sweeper = Sweeper(served.socketio.server, served.inner)
    assert [sweeper.sweep() for _ in range(3)] == [{}] * 3
    release.set()
    served.wait_for(served.inner.is_quiet)
    assert environs == ["GET"]
    assert not served.socketio.server.environ


def test_an_application_under_a_test_client_is_left_alone(
    make_guarded: Callable[..., unit_support.Guarded],
) -> None:
    """It has clients without sockets."""
    guarded = make_guarded()
    client = guarded.client()
    sweeper = Sweeper(guarded.socketio.server, guarded.inner)
    assert [sweeper.sweep() for _ in range(3)] == [{}] * 3
    assert client.is_connected()


def test_what_the_guard_sweeps_is_counted(
    make_served: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = make_served()
    scene = Scene(served)
    sweeps = served.collect(signals.connections_swept)
    plant_environ(scene)
    scene.server.environ["another"] = {}
    plant_room(scene)
    sweeper = Sweeper(served.socketio.server, served.inner)
    for _ in range(9):
        sweeper.tick()
    assert sweeps == []
    sweeper.tick()
    assert sweeps == [signals.Sweep(3, ("environ", "rooms"))]
    assert served.counter("connections_swept") == 3

"""A capability is one component: what it does not need, its base class has."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from flask_socketio import join_room

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.core.component import Check, Component, Status
from flask_socketio_guard.core.supervisor import is_stopping, sleep
from flask_socketio_guard.states import Phase
from tests import unit_support
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flask_socketio_guard.core.component import Watch
    from flask_socketio_guard.core.lifecycle import Lifecycle
    from tests.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded


class Thermometer(Component):
    """Has all that a component may have."""

    def __init__(self, guard: Any) -> None:
        self.runtime = guard.runtime
        self.told: Counter[str] = Counter()
        self.temperature = 20
        self.is_flushed = True

    def start(self, watch: Watch) -> None:
        self.told["start"] += 1
        watch("thermometer", self.measure, None)

    def serve(self, watch: Watch) -> None:
        self.told["serve"] += 1

    def measure(self) -> None:
        while not is_stopping():
            self.told["measured"] += 1
            sleep(self.runtime, 0.01)
        self.told["measured to the end"] += 1

    def tick(self) -> None:
        self.told["tick"] += 1

    def poll(self) -> None:
        self.told["poll"] += 1

    def connected(self, client: Any) -> None:
        self.told[f"connected {client.namespace}"] += 1

    def entered(self, client: Any, room: str) -> None:
        self.told[f"entered {room}"] += 1

    def disconnected(self, client: Any) -> None:
        self.told["disconnected"] += 1

    def drain(self, timeout: float) -> bool:
        self.told["drain"] += 1
        return True

    def flush(self, timeout: float) -> bool:
        self.told["flush"] += 1
        return self.is_flushed

    def stop(self, timeout: float) -> None:
        self.told["stop"] += 1

    def checks(self) -> Mapping[str, Check]:
        status = Status.FAIL if self.temperature > 30 else Status.PASS
        return {"thermometer:temperature": Check(status, self.temperature, "C")}

    def gauges(self) -> Mapping[str, int]:
        return {"thermometer:measured": self.told["measured"]}


def test_a_component_of_ones_own_is_one_list_entry(make_guarded: Callable[..., Guarded]) -> None:
    """A task, a check, a gauge, clients and the end, without an edit in the package."""
    guard = SocketIOGuard()
    made: list[Thermometer] = []

    def make(inner: Any) -> Thermometer:
        made.append(Thermometer(inner))
        return made[-1]

    guard.registry.components.append(make)
    guarded = make_guarded(guard=guard, health_details="secret")
    guarded.socketio.on_event("enter", join_room)
    (own,) = made
    assert own.told == Counter()
    guard_of = guarded.inner
    guard_of.start()
    wait_until(lambda: own.told["tick"] and own.told["measured"] > 1 and own.told["poll"])
    client = guarded.client()
    client.emit("enter", "hall", callback=True)
    http = guarded.app.test_client()
    guard_of.health.refresh()
    answer = http.get("/readyz", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
    assert answer.json is not None
    checks = answer.json["checks"]
    assert checks["thermometer:temperature"][0]["observedUnit"] == "C"
    assert checks["thermometer:measured"][0]["observedValue"] > 0
    own.temperature = 40
    guard_of.health.refresh()
    assert http.get("/readyz").status_code == 503
    client.disconnect()
    wait_until(lambda: own.told["disconnected"] == 1)
    own.is_flushed = False
    assert guarded.guard.drain(2.0) is False, "it says that something has not got out"
    guard_of.stop(2.0)
    once = ["start", "serve", "connected /", "entered hall", "drain", "stop"]
    assert {name: own.told[name] for name in once} == dict.fromkeys(once, 1)
    assert own.told["measured to the end"] == 1
    assert own.told["flush"] == 1


def test_a_process_goes_through_its_phases_once(make_guarded: Callable[..., Guarded]) -> None:
    lifecycle: Lifecycle = make_guarded().inner.lifecycle
    phases = [lifecycle.phase]
    for step in (lifecycle.start, lifecycle.start, lifecycle.serve, lifecycle.serve):
        step()
        phases.append(lifecycle.phase)
    assert lifecycle.drain(1.0)
    assert lifecycle.drain(1.0), "who comes second is told the same"
    phases.append(lifecycle.phase)
    lifecycle.serve()
    lifecycle.stop(1.0)
    lifecycle.stop(1.0)
    phases.append(lifecycle.phase)
    lifecycle.start()
    assert phases == [
        Phase.NEW,
        Phase.EMITTING,
        Phase.EMITTING,
        Phase.SERVING,
        Phase.SERVING,
        Phase.DRAINING,
        Phase.STOPPED,
    ]
    assert lifecycle.phase is Phase.STOPPED


def test_a_start_that_failed_is_not_tried_with_each_request(
    make_guarded: Callable[..., Guarded],
) -> None:
    """It would find half of it running; the load balancer is told, and requests are served."""

    class Failing(Component):
        def serve(self, watch: Watch) -> None:
            raise RuntimeError("can't start new thread")

    guard = SocketIOGuard()
    guard.registry.components.append(lambda _: Failing())
    guarded = make_guarded(guard=guard)
    with pytest.raises(RuntimeError):
        guarded.inner.start()
    guarded.inner.start()
    http = guarded.app.test_client()
    assert http.get("/elsewhere").status_code == 404
    assert http.get("/readyz").status_code == 503


def test_components_stop_in_reverse(make_guarded: Callable[..., Guarded]) -> None:
    """What others rest upon is started first and ends last."""
    stopped: list[str] = []

    class Named(Component):
        def __init__(self, name: str) -> None:
            self.name = name

        def stop(self, timeout: float) -> None:
            stopped.append(self.name)

    guard = SocketIOGuard()
    guard.registry.components += [lambda _, name=name: Named(name) for name in "abc"]
    make_guarded(guard=guard).inner.stop(1.0)
    assert stopped == ["c", "b", "a"]

"""A capability is one component: what it does not need, its base class has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from flask_socketio import SocketIO, join_room

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import all_guards
from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.core.component import Check, Component, Status, implementations_of
from flask_socketio_guard.core.supervisor import is_stopping, sleep
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.settings import (
    COUNT,
    SECONDS,
    Settings,
    one_of,
    or_none,
    setting,
    settings_table,
)
from flask_socketio_guard.states import Phase
from tests.support import unit_support, wait_until
from tests.support.unit_support import Bus, BusManager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flask_socketio_guard.core.component import Watch
    from flask_socketio_guard.core.lifecycle import Lifecycle
    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
stop_guards = unit_support.stop_guards


@dataclass(frozen=True)
class ThermometerSettings(Settings):
    thermometer_interval: float = setting(0.01, SECONDS, "time between two measurements")
    thermometer_limit: int | None = setting(30, or_none(COUNT), "degrees that are too many")
    thermometer_scale: str = setting("C", one_of("C", "F"), "unit of what is told")
    thermometer_key: str = setting("", (str.isascii, "ASCII"), "opens it", is_secret=True)


class Thermometer(Component):
    """Has all that a component may have."""

    settings = ThermometerSettings

    def __init__(self, guard: Any) -> None:
        self.own = guard.config.of(ThermometerSettings)
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
            sleep(self.runtime, self.own.thermometer_interval)
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
        limit = self.own.thermometer_limit
        status = Status.FAIL if limit and self.temperature > limit else Status.PASS
        check = Check(status, self.temperature, self.own.thermometer_scale)
        return {"thermometer:temperature": check}

    def gauges(self) -> Mapping[str, int]:
        return {"thermometer:measured": self.told["measured"]}


def thermometer(guarded: Guarded) -> Thermometer:
    """Return the one that the guard of an application has made."""
    (own,) = (each for each in guarded.inner.lifecycle.components if isinstance(each, Thermometer))
    return own


@pytest.fixture
def guard() -> SocketIOGuard:
    """One with a component of its own."""
    guard = SocketIOGuard()
    guard.registry.components.append(Thermometer)
    return guard


def test_a_component_of_ones_own_is_one_list_entry(
    make_guarded: Callable[..., Guarded], guard: SocketIOGuard
) -> None:
    """A task, a check, a gauge, a setting, clients and the end, without an edit in the package."""
    guarded = make_guarded(guard=guard, health_details="secret", thermometer_limit=50)
    guarded.socketio.on_event("enter", join_room)
    own = thermometer(guarded)
    assert own.told == Counter()
    guard_of = guarded.inner
    guard_of.start()
    wait_until(lambda: own.told["tick"] and own.told["measured"] > 1 and own.told["poll"])
    client = guarded.client()
    client.emit("enter", "hall", callback=True)
    http = guarded.app.test_client()
    own.temperature = 40
    guard_of.health.refresh()
    answer = http.get("/readyz", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
    assert answer.json is not None
    checks = answer.json["checks"]
    assert checks["thermometer:temperature"][0]["observedUnit"] == "C"
    assert checks["thermometer:measured"][0]["observedValue"] > 0
    own.temperature = 60
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


def test_settings_of_a_component_come_from_where_all_do(
    make_guarded: Callable[..., Guarded], guard: SocketIOGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keyword wins over ``app.config``, that over the environment, and that over the default."""
    for name in ("INTERVAL", "LIMIT"):
        monkeypatch.setenv(f"SOCKETIO_GUARD_THERMOMETER_{name}", "3")
    monkeypatch.setenv("SOCKETIO_GUARD_THERMOMETER_SCALE", "F")
    config = {
        "SOCKETIO_GUARD_THERMOMETER_INTERVAL": 2.0,
        "SOCKETIO_GUARD_THERMOMETER_LIMIT": 2,
        "SOCKETIO_GUARD_DRAIN_WINDOW": 2.0,
    }
    guarded = make_guarded(guard=guard, config=config, thermometer_interval=1.0)
    assert thermometer(guarded).own == ThermometerSettings(1.0, 2, "F", "")
    assert guarded.inner.config.drain_window == 2.0
    other = make_guarded(guard=guard)
    assert thermometer(other).own == ThermometerSettings(3.0, 3, "F", "")
    monkeypatch.setenv("SOCKETIO_GUARD_THERMOMETER_LIMIT", "none")
    assert thermometer(make_guarded(guard=guard)).own.thermometer_limit is None


@pytest.mark.parametrize(
    ("settings", "environment", "told"),
    [
        ({"thermometer_interval": 0}, {}, "_INTERVAL must be a number of seconds > 0, not 0"),
        ({"thermometer_limit": "5"}, {}, "_LIMIT must be None or an integer >= 1, not '5'"),
        ({"thermometer_scale": None}, {}, "_SCALE must be 'C' or 'F', not None"),
        ({"thermometer_key": "\u00e9"}, {}, "_KEY must be ASCII"),
        ({"thermometer_key": 5}, {}, "_KEY must be ASCII"),
        ({}, {"LIMIT": "many"}, "_LIMIT must be a number, not 'many'"),
    ],
)
def test_a_wrong_setting_of_a_component_is_told_as_any(
    make_guarded: Callable[..., Guarded],
    guard: SocketIOGuard,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    environment: dict[str, str],
    told: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"SOCKETIO_GUARD_THERMOMETER_{name}", value)
    with pytest.raises(ConfigError) as raised:
        make_guarded(guard=guard, **settings)
    assert str(raised.value) == f"SOCKETIO_GUARD_THERMOMETER{told}"


def test_a_setting_of_a_component_that_is_not_there_is_unknown(
    make_guarded: Callable[..., Guarded], guard: SocketIOGuard
) -> None:
    """And one that is misspelt is told what it may have meant."""
    config = {"SOCKETIO_GUARD_THERMOMETER_LIMIT": 5}
    with pytest.raises(ConfigError, match="unknown setting SOCKETIO_GUARD_THERMOMETER_LIMIT"):
        make_guarded(config=config)
    with pytest.raises(ConfigError, match="did you mean SOCKETIO_GUARD_THERMOMETER_LIMIT"):
        make_guarded(guard=guard, thermometer_limits=5)


def test_settings_are_declared_once_and_as_they_must_be() -> None:
    @dataclass(frozen=True)
    class Same(Settings):
        thermometer_limit: int = setting(1, COUNT, "another one")

    @dataclass(frozen=True)
    class Known(Settings):
        drain_window: float = setting(1.0, SECONDS, "one of the guard's")

    class Undecorated(Settings):
        undecorated: int = setting(1, COUNT, "would not be read")

    for wrong, told in (
        (Same, "THERMOMETER_LIMIT is declared by ThermometerSettings and by Same"),
        (Known, "DRAIN_WINDOW is declared by GuardConfig and by Known"),
        (Undecorated, r"Undecorated must be a @dataclass\(frozen=True\) of Settings"),
        (int, "must be a @dataclass"),
    ):
        with pytest.raises(ConfigError, match=told):
            GuardConfig.from_mapping({}, [ThermometerSettings, wrong])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"Same was not read: .* before init_app\(\)"):
        GuardConfig.from_mapping({}, [ThermometerSettings]).of(Same)


def test_a_write_only_process_and_a_factory_have_them_too(
    guard: SocketIOGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCKETIO_GUARD_THERMOMETER_LIMIT", "7")
    guard.registry.components[:] = [partial(Thermometer)]
    manager = BusManager(Bus(), write_only=True)
    socketio = SocketIO(client_manager=manager, async_mode="threading")
    socketio.init_app(None)
    guard.init_app(None, socketio)
    (inner,) = (each for each in all_guards() if each.socketio is socketio)
    assert inner.config.of(ThermometerSettings).thermometer_limit == 7


def test_the_settings_of_a_component_have_a_table() -> None:
    table = settings_table(ThermometerSettings)
    assert "| `THERMOMETER_LIMIT` | 30 | degrees that are too many |" in table
    assert "DRAIN_WINDOW" not in table


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


def test_only_components_that_have_something_to_do_are_polled(
    make_guarded: Callable[..., Guarded],
) -> None:
    """Ten times a second there is no time for those that have not."""
    guard = SocketIOGuard()
    guard.registry.components.append(Thermometer)
    components = make_guarded(guard=guard).inner.lifecycle.components
    polls = implementations_of("poll", components)
    assert [type(poll.__self__).__name__ for poll in polls] == ["Deliveries", "Thermometer"]

"""The house: imports go down, only the runtimes name gevent, private parts are for upstream."""

from __future__ import annotations

import ast

import pytest

from tests.tools.architecture import (
    FLOORS,
    GEVENT,
    PACKAGE,
    PROJECT,
    cycles,
    picture,
    private_touches,
    read_package,
    room_of,
    users_of,
    wrong_directions,
)


def test_imports_go_down_one_direction_only() -> None:
    wrong = wrong_directions(read_package())
    assert not wrong, "imports must go down the table FLOORS:\n" + "\n".join(wrong)


def test_every_floor_names_rooms_that_exist() -> None:
    """The table must not remember rooms that are gone."""
    rooms = {room_of(module) for module in read_package()}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(read_package()) == []


def test_only_runtime_names_gevent() -> None:
    """Whoever needs to know which runtime there is asks ``runtime``."""
    users = {module.partition("_")[0] for module in users_of(GEVENT, read_package())}
    assert users == {"core.runtime"}


def test_only_upstream_touches_private_parts_of_others() -> None:
    touches = private_touches(read_package())
    assert not touches, "private parts are for upstream/ alone:\n" + "\n".join(touches)


@pytest.mark.parametrize("package", ["demo", "example_app", "benchmarks"])
def test_no_modules_beside_the_package_import_each_other_in_a_circle(package: str) -> None:
    sources = read_package(PROJECT / package)
    assert "__init__" in sources
    assert cycles(sources, package) == []


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("flask_socketio_guard", {"example_app", "demo", "benchmarks", "tests"}),
        ("example_app", {"demo", "benchmarks", "tests"}),
        ("demo", {"benchmarks", "tests"}),
    ],
)
def test_a_package_knows_nothing_of_those_that_show_it(package: str, others: set[str]) -> None:
    """The example is there to be copied, and the demo to break what is copied."""
    assert users_of(others, read_package(PROJECT / package)) == []


def test_modules_of_the_demo_stay_short() -> None:
    for module, source in read_package(PROJECT / "demo").items():
        assert source.count("\n") <= 450, module


def test_an_import_up_the_floors_is_found() -> None:
    """Both forms of the import statement, and imports for types only."""
    sources = {
        "core.runtime": "from ..telemetry.health import Health",
        "states": "from . import extension",
        "errors": "import flask_socketio_guard.extension",
        "upstream.engineio.websocket_transport": "from ..socketio import server",
        "upstream.adopt": "if TYPE_CHECKING:\n    from ..app_guard import AppGuard",
    }
    assert wrong_directions(sources) == [
        "core.runtime reaches up to telemetry.health",
        "states reaches up to extension",
        "errors reaches up to extension",
        "upstream.engineio.websocket_transport reaches up to upstream.socketio",
        "upstream.adopt reaches up to app_guard",
    ]


def test_an_import_next_door_is_found() -> None:
    sources = {
        "queue.listener": "from ..clients.send_queue import SendQueue",
        "gunicorn": "from .middleware import x",
        "queue.outbox": "from .listener import Listener",
    }
    assert wrong_directions(sources) == [
        "queue.listener reaches next door to clients.send_queue",
        "gunicorn reaches next door to middleware",
    ]


def test_a_room_without_a_floor_is_found() -> None:
    assert wrong_directions({"utils": ""}) == ["utils is on no floor: add it to FLOORS"]


def test_a_circle_within_upstream_is_found() -> None:
    sources = {
        "upstream.server": "from .managers import x",
        "upstream.managers": "from .adopt import x",
        "upstream.adopt": "from .server import x",
    }
    assert cycles(sources) == [
        "upstream.server -> upstream.managers -> upstream.adopt -> upstream.server"
    ]


def test_a_circle_of_another_package_is_found() -> None:
    """Imports of modules and of names in them, also for types only."""
    sources = {
        "check": "from demo.faults import FAULTS",
        "faults": "if TYPE_CHECKING:\n    from demo import check",
        "app": "import demolition.check",
    }
    assert cycles(sources, "demo") == ["check -> faults -> check"]


def test_a_second_user_of_gevent_is_found() -> None:
    sources = {"outbox": "from gevent.event import Event", "tasks": "import gevent"}
    assert users_of(GEVENT, sources) == ["outbox", "tasks"]


def test_a_touch_of_private_parts_is_found() -> None:
    """The names that upstream's seams have, wherever they are used."""
    seams = ("_handle_event", "_trigger_event", "_publish", "_listen", "_generate_ack_id")
    source = "\n".join(f"server.manager.{name}()" for name in seams)
    assert len(private_touches({"app_guard": source})) == len(seams)
    assert private_touches({"upstream.server": source}) == []
    assert private_touches({"app_guard": "class A:\n def f(self): self._own()"}) == []


def test_the_picture_shows_every_module() -> None:
    shown = picture(read_package())
    for module in read_package():
        name = module.removeprefix(room_of(module) + ".")
        assert name.endswith("__init__") or name in shown, module


def test_every_room_is_packaged() -> None:
    """An installation from the checkout would not notice that one is left out."""
    project = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    _, _, listed = project.partition("\npackages = ")
    found = [path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")]
    names = {".".join(folder.parts) for folder in found}
    assert set(ast.literal_eval(listed[: listed.index("]") + 1])) == names

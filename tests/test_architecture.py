"""The directions in which the rooms of the package may know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import flask_socketio_guard

PACKAGE = Path(flask_socketio_guard.__file__).parent

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "backoff", "printable", "version", "signatures"})
    | frozenset({"addresses", "duplicates", "answers", "forks"}),
    frozenset({"states", "threads", "loop_monitor"}),
    frozenset({"config", "runtime", "signals", "scripts"}),
    frozenset({"hooks", "transport", "intake", "sending", "folding"}),
    frozenset({"supervisor", "broker", "fan_out"}),
    frozenset({"deadlines"}),
    frozenset({"upstream", "handlers", "callbacks", "tasks", "listener", "outbox"})
    | frozenset({"connections", "blocking", "rates", "schema", "admission", "delivery"})
    | frozenset({"surveys"}),
    frozenset({"health", "metrics", "logs", "drain", "routes"}),
    frozenset({"app_guard"}),
    frozenset({"gunicorn", "middleware"}),
    frozenset({"extension"}),
    frozenset({"__init__"}),
)
"""Imports go from a later row to an earlier one. Rooms in one row do not import each other."""

GEVENT = frozenset({"gevent", "greenlet"})
ALLOWED_PRIVATE = {("extension", "_get_current_object"), ("gunicorn", "_exit")}
"""Names with an underscore that are no private parts: Werkzeug's "the object itself", os._exit."""

NAMED_TUPLE = {"_asdict", "_make", "_replace"}
"""What ``typing.NamedTuple`` documents, with an underscore so as not to meet names of fields."""

Sources = dict[str, str]


def read_package() -> Sources:
    """Return the source of every module by its dotted name within the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports_of(module: str, source: str) -> set[str]:
    """Return the modules of the package that *module* imports, those for types included."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                name.removeprefix("flask_socketio_guard.")
                for name in names
                if name.startswith("flask_socketio_guard.")
            }
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            if not (node.module or "").startswith("flask_socketio_guard"):
                continue
            base = (node.module or "").split(".")[1:]
        else:
            base = package[: len(package) - (node.level - 1)]
            base = [*base, *(node.module or "").split(".")] if node.module else base
        if base and base != package:
            found.add(".".join(base))
        else:
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def floor_of(room: str) -> int:
    """Return the floor that *room* is on, and -1 if nobody has given it one."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), -1)


def wrong_directions(sources: Sources) -> list[str]:
    """Return a sentence for each import that goes up, or to a room next door."""
    wrong = []
    for module, source in sources.items():
        room = module.split(".")[0]
        if floor_of(room) < 0:
            wrong.append(f"{room} is on no floor: add it to FLOORS")
            continue
        for imported in imports_of(module, source):
            other = imported.split(".")[0]
            if other == room and "." in module:
                continue  # a package is one room
            if floor_of(other) >= floor_of(room):
                direction = "up to" if floor_of(other) > floor_of(room) else "next door to"
                wrong.append(f"{module} reaches {direction} {imported}")
    return wrong


def cycles(sources: Sources) -> list[str]:
    """Return one import cycle, if there is any, as a path of modules."""
    graph = {
        module: sorted(imports_of(module, source) & set(sources))
        for module, source in sources.items()
        if not module.endswith("__init__")
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [" -> ".join([*path[path.index(module) :], module])]
        if module in done:
            return []
        for imported in graph.get(module, []):
            if found := visit(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in graph)), [])


def gevent_users(sources: Sources) -> list[str]:
    """Return the modules that import gevent."""
    users = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            users += [module for name in names if name.split(".")[0] in GEVENT]
    return users


def private_touches(sources: Sources) -> list[str]:
    """Return each use of an underscored attribute of an object that is not the module's own."""
    touches = []
    for module, source in sources.items():
        if module.split(".")[0] == "upstream":
            continue
        tree = ast.parse(source)
        own = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        }
        own |= {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            is_dunder = node.attr.startswith("__") and node.attr.endswith("__")
            is_foreign = node.attr not in own or not isinstance(node.value, ast.Name)
            is_public = is_dunder or node.attr in NAMED_TUPLE
            if not is_public and is_foreign and (module, node.attr) not in ALLOWED_PRIVATE:
                touches.append(f"{module}:{node.lineno} touches {ast.unparse(node)}")
    return touches


def test_imports_go_down_one_direction_only() -> None:
    wrong = wrong_directions(read_package())
    assert not wrong, "imports must go down the table FLOORS:\n" + "\n".join(wrong)


def test_every_floor_names_rooms_that_exist() -> None:
    """The table must not remember rooms that are gone."""
    rooms = {module.split(".")[0] for module in read_package()}
    assert rooms == frozenset().union(*FLOORS)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(read_package()) == []


def test_only_runtime_names_gevent() -> None:
    """Whoever needs to know which runtime there is asks ``runtime``."""
    assert set(gevent_users(read_package())) == {"runtime"}


def test_only_upstream_touches_private_parts_of_others() -> None:
    touches = private_touches(read_package())
    assert not touches, "private parts are for upstream/ alone:\n" + "\n".join(touches)


def test_an_import_up_the_floors_is_found() -> None:
    """Both forms of the import statement, and imports for types only."""
    sources = {
        "broker": "from .health import Health",
        "states": "from . import signals",
        "errors": "import flask_socketio_guard.extension",
        "upstream.server": "if TYPE_CHECKING:\n    from ..app_guard import AppGuard",
    }
    assert wrong_directions(sources) == [
        "broker reaches up to health",
        "states reaches up to signals",
        "errors reaches up to extension",
        "upstream.server reaches up to app_guard",
    ]


def test_an_import_next_door_is_found() -> None:
    sources = {"listener": "from .outbox import Outbox", "handlers": "from .upstream import adopt"}
    assert wrong_directions(sources) == [
        "listener reaches next door to outbox",
        "handlers reaches next door to upstream",
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


def test_a_second_user_of_gevent_is_found() -> None:
    sources = {"outbox": "from gevent.event import Event", "tasks": "import gevent"}
    assert gevent_users(sources) == ["outbox", "tasks"]


def test_a_touch_of_private_parts_is_found() -> None:
    """The names that upstream's seams have, wherever they are used."""
    seams = ("_handle_event", "_trigger_event", "_publish", "_listen", "_generate_ack_id")
    source = "\n".join(f"server.manager.{name}()" for name in seams)
    assert len(private_touches({"app_guard": source})) == len(seams)
    assert private_touches({"upstream.server": source}) == []
    assert private_touches({"app_guard": "class A:\n def f(self): self._own()"}) == []

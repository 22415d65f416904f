"""The rooms of the package and the directions in which they may know each other.

``python -m tests.tools.architecture`` prints them: modules, lines, and who imports whom.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import flask_socketio_guard

if TYPE_CHECKING:
    from collections.abc import Collection

PACKAGE = Path(flask_socketio_guard.__file__).parent
PROJECT = PACKAGE.parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "backoff", "version", "answers"),
    ("checks", "states"),
    ("settings",),
    ("config",),
    ("core", "routes"),
    ("telemetry",),
    ("blueprint",),
    ("events", "clients", "queue"),
    ("ports",),
    ("delivery", "upstream.compat", "upstream.overrides", "upstream.engineio"),
    ("upstream.socketio", "upstream.redis"),
    ("upstream.flask", "upstream.web_server"),
    ("upstream",),
    ("registry",),
    ("assembly",),
    ("app_guard",),
    ("gunicorn", "middleware", "signals"),
    ("public",),
    ("extension",),
    ("__init__",),
)
"""Imports go from a later row to an earlier one. Rooms in one row do not import each other.

A package is one room, unless parts of it have a row of their own.
"""

GEVENT = frozenset({"gevent", "greenlet"})
ALLOWED_PRIVATE = {("public.guards", "_get_current_object"), ("gunicorn", "_exit")}
"""Names with an underscore that are no private parts: Werkzeug's "the object itself", os._exit."""

NAMED_TUPLE = {"_asdict", "_make", "_replace"}
"""What ``typing.NamedTuple`` documents, with an underscore so as not to meet names of fields."""

Sources = dict[str, str]


def read_package(folder: Path = PACKAGE) -> Sources:
    """Return the source of every module in *folder* by its dotted name within that package."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(folder.rglob("*.py"))
        if "node_modules" not in path.parts
    }


@cache
def _tree_of(source: str) -> ast.Module:
    return ast.parse(source)


def imports_of(module: str, source: str, package_name: str = PACKAGE.name) -> set[str]:
    """Return the modules of its package that *module* imports, those for types included."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(_tree_of(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                name.removeprefix(f"{package_name}.")
                for name in names
                if name.startswith(f"{package_name}.")
            }
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            if (node.module or "").split(".")[0] != package_name:
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


def room_of(module: str) -> str:
    """Return the room that *module* is in: the longest name of one that begins its own."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if floor_of(name) >= 0), parts[0])


def floor_of(room: str) -> int:
    """Return the floor that *room* is on, and -1 if nobody has given it one."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), -1)


def wrong_directions(sources: Sources) -> list[str]:
    """Return a sentence for each import that goes up, or to a room next door."""
    wrong = []
    for module, source in sources.items():
        room = room_of(module)
        if floor_of(room) < 0:
            wrong.append(f"{room} is on no floor: add it to FLOORS")
            continue
        for imported in imports_of(module, source):
            other = room_of(imported)
            if other == room and "." in module:
                continue  # a package is one room
            if floor_of(other) >= floor_of(room):
                direction = "up to" if floor_of(other) > floor_of(room) else "next door to"
                wrong.append(f"{module} reaches {direction} {imported}")
    return wrong


def cycles(sources: Sources, package_name: str = PACKAGE.name) -> list[str]:
    """Return one import cycle, if there is any, as a path of modules."""
    graph = {
        module: sorted(imports_of(module, source, package_name) & set(sources))
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


def users_of(packages: Collection[str], sources: Sources) -> list[str]:
    """Return the modules that import one of *packages*."""
    users = []
    for module, source in sources.items():
        for node in ast.walk(_tree_of(source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            users += [module for name in names if name.split(".")[0] in packages]
    return users


def private_touches(sources: Sources) -> list[str]:
    """Return each use of an underscored attribute of an object that is not the module's own."""
    touches = []
    for module, source in sources.items():
        if module.split(".")[0] == "upstream":
            continue
        tree = _tree_of(source)
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


def picture(sources: Sources) -> str:
    """Return the rooms from the top floor down, with their modules, lines and imports."""
    lines = []
    for floor in reversed(FLOORS):
        for room in floor:
            modules = [module for module in sources if room_of(module) == room]
            known = {
                room_of(other)
                for module in modules
                for other in imports_of(module, sources[module])
            } - {room}
            count = sum(sources[module].count("\n") for module in modules)
            lines.append(f"{room}: {count} lines -> {', '.join(sorted(known)) or 'nothing'}")
            if len(modules) > 1:
                width = len(room) + 1
                lines += [
                    f"    {module[width:]}: {sources[module].count(chr(10))}"
                    for module in modules
                    if not module.endswith("__init__")
                ]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.stdout.write(picture(read_package()) + "\n")

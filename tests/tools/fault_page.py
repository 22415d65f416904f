"""The table of docs/faults.md: its rows are the markers of the tests, its figures those of runs.

``python -m tests.tools.fault_page`` writes the rows anew and keeps the figures; a run of the tests
with ``--write-faults`` writes the figures of what it ran as well.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.page import read_part, write_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

FOLDER = Path(__file__).parents[1] / "faults"
PAGE = FOLDER.parent.parent / "docs" / "faults.md"
TABLE, VERSIONS = "table of faults", "versions"
HEADING = "| fault | stock | with the guard | measured | test |\n|---|---|---|---|---|"
DISTRIBUTIONS = (
    "Flask-SocketIO",
    "python-socketio",
    "python-engineio",
    "gevent",
    "gunicorn",
    "redis",
    "websockets",
)

_NUMBER = re.compile(r"(?P<number>\d[\d.]*)(?P<unit>\D*)")


class Row(NamedTuple):
    """A test of a fault, as its marker tells of it."""

    fault: str
    stock: str
    module: str
    test: str

    def line(self, measured: str) -> str:
        """Return the row as Markdown."""
        sentence = self.test.removeprefix("test_").replace("_", " ")
        link = f"[`{self.module}`](../tests/faults/{self.module}.py)"
        cells = (self.fault, self.stock, sentence, measured, link)
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def rows() -> list[Row]:
    """Return one row for each test and fault, in the order of modules and lines."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(f"tests.faults.{path.stem}")
        for name, function in vars(module).items():
            if name.startswith("test_") and function.__module__ == module.__name__:
                for mark in _marks(module, function):
                    stock = found.setdefault((mark.args[0], path.stem, name), [])
                    if mark.kwargs["stock"] not in stock:  # parameters have markers of their own
                        stock.append(mark.kwargs["stock"])
    return [Row(fault, "; ".join(stock), *where) for (fault, *where), stock in found.items()]


def _marks(module: ModuleType, function: Any) -> Iterator[Any]:
    """Yield the markers of faults that *function* and its parameters have."""
    own = getattr(module, "pytestmark", [])
    for mark in [*(own if isinstance(own, list) else [own]), *getattr(function, "pytestmark", [])]:
        mark = getattr(mark, "mark", mark)
        if mark.name == "faults":
            yield mark
        elif mark.name == "parametrize":
            for parameters in mark.args[1]:
                for each in getattr(parameters, "marks", ()):
                    each = getattr(each, "mark", each)
                    if each.name == "faults":
                        yield each


def table(measured: Mapping[tuple[str, str], str]) -> str:
    """Return the table, with what was *measured*, by fault and name of the test."""
    lines = [row.line(measured.get((row.fault, row.test), "")) for row in rows()]
    return "\n".join([HEADING, *lines])


def summary(figures: list[str]) -> str:
    """Return *figures*, each ``what: value``, in one line: those of one kind as a range."""
    kinds: dict[str, list[str]] = {}
    for figure in figures:
        what, _, value = figure.partition(": ")
        kinds.setdefault(what, []).append(value)
    return "; ".join(f"{what}: {_range(values)}" for what, values in kinds.items())


def _range(values: list[str]) -> str:
    distinct = list(dict.fromkeys(values))
    matches = [_NUMBER.fullmatch(value) for value in distinct]
    numbers = [match for match in matches if match]
    if len(distinct) == 1 or len(numbers) < len(distinct):
        return " / ".join(distinct)
    if len({match["unit"] for match in numbers}) > 1:
        return " / ".join(distinct)
    ordered = sorted(numbers, key=lambda match: float(match["number"]))
    return f"{ordered[0]['number']} to {ordered[-1]['number']}{ordered[0]['unit']}"


def measured_before(page: Path = PAGE) -> dict[tuple[str, str], str]:
    """Return what *page* says was measured, by fault and name of the test."""
    known = {}
    for line in read_part(page, TABLE).splitlines()[2:]:
        fault, _, sentence, measured, _ = line.removeprefix("| ").removesuffix(" |").split(" | ")
        fault = fault.replace("&#124;", "|")
        known[fault, f"test_{sentence.replace(' ', '_')}"] = measured.replace("&#124;", "|")
    return known


def write(figures: Mapping[tuple[str, str], list[str]], page: Path = PAGE) -> None:
    """Write the table into *page*; what was not measured anew keeps the figures that it had.

    Args:
        figures: By fault and name of the test; empty where only the markers have changed.
        page: The page.
    """
    measured = measured_before(page)
    measured |= {key: summary(values) for key, values in figures.items() if values}
    write_part(page, TABLE, table(measured))
    if figures:
        versions = ", ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS)
        write_part(page, VERSIONS, f"Measured with {versions}, Python {python_version()}.")


if __name__ == "__main__":
    write({})

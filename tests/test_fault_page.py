"""docs/faults.md agrees with the markers of the tests, and runs write what they measure."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from benchmarks.__main__ import PART
from benchmarks.page import read_part, write_part
from tests.tools import fault_page
from tests.tools.fault_page import (
    PAGE,
    TABLE,
    VERSIONS,
    measured_before,
    rows,
    summary,
    table,
    write,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page."""
    return shutil.copy(PAGE, tmp_path / PAGE.name)


def test_page_has_the_row_of_each_marked_test() -> None:
    """After a change of a marker: ``python -m tests.tools.fault_page``."""
    assert read_part(PAGE, TABLE) == table(measured_before())


def test_every_module_with_a_marker_is_found() -> None:
    """Markers of functions, of their parameters and in functions that make parameters."""
    marked = {
        path.stem for path in fault_page.FOLDER.glob("test_*.py") if ".faults(" in path.read_text()
    }
    assert {row.module for row in rows()} == marked
    assert all(row.fault and row.stock for row in rows())


def test_a_run_writes_its_figures_and_keeps_the_others(page: Path) -> None:
    first, second = rows()[0], rows()[1]
    write({(first.fault, first.test): ["lost: 0", "lost: 0"]}, page)
    write({(second.fault, second.test): ["first event after: 0.30 s"]}, page)
    known = measured_before(page)
    assert known[first.fault, first.test] == "lost: 0"
    assert known[second.fault, second.test] == "first event after: 0.30 s"
    assert "gevent" in read_part(page, VERSIONS)
    assert read_part(page, TABLE) == table(known)


def test_a_row_whose_marker_is_gone_goes(page: Path) -> None:
    text = read_part(page, TABLE)
    write_part(page, TABLE, text + "\n| flood | drowns | test of old | dry: 1 | [`x`](x) |")
    write({}, page)
    assert read_part(page, TABLE) == text


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        (["lost: 0", "lost: 2", "lost: 1"], "lost: 0 to 2"),
        (["after: 0.03 s", "after: 0.01 s"], "after: 0.01 to 0.03 s"),
        (["answer: 400", "answer: 1002 closed"], "answer: 400 / 1002 closed"),
        (["told: slow", "after: 1.00 s", "told: slow"], "told: slow; after: 1.00 s"),
        (["took: 10 s", "took: 9.5 s"], "took: 9.5 to 10 s"),
    ],
)
def test_figures_of_one_kind_become_a_range(figures: list[str], line: str) -> None:
    assert summary(figures) == line


@pytest.mark.parametrize("text", ["", "<!-- table of faults: end -->", "no comments"])
def test_a_page_without_the_part_is_refused(page: Path, text: str) -> None:
    page.write_text(text)
    with pytest.raises(ValueError, match="has no part between"):
        write({}, page)


def test_page_of_the_benchmarks_has_the_part_that_a_run_writes(tmp_path: Path) -> None:
    page = shutil.copy(PAGE.with_name("benchmarks.md"), tmp_path / "benchmarks.md")
    write_part(page, PART, "| echo |\n")
    assert read_part(page, PART) == "| echo |"
    assert "[Where the time goes](performance.md)" in page.read_text()

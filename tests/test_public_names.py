"""What applications import: few names, and ``docs/api.md`` lists them all."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PAGE = PROJECT / "docs" / "api.md"
MODULES = ("", ".errors", ".signals", ".gunicorn")


def listed(module: str) -> set[str]:
    """Return the names that the page lists for *module*."""
    row = re.search(rf"^\| `{re.escape(module)}` \|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert row is not None, module
    return set(re.findall(r"`(\w+)`", row[1]))


@pytest.mark.parametrize("suffix", MODULES)
def test_the_page_lists_what_applications_import(suffix: str) -> None:
    name = f"flask_socketio_guard{suffix}"
    module = importlib.import_module(name)
    assert listed(name) == set(module.__all__)
    assert all(hasattr(module, each) for each in module.__all__)


def test_the_package_offers_what_applications_name_every_day() -> None:
    """Errors, signals and hooks have modules of their own."""
    names = importlib.import_module("flask_socketio_guard").__all__
    assert len(names) <= 16
    for suffix in MODULES[1:]:
        others = importlib.import_module(f"flask_socketio_guard{suffix}").__all__
        assert not set(names) & set(others)


def test_what_applications_call_only_says_what_it_takes() -> None:
    """What a call does is in the room that owns it; here are signatures, docstrings, few lines."""
    for path in (PROJECT / "flask_socketio_guard" / "public").glob("*.py"):
        source = path.read_text("utf-8")
        assert source.count("\n") <= 300, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                assert len({each.name for each in methods}) <= 30, node.name
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 25, f"{node.name} has a body of {lines} lines"

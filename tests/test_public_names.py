"""What applications import: few names, and ``docs/api.md`` lists them all."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
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

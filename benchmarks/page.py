"""Reads and writes the generated part of a page, which is between two HTML comments."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """Return the comments that begin and end the part called *name*."""
    return f"<!-- {name}: written by a run, not by hand -->", f"<!-- {name}: end -->"


def read_part(page: Path, name: str) -> str:
    """Return the text of *page* between the comments of the part called *name*.

    Raises:
        ValueError: The page has no such part.
    """
    return _split(page, name)[1]


def write_part(page: Path, name: str, text: str) -> None:
    """Replace the part of *page* called *name* by *text*, which is Markdown.

    Raises:
        ValueError: The page has no such part.
    """
    before, _, after = _split(page, name)
    page.write_text(f"{before}\n\n{text.strip()}\n\n{after}", "utf-8")


def _split(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = markers(name)
    text = page.read_text("utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{page} has no part between {begin} and {end}")
    head, rest = text.split(begin)
    inner, tail = rest.split(end)
    return head + begin, inner.strip(), end + tail

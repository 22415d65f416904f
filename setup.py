"""The page of the project on a package index, which pyproject.toml cannot say."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

LINK_TO_FILE = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?:|#)(?P<path>[^)]+)\)")


def page() -> str:
    """Return the README with the names of files in place of links to them.

    The files are in the source distribution. An index has none of them, and would make each such
    link one that leads nowhere.
    """
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    return LINK_TO_FILE.sub(_name, text)


def _name(link: re.Match[str]) -> str:
    text, path = link["text"], f"`{link['path']}`"
    return text if text == path else f"{text} ({path})"


setup(long_description=page(), long_description_content_type="text/markdown")

"""``python -m tests.tools.settings_page`` writes the table of ``docs/settings.md``."""

from __future__ import annotations

from pathlib import Path

from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.settings import settings_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def written(page: str) -> str:
    """Return *page* with the table of now in the place of its own."""
    head, _, rest = page.partition("| key ")
    _, _, tail = rest.partition("\n\n")
    return f"{head}{settings_table(GuardConfig)}\n{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")

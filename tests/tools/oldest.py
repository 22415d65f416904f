"""Print the oldest versions that a pyproject.toml allows, as requirements for pip.

``python tests/tools/oldest.py pyproject.toml`` prints ``name==version`` for the lower bound of
each dependency of the project, and of its extra ``gunicorn``, in one line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

EXTRAS = ("gunicorn", "ratelimit", "validation")

_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*>=\s*(?P<version>[0-9][^\s,;]*)"
)


def lower_bounds(path: Path) -> dict[str, str]:
    """Return the lower bound of each dependency by its name.

    Raises:
        ValueError: A dependency has none.
    """
    project = _load(path)["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    bounds = {}
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        bounds[match["name"]] = match["version"]
    return bounds


def _load(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(path.read_text("utf-8"))


def main() -> None:
    """Print the requirements."""
    bounds = lower_bounds(Path(sys.argv[1]))
    sys.stdout.write(" ".join(f"{name}=={version}" for name, version in bounds.items()) + "\n")


if __name__ == "__main__":
    main()

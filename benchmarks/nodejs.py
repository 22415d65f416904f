"""Node's Socket.IO, as a further column if node and npm are installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "node"
COMMAND = ["node", "--expose-gc", str(FOLDER / "app.js")]
PACKAGES = ("socket.io", "engine.io", "ws", "@socket.io/redis-adapter", "redis")

_INSTALL_TIMEOUT = 180.0


class MissingError(Exception):
    """The column of Node is not possible; the message says why, in one line."""


def prepare() -> dict[str, str]:
    """Install the packages of ``package-lock.json``, unless they are installed already.

    Returns:
        Versions by name, that of Node first.

    Raises:
        MissingError: node or npm is missing or too old, or npm could not install.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise MissingError(f"{program} is not installed")
    version = _output("node", "--version").lstrip("v")
    wanted = json.loads((FOLDER / "package.json").read_text())["engines"]["node"].lstrip(">=")
    if int(version.partition(".")[0]) < int(wanted):
        raise MissingError(f"it needs Node {wanted} or newer, this is {version}")
    locked = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    versions = {name: locked[f"node_modules/{name}"]["version"] for name in PACKAGES}
    if _installed() != versions:
        _output("npm", "ci", "--loglevel=error", "--no-audit", "--no-fund")
    if _installed() != versions:
        raise MissingError("npm ci did not install what package-lock.json names")
    return {"Node": version, **versions}


def _installed() -> dict[str, str]:
    """Return the versions of the installed packages."""
    manifests = {name: FOLDER / "node_modules" / name / "package.json" for name in PACKAGES}
    return {
        name: json.loads(manifest.read_text())["version"]
        for name, manifest in manifests.items()
        if manifest.exists()
    }


def _output(*command: str) -> str:
    """Run *command* in the folder and return what it prints."""
    try:
        done = subprocess.run(
            command,
            cwd=FOLDER,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise MissingError(f"{' '.join(command)} took longer than {exc.timeout:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[:1] or [f"exit status {done.returncode}"]
        raise MissingError(f"{' '.join(command)} failed: {said[0]}")
    return done.stdout.strip()

"""The Socket.IO client for JavaScript, from npm."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from example_app.pages import CLIENT_FILE, CLIENT_FOLDER
from tests.support.servers import PROJECT_ROOT

CLIENT_MODULE = CLIENT_FOLDER.parent
"""What Node.js is asked for."""

_NPM_TIMEOUT = 60


def require_client() -> None:
    """See that the client is there, where ``make demo`` puts it; skip the test if it cannot be."""
    if (CLIENT_FOLDER / CLIENT_FILE).is_file():
        return
    if shutil.which("npm") is None:
        pytest.skip("the Socket.IO client for JavaScript is needed, and npm is not installed")
    folder = PROJECT_ROOT / "example_app"
    command = ["npm", "ci", "--prefix", str(folder), "--no-audit", "--no-fund"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_TIMEOUT)
    if result.returncode != 0:
        pytest.skip(f"npm could not fetch the Socket.IO client for JavaScript: {result.stderr}")

"""The Socket.IO client for JavaScript, from npm."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from typing import Any

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
    with (folder / "package.json").open() as lock:
        # npm empties the folder first, which nobody else may be filling.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (CLIENT_FOLDER / CLIENT_FILE).is_file():
            return
        result = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_TIMEOUT)
    if result.returncode != 0:
        pytest.skip(f"npm could not fetch the Socket.IO client for JavaScript: {result.stderr}")


def run_script(script: str, *arguments: object, timeout: float = 60.0) -> Any:
    """Run *script*, which has ``io`` and the *arguments* in ``args``.

    Returns:
        What it prints, as JSON.

    Raises:
        AssertionError: It failed, or did not end in time.
    """
    require_client()
    prelude = f"const {{ io }} = require({json.dumps(str(CLIENT_MODULE))});\n"
    prelude += f"const args = {json.dumps(arguments)};\n"
    command = ["node", "-e", prelude + script]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not ended after {timeout:g} s: {error.stdout!r}") from None
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)

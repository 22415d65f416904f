"""Print the newest Python on this machine that gevent has a wheel for.

Prints its executable if it is newer than the Python that runs this, else nothing, and says what
it looked at on stderr. An executable is tried under its usual names, and must really run: what
pyenv puts in the way of each of its versions refuses to, unless told which of them is wanted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

NEWEST = 20
"""The minor version to begin with; there is none that new."""


def executable_of(version: str) -> str | None:
    """Return the executable of a version of Python, such as 3.14, if there is one that runs."""
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    answer = subprocess.run(
        [found, "-c", "import ensurepip, sys, venv; print(sys.executable)"],
        env={**os.environ, "PYENV_VERSION": version},
        capture_output=True,
        check=False,
        text=True,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def is_supported(version: str) -> bool:
    """Whether gevent has a wheel for this version of Python."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        command += ["--python-version", version, "gevent"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    """Print the executable."""
    for minor in range(NEWEST, sys.version_info.minor, -1):
        version = f"3.{minor}"
        executable = executable_of(version)
        if executable is None:
            continue
        if is_supported(version):
            sys.stdout.write(f"{executable}\n")
            return
        sys.stderr.write(f"Python {version} is here, but gevent has no wheel for it yet\n")


if __name__ == "__main__":
    main()

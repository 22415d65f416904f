"""Processes that do not outlive the tests, even when the tests are killed.

Each process gets a group of its own. A small process, the reaper, knows the groups; when its
standard input ends, because the tests have come to whatever end, it kills those that are left.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXIT_TIMEOUT = 5.0

_lock = threading.Lock()
_reaper: subprocess.Popen[str] | None = None


def start_process(
    command: Sequence[str], *, text: bool = False, **options: Any
) -> subprocess.Popen[Any]:
    """Start *command* as the leader of a session and a process group of its own.

    Args:
        command: Program and arguments.
        text: Whether its pipes carry text.
        **options: As for :class:`subprocess.Popen`.
    """
    process = subprocess.Popen(command, text=text, start_new_session=True, **options)
    _tell_reaper(f"+{process.pid}")
    return process


def end_process(process: subprocess.Popen[Any]) -> None:
    """Kill whatever is left of the group of *process*, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _tell_reaper(f"-{process.pid}")


def reaper_pid() -> int | None:
    """Return the process id of the reaper, if there is one."""
    return None if _reaper is None else _reaper.pid


def reap(groups: IO[str]) -> None:
    """Note which groups come and go, and kill those that are left at the end of the input."""
    known: set[int] = set()
    for line in groups:
        action, number = line[0], int(line[1:])
        if action == "+":
            known.add(number)
        else:
            known.discard(number)
    for number in known:
        with contextlib.suppress(OSError):
            os.killpg(number, signal.SIGKILL)


def _tell_reaper(word: str) -> None:
    global _reaper
    with _lock:
        if _reaper is None:
            _reaper = subprocess.Popen(
                [sys.executable, "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            atexit.register(_dismiss_reaper, _reaper)
        assert _reaper.stdin is not None
        _reaper.stdin.write(word + "\n")
        _reaper.stdin.flush()


def _dismiss_reaper(reaper: subprocess.Popen[str]) -> None:
    assert reaper.stdin is not None
    reaper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        reaper.wait(_EXIT_TIMEOUT)


if __name__ == "__main__":
    reap(sys.stdin)

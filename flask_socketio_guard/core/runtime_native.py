"""The base of all runtimes: the clock, and the standard library without gevent's patches."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

try:
    from gevent.monkey import get_original
except ImportError:  # comes with the extra "gunicorn"; threads do not need it

    def get_original(module: str, name: str) -> Any:
        """Return the attribute itself: without gevent nothing is patched."""
        return getattr(importlib.import_module(module), name)


if TYPE_CHECKING:
    from types import FrameType

TIME_SLICE: Final = 0.002
"""Seconds for which a loop works through its queue before it yields control.

Other tasks wait for two or three time slices. With 1 ms, ten thousand events of one client take 5
to 10 % more CPU: each iteration of the loop costs 20 to 60 us, and sends the answers made in it.
"""

get_ident = get_original("_thread", "get_ident")
start_new_thread = get_original("_thread", "start_new_thread")
native_sleep = get_original("time", "sleep")
_native_socketpair = get_original("socket", "socketpair")
_nowhere: tuple[Any, Any] | None = None

clock = time.monotonic
"""Returns monotonic seconds; for intervals and deadlines."""


def silence(sock: Any) -> None:
    """Disconnect a socket that is shared with the parent process; ignore other objects.

    It never becomes readable, and what is sent to it is lost. Greenlets that wait for it keep
    waiting; if it were closed, they would wake with an error and log it.
    """
    global _nowhere
    if _nowhere is None:
        _nowhere = _native_socketpair()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = sock.fileno()
        if number >= 0:
            os.dup2(_nowhere[0].fileno(), number)


def is_patched() -> bool:
    """Return whether gevent has patched the sockets of this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def is_about_to_exec() -> bool:
    """Return whether this is a forked child in which ``subprocess`` will start a program."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("subprocess", "gevent.subprocess"):
            return True
        frame = frame.f_back
    return False

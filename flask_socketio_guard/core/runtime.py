"""Concurrency: chooses an application's runtime, and exports what the package needs of it.

Only this module and the ``runtime_*`` modules mention gevent.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

with contextlib.suppress(ImportError):  # comes with the extra "gunicorn"; threads do not need it
    import gevent.socket

from ..errors import ConfigError
from .runtime_gevent import GeventRuntime
from .runtime_greenlets import MAX_LOOP_QUEUE
from .runtime_native import TIME_SLICE, clock, is_about_to_exec, is_patched, silence
from .runtime_protocols import Flag, Job, Runtime, Timer
from .threads import ThreadRuntime

__all__ = [
    "GEVENT_MODES",
    "MAX_LOOP_QUEUE",
    "TIME_SLICE",
    "Flag",
    "GeventRuntime",
    "Job",
    "Runtime",
    "ThreadRuntime",
    "Timer",
    "clock",
    "gevent_socket",
    "is_about_to_exec",
    "is_patched",
    "runtime_for",
    "silence",
]

GEVENT_MODES: Final = ("gevent", "gevent_uwsgi")
"""Modes of Flask-SocketIO that run on gevent's event loop; the second is for uWSGI."""


def runtime_for(async_mode: str, *, is_write_only: bool) -> Runtime:
    """Choose the runtime for a ``SocketIO`` of *async_mode*.

    A write-only process (a Celery worker, a script) has ``async_mode`` gevent whenever gevent
    can be imported. Unless gevent has patched it, its sockets are those of the standard
    library, and it needs threads.

    Raises:
        ConfigError: The mode uses neither gevent's event loop nor threads.
    """
    if is_write_only:
        return GeventRuntime() if is_patched() else ThreadRuntime()
    if async_mode in GEVENT_MODES:
        return GeventRuntime()
    if async_mode == "threading":
        return ThreadRuntime()
    if async_mode == "eventlet":
        raise ConfigError(
            "eventlet is installed, and Flask-SocketIO uses it unless async_mode is set; the "
            'guard does not support it: set async_mode="gevent" or async_mode="threading"'
        )
    raise ConfigError(
        f"async_mode {async_mode!r} is not supported: "
        'create SocketIO with async_mode="gevent" or async_mode="threading"'
    )


def gevent_socket(fd: int) -> Any:
    """Return a gevent socket that takes over the file descriptor *fd*."""
    return gevent.socket.socket(fileno=fd)

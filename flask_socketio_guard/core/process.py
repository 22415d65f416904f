"""Hooks of the whole process: what all its guards do after a fork and at exit."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import weakref
from typing import Any, Protocol

from .runtime import is_about_to_exec

_logger = logging.getLogger("flask_socketio_guard")


class Member(Protocol):
    """An object that must act when the process forks or exits."""

    @property
    def sender(self) -> object:
        """The application to which it belongs; named in the log."""

    def after_fork(self) -> None:
        """Start afresh in a forked child: tasks, locks and connections are the parent's."""

    def flush_at_exit(self) -> None:
        """Try once more to send what is still queued."""


_members: weakref.WeakSet[Any] = weakref.WeakSet()


def join(member: Member) -> None:
    """Register *member*, by a weak reference, to act when the process forks and exits."""
    _members.add(member)


def leave(member: Member) -> None:
    """Unregister *member*; it may be unknown."""
    _members.discard(member)


def members() -> list[Any]:
    """Return the registered members that still exist."""
    return list(_members)


def flush_in_children() -> None:
    """Make children of multiprocessing and Celery flush at exit: they skip ``atexit``.

    Source:
        multiprocessing, ``BaseProcess._bootstrap``: forgets finalizers of the parent, runs its
        own at the end of the child, and then calls ``os._exit``. billiard is Celery's copy.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        util: Any = sys.modules.get(name)
        if util is not None:
            util.Finalize(None, _at_exit, exitpriority=0)


def _after_fork() -> None:
    if is_about_to_exec():
        return  # gevent's subprocess forks in Python before it starts a program
    for member in members():
        try:
            member.after_fork()
        except Exception:  # of a delivery store, say; the other guards must still restart
            _logger.exception("the guard of %s could not restart after a fork", member.sender)


def _at_exit() -> None:
    for member in members():
        member.flush_at_exit()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

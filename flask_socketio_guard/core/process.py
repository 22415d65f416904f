"""What is one for the whole process: its guards, its forks and its end."""

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
    """Something that has to act when the process forks or ends."""

    @property
    def sender(self) -> object:
        """Whose it is; named in the log."""

    def after_fork(self) -> None:
        """Begin anew in a forked child: tasks, locks and connections are the parent's."""

    def flush_at_exit(self) -> None:
        """Give what is on its way out a last chance to get there."""


_members: weakref.WeakSet[Any] = weakref.WeakSet()


def join(member: Member) -> None:
    """Have *member* act when the process forks and ends, for as long as it lives."""
    _members.add(member)


def leave(member: Member) -> None:
    """Have it act no more."""
    _members.discard(member)


def members() -> list[Any]:
    """Return those that have joined, and still live."""
    return list(_members)


def flush_in_children() -> None:
    """See that a child of multiprocessing, or Celery's, flushes: it runs no exit functions.

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
        return  # gevent runs programs by a fork in Python
    for member in members():
        try:
            member.after_fork()
        except Exception:  # of a store, for one; the others are to begin anew
            _logger.exception("the guard of %s could not begin anew after a fork", member.sender)


def _at_exit() -> None:
    for member in members():
        member.flush_at_exit()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

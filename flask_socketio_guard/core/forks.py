"""Locks in a forked child: whoever held one may be a thread of the parent, and never release it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

_owners: WeakKeyDictionary[object, dict[str, Callable[[], object]]] = WeakKeyDictionary()


def renew_after_fork(owner: object, **makers: Callable[[], object]) -> None:
    """Make attributes of *owner* anew in a forked child; for locks that outlive the fork.

    The old one is left as it is: if the thread that forked holds it, it releases that one.

    Args:
        owner: An object or a module; not kept alive.
        makers: What makes each attribute, by name.
    """
    _owners.setdefault(owner, {}).update(makers)


def _renew() -> None:
    for owner, makers in list(_owners.items()):
        for name, make in makers.items():
            setattr(owner, name, make())


# Modules register after those that they import, so this runs before the guards begin anew.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)

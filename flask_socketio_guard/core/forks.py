"""New locks for a forked child: a thread of the parent that held one can never release it here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

_owners: WeakKeyDictionary[object, dict[str, Callable[[], object]]] = WeakKeyDictionary()


def renew_after_fork(owner: object, **makers: Callable[[], object]) -> None:
    """Replace attributes of *owner* in each forked child; for locks that outlive the fork.

    The old lock stays as it is: if the thread that forked holds it, it still releases that one.

    Args:
        owner: An object or a module; not kept alive.
        makers: By the name of the attribute, a function that returns its new value.
    """
    _owners.setdefault(owner, {}).update(makers)


def _renew() -> None:
    for owner, makers in list(_owners.items()):
        for name, make in makers.items():
            setattr(owner, name, make())


# Modules register after those that they import, so this runs before the guards restart.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)

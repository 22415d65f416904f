"""The number of arguments that a handler can be called with, according to its signature."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def accepts(handler: Callable[..., object], count: int) -> bool:
    """Return whether the signature of *handler* allows a call with *count* arguments.

    A decorator that takes ``*args`` is not followed to the function it wraps,
    because it may add arguments of its own.
    """
    try:
        fewest, most = _arity(handler)
    except TypeError:  # not hashable
        return True
    return fewest <= count and (most is None or count <= most)


@lru_cache(maxsize=1024)
def _arity(handler: Callable[..., object]) -> tuple[int, int | None]:
    """Return the smallest and the largest number of positional arguments; ``None``: no limit."""
    try:
        parameters = inspect.signature(handler, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return 0, None
    named = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    fewest = sum(parameter.default is inspect.Parameter.empty for parameter in named)
    kinds = {parameter.kind for parameter in parameters}
    return fewest, None if inspect.Parameter.VAR_POSITIONAL in kinds else len(named)


def fit(handler: Callable[..., object], args: tuple[object, ...]) -> tuple[object, ...]:
    """Truncate *args* to the number of arguments that *handler* accepts.

    Connect handlers are written with and without the client's authentication,
    disconnect handlers with and without the reason.
    """
    try:
        return args[: _capacity(handler)]
    except TypeError:  # not hashable
        return args[: _capacity.__wrapped__(handler)]


@lru_cache(maxsize=1024)
def _capacity(function: Callable[..., object]) -> int | None:
    """Return how many positional arguments *function* takes; ``None``: any number, or unknown."""
    # A decorator's own signature is used, unless it takes *args.
    for is_following in (False, True):
        try:
            signature = inspect.signature(function, follow_wrapped=is_following)
        except (TypeError, ValueError):
            return None
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            return sum(kind in _POSITIONAL for kind in kinds)
    return None

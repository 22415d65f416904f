"""What callers pass, checked; errors name the argument, its value and the mend."""

from __future__ import annotations

import inspect
from typing import Any

from .errors import ConfigError, DeliveryInvalid


def is_seconds(value: object, *, is_zero_allowed: bool = False) -> bool:
    """Say whether *value* is a finite number of seconds, > 0 or, if allowed, 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value < float("inf") and (value > 0 or (is_zero_allowed and value == 0))


def require_seconds(name: str, value: object) -> None:
    """Make sure that *value* is a duration: a finite number of seconds, > 0.

    Raises:
        ConfigError: It is not; the text calls it *name*.
    """
    if not is_seconds(value):
        raise ConfigError(f"{name} must be a number of seconds > 0, not {value!r}")


def require_plain(name: str, function: object) -> None:
    """Make sure that a call of *function* runs its body.

    Raises:
        ConfigError: It is an ``async def`` or a generator function; the text calls it *name*.
    """
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004 - of an object
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            kind, mend = "an async def", "write it as a plain def"
        elif inspect.isgeneratorfunction(each):
            kind, mend = "a generator", "let it return, and emit what it would yield"
        else:
            continue
        raise ConfigError(f"{name} is {kind} function, whose body would never run: {mend}")


def is_text(name: str) -> bool:
    """Say whether UTF-8 can hold *name*; what clients send as JSON may have half a character."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(name: str, value: object) -> None:
    """Make sure that *value* is a text that is not empty, and that UTF-8 can hold it.

    Raises:
        ConfigError: It is no text, or empty.
        DeliveryInvalid: It holds half a character.
    """
    if not isinstance(value, str) or not value:
        hint = ": str() makes one" if isinstance(value, int) else ""
        raise ConfigError(f"{name} must be a text that is not empty, not {value!r}{hint}")
    if not is_text(value):
        raise DeliveryInvalid(f"UTF-8 cannot hold {name}: {value!r}")


def require_flag(name: str, value: object) -> None:
    """Make sure that *value* is ``True`` or ``False``.

    Raises:
        ConfigError: It is something else.
    """
    if value is not True and value is not False:
        raise ConfigError(f"{name} must be True or False, not {value!r}")


def require_hook(name: str, value: object) -> None:
    """Make sure that *value* is ``None`` or can be called.

    Raises:
        ConfigError: It is something else.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be callable, not {value!r}")


def namespace_of(value: str | None) -> str:
    """Return the namespace that an argument means; ``None`` is ``"/"``.

    Raises:
        ConfigError: It is none.
        DeliveryInvalid: UTF-8 cannot hold it.
    """
    if value is None:
        return "/"
    require_text("namespace", value)
    if not value.startswith("/"):
        raise ConfigError(f"namespace must begin with '/', not {value!r}")
    return value


def arguments_of(args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments of an event, of which ``emit`` takes one or a tuple.

    Raises:
        TypeError: There are several.
    """
    if len(args) > 1:
        raise TypeError("several arguments are one tuple, as in SocketIO.emit")
    return list(args[0]) if args and isinstance(args[0], tuple) else list(args)

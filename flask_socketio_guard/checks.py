"""Checks of arguments from callers; errors name the argument, its value and the fix."""

from __future__ import annotations

import inspect
from typing import Any

from .errors import ConfigError, DeliveryInvalid


def is_seconds(value: object, *, is_zero_allowed: bool = False) -> bool:
    """Return whether *value* is a finite number of seconds that is > 0 or, if allowed, 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value < float("inf") and (value > 0 or (is_zero_allowed and value == 0))


def require_seconds(name: str, value: object) -> None:
    """Require a duration: a finite number of seconds, > 0.

    Raises:
        ConfigError: *value* is anything else; the message refers to it as *name*.
    """
    if not is_seconds(value):
        raise ConfigError(f"{name} must be a number of seconds > 0, not {value!r}")


def require_plain(name: str, function: object) -> None:
    """Require a function whose body runs when it is called.

    Raises:
        ConfigError: *function* is an ``async def`` or a generator function; the message refers
            to it as *name*.
    """
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004 - of an object
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            kind, fix = "an async def", "write it as a plain def"
        elif inspect.isgeneratorfunction(each):
            kind, fix = "a generator", "return instead of yielding, and emit what it would yield"
        else:
            continue
        raise ConfigError(f"{name} is {kind} function, whose body would never run: {fix}")


def is_text(name: str) -> bool:
    """Return whether *name* can be encoded as UTF-8; JSON can contain lone surrogates."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(name: str, value: object) -> None:
    """Require a non-empty string that can be encoded as UTF-8.

    Raises:
        ConfigError: *value* is not a string, or is empty.
        DeliveryInvalid: *value* contains a lone surrogate.
    """
    if not isinstance(value, str) or not value:
        hint = ": convert it with str()" if isinstance(value, int) else ""
        raise ConfigError(f"{name} must be a non-empty string, not {value!r}{hint}")
    if not is_text(value):
        raise DeliveryInvalid(f"{name} cannot be encoded as UTF-8: {value!r}")


def require_flag(name: str, value: object) -> None:
    """Require ``True`` or ``False``.

    Raises:
        ConfigError: *value* is anything else.
    """
    if value is not True and value is not False:
        raise ConfigError(f"{name} must be True or False, not {value!r}")


def require_hook(name: str, value: object) -> None:
    """Require ``None`` or a callable.

    Raises:
        ConfigError: *value* is anything else.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be callable, not {value!r}")


def namespace_of(value: str | None) -> str:
    """Return the namespace that an argument refers to; ``None`` means ``"/"``.

    Raises:
        ConfigError: *value* is not a string that begins with ``/``.
        DeliveryInvalid: *value* contains a lone surrogate.
    """
    if value is None:
        return "/"
    require_text("namespace", value)
    if not value.startswith("/"):
        raise ConfigError(f"namespace must begin with '/', not {value!r}")
    return value


def arguments_of(args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments of an event from those of ``emit``: one payload, or one tuple.

    Raises:
        TypeError: *args* has several items.
    """
    if len(args) > 1:
        raise TypeError("pass several arguments as one tuple, as in SocketIO.emit")
    return list(args[0]) if args and isinstance(args[0], tuple) else list(args)

"""Declaration of settings, and reading them from keywords, ``app.config`` and the environment.

A settings class is a frozen dataclass. Each field declares type, default, range and meaning once;
checks, error messages, the environment reader and the settings page are derived from that. The
guard's own class is :class:`.GuardConfig`; a component may declare another::

    @dataclass(frozen=True)
    class ThermometerSettings(Settings):
        thermometer_interval: float = setting(1.0, SECONDS, "time between two measurements")

    class Thermometer(Component):
        settings = ThermometerSettings

        def __init__(self, guard):
            self.interval = guard.config.of(ThermometerSettings).thermometer_interval
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Final, TypeAlias

from .checks import is_seconds
from .errors import ConfigError

PREFIX = "SOCKETIO_GUARD_"

Rule: TypeAlias = tuple[Callable[[Any], object], str]
"""A predicate for values, and its description, which completes "must be ..."."""


def or_none(rule: Rule) -> Rule:
    """Return a rule that allows ``None`` in addition to *rule*."""
    is_met, wanted = rule
    return lambda value: value is None or is_met(value), f"None or {wanted}"


def one_of(*choices: str) -> Rule:
    """Return a rule that allows only *choices*."""
    return choices.__contains__, " or ".join(repr(choice) for choice in choices)


def is_whole(value: object, *, least: int) -> bool:
    """Return whether *value* is an integer >= *least*; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_filled(value: object, *, beginning: str = "") -> bool:
    """Return whether *value* is a string that is not blank and starts with *beginning*."""
    return isinstance(value, str) and bool(value.strip()) and value.startswith(beginning)


FLAG: Rule = (lambda value: isinstance(value, bool), "True or False")
SECONDS: Rule = (is_seconds, "a number of seconds > 0")
SECONDS_OR_ZERO: Rule = (partial(is_seconds, is_zero_allowed=True), "a number of seconds >= 0")
COUNT: Rule = (partial(is_whole, least=1), "an integer >= 1")
RATE: Rule = (is_filled, 'a rate such as "20/second"')
PATH: Rule = (
    lambda value: is_filled(value, beginning="/") and "<" not in value,  # < begins a variable
    'a path that begins with "/" and has no "<"',
)
URL: Rule = (lambda value: isinstance(value, str) and "://" in value, "a URL")


def setting(default: Any, rule: Rule, *meaning: str, is_secret: bool = False) -> Any:
    """Declare a setting, as a field of a subclass of :class:`Settings`.

    Args:
        default: Default value.
        rule: The allowed values, such as :data:`SECONDS`.
        meaning: Description for the settings page, in Markdown; the parts are concatenated.
        is_secret: Whether error messages must not repeat its value.
    """
    metadata = {"rule": rule, "meaning": "".join(meaning), "is_secret": is_secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of settings classes.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if _is_met(each, value):
                continue
            # An error must not carry tokens, or passwords in URLs, into a log.
            found = "" if each.metadata["is_secret"] else f", not {value!r}"
            raise ConfigError(f"{_key(each.name)} must be {each.metadata['rule'][1]}{found}")


def read_settings(
    classes: Sequence[type[Settings]], mapping: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[type[Settings], Settings]:
    """Read the settings of several classes.

    Args:
        classes: All settings classes; each setting must belong to exactly one of them.
        mapping: Usually ``app.config``; overrides the environment. Keys without the prefix are
            ignored.
        overrides: Settings by attribute name; they override *mapping*.

    Raises:
        ConfigError: A key is unknown, a value is of the wrong type or out of range, or a setting
            is declared twice.
    """
    owners = _owners(classes)
    found: dict[str, Any] = {}
    for key, text in os.environ.items():
        if key.startswith(PREFIX):
            name = _known(owners, key.removeprefix(PREFIX).lower(), key)
            found[name] = _parsed(text, _field(owners[name], name), key)
    for key, value in mapping.items():
        if isinstance(key, str) and key.startswith(PREFIX):
            found[_known(owners, key.removeprefix(PREFIX).lower(), key)] = value
    for name, value in overrides.items():
        found[_known(owners, name, name)] = value
    return {
        owner: owner(**{name: value for name, value in found.items() if owners[name] is owner})
        for owner in classes
    }


def settings_table(owner: type[Settings]) -> str:
    """Return the settings of a class as a table in Markdown: key, default and meaning."""
    rows = ["| key `SOCKETIO_GUARD_...` | default | meaning |", "|---|---|---|"]
    for each in fields(owner):
        default = each.default
        if isinstance(default, float) and default.is_integer():
            default = int(default)
        text = str(default) if type(default) in (int, float) else f"`{_quoted(default)}`"
        rows.append(f"| `{each.name.upper()}` | {text} | {each.metadata['meaning']} |")
    return "\n".join(rows) + "\n"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _key(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _is_met(each: Field[Any], value: object) -> bool:
    try:
        return bool(each.metadata["rule"][0](value))
    except TypeError:  # the predicate does not support this type
        return False


def _owners(classes: Sequence[type[Settings]]) -> dict[str, type[Settings]]:
    """Return the class that declares each setting, by the setting's name.

    Raises:
        ConfigError: A class is not valid, or a setting is declared twice.
    """
    owners: dict[str, type[Settings]] = {}
    for owner in classes:
        is_settings = isinstance(owner, type) and issubclass(owner, Settings)
        if not is_settings or "__dataclass_fields__" not in vars(owner):
            raise ConfigError(f"{owner.__name__} must be a @dataclass(frozen=True) of Settings")
        for each in fields(owner):
            if "rule" not in each.metadata:
                raise ConfigError(f"{owner.__name__}.{each.name} must be declared with setting()")
            if each.name in owners:
                raise ConfigError(
                    f"{_key(each.name)} is declared by {owners[each.name].__name__} and by "
                    f"{owner.__name__}"
                )
            owners[each.name] = owner
    return owners


def _known(owners: Mapping[str, object], name: str, key: str) -> str:
    if name in owners:
        return name
    near = difflib.get_close_matches(name, owners, n=1)
    hint = f"; did you mean {_key(near[0])}?" if near else ""
    raise ConfigError(f"unknown setting {key}{hint}")


def _field(owner: type[Settings], name: str) -> Field[Any]:
    return next(each for each in fields(owner) if each.name == name)


def _parsed(text: str, each: Field[Any], key: str) -> object:
    """Convert the value of an environment variable to the type of a setting.

    Raises:
        ConfigError: *text* is not a valid number or boolean.
    """
    kind = each.type.__name__ if isinstance(each.type, type) else str(each.type)
    if text.lower() == "none" and _is_met(each, None):
        return None
    if kind == "bool":
        if text.lower() not in _WORDS:
            raise ConfigError(f"{key} must be true or false, not {text!r}")
        return _WORDS[text.lower()]
    try:
        if re.search(r"\bint\b", kind):
            return int(text)
        if re.search(r"\bfloat\b", kind):
            return float(text)
    except ValueError:
        raise ConfigError(f"{key} must be a number, not {text!r}") from None
    return text


_WORDS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

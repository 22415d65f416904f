"""What a setting is, and where it is read from: a keyword, ``app.config`` or the environment.

A class of settings is a frozen dataclass. Each field says its type, default, range and meaning
once; checks, errors, the environment reader and the page of settings are made of that. The guard's
own class is :class:`.GuardConfig`; a component may have one, too::

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
"""What a value must meet, and how that is said: "must be ..."."""


def or_none(rule: Rule) -> Rule:
    """Return *rule* such that ``None`` meets it, too."""
    is_met, wanted = rule
    return lambda value: value is None or is_met(value), f"None or {wanted}"


def one_of(*choices: str) -> Rule:
    """Return the rule that a value is one of some texts."""
    return choices.__contains__, " or ".join(repr(choice) for choice in choices)


def is_whole(value: object, *, least: int) -> bool:
    """Say whether *value* is an integer of at least *least*."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_filled(value: object, *, beginning: str = "") -> bool:
    """Say whether *value* is a text that is not blank, and begins as it should."""
    return isinstance(value, str) and bool(value.strip()) and value.startswith(beginning)


FLAG: Rule = (lambda value: isinstance(value, bool), "True or False")
SECONDS: Rule = (is_seconds, "a number of seconds > 0")
SECONDS_OR_ZERO: Rule = (partial(is_seconds, is_zero_allowed=True), "a number of seconds >= 0")
COUNT: Rule = (partial(is_whole, least=1), "an integer >= 1")
RATE: Rule = (is_filled, 'a rate such as "20/second"')
PATH: Rule = (
    lambda value: is_filled(value, beginning="/") and "<" not in value,  # a variable, to Werkzeug
    'a path that begins with "/" and has no "<"',
)
URL: Rule = (lambda value: isinstance(value, str) and "://" in value, "a URL")


def setting(default: Any, rule: Rule, *meaning: str, is_secret: bool = False) -> Any:
    """Declare a setting, as a field of a class of :class:`Settings`.

    Args:
        default: Its default.
        rule: What a value must be, such as :data:`SECONDS`.
        meaning: What the page of settings says of it.
        is_secret: Whether errors must not repeat its value.
    """
    metadata = {"rule": rule, "meaning": "".join(meaning), "is_secret": is_secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of every class of settings.

    Raises:
        ConfigError: A value is of the wrong type, or out of range.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if _is_met(each, value):
                continue
            # Tokens and passwords in URLs must not reach a log through an error.
            found = "" if each.metadata["is_secret"] else f", not {value!r}"
            raise ConfigError(f"{_key(each.name)} must be {each.metadata['rule'][1]}{found}")


def read_settings(
    classes: Sequence[type[Settings]], mapping: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[type[Settings], Settings]:
    """Read all settings of some classes.

    Args:
        classes: Those that there are; a name is in one of them.
        mapping: Usually ``app.config``; wins over the environment. Only keys with the prefix count.
        overrides: Settings by attribute name; win over *mapping*.

    Raises:
        ConfigError: A key is unknown, a value of the wrong type or out of range, or a setting is
            declared twice.
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
    except TypeError:  # of a rule that takes the type for granted
        return False


def _owners(classes: Sequence[type[Settings]]) -> dict[str, type[Settings]]:
    """Return which class a setting is of, by name."""
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
    """Return what *text* in the environment means to a setting of the type that it has."""
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

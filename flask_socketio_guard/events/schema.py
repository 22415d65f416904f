"""Validation of payloads by pydantic models or plain type hints, before a handler runs.

pydantic is an optional extra and is imported only when a schema is used.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, EventInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pydantic import TypeAdapter, ValidationError

_MAX_MESSAGE = 300
_MAX_ERRORS = 100  # pydantic takes 2 us to format one, and a hostile list can cause 300,000
_MAX_PLACE = 8
_MAX_INDEX = 999_999
_UNKNOWN = "*"
_UNREADABLE = "Input cannot be read"
_LABEL = re.compile(r"[\w\[\], ()-]+")  # pydantic's label of a member of a union: list[int]
_WORD = re.compile(r"\w+")
_NO_NAMES = frozenset({"default", "metadata", "serialization"})
_SCHEMA_CONTEXT = frozenset(
    {
        "actual_length", "class", "class_name", "decimal_places", "discriminator", "expected",
        "expected_schemes", "expected_tags", "expected_version", "field_type", "ge", "gt", "le",
        "lt", "max_digits", "max_length", "min_length", "multiple_of", "pattern", "whole_digits",
    }
)  # fmt: skip
"""Context values of errors that come from the schema; others may come from the client."""
_VALUE_ERRORS = (ArithmeticError, UnicodeError, RecursionError)
"""Errors that a client's value can cause in conversions and that pydantic does not catch."""
_PANIC = "PanicException"
"""Name of the exception that pydantic's Rust code raises when it panics.

For example, before 2.13, for an int >= 2**63 where a complex number is expected. It derives from
BaseException and cannot be imported."""


def validator(
    schema: object, handler: Callable[..., object]
) -> Callable[[tuple[object, ...]], tuple[object, ...]]:
    """Return a function that checks the arguments of an event and converts them.

    The function returns the arguments for the handler, or raises
    :class:`~flask_socketio_guard.errors.EventInvalid` with the location and kind of each error,
    such as ``"0.text: Field required"`` (0 is the first argument). The message has at most
    300 characters and repeats nothing that the client sent: a key that the schema does
    not define appears as ``*``, and an error of a validator of the application appears
    only with its kind. If such a validator raises anything besides ``ValueError`` and
    ``AssertionError``, that is a bug in it, and the exception propagates.

    Values are converted by pydantic's rules, unless the schema is strict. pydantic
    collects all errors, at about a microsecond each: limit the length of lists and
    dicts (``Field(max_length=100)``) to keep a hostile payload cheap.

    Args:
        schema: The type of the single argument: a pydantic model, or any type hint
            that pydantic supports (``int | None``, ``list[int]``, a dataclass, a
            TypedDict, ...). A tuple of types means exactly as many arguments.
            ``True`` takes the types from the annotations of *handler*, with its
            defaults and ``*args``; a parameter without annotation accepts anything.
        handler: Named in errors; its signature is read if *schema* is ``True``.

    Raises:
        ConfigError: pydantic is not installed, or the schema cannot be used.
    """
    try:
        from pydantic import TypeAdapter
    except ImportError as exc:
        raise ConfigError(
            'schema= needs the package pydantic: pip install "Flask-SocketIO-Guard[validation]"'
        ) from exc
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    try:
        hints, required, rest = _hints(schema, handler)
        return _Validator(
            [_Argument(TypeAdapter(hint)) for hint in hints],
            required=required,
            rest=None if rest is inspect.Parameter.empty else _Argument(TypeAdapter(rest)),
        )
    except Exception as exc:
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        raise ConfigError(f"the schema of {name} cannot be used: {reason}") from exc


class _Argument:
    """The type of one argument, with the names that error messages may quote."""

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self.check = adapter.validate_python
        # Reading core_schema raises if the type refers to an undefined name, which pydantic
        # itself reports at the first value only.
        names = set(_names(adapter.core_schema))
        self._names = names.union(*map(_WORD.findall, names))

    def problems(self, number: int, exc: ValidationError) -> list[str]:
        """Return one text per error, such as ``"0.text: Field required"``."""
        count = exc.error_count()
        if count > _MAX_ERRORS:
            return [f"{number}: {count} errors"]
        try:
            errors = exc.errors(include_url=False)
        except _VALUE_ERRORS:  # the message of an application's validator cannot be encoded
            return [f"{number}: {_UNREADABLE}"]
        return [f"{self._place(number, error['loc'])}: {_kind(error)}" for error in errors]

    def _place(self, number: int, path: tuple[int | str, ...]) -> str:
        parts = [str(number), *(self._part(part) for part in path[:_MAX_PLACE])]
        return ".".join(parts) + ("..." if len(path) > _MAX_PLACE else "")

    def _part(self, part: int | str) -> str:
        if isinstance(part, int):
            return str(part) if 0 <= part <= _MAX_INDEX else _UNKNOWN
        if part in self._names:
            return part
        words = _WORD.findall(part) if _LABEL.fullmatch(part) else []
        return part if words and self._names.issuperset(words) else _UNKNOWN


class _Validator:
    """Checks the arguments of one event.

    Args:
        arguments: The positional arguments.
        required: How many of them are required.
        rest: The type of further arguments; ``None`` if none are allowed.
    """

    def __init__(
        self, arguments: list[_Argument], *, required: int, rest: _Argument | None
    ) -> None:
        from pydantic import ValidationError

        self._invalid = ValidationError
        self._arguments = arguments
        self._required = required
        self._rest = rest

    def __call__(self, args: tuple[object, ...]) -> tuple[object, ...]:
        self._check_count(len(args))
        checked: list[object] = []
        problems: list[str] = []
        for number, value in enumerate(args):
            argument = self._rest if number >= len(self._arguments) else self._arguments[number]
            assert argument is not None
            try:
                checked.append(argument.check(value))
            except self._invalid as exc:
                problems += argument.problems(number, exc)
            except BaseException as exc:
                if not (isinstance(exc, _VALUE_ERRORS) or type(exc).__name__ == _PANIC):
                    raise
                problems.append(f"{number}: {_UNREADABLE}")
            if len(problems) > _MAX_ERRORS:
                break
        if problems:
            raise EventInvalid(_cut("; ".join(problems)))
        return tuple(checked)

    def _check_count(self, count: int) -> None:
        if count < self._required or (self._rest is None and count > len(self._arguments)):
            if self._rest is not None:
                wanted = f"{self._required} or more"
            elif self._required < len(self._arguments):
                wanted = f"{self._required} to {len(self._arguments)}"
            else:
                wanted = str(self._required)
            raise EventInvalid(f"expected arguments: {wanted}, received: {count}")


def _kind(error: Mapping[str, Any]) -> str:
    """Return pydantic's message if it quotes only the schema, otherwise the kind of the error."""
    kind: str = error["type"]
    message: str = error["msg"]
    is_known = kind in _own_kinds() and "://" not in message
    if is_known and _SCHEMA_CONTEXT.issuperset(error.get("ctx", ())):
        return message
    return kind.replace("_", " ").capitalize()


@cache
def _own_kinds() -> frozenset[str]:
    """Return the kinds of errors that pydantic defines; others come from the application."""
    from pydantic_core.core_schema import ErrorType

    return frozenset(typing.get_args(ErrorType))


def _cut(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 3] + "..."


def _names(core_schema: object) -> Iterable[str]:
    """Yield the strings in a pydantic-core schema: names of fields, aliases, tags and types."""
    yield "key"  # pydantic marks an error in a dict's key with [key]
    waiting = [core_schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, type):
            yield node.__name__
        elif isinstance(node, Mapping):
            yield from (key for key in node if isinstance(key, str))
            waiting += [value for key, value in node.items() if key not in _NO_NAMES]
        elif isinstance(node, list | tuple):
            waiting += node


def _hints(schema: object, handler: Callable[..., object]) -> tuple[list[Any], int, Any]:
    """Return the type of each argument, the number of required ones, and the type of the rest.

    The last is ``inspect.Parameter.empty`` if no further arguments are allowed.
    """
    if schema is True:
        return _annotations(handler)
    hints = list(schema) if isinstance(schema, tuple) else [schema]
    for hint in hints:
        if inspect.isroutine(hint):  # pydantic would call it
            raise TypeError(f"{hint.__qualname__} is a function, not a type")
    return hints, len(hints), inspect.Parameter.empty


def _annotations(handler: Callable[..., object]) -> tuple[list[Any], int, Any]:
    parameters, names = _signature(handler)
    written = {
        parameter.name: Any
        if parameter.annotation is inspect.Parameter.empty
        else parameter.annotation
        for parameter in parameters
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    # Without the return annotation, which may name something that cannot be resolved at runtime.
    holder = types.SimpleNamespace(__annotations__=written)
    hints = typing.get_type_hints(holder, globalns=names, include_extras=True)
    named: list[Any] = []
    required = 0
    rest: Any = inspect.Parameter.empty
    for parameter in parameters:
        has_default = parameter.default is not inspect.Parameter.empty
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            rest = hints[parameter.name]
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if not has_default:
                raise TypeError(f"the argument {parameter.name} can be passed by keyword only")
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            named.append(hints[parameter.name])
            required += not has_default
    return named, required, rest


def _signature(handler: Callable[..., object]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Return the parameters of *handler* and the names that their annotations may use.

    A decorator's own signature is used, unless it takes ``*args``.
    """
    function: Any = handler
    while isinstance(function, partial):
        function = function.func
    if not inspect.isroutine(function):
        function = type(function).__call__
    signature = inspect.signature(handler, follow_wrapped=False)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        signature = inspect.signature(handler)
        function = inspect.unwrap(function)
    return list(signature.parameters.values()), getattr(function, "__globals__", {})

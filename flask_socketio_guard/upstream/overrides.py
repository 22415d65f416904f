"""An application's overrides of upstream's methods, which are honoured or refused at startup.

A method that an application's own class overrides runs first, and its ``super()`` leads to the
guard's. An override is refused, with the reason, if the guard would never call it, or if it does
not call a method of the guard that must run.
"""

from __future__ import annotations

from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_UPSTREAM: Final = frozenset({"engineio", "flask_socketio", "socketio"})


def is_upstream(owner: Any) -> bool:
    """Return whether a class or function comes from the Socket.IO packages."""
    name = (
        owner.__globals__.get("__name__", "")  # functools.wraps copies __module__
        if isinstance(owner, FunctionType)
        else getattr(owner, "__module__", "")
    )
    return str(name).partition(".")[0] in _UPSTREAM


def own_methods(owner: type) -> dict[str, Any]:
    """Return the attributes, by name, of the application's classes in the MRO of *owner*."""
    found: dict[str, Any] = {}
    for cls in owner.__mro__:
        if cls is object or is_upstream(cls) or is_guarded(cls):
            continue
        for name, value in vars(cls).items():
            found.setdefault(name, value)
    return found


def overrides(owner: type, *names: str) -> bool:
    """Return whether the application's classes in the MRO of *owner* define one of *names*."""
    methods = own_methods(owner)
    return any(name in methods for name in names)


def is_guarded(cls: type) -> bool:
    """Return whether a class belongs to the guard."""
    return cls.__module__.startswith(__package__ + ".")


def guarded_class(own: type, guarded: type, *, front: tuple[type, ...] = ()) -> type:
    """Return a subclass of *own* with *guarded* placed before upstream's classes in its MRO.

    Args:
        own: Upstream's class, or the application's subclass of it.
        guarded: Placed after the application's classes, so that their ``super()`` leads to it.
        front: Placed before the application's classes.

    Source:
        Python's data model, ``type.mro()``: a metaclass may define the method resolution order.
    """
    order = list(own.__mro__)
    first = next(index for index, cls in enumerate(order) if is_upstream(cls))
    order[first:first] = [cls for cls in guarded.__mro__ if cls is not object]
    meta: Any = type(own)

    class Ordered(meta):
        def mro(cls) -> list[type]:
            return [cls, *front, *order]

    made: type = Ordered(
        f"Guarded{own.__name__}", (*front, own, guarded), {"__module__": guarded.__module__}
    )
    return made


def check(
    instance: Any,
    guarded: type,
    *,
    unused: Iterable[str],
    needed: Iterable[str],
    extended: Iterable[str] = (),
) -> None:
    """Check that the guard would not silently bypass an override or a patch.

    Args:
        instance: An object that is not guarded yet.
        guarded: The class that will guard it.
        unused: Methods that upstream calls and the guard never does.
        needed: Methods of the guard that must run, even if they are overridden.
        extended: Methods of the guard that always call upstream's, which may be patched then.

    Raises:
        ConfigError: An override or patch would be bypassed; the text names the class, the method
            and the solution.
    """
    own = type(instance)
    unused, needed = frozenset(unused), frozenset(needed)
    replaced = unused | {
        name
        for cls in guarded.__mro__[:-1]
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType)
    }
    methods = own_methods(own)
    for cls in _behind_upstream(own):
        for name in sorted(replaced & vars(cls).keys()):
            if next(first for first in own.__mro__ if name in vars(first)) is not cls:
                continue  # it would not be called without the guard either
            raise ConfigError(
                f"{cls.__name__}.{name} comes after a class of python-socketio in the bases of "
                f"{own.__name__}, where the guard would bypass it: list {cls.__name__} first"
            )
    for name in sorted(unused & methods.keys()):
        raise ConfigError(
            f"{own.__name__}.{name} would never be called, because the guard does not use it: "
            f"remove {name}(), or do not guard this SocketIO"
        )
    for name in sorted(needed & methods.keys()):
        if not calls_on(methods[name], name):
            raise ConfigError(
                f"{own.__name__}.{name} does not call super().{name}(), on which the guard "
                "relies: call it"
            )
    for owner, name, value in _patched(own, replaced - frozenset(extended)):
        raise ConfigError(
            f"{owner.__module__}.{owner.__name__}.{name} was replaced by {_described(value)}, "
            "which the guard would bypass: override it in a subclass"
        )
    for name in sorted(replaced & vars(instance).keys()):
        value = vars(instance)[name]
        if callable(value) and not is_upstream(getattr(value, "__func__", value)):
            raise ConfigError(
                f"{name} of this {own.__name__} was replaced by {_described(value)} before it was "
                "guarded: replace it after guard.init_app(), or override it in a subclass"
            )


def calls_on(function: Any, name: str) -> bool:
    """Return whether *function* uses the attribute *name*, most likely of its ``super()``."""
    code = getattr(function, "__code__", None)
    if code is None:
        inner = getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
        return inner is not None and calls_on(inner, name)
    return _has_name(code, name)


def _has_name(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(
        isinstance(constant, CodeType) and _has_name(constant, name) for constant in code.co_consts
    )


def _behind_upstream(own: type) -> Iterator[type]:
    is_behind = False
    for cls in own.__mro__[:-1]:
        is_behind = is_behind or is_upstream(cls)
        if is_behind and not is_upstream(cls):
            yield cls


def _patched(own: type, names: Iterable[str]) -> Iterator[tuple[type, str, Any]]:
    """Yield (class, name, value) for each method of upstream's classes that has been patched."""
    for owner in own.__mro__:
        if is_upstream(owner):
            for name in sorted(names & vars(owner).keys()):
                value = vars(owner)[name]
                if callable(value) and not (isinstance(value, FunctionType) and is_upstream(value)):
                    yield owner, name, value


def _described(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return f"{getattr(value, '__module__', '?')}.{name}"


def rebind(instance: Any) -> None:
    """Rebind upstream's methods that are stored on *instance* to those of its guarded class.

    Code that replaces a method, as python-socketio's admin UI does, stores the original as
    an attribute of the object in order to call it.
    """
    for attribute, value in list(vars(instance).items()):
        if isinstance(value, MethodType) and value.__self__ is instance:
            name = value.__func__.__name__
            if not is_upstream(value.__func__) or not hasattr(type(instance), name):
                continue  # an application's own method reaches the guard's through super()
            setattr(instance, attribute, MethodType(getattr(type(instance), name), instance))

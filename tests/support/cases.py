"""Many cases of one fact in one test, where each as a test would cost more than it is worth."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Test = Callable[..., None]


def in_turn(names: str | Sequence[str], cases: Iterable[Any], **_: Any) -> Callable[[Test], Test]:
    """Run a test with one case after the other; takes what ``pytest.mark.parametrize`` takes.

    All cases run, and the message names each that failed. For tests without fixtures: those would
    be the same for all cases.
    """
    of_a_case = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    of_all = [_values(case, len(of_a_case)) for case in cases]

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)

        @wraps(test)
        def run(*args: Any, **fixtures: Any) -> None:
            failed: list[str] = []
            cause: BaseException | None = None
            for values in of_all:
                case = dict(zip(of_a_case, values, strict=True))
                try:
                    test(*args, **fixtures, **case)
                except (Exception, pytest.fail.Exception) as exc:
                    failed.append(f"with {case}: {type(exc).__name__}: {exc}")
                    cause = cause or exc
            if failed:
                raise AssertionError("\n".join(failed)) from cause

        left = [each for name, each in signature.parameters.items() if name not in of_a_case]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate


def _values(case: Any, count: int) -> tuple[Any, ...]:
    if hasattr(case, "marks"):  # pytest.param()
        return tuple(case.values)
    return (case,) if count == 1 else tuple(case)

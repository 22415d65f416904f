"""Text that others can influence, made fit for a log: escaped, cut, without passwords."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

LONGEST_TEXT = 300
"""Characters of one text, such as that of an exception, before it is escaped."""

LONGEST_TRACEBACK = 10_000
"""Characters of one traceback, with those that led to it."""

_DEEPEST_CHAIN = 10  # exceptions that led to one another, or stand in one another
_USER_INFO = re.compile(r"://[^\s/]*(?:/[^\s/@]*){0,3}@")
# urllib takes what stands before a "#" or "/" in a password for the port, and quotes it.
_PORT = re.compile(r"(Port could not be cast to integer value as ).*", re.DOTALL)
_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return the beginning of *text*, with all escaped that could break or forge a line.

    Line ends, control characters and lone surrogates are written as Python writes them.
    """
    text = text[:longest]
    return text if text.isprintable() and "\\" not in text else repr(text)[1:-1]


def without_secrets(text: str) -> str:
    """Return *text* without user names and passwords of the URLs in it, odd ones included."""
    return _PORT.sub(r"\1 ...", _USER_INFO.sub("://...@", text))


def printable_traceback(exc: BaseException, tb: TracebackType | None) -> str:
    """Return the traceback of *exc*, each text of an exception in it on one line.

    One of more than :data:`LONGEST_TRACEBACK` characters lacks its middle.
    """
    told = traceback.TracebackException(type(exc), exc, tb, compact=True)
    text = "".join(_lines(told, _DEEPEST_CHAIN)).rstrip("\n")
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= LONGEST_TRACEBACK:
        return text
    half = LONGEST_TRACEBACK // 2
    return f"{text[:half]}\n  ...\n{text[-half:]}"


def _lines(told: traceback.TracebackException, depth: int) -> Iterator[str]:
    if depth == 0:
        yield "...\n"
        return
    if told.__cause__ is not None:
        yield from _lines(told.__cause__, depth - 1)
        yield _CAUSE
    elif told.__context__ is not None and not told.__suppress_context__:
        yield from _lines(told.__context__, depth - 1)
        yield _CONTEXT
    if told.stack:
        yield "Traceback (most recent call last):\n"
        yield from told.stack.format()
    for part in told.format_exception_only():
        # The secret first: what is cut might be the end by which it is known.
        yield printable(without_secrets(part[: 10 * LONGEST_TEXT].rstrip("\n"))) + "\n"
    for number, member in enumerate((getattr(told, "exceptions", None) or ())[:_DEEPEST_CHAIN]):
        yield f"Exception {number + 1} of the group:\n"
        yield from _lines(member, depth - 1)

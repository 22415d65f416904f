"""Sanitises untrusted text for the log: escaped, truncated, without passwords."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

LONGEST_TEXT = 300
"""Longest text, such as that of an exception, in characters before escaping."""

LONGEST_TRACEBACK = 10_000
"""Longest traceback, in characters, chained exceptions included."""

_DEEPEST_CHAIN = 10  # chained or grouped exceptions
_USER_INFO = re.compile(r"://[^\s/]*(?:/[^\s/@]*){0,3}@")
# urllib mistakes the part of a password before a "#" or "/" for the port, and quotes it.
_PORT = re.compile(r"(Port could not be cast to integer value as ).*", re.DOTALL)
_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    r"""Return the beginning of *text*, escaped so that it cannot break or forge a log line.

    Line ends, control characters and lone surrogates become Python escapes such as ``\n``.
    """
    text = text[:longest]
    return text if text.isprintable() and "\\" not in text else repr(text)[1:-1]


def without_secrets(text: str) -> str:
    """Return *text* without the user names and passwords of URLs, malformed ones included."""
    return _PORT.sub(r"\1 ...", _USER_INFO.sub("://...@", text))


def printable_traceback(exc: BaseException, tb: TracebackType | None) -> str:
    """Return the traceback of *exc*, with the text of each exception on one line.

    The middle of a traceback longer than :data:`LONGEST_TRACEBACK` characters is left out.
    """
    trace = traceback.TracebackException(type(exc), exc, tb, compact=True)
    text = "".join(_lines(trace, _DEEPEST_CHAIN)).rstrip("\n")
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= LONGEST_TRACEBACK:
        return text
    half = LONGEST_TRACEBACK // 2
    return f"{text[:half]}\n  ...\n{text[-half:]}"


def _lines(trace: traceback.TracebackException, depth: int) -> Iterator[str]:
    if depth == 0:
        yield "...\n"
        return
    if trace.__cause__ is not None:
        yield from _lines(trace.__cause__, depth - 1)
        yield _CAUSE
    elif trace.__context__ is not None and not trace.__suppress_context__:
        yield from _lines(trace.__context__, depth - 1)
        yield _CONTEXT
    if trace.stack:
        yield "Traceback (most recent call last):\n"
        yield from trace.stack.format()
    for part in trace.format_exception_only():
        # Secrets are removed before the text is cut, which could remove the "@" that marks one.
        yield printable(without_secrets(part[: 10 * LONGEST_TEXT].rstrip("\n"))) + "\n"
    for number, member in enumerate((getattr(trace, "exceptions", None) or ())[:_DEEPEST_CHAIN]):
        yield f"Exception {number + 1} of the group:\n"
        yield from _lines(member, depth - 1)

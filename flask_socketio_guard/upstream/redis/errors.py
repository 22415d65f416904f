"""Descriptions and categories of errors from Redis and its drivers."""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any

from ...errors import BrokerError
from ...queue.reachability import PERMISSION, UNREACHABLE
from ...telemetry.printable import printable, without_secrets

_LONGEST_REPLY = 3000  # characters that are searched for passwords
_NOT_NOW = re.compile("BUSY|MISCONF|NOREPLICAS|UNKILLABLE")
_NOT_NOW_ERRORS = frozenset(  # classes of the drivers, which strip the error code from the text
    (
        "ClusterDownError",
        "MasterDownError",
        "MovedError",
        "OutOfMemoryError",
        "ReadOnlyError",
        "TryAgainError",
    )
)


def means_not_now(reply: Any) -> bool:
    """Return whether *reply* is an error about the state of Redis, so a retry may succeed."""
    if not isinstance(reply, Exception):
        return False
    return type(reply).__name__ in _NOT_NOW_ERRORS or _NOT_NOW.match(str(reply)) is not None


def categorize(exc: BaseException) -> str:
    """Return the category of an error; see :class:`~..errors.BrokerError`."""
    seen: BaseException | None = exc
    while seen is not None:
        names = {cls.__name__ for cls in type(seen).__mro__}  # of redis-py or valkey-py
        if isinstance(seen, BrokerError):
            return seen.category
        if isinstance(seen, ssl.SSLCertVerificationError):
            return "certificate"
        if isinstance(seen, ssl.SSLError):
            return "tls"
        if isinstance(seen, socket.gaierror):
            return "name"
        if names & {"AuthenticationError", "AuthenticationWrongNumberOfArgsError"}:
            return "authentication"
        if "NoPermissionError" in names:
            return PERMISSION
        seen = seen.__cause__ or seen.__context__
    return UNREACHABLE


def describe(exc: BaseException) -> str:
    """Return a description of *exc* on one line, without passwords."""
    if isinstance(exc, BrokerError):
        return str(exc)
    text = f"{type(exc).__name__}: {exc}"[:_LONGEST_REPLY].splitlines()[0]
    return printable(without_secrets(text))

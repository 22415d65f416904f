"""Shared by the modules of the demo: waiting for a condition, free ports, HTTP requests."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEADER = "X-Break-It"
"""Header that the panel sends with each POST; browsers forbid it to pages of other origins."""
POLL_INTERVAL = 0.02


class DemoError(Exception):
    """The demo cannot continue; the message says why and how to fix it."""


class Answer(NamedTuple):
    """The answer of a process: HTTP status, 0 if it did not answer, and JSON document."""

    code: int
    document: dict[str, Any]


def wait_until(condition: Callable[[], object], timeout: float) -> bool:
    """Wait up to *timeout* seconds until *condition* is true; return whether it became so."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


def is_free(port: int) -> bool:
    """Return whether a server can listen on *port* of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """Return the last *lines* of *log*."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def fetch(url: str, body: dict[str, Any] | None = None, timeout: float = 2.0) -> Answer:
    """GET the JSON document at *url*, or POST *body* to it as the "Break it" panel does."""
    headers = {} if body is None else {"Content-Type": "application/json", HEADER: "yes"}
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, headers)  # the demo's own addresses
    try:
        with urlopen(request, timeout=timeout) as response:
            return Answer(response.status, json.load(response))
    except HTTPError as error:
        with error:
            text = error.read()
        try:
            return Answer(error.code, json.loads(text))
        except ValueError:
            return Answer(error.code, {})
    except (URLError, OSError, ValueError):
        return Answer(0, {})

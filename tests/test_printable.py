"""Text that others can influence, made fit for a log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import redis

from flask_socketio_guard.delivery import redis_client
from flask_socketio_guard.queue.component import MessageQueue
from flask_socketio_guard.telemetry.printable import (
    LONGEST_TRACEBACK,
    printable,
    printable_traceback,
    without_secrets,
)
from flask_socketio_guard.upstream.redis import errors as redis_errors


def raised_by(url: str) -> Exception:
    """Return what the driver says to *url*."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - whatever the driver says
        redis.Redis.from_url(url)
    return caught.value


@pytest.mark.parametrize("url", ["redis://:hunter2#x@host", "redis://:hunter2/x@host/0"])
def test_an_odd_url_shows_no_password(url: str) -> None:
    """The standard library takes the password for the port, and quotes it."""
    exc = raised_by(url)
    assert "hunter2" in str(exc)
    for text in (
        redis_errors.describe(exc),
        redis_client.describe(exc),
        printable_traceback(exc, exc.__traceback__),
        without_secrets(f"cannot reach {url}"),
    ):
        assert "hunter2" not in text


def test_what_redis_answers_is_one_printable_line() -> None:
    """A user that may run scripts there chooses what an error says."""
    exc = redis.ResponseError("ERR \x1b[2J\nforged \ud800" + 10_000 * "!")
    for text in (redis_errors.describe(exc), redis_client.describe(exc)):
        assert text.isprintable()
        assert len(text) < 400


def test_what_redis_refuses_is_told_in_one_printable_line(caplog: pytest.LogCaptureFixture) -> None:
    queue = MessageQueue.__new__(MessageQueue)
    vars(queue)["_lifecycle"] = SimpleNamespace(refresh=lambda: None)
    queue._refused("OOM redis://:hunter2@host \x1b[2J\nforged \ud800" + 10_000 * "!")
    (message,) = caplog.messages
    assert "hunter2" not in message
    assert message.isprintable()
    assert len(message) < 600


def test_text_that_needs_no_escape_stays_as_it_is() -> None:
    assert printable('Verbindung zu »host« verloren: it\'s "gone"') == (
        'Verbindung zu »host« verloren: it\'s "gone"'
    )


def test_long_chains_and_groups_are_cut() -> None:
    exc: Exception = ValueError(1000 * "x")
    for number in range(100):
        later = RuntimeError(f"{number} " + 1000 * "x")
        later.__cause__, exc = exc, later
    text = printable_traceback(exc, None)
    assert len(text) < LONGEST_TRACEBACK + 100
    assert "direct cause" in text

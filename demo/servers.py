"""The gunicorn processes of the demo: starting them, and stopping all of them in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from demo.waiting import DemoError, fetch, tail, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 20.0
STOP_TIMEOUT = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Process:
    """One gunicorn master with its worker, on a port of this machine.

    Args:
        port: Port that it listens on; also its name.
        folder: Directory for its log.
        environment: Environment variables with the application's settings.
    """

    def __init__(self, port: int, folder: Path, environment: dict[str, str]) -> None:
        self.name = str(port)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"gunicorn-{port}.log"
        self._environment = os.environ | environment | {"HOST": "127.0.0.1", "PORT": str(port)}
        self._master: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, also after it has ended; does not wait, see `wait_ready`."""
        with self.log.open("ab") as log, signals_held():
            self._master = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gunicorn", "-c", str(PROJECT / "gunicorn.conf.py")),
                    "demo.app:create_app()",
                ],
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A process group of its own: Ctrl-C reaches only the runner, which stops
                # everything in order, and a worker whose master died can still be killed.
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until it is ready for traffic.

        Raises:
            DemoError: It ended, or was not ready in time.
        """
        wait_until(lambda: self.has_died() or self.is_ready(), START_TIMEOUT)
        if self.has_died() or not self.is_ready():
            state = "ended" if self.has_died() else "is not ready"
            raise DemoError(f"process {self.name} {state}; its log ends:\n{tail(self.log)}")

    def is_ready(self) -> bool:
        """Return whether a load balancer would send it clients."""
        return fetch(f"{self.url}/readyz").code == 200

    def has_died(self) -> bool:
        """Return whether the master has ended."""
        return self._master is not None and self._master.poll() is not None

    def ask_to_stop(self) -> None:
        """Begin a graceful shutdown; `join` waits for it."""
        if self._master is not None:
            self._master.terminate()

    def join(self, deadline: float) -> None:
        """Wait until *deadline* (``time.monotonic``) for it to end, then kill what is left."""
        if self._master is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._master.wait(timeout=max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(self._master.pid, signal.SIGKILL)
        self._master.wait()


def stop(processes: list[Process]) -> None:
    """Ask all processes to stop, then wait for them with one deadline for all."""
    for process in processes:
        process.ask_to_stop()
    deadline = time.monotonic() + STOP_TIMEOUT
    for process in processes:
        process.join(deadline)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay signals until the end: a new process must be known to `stop` before one arrives."""
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held_back in held:
            signal.raise_signal(held_back)

"""Run the Harbour Exchange: two guarded gunicorn processes and a Redis between them.

    python -m example_app.demo              # until Ctrl-C
    python -m example_app.demo --check      # without a person: break it, measure, print a table

``REDIS_URL`` names a Redis to use instead of one of the demo's own. That one is never stopped,
paused or told to drop connections, so some faults are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from example_app.broker import Broker, is_answering
from example_app.client_file import CLIENT_FILE, CLIENT_FOLDER
from example_app.waiting import DemoError, fetch, free_port, is_free, tail, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

PROJECT = Path(__file__).resolve().parent.parent
PREFERRED_PORTS = (5001, 5002)
START_TIMEOUT = 20.0
STOP_TIMEOUT = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the demo to end."""


class Process:
    """One gunicorn master with its worker, on a port of this machine.

    Args:
        port: Where it listens; also what it calls itself.
        folder: Where its log goes.
        environment: Settings of the application.
    """

    def __init__(self, port: int, folder: Path, environment: dict[str, str]) -> None:
        self.name = str(port)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"gunicorn-{port}.log"
        self._environment = os.environ | environment | {"HOST": "127.0.0.1", "PORT": str(port)}
        self._master: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, again if it has ended; `wait_ready` waits for it."""
        with self.log.open("ab") as log, signals_held():
            self._master = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gunicorn", "-c", str(PROJECT / "gunicorn.conf.py")),
                    "example_app.app:create_app()",
                ],
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: Ctrl-C reaches the runner only, which stops things in order,
                # and a worker whose master died can still be found.
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Return when it is ready for traffic.

        Raises:
            DemoError: It ended, or is not ready in time.
        """
        wait_until(lambda: self.has_died() or self.is_ready(), START_TIMEOUT)
        if self.has_died() or not self.is_ready():
            state = "ended" if self.has_died() else "is not ready"
            raise DemoError(f"process {self.name} {state}; its log ends:\n{tail(self.log)}")

    def is_ready(self) -> bool:
        """Tell whether a load balancer would send it clients."""
        return fetch(f"{self.url}/readyz").code == 200

    def has_died(self) -> bool:
        """Tell whether the master has ended."""
        return self._master is not None and self._master.poll() is not None

    def ask_to_stop(self) -> None:
        """Start an orderly stop; `join` waits for it."""
        if self._master is not None:
            self._master.terminate()

    def join(self, deadline: float) -> None:
        """Wait for the end until *deadline* (monotonic), then end what is left by force."""
        if self._master is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._master.wait(timeout=max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(self._master.pid, signal.SIGKILL)
        self._master.wait()


class Demo:
    """Everything that runs.

    Attributes:
        processes: The two gunicorn processes.
        broker: The Redis that the demo started, or None when ``REDIS_URL`` names another.
        broker_url: Where the Redis is.
    """

    def __init__(self, processes: list[Process], broker: Broker | None, broker_url: str) -> None:
        self.processes = processes
        self.broker = broker
        self.broker_url = broker_url

    def check_alive(self) -> None:
        """Raise `DemoError` if something ended by itself."""
        for process in self.processes:
            if process.has_died():
                raise DemoError(f"process {process.name} ended; its log ends:\n{tail(process.log)}")
        if self.broker and self.broker.has_died():
            raise DemoError("redis-server ended")


@contextmanager
def running(folder: Path, ports: tuple[int, ...]) -> Iterator[Demo]:
    """Start everything, and stop it at the end, whatever happens."""
    with ExitStack() as stack:
        environment = {
            "FLASK_DEMO": "1",
            "FLASK_PEERS": json.dumps([f"http://127.0.0.1:{port}" for port in ports]),
            # A client that vanishes is noticed while one watches.
            "FLASK_PING_INTERVAL": "1",
            "FLASK_PING_TIMEOUT": "3",
            # Ctrl-C shall not take long: nobody waits for a callback that hangs, and what was
            # emitted while the broker was away has nobody left to go to.
            "FLASK_SOCKETIO_GUARD_SLOW_CONSUMER_TIMEOUT": "1",
            "FLASK_SOCKETIO_GUARD_STOP_TIMEOUT": "1",
            "FLASK_SOCKETIO_GUARD_EXIT_FLUSH_TIMEOUT": "1",
        }
        broker = None
        broker_url = os.environ.get("REDIS_URL", "")
        if not broker_url:
            broker = Broker(folder)
            stack.callback(broker.stop)
            with signals_held():
                broker.start()
            broker_url = broker.url
            control = stack.enter_context(broker_control(broker, folder))
            environment["FLASK_BROKER_CONTROL"] = control
        elif not is_answering(broker_url):
            raise DemoError(
                "the Redis that REDIS_URL names does not answer. Start it, "
                "or unset REDIS_URL to have the demo start one of its own."
            )
        environment["FLASK_MESSAGE_QUEUE"] = broker_url

        processes = [Process(port, folder, environment) for port in ports]
        stack.callback(stop, processes)
        for process in processes:
            process.start()
        for process in processes:
            process.wait_ready()
        yield Demo(processes, broker, broker_url)


def stop(processes: list[Process]) -> None:
    """Ask all to stop, then join all against one deadline."""
    for process in processes:
        process.ask_to_stop()
    deadline = time.monotonic() + STOP_TIMEOUT
    for process in processes:
        process.join(deadline)


@contextmanager
def broker_control(broker: Broker, folder: Path) -> Iterator[str]:
    """Let the panel stop and start *broker* through a Unix socket in *folder*; yield its path."""
    actions = {b"stop": broker.stop, b"start": broker.start}

    class Command(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            command = self.rfile.readline().strip()
            try:
                actions[command]()
                reply = "done"
            except (DemoError, KeyError) as error:
                reply = f"failed: {error}"
            self.wfile.write(reply.encode() + b"\n")

    path = folder / "broker.sock"
    with socketserver.UnixStreamServer(str(path), Command) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield str(path)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver signals only afterwards: a process just started must first be known to `stop`."""
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came in held:
            signal.raise_signal(came)


def choose_ports(wanted: list[int] | None) -> tuple[int, ...]:
    """Return two ports that are free: *wanted*, else the preferred, else any.

    Raises:
        DemoError: One of *wanted* is taken, or both are the same.
    """
    if wanted is None:
        return tuple(port if is_free(port) else free_port() for port in PREFERRED_PORTS)
    if len(set(wanted)) < len(wanted):
        raise DemoError("the processes need two different ports")
    for port in wanted:
        if not is_free(port):
            raise DemoError(f"port {port} is in use; name others, or none to have free ones chosen")
    return tuple(wanted)


def serve(demo: Demo) -> int:
    """Say where the demo is, and wait until it is stopped."""
    if not (CLIENT_FOLDER / CLIENT_FILE).is_file():
        say(
            "The page lacks the Socket.IO client for JavaScript and will only show the health.\n"
            "To get it: npm ci --prefix example_app   (no restart needed)\n"
        )
    say("Open both, side by side. Each has a panel to break things.\n")
    for process in demo.processes:
        say(f"    {process.url}/")
    say("\nCtrl-C stops everything.")
    try:
        while True:
            demo.check_alive()
            time.sleep(0.5)
    except Stopped:
        say("\nStopping ...")
        raise


def port_number(text: str) -> int:
    """Return the port that an argument names."""
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text} is no port: 1 to 65535")
    return int(text)


def say(text: str) -> None:
    """Print *text* at once."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m example_app.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="inject each fault and print a table")
    parser.add_argument("--ports", nargs=2, type=port_number, metavar="PORT", help="two to use")
    options = parser.parse_args(arguments)

    for number in SIGNALS:
        signal.signal(number, _stop_at_signal)
    folder = Path(tempfile.mkdtemp(prefix="harbour-exchange-"))
    status = 1
    try:
        say(f"Logs are in {folder}")
        with running(folder, choose_ports(options.ports)) as demo:
            if options.check:
                from example_app.check import check  # needs client packages

                status = check(demo, say)
            else:
                serve(demo)
    except Stopped:
        say("Stopped.")
        status = 130 if options.check else 0
    except DemoError as error:
        say(f"The demo cannot go on: {error}")
    if status == 1 and any(folder.iterdir()):
        say(f"The logs stay in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return status


def _stop_at_signal(number: int, frame: FrameType | None) -> None:
    # One is enough: what follows must not interrupt the stopping itself.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())

"""Starting and stopping the demo: two guarded gunicorn processes and a Redis between them."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from demo.broker import Broker, is_answering
from demo.servers import Process, signals_held, stop
from demo.waiting import DemoError, free_port, is_free, tail

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREFERRED_PORTS = (5001, 5002)


class Demo:
    """The running processes of the demo.

    Attributes:
        processes: The two gunicorn processes.
        broker: The Redis that the demo started; ``None`` if ``REDIS_URL`` names another.
        broker_url: URL of the Redis.
    """

    def __init__(self, processes: list[Process], broker: Broker | None, broker_url: str) -> None:
        self.processes = processes
        self.broker = broker
        self.broker_url = broker_url

    def check_alive(self) -> None:
        """Raise `DemoError` if a process ended without being stopped."""
        for process in self.processes:
            if process.has_died():
                raise DemoError(f"process {process.name} ended; its log ends:\n{tail(process.log)}")
        if self.broker and self.broker.has_died():
            raise DemoError("redis-server ended")


@contextmanager
def running(folder: Path, ports: tuple[int, ...]) -> Iterator[Demo]:
    """Start everything, and stop it at the end, also after an error."""
    with ExitStack() as stack:
        environment = {
            "FLASK_PEERS": json.dumps([f"http://127.0.0.1:{port}" for port in ports]),
            # Short, so that a person can watch a vanished client being noticed.
            "FLASK_PING_INTERVAL": "1",
            "FLASK_PING_TIMEOUT": "3",
            # Ctrl-C must be quick: do not wait for a callback that hangs, or for messages that an
            # unreachable broker has not taken.
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
                "the Redis at REDIS_URL does not answer. Start it, "
                "or unset REDIS_URL to have the demo start its own."
            )
        environment["FLASK_MESSAGE_QUEUE"] = broker_url

        processes = [Process(port, folder, environment) for port in ports]
        stack.callback(stop, processes)
        for process in processes:
            process.start()
        for process in processes:
            process.wait_ready()
        yield Demo(processes, broker, broker_url)


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


def choose_ports(wanted: list[int] | None) -> tuple[int, ...]:
    """Return two free ports: *wanted*, otherwise the preferred ones if free, otherwise any.

    Raises:
        DemoError: One of *wanted* is in use, or both are the same.
    """
    if wanted is None:
        return tuple(port if is_free(port) else free_port() for port in PREFERRED_PORTS)
    if len(set(wanted)) < len(wanted):
        raise DemoError("the processes need two different ports")
    for port in wanted:
        if not is_free(port):
            raise DemoError(f"port {port} is in use; choose others, or omit --ports")
    return tuple(wanted)

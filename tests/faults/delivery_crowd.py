"""Clients that drop, crash, move and acknowledge late, and remember what they had."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.javascript import CLIENT_MODULE, require_client
from tests.support.raw_clients import RawWebSocket
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.support import GunicornServer


@dataclass
class Copy:
    """One time that a client had a message.

    Attributes:
        at: Instant (monotonic).
        attempt: As the server says.
        acknowledged_at: When the client sent its acknowledgement.
        lost_at: When its connection ended.
    """

    at: float
    attempt: int
    acknowledged_at: float | None = None
    lost_at: float | None = None


@dataclass
class Memory:
    """What one client remembers, over all its connections."""

    copies: dict[str, list[Copy]] = field(default_factory=dict)
    handled: Counter[str] = field(default_factory=Counter)


class Crowd:
    """Clients in threads, each with an identity of its own.

    Args:
        servers: Where they connect, now here, now there.
        names: Their identities.
        seed: Of their behaviour.
    """

    def __init__(
        self, servers: Sequence[GunicornServer], names: Iterable[str], *, seed: int = 1
    ) -> None:
        self._servers = servers
        self._is_calm = threading.Event()
        self._is_over = threading.Event()
        self.memories = {name: Memory() for name in names}
        self._threads = [
            threading.Thread(
                target=self._live, args=(name, random.Random(f"{seed} {name}")), daemon=True
            )
            for name in self.memories
        ]

    def start(self) -> None:
        """Let them come."""
        for thread in self._threads:
            thread.start()

    def calm_down(self) -> None:
        """Have them acknowledge everything at once from now on."""
        self._is_calm.set()

    def stop(self) -> None:
        """Let them go."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(20.0)

    def _live(self, name: str, chance: random.Random) -> None:
        while not self._is_over.is_set():
            client = RawWebSocket(chance.choice(self._servers).port, timeout=3.0)
            ours: list[Copy] = []
            try:
                client.open(query=f"identity={name}").join()
                self._take(client, self.memories[name], chance, ours)
            except (OSError, AssertionError, ValueError):
                pass  # the server is away, or has gone
            finally:
                ended_at = time.monotonic()
                for copy in ours:
                    copy.lost_at = ended_at
                with contextlib.suppress(OSError):
                    client.reset()
            self._is_over.wait(chance.uniform(0.0, 0.5))

    def _take(
        self, client: RawWebSocket, memory: Memory, chance: random.Random, ours: list[Copy]
    ) -> None:
        """Be connected for a while."""
        late: list[tuple[float, str, Copy]] = []
        leaves_at = time.monotonic() + chance.uniform(0.5, 8.0)
        while not self._is_over.is_set():
            now = time.monotonic()
            if now > leaves_at and not self._is_calm.is_set():
                return
            for due in [entry for entry in late if entry[0] <= now]:
                late.remove(due)
                self._acknowledge(client, *due[1:])
            try:
                frame = client.read_frame(0.1)
            except TimeoutError:
                continue
            if frame is None:
                return
            if not frame.text.startswith("42"):
                continue
            start = frame.text.index("[")
            ack_id, (_, _, meta) = frame.text[2:start], json.loads(frame.text[start:])
            copy = Copy(time.monotonic(), meta["attempt"])
            ours.append(copy)
            memory.copies.setdefault(meta["delivery_id"], []).append(copy)
            fate = 1.0 if self._is_calm.is_set() else chance.random()
            if fate < 0.05:
                return  # with it unacknowledged
            if fate < 0.1:
                continue  # never
            if fate < 0.2:
                late.append((now + chance.uniform(0.2, 2.0), ack_id, copy))
            else:
                self._acknowledge(client, ack_id, copy)
                if fate < 0.23:
                    return  # as soon as it is said

    def _acknowledge(self, client: RawWebSocket, ack_id: str, copy: Copy) -> None:
        client.send(f"43{ack_id}[]")
        copy.acknowledged_at = time.monotonic()


class JavaScriptCrowd:
    """The same with the standard library for JavaScript, in a process of their own.

    Every second one uses ``deliveries.js``, and so handles each message once.
    """

    def __init__(self, servers: Sequence[GunicornServer], names: Iterable[str]) -> None:
        require_client()
        self.memories = {name: Memory() for name in names}
        self._command = [
            "node",
            str(Path(__file__).with_name("delivery_crowd.mjs")),
            str(CLIENT_MODULE),
            str(PROJECT_ROOT / "flask_socketio_guard" / "static" / "deliveries.js"),
            ",".join(f"http://127.0.0.1:{server.port}" for server in servers),
            ",".join(self.memories),
        ]
        self._offset = time.time() - time.monotonic()
        self._open: dict[str, list[Copy]] = {name: [] for name in self.memories}

    def start(self) -> None:
        """Let them come."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def calm_down(self) -> None:
        """Have them acknowledge everything at once from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write("calm\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Let them go."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20.0)
        self._thread.join(20.0)
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._note(json.loads(line))

    def _note(self, said: dict[str, Any]) -> None:
        at = said["now"] / 1000 - self._offset
        name = said["name"]
        memory, copies = self.memories[name], self._open[name]
        if said["kind"] == "copy":
            copy = Copy(at, said["attempt"])
            memory.copies.setdefault(said["id"], []).append(copy)
            copies.append(copy)
        elif said["kind"] == "acknowledged":
            memory.copies[said["id"]][-1].acknowledged_at = at
        elif said["kind"] == "handled":
            memory.handled[said["id"]] += 1
        else:
            for copy in copies:
                copy.lost_at = at
            copies.clear()

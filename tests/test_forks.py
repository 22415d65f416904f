"""A forked child finds every lock open, whoever held it in the parent."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import _thread, os, sys, threading
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import all_guards

PACKAGE = "flask_socketio_guard"
LOCKS = (type(_thread.allocate_lock()), type(threading.RLock()), _thread.RLock)

app = Flask("app")
socketio = SocketIO(app, async_mode="threading")
guard = SocketIOGuard(app, socketio, event_rate="5/second")
(inner,) = all_guards()

def find():
    found, seen = {}, set()
    def walk(owner, path):
        if id(owner) in seen:
            return
        seen.add(id(owner))
        for name, value in list(vars(owner).items()):
            parts = list(value.values()) if isinstance(value, dict) else [value]
            if isinstance(value, (list, tuple)):
                parts = list(value)
            for part in parts:
                if isinstance(part, LOCKS):
                    found[f"{path}.{name}"] = part
                elif type(part).__module__.startswith(PACKAGE) and hasattr(part, "__dict__"):
                    walk(part, f"{path}.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            walk(module, name)
    walk(inner, "guard")
    walk(socketio, "socketio")
    return found

held, release = threading.Event(), threading.Event()

def hold():
    for lock in find().values():
        lock.acquire()
    held.set()
    release.wait(20)

threading.Thread(target=hold, daemon=True).start()
assert held.wait(10)
assert len(find()) > 15, find()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    closed = [path for path, lock in find().items() if not lock.acquire(False)]
    os.write(writer, repr(closed).encode())
    os._exit(0)
print(os.read(reader, 10000).decode())
os.waitpid(child, 0)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_no_lock_that_a_thread_of_the_parent_holds_is_closed_in_a_child() -> None:
    """Connections, events and subscriptions take them, and a child would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELD], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


FROZEN = """
import gc
import os
import socket
import gevent
import gevent.os
from gevent.server import StreamServer
from flask_socketio_guard.core.runtime import GeventRuntime

server = StreamServer(("127.0.0.1", 0), lambda sock, address: sock.sendall(b"answered"))
server.start()
gevent.sleep(0)
gc.collect()
gc.freeze()
child = gevent.os.fork()
if child == 0:
    GeventRuntime().forsake_servers()
    gevent.sleep(0.3)
    os._exit(0)
client = socket.create_connection(server.address[:2])
os.waitpid(child, 0)
client.setblocking(False)
try:
    print(client.recv(100))
except BlockingIOError:
    print("nobody")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks")
def test_a_child_forsakes_servers_that_are_frozen() -> None:
    """Gunicorn's workers freeze what they have loaded, and then nothing finds it."""
    program = subprocess.run(
        [sys.executable, "-c", FROZEN], capture_output=True, text=True, timeout=60
    )
    assert program.stdout == "nobody\n", program.stderr

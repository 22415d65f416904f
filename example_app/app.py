"""The Harbour Exchange: rooms, presence, a live ticker and acknowledged questions.

An ordinary Flask-SocketIO application. The marked line in `create_app` protects it, including
handlers registered with ``@socketio.on``. Code that uses ``guard`` directly (a task, an event
with a schema) shows the additional features of the guard.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, current_app, request
from flask_socketio import SocketIO, join_room, leave_room

from example_app.market import PITS, Lots, Pit, Side, price
from example_app.pages import pages
from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.errors import EventRejected

SETTLEMENT_TIME = 2.0  # seconds

socketio = SocketIO()
guard = SocketIOGuard()


@dataclass
class Trader:
    """A client, and the pit that it has joined."""

    name: str
    pit: Pit | None = None
    key: str | None = field(default=None, repr=False)


# The traders on this process, by session id. Each process sends its list to all clients with
# every tick.
traders: dict[str, Trader] = {}


def create_app() -> Flask:
    """Create the application; settings come from ``FLASK_*`` environment variables."""
    app = Flask(__name__)
    app.config.from_mapping(
        PROCESS=os.environ.get("PORT", "5000"), PING_INTERVAL=25, PING_TIMEOUT=20
    )
    app.config.from_prefixed_env()
    # Contract notes are stored in the Redis that the processes share, if they have one.
    app.config.setdefault("SOCKETIO_GUARD_DELIVERY_STORE", app.config.get("MESSAGE_QUEUE"))

    socketio.init_app(
        app,
        message_queue=app.config.get("MESSAGE_QUEUE"),
        ping_interval=app.config["PING_INTERVAL"],
        ping_timeout=app.config["PING_TIMEOUT"],
    )
    guard.init_app(app, socketio)  # This line protects the application.

    app.register_blueprint(pages)
    return app


@socketio.on("connect")
def connect(auth: Any) -> None:
    """Accept a trader who gives a name.

    *auth* is not validated here: if a client sends anything else, this handler raises, and the
    guard refuses the client.
    """
    traders[_sid()] = Trader(auth["name"].strip()[:24] or "Nameless")
    # A page keeps its key when it reconnects, and so is recognised by every process. An
    # application with accounts would use the user's id.
    key = auth.get("key")
    if isinstance(key, str) and 16 <= len(key) <= 64:
        traders[_sid()].key = key
        guard.identify(_sid(), key)


@socketio.on("disconnect")
def disconnect(reason: str) -> None:
    """Remove a trader."""
    traders.pop(_sid(), None)


@guard.handshake("join", timeout=10.0, schema=Pit)
def join(pit: Pit) -> dict[str, Any]:
    """Move the trader to *pit*, and acknowledge with its prices of the last minute.

    After the first join, the trader receives ticks. A trader who has not joined a pit within
    10 s is disconnected.
    """
    trader = traders[_sid()]
    if trader.pit:
        leave_room(trader.pit)
    join_room(pit)
    trader.pit = pit
    now = int(time.time())
    return {"pit": pit, "prices": [[at, price(pit, at)] for at in range(now - 59, now + 1)]}


@guard.on("trade", schema=(Side, Lots), rate="10/second")
def trade(side: Side, lots: int) -> dict[str, Any]:
    """Send the deal to everybody in the pit, in all processes, and acknowledge it."""
    trader = traders[_sid()]
    deal = {"who": trader.name, "side": side, "lots": lots} | _quote(trader.pit)
    guard.emit("trade", deal, to=trader.pit)
    if trader.key is not None:
        guard.start_background_task(settle, deal, trader.key)
    return deal


def settle(deal: dict[str, Any], key: str) -> None:
    """Send the contract note of a deal, which must arrive even if the trader is offline now."""
    guard.sleep(SETTLEMENT_TIME)
    guard.deliver("contract", deal, to=key, ttl=600, with_id=True)


@guard.on("ask", schema=str)
def ask(sid: str) -> None:
    """Ask another trader, on any process, for a price; send the answer to the pit."""
    # The name of a room would address the whole room, and an empty string everybody.
    if not sid or sid in PITS:
        raise EventRejected("there is no such trader")
    asker = traders[_sid()]
    question = {"who": asker.name} | _quote(asker.pit)

    def publish(answer: Any = None) -> None:
        price_given = answer if isinstance(answer, int | float) else None
        guard.emit("answer", question | {"answer": price_given}, to=asker.pit)

    guard.emit(
        "question", question, to=sid, callback=publish, callback_timeout=20, on_timeout=publish
    )


@guard.task(every=1.0)
def tick() -> None:
    """Send the prices and this process's traders to every client that has joined a pit.

    The event is volatile: a client that lags behind would read outdated prices.
    """
    now = int(time.time())
    news = {
        "process": current_app.config["PROCESS"],
        "pid": os.getpid(),
        "at": now,
        "prices": {pit: price(pit, now) for pit in PITS},
        "traders": [
            {"sid": sid, "name": trader.name, "pit": trader.pit} for sid, trader in traders.items()
        ],
        "connections": len(guard.connections),
    }
    guard.emit("tick", news, ready_only=True, volatile=True)


def _sid() -> str:
    """Return the session id of the client whose event is being handled."""
    return str(request.sid)  # type: ignore[attr-defined]  # Flask-SocketIO adds it


def _quote(pit: Pit | None) -> dict[str, Any]:
    """Return the current price of *pit*, with the pit and the time."""
    if pit is None:
        raise EventRejected("join a pit first")
    now = int(time.time())
    return {"pit": pit, "at": now, "price": price(pit, now)}

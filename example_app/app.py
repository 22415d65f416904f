"""The Harbour Exchange: rooms, presence, a live ticker and a question that wants an answer.

An ordinary Flask-SocketIO application. What protects it is the line in `create_app` that is
marked so; handlers registered with ``@socketio.on`` are protected as they are, and what is
written with ``guard`` (a task, an event that is checked) uses what the guard offers on top.
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


# The traders on this process, by session id. Each process tells all clients with every tick who
# is on it.
traders: dict[str, Trader] = {}


def create_app() -> Flask:
    """Create the application; settings come from ``FLASK_*`` environment variables."""
    app = Flask(__name__)
    app.config.from_mapping(
        PROCESS=os.environ.get("PORT", "5000"), PING_INTERVAL=25, PING_TIMEOUT=20
    )
    app.config.from_prefixed_env()
    # Contract notes are kept in the Redis that the processes share, if they have one.
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
    """Let a trader in who gives a name.

    Nothing here checks what *auth* is. A client that sends something else makes this raise, and
    the guard refuses it.
    """
    traders[_sid()] = Trader(auth["name"].strip()[:24] or "Nameless")
    # A page keeps its key over lost connections, and is known by it whichever process it comes to.
    # An application with accounts would take the id of the user.
    key = auth.get("key")
    if isinstance(key, str) and 16 <= len(key) <= 64:
        traders[_sid()].key = key
        guard.identify(_sid(), key)


@socketio.on("disconnect")
def disconnect(reason: str) -> None:
    """Forget a trader."""
    traders.pop(_sid(), None)


@guard.handshake("join", timeout=10.0, schema=Pit)
def join(pit: Pit) -> dict[str, Any]:
    """Move the trader to *pit*, and answer with the prices of the last minute there.

    From the first time on the trader hears the ticks. Who has joined no pit within 10 s is
    disconnected.
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
    """Tell everybody in the pit, whichever process they are on, and acknowledge."""
    trader = traders[_sid()]
    deal = {"who": trader.name, "side": side, "lots": lots} | _quote(trader.pit)
    guard.emit("trade", deal, to=trader.pit)
    if trader.key is not None:
        guard.start_background_task(settle, deal, trader.key)
    return deal


def settle(deal: dict[str, Any], key: str) -> None:
    """Send the contract note of a deal, which must arrive, whatever becomes of the line."""
    guard.sleep(SETTLEMENT_TIME)
    guard.deliver("contract", deal, to=key, ttl=600, with_id=True)


@guard.on("ask", schema=str)
def ask(sid: str) -> None:
    """Ask another trader, on this or any other process, for a price; tell the pit the answer."""
    # A room would be taken for a trader, and no name at all for everybody.
    if not sid or sid in PITS:
        raise EventRejected("there is no such trader")
    asker = traders[_sid()]
    question = {"who": asker.name} | _quote(asker.pit)

    def tell(answer: Any = None) -> None:
        price_given = answer if isinstance(answer, int | float) else None
        guard.emit("answer", question | {"answer": price_given}, to=asker.pit)

    guard.emit("question", question, to=sid, callback=tell, callback_timeout=20, on_timeout=tell)


@guard.task(every=1.0)
def tick() -> None:
    """Tell all who have joined a pit the prices, and who is on this process.

    Not those who lag behind: by the time they read it, it would be wrong.
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
    """Return the price of *pit* now."""
    if pit is None:
        raise EventRejected("join a pit first")
    now = int(time.time())
    return {"pit": pit, "at": now, "price": price(pit, now)}

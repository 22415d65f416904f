"""The Harbour Exchange: rooms, presence, a live ticker and a question that wants an answer.

An ordinary Flask-SocketIO application. What protects it is the line in `create_app` that is
marked so; handlers registered with ``@socketio.on`` are protected as they are, and what is
written with ``guard`` (a task, an event that is checked) uses what the guard offers on top.
"""

from __future__ import annotations

import os
import time
from typing import Any

from flask import Flask, current_app, request
from flask_socketio import SocketIO, join_room, leave_room

from example_app import faults
from example_app.market import PITS, price
from example_app.pages import pages
from flask_socketio_guard import EventRejected, SocketIOGuard

socketio = SocketIO()
guard = SocketIOGuard()

# The traders on this process, by session id. Each process tells all clients with every tick who
# is on it.
traders: dict[str, dict[str, str]] = {}


def create_app() -> Flask:
    """Create the application; settings come from ``FLASK_*`` environment variables."""
    app = Flask(__name__)
    app.config.from_mapping(PROCESS=os.environ.get("PORT", "5000"), DEMO=0)
    app.config.from_prefixed_env()

    socketio.init_app(app, message_queue=app.config.get("MESSAGE_QUEUE"))
    guard.init_app(app, socketio)  # This line protects the application.

    app.register_blueprint(pages)
    if app.config["DEMO"] == 1:
        faults.init_app(app, socketio, guard)
    return app


@socketio.on("connect")
def connect(auth: Any) -> None:
    """Let a trader in who gives a name.

    Nothing here checks what *auth* is. A client that sends something else makes this raise, and
    the guard refuses it.
    """
    traders[_sid()] = {"name": auth["name"].strip()[:24] or "Nameless", "pit": ""}


@socketio.on("disconnect")
def disconnect(reason: str) -> None:
    """Forget a trader."""
    traders.pop(_sid(), None)


@guard.on("join")
def join(pit: str) -> dict[str, Any]:
    """Move the trader to *pit*, and answer with the prices of the last minute there."""
    if not isinstance(pit, str) or pit not in PITS:
        raise EventRejected("there is no such pit")
    trader = traders[_sid()]
    if trader["pit"]:
        leave_room(trader["pit"])
    join_room(pit)
    trader["pit"] = pit
    now = int(time.time())
    return {"pit": pit, "prices": [[at, price(pit, at)] for at in range(now - 59, now + 1)]}


@guard.on("trade")
def trade(side: str, lots: int) -> dict[str, Any]:
    """Tell everybody in the pit, whichever process they are on, and acknowledge."""
    if side not in ("buy", "sell") or type(lots) is not int or not 1 <= lots <= 100:
        raise EventRejected("a trade is 'buy' or 'sell' and 1 to 100 lots")
    trader = traders[_sid()]
    deal = {"who": trader["name"], "side": side, "lots": lots} | _quote(trader["pit"])
    guard.emit("trade", deal, to=trader["pit"])
    return deal


@guard.on("ask")
def ask(sid: str) -> None:
    """Ask another trader, on this or any other process, for a price; tell the pit the answer."""
    # A room would be taken for a trader, and no name at all for everybody.
    if not isinstance(sid, str) or not sid or sid in PITS:
        raise EventRejected("there is no such trader")
    asker = traders[_sid()]
    question = {"who": asker["name"]} | _quote(asker["pit"])

    def tell(answer: Any = None) -> None:
        price_given = answer if isinstance(answer, int | float) else None
        guard.emit("answer", question | {"answer": price_given}, to=asker["pit"])

    guard.emit("question", question, to=sid, callback=tell, callback_timeout=20, on_timeout=tell)


@guard.task(every=1.0)
def tick() -> None:
    """Tell all clients the prices, and who is on this process."""
    now = int(time.time())
    guard.emit("tick", {
        "process": current_app.config["PROCESS"],
        "pid": os.getpid(),
        "at": now,
        "prices": {pit: price(pit, now) for pit in PITS},
        "traders": [{"sid": sid} | trader for sid, trader in traders.items()],
    })  # fmt: skip


def _sid() -> str:
    """Return the session id of the client whose event is being handled."""
    return str(request.sid)  # type: ignore[attr-defined]  # Flask-SocketIO adds it


def _quote(pit: str) -> dict[str, Any]:
    """Return the price of *pit* now."""
    if not pit:
        raise EventRejected("join a pit first")
    now = int(time.time())
    return {"pit": pit, "at": now, "price": price(pit, now)}

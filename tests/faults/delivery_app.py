"""An application with acknowledged delivery, for its fault tests.

A client says in the query of its handshake whose device it is (``identity``) and which room it
joins (``room``).
"""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request
from flask_socketio import join_room

from flask_socketio_guard import Retry
from flask_socketio_guard.delivery.redis_store import RedisStore
from flask_socketio_guard.delivery.steps import Expire
from tests.faults.app import Application, _log_to_file

if TYPE_CHECKING:
    from flask_socketio_guard import DeadLetter, Receipt

IN_REDIS = "DELIVERIES_IN_REDIS"
"""The setting that has messages kept in the Redis of the queue."""
DIES = "DIES_WITH_AN_EXPIRY"
"""The setting that has a process killed when the store has just answered that messages expired."""
DELIVERY_APP = "tests.faults.delivery_app:create_app()"


def create_app() -> Flask:
    """Return the application; always guarded."""
    os.environ["GUARD"] = "1"
    config = json.loads(os.environ.get("APP_CONFIG", "{}"))
    if config.pop(IN_REDIS, False):
        config["SOCKETIO_GUARD_DELIVERY_STORE"] = os.environ["REDIS_URL"]
    if config.pop(DIES, False):
        _die_with_an_expiry()
    os.environ["APP_CONFIG"] = json.dumps(config)
    _log_to_file()
    application = Application()
    _add_handlers(application)
    _add_routes(application)
    return application.app


def _die_with_an_expiry() -> None:
    do = RedisStore.do

    def do_or_die(store: RedisStore, step: Any) -> Any:
        result = do(store, step)
        if isinstance(step, Expire) and result:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    RedisStore.do = do_or_die  # type: ignore[method-assign]


def _add_handlers(application: Application) -> None:
    guard = application.guard

    @application.socketio.on("connect")
    def connect(_auth: Any = None) -> None:
        sid = request.sid  # type: ignore[attr-defined]
        if identity := request.args.get("identity"):
            guard.identify(sid, identity)
        if room := request.args.get("room"):
            join_room(room)

    @guard.on_dead_letter
    def dead(letter: DeadLetter) -> None:
        delivery = letter.delivery
        application.calls.append(["dead", delivery.id, str(delivery.state), delivery.arguments])

    @application.socketio.on("echo")
    def echo(value: Any) -> Any:
        return value


def _add_routes(application: Application) -> None:
    app, guard = application.app, application.guard

    def note(outcome: str) -> Any:
        def called(receipt: Receipt) -> None:
            application.calls.append([outcome, receipt.id, str(receipt.state)])

        return called

    @app.get("/")
    def index() -> str:
        return "here"

    @app.get("/state")
    def state() -> Response:
        return jsonify(application.state())

    @app.post("/deliver")
    def deliver() -> Response:
        options = request.get_json()
        values = options.pop("values", [None])
        if "retry" in options:
            options["retry"] = Retry(*options["retry"])
        hooks = {}
        if options.pop("hooks", False):
            hooks = {"on_delivered": note("delivered"), "on_expired": note("expired")}
        receipts = [guard.deliver("news", value, **options, **hooks) for value in values]
        return jsonify([receipt.id for receipt in receipts])

    @app.post("/receipts")
    def receipts() -> Response:
        found = [guard.receipt(id) for id in request.get_json()["ids"]]
        return jsonify([[str(receipt.state), receipt.attempts] for receipt in found])

    @app.post("/acknowledged")
    def acknowledged() -> Response:
        receipt = guard.receipt(request.get_json()["id"])
        return jsonify([receipt.acknowledged_by, receipt.acknowledgements])

    @app.post("/wait")
    def wait() -> Response:
        body = request.get_json()
        return jsonify(str(guard.receipt(body["id"]).wait(body["seconds"])))

    @app.post("/cancel")
    def cancel() -> Response:
        return jsonify(guard.receipt(request.get_json()["id"]).cancel())

    @app.get("/dead-letters")
    def dead_letters() -> Response:
        return jsonify(
            [
                [letter.delivery.id, str(letter.delivery.state), json.loads(letter.delivery.body)]
                for letter in guard.dead_letters()
            ]
        )

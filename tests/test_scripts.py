"""``deliveries.js``, in Node.js."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.support.javascript import require_client
from tests.support.servers import PROJECT_ROOT

_SCRIPT = PROJECT_ROOT / "flask_socketio_guard" / "static" / "deliveries.js"
_PROGRAM = """
const { onDelivery } = require(process.argv[1]);
const told = [];
console.error = (what) => told.push(["error", String(what)]);
const listeners = {};
const socket = { on: (event, listener) => (listeners[event] = listener) };
onDelivery(socket, "note", async (value, more) => {
  told.push(["handled", value, more ?? null]);
  if (value === "fail") throw new Error("mine");
  return value === "refuse" ? { error: "no" } : undefined;
}, 2);
(async () => {
  for (const values of JSON.parse(process.argv[2])) {
    await listeners.note(...values, (...answer) => told.push(["acknowledged", ...answer]));
  }
  console.log(JSON.stringify(told));
})();
"""


def handle(*messages: list[Any]) -> list[list[Any]]:
    """Have the script handle messages; return what happened."""
    require_client()
    command = ["node", "-e", _PROGRAM, str(_SCRIPT), json.dumps(messages)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    told: list[list[Any]] = json.loads(result.stdout)
    return told


def test_each_message_is_handled_once_and_acknowledged_each_time() -> None:
    told = handle(["a", 1, {"delivery_id": "5f"}], ["a", 1, {"delivery_id": "5f"}])
    assert told == [["handled", "a", 1], ["acknowledged", None], ["acknowledged", None]]


def test_one_whose_handler_fails_is_not_acknowledged_and_handled_again() -> None:
    told = handle(["fail", {"delivery_id": "5f"}], ["fail", {"delivery_id": "5f"}])
    once = [["handled", "fail", None], ["error", "Error: mine"]]
    assert told == once * 2


def test_what_the_handler_returns_may_refuse() -> None:
    told = handle(["refuse", {"delivery_id": "5f"}])
    assert told[-1] == ["acknowledged", {"error": "no"}]


def test_a_message_without_an_id_is_neither_handled_nor_acknowledged() -> None:
    for values in (["a"], [{"b": 1}], []):
        ((kind, text),) = handle(values)
        assert kind == "error"
        assert "with_id=True" in text


def test_no_more_are_remembered_than_asked_for() -> None:
    told = handle(*(["a", {"delivery_id": id}] for id in ("1", "2", "3", "3", "1")))
    assert [entry[0] for entry in told].count("handled") == 4

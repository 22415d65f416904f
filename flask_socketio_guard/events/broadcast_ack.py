"""Broadcasts that every client of a room acknowledges, across all processes."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.runtime import Flag, Runtime, clock
from ..events.acknowledgements import (
    BROADCAST_ANSWER,
    BROADCAST_CALL,
    BROADCAST_PARTICIPANTS,
    AckCallback,
    Question,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..events.acknowledgements import Recipients

_BATCH_SIZE = 50  # clients asked before other tasks get to run


@dataclass(frozen=True)
class BroadcastAnswers:
    """The acknowledgements of a room.

    Attributes:
        answers: Each client's answer by session id: ``None``, one value, or a list of values
            if the client passed several.
        missing: Sorted session ids of the clients that did not answer in time.
        silent_processes: Number of processes that did not report in time which clients they
            asked; ``None`` if the number of processes is unknown.
    """

    answers: dict[str, Any]
    missing: tuple[str, ...]
    silent_processes: int | None

    @property
    def is_complete(self) -> bool:
        """Whether every client has answered and every process has reported its clients."""
        return not self.missing and self.silent_processes == 0


@dataclass(eq=False)
class _BroadcastAck:
    done: Flag
    others: int | None = None  # number of other processes; None if unknown
    asked: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    answers: dict[str, Any] = field(default_factory=dict)
    participants: set[object] = field(default_factory=set)

    def add(self, sids: Iterable[str]) -> None:
        new = {sid for sid in sids if isinstance(sid, str)} - self.asked
        self.asked |= new
        self.open |= new

    def check(self) -> None:
        """Wake the caller once every client has answered or is gone."""
        if self.others is not None and len(self.participants) > self.others and not self.open:
            self.done.set()

    def take(self, sid: object, answer: object) -> None:
        if sid in self.open:
            assert isinstance(sid, str)
            self.open.discard(sid)
            if isinstance(answer, list):
                self.answers[sid] = answer if len(answer) > 1 else answer[0] if answer else None
        self.check()


class BroadcastAcks:
    """The broadcasts that this process has sent, and those it relays for other processes.

    Args:
        runtime: Provides flags and yields control.
        recipients: The clients of this process.
        publish: Sends a message to all other processes; ``None`` if there are none.
        spawn: ``spawn(name, target)`` runs *target* in a task of its own.
        recording: Wraps a function; the wrapper records exceptions instead of raising them.
        count_others: Returns how many other processes received the message published last;
            ``None`` if unknown. It may block for up to the given number of seconds.
        host_id: Returns the name of this process on the queue.
    """

    def __init__(
        self,
        runtime: Runtime,
        recipients: Recipients,
        *,
        publish: Callable[[dict[str, Any]], None] | None,
        spawn: Callable[[str, Callable[[], object]], None],
        recording: Callable[[Callable[..., object]], Callable[..., object]],
        count_others: Callable[[float], int | None],
        host_id: Callable[[], str],
    ) -> None:
        self._runtime = runtime
        self._recipients = recipients
        self._publish = publish
        self._spawn = spawn
        self._recording = recording
        self._count_others = count_others
        self._host_id = host_id
        self._open: dict[str, _BroadcastAck] = {}

    def ask(
        self, event: str, arguments: list[Any], *, room: str, namespace: str, timeout: float
    ) -> BroadcastAnswers:
        """Send an event to every client in *room* and wait up to *timeout* seconds for answers.

        Raises:
            TypeError: *arguments* cannot be encoded as JSON; nothing has been sent.
            ValueError: The same, for example for a NaN.
        """
        text = _text(arguments)  # encode first: nothing is sent if this raises
        id = secrets.token_hex(8)
        ack = self._open[id] = _BroadcastAck(self._runtime.flag())
        deadline = clock() + timeout
        try:
            if self._publish is None:
                ack.others = 0
            else:
                self._publish(
                    {
                        "method": BROADCAST_CALL,
                        "survey": id,
                        "event": event,
                        "data": arguments,
                        "namespace": namespace,
                        "room": room,
                        "timeout": timeout,
                        "host_id": self._host_id(),
                    }
                )
            self._runtime.run_on_loop(self._ask_own, ack, event, text, room, namespace, timeout)
            if self._publish is not None:
                ack.others = self._count_others(max(0.0, deadline - clock()))
            ack.check()
            ack.done.wait(max(0.0, deadline - clock()))
        finally:
            del self._open[id]
        missing = tuple(sorted(ack.asked - ack.answers.keys()))
        silent = None
        if ack.others is not None:
            silent = max(0, ack.others + 1 - len(ack.participants))
        return BroadcastAnswers(dict(ack.answers), missing, silent)

    def _ask_own(
        self,
        ack: _BroadcastAck,
        event: str,
        arguments: str,
        room: str,
        namespace: str,
        timeout: float,
    ) -> None:
        """Ask the clients of this process."""
        sids = list(self._recipients.find(room, namespace))
        ack.add(sids)
        ack.participants.add(None)
        self._ask_each(sids, namespace, event, arguments, clock() + timeout, ack.take)
        ack.check()

    def take(self, message: dict[str, Any]) -> None:
        """Handle a message from another process without blocking."""
        if message["method"] == BROADCAST_CALL:
            self._spawn("broadcast call", partial(self._ask_here, message))
            return
        ack = self._open.get(str(message.get("survey")))
        if ack is None or message.get("to") != self._host_id():
            return
        if message["method"] == BROADCAST_PARTICIPANTS:
            sids = message.get("sids")
            if isinstance(sids, list):
                ack.add(sids)
                ack.participants.add(message.get("host_id"))
                ack.check()
        else:
            ack.take(message.get("sid"), message.get("answer"))

    def _ask_here(self, message: dict[str, Any]) -> None:
        """Ask this process's clients on behalf of another process."""
        assert self._publish is not None
        namespace, event, text = message["namespace"], message["event"], _text(message["data"])
        reply = {"survey": message["survey"], "to": message["host_id"]}
        own = {"host_id": self._host_id()}
        deadline = clock() + float(message["timeout"])
        sids = list(self._recipients.find(message["room"], namespace))
        self._publish({"method": BROADCAST_PARTICIPANTS, **reply, "sids": sids, **own})
        publish = self._publish

        def answered(sid: str, answer: object) -> None:
            message = {"method": BROADCAST_ANSWER, **reply, "sid": sid}
            try:
                publish({**message, "answer": answer, **own})
            except (TypeError, ValueError):  # bytes, for example: do not let the caller time out
                publish({**message, "answer": None, **own})
                raise

        self._ask_each(sids, namespace, event, text, deadline, answered)

    def _ask_each(
        self,
        sids: list[str],
        namespace: str,
        event: str,
        arguments: str,
        deadline: float,
        take: Callable[[str, object], None],
    ) -> None:
        left = max(0.0, deadline - clock())  # once: callbacks with equal timeouts are cheapest
        for count, sid in enumerate(sids, 1):
            self._put(sid, namespace, event, arguments, left, take)
            if count % _BATCH_SIZE == 0:
                self._runtime.yield_control()

    def _put(
        self,
        sid: str,
        namespace: str,
        event: str,
        arguments: str,
        timeout: float,
        take: Callable[[str, object], None],
    ) -> None:
        """Ask one client; *take* gets its session id and its answer, or ``None`` if it is lost."""

        def answered(*answer: Any) -> None:
            take(sid, list(answer))

        def lost(_reason: str) -> None:
            take(sid, None)

        # Both run inline in the code that reads the client's packets or handles its disconnect.
        # A full outbox, or an answer that cannot be encoded as JSON, must not break that code.
        recording = self._recording
        callback = AckCallback(recording(answered), timeout, recording(lost), is_inline=True)
        question = Question(namespace, event, arguments, callback)
        if self._recipients.ask(sid, question) is None:
            take(sid, None)


def _text(arguments: list[Any]) -> str:
    return json.dumps(arguments, separators=(",", ":"), allow_nan=False)

"""The message queue of a process: what it publishes, what it hears, and how that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.component import Check, Component, Status, Watch
from ..core.process import flush_in_children
from ..core.runtime import clock
from ..core.supervisor import current_task
from ..states import ListenerState, TaskState
from ..telemetry import records
from ..telemetry.printable import printable, without_secrets
from ..telemetry.records import (
    LISTENER_TASK,
    BrokerChange,
    Failure,
    ListenerChange,
    OutboxLoss,
    TaskChange,
    logger,
)
from .listener import Listener
from .outbox import BATCH_MESSAGES, Outbox
from .reachability import Reachability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import GuardConfig
    from ..core.lifecycle import Lifecycle
    from ..core.runtime import Runtime
    from ..core.supervisor import TaskHandle
    from ..telemetry.records import Telemetry
    from .transport import Transport

WRITER_TASK = "socketio-guard:outbox"
_WARN_FILL = 0.5
_LISTENING_POLL_INTERVAL = 0.01  # seconds


class MessageQueue(Component):
    """Outbox and listener over one transport.

    Args:
        runtime: For events and sleep.
        lifecycle: Runs writer, reader and prober, and says where the process stands.
        config: Settings.
        transport: Way to the broker.
        telemetry: Is told of what happens.
        handle: Takes one message of another process; see :class:`~.listener.Listener`.
        is_write_only: Whether the process never serves, and so hears nothing before it asks.

    Attributes:
        outbox: Messages on their way out.
        listener: The way in.
        broker: Whether the broker can be reached.
    """

    def __init__(
        self,
        runtime: Runtime,
        lifecycle: Lifecycle,
        config: GuardConfig,
        transport: Transport,
        *,
        telemetry: Telemetry,
        handle: Callable[[bytes | str | dict[str, object]], None],
        is_write_only: bool,
    ) -> None:
        self._runtime = runtime
        self._lifecycle = lifecycle
        self._config = config
        self._transport = transport
        self._telemetry = telemetry
        self._is_write_only = self._may_end_soon = is_write_only
        self._writer: TaskHandle | None = None
        broker = self.broker = Reachability(transport.check, on_change=self._broker_changed)
        self.outbox = Outbox(
            runtime,
            transport.publisher(broker.check),
            broker,
            max_messages=config.outbox_max_messages,
            max_bytes=config.outbox_max_bytes,
            batch_messages=BATCH_MESSAGES if config.fast else 1,
            is_dropping_oldest=config.outbox_overflow == "drop_oldest",
            reconnect_max_delay=config.reconnect_max_delay,
            resubscribe_timeout=config.resubscribe_timeout,
            is_listening=lambda: self.state in (ListenerState.RUNNING, ListenerState.ABSENT),
            on_lost=lambda *loss: telemetry.send(OutboxLoss(*loss)),
            on_trouble=self._refused,
            on_probe=lambda token: self.listener.probe_published(token),
        )
        self.listener = Listener(
            runtime,
            lifecycle.supervisor,
            broker,
            subscribe=transport.subscribe,
            handle=handle,
            send_probe=self.outbox.put_probe,
            probe_interval=config.probe_interval,
            probe_timeout=config.probe_timeout,
            reconnect_max_delay=config.reconnect_max_delay,
            on_change=lambda *change: telemetry.send(ListenerChange(*change)),
            on_message_failure=lambda exc: telemetry.send(
                Failure("listener", exc, "queue message")
            ),
        )
        self._subscription: object = telemetry.subscribe(records.task_changed, self._task_changed)

    @property
    def state(self) -> ListenerState:
        """What is known of the listener; ``ABSENT`` in a process that has not asked for one."""
        state = self.listener.state
        return (
            ListenerState.ABSENT if self._is_write_only and state is ListenerState.IDLE else state
        )

    def start(self, watch: Watch) -> None:
        """Start the writer."""
        del watch
        self._start_writing()

    def serve(self, watch: Watch) -> None:
        """Start the listener."""
        del watch
        if not self._is_write_only:
            self.listener.start()

    def _start_writing(self) -> None:
        lifecycle = self._lifecycle
        with lifecycle.lock:
            if self._writer is not None or lifecycle.stopping.is_set():
                return
            flush_in_children()
            self._writer = lifecycle.watch(WRITER_TASK, self.outbox.write, self.outbox.wake)

    def publish(self, payload: bytes) -> None:
        """Put a message into the outbox and see that it gets out of there.

        A process that serves nobody may end at any instant, without a word (``os._exit``),
        and often does so right behind its last emit; so does one that is about to exit. So it
        waits for a while until that is with the broker, as stock does.

        Raises:
            OutboxFull: See :meth:`.Outbox.put`.
        """
        self.outbox.put(payload)
        if self._writer is None:
            self._start_writing()
        if self._may_end_soon or not self._lifecycle.has_served:
            self._see_it_out()

    def _see_it_out(self) -> None:
        task = current_task()
        is_writer = task is not None and task.is_internal
        is_stopping = self._lifecycle.stopping.is_set()
        if not is_writer and not is_stopping and self._runtime.can_wait():
            self.outbox.settle(self._config.broker_timeout)

    def listen(self) -> None:
        """See that answers of other processes are heard.

        A process that only emits begins to listen when it asks for the first time, and
        waits until it hears, so that no answer comes too early.
        """
        if not self._is_write_only:
            return
        lifecycle, listener = self._lifecycle, self.listener
        lifecycle.serve()
        with lifecycle.lock:
            if listener.state is ListenerState.IDLE and not lifecycle.stopping.is_set():
                listener.start()
        deadline = clock() + self._config.resubscribe_timeout
        while listener.state is ListenerState.STARTING and clock() < deadline:
            self._runtime.sleep(_LISTENING_POLL_INTERVAL)

    def count_others(self, timeout: float) -> int | None:
        """Return how many other processes hear this one; ``None`` if that is not known.

        Args:
            timeout: Longest wait, in seconds, for what was published last to be out: only then
                it is known who hears it.
        """
        heard = self.outbox.subscribers if self.outbox.flush(timeout) else None
        return None if heard is None else heard - 1

    def flush_last(self) -> None:
        """Give what was emitted last a chance to get out before the process ends."""
        self._may_end_soon = True  # exit functions of the application may follow, and emit
        outbox, timeout = self.outbox, self._config.exit_flush_timeout
        if not len(outbox):
            return
        if outbox.trouble:
            is_out = False
        elif self._is_write_only or self.broker.has_answered:
            is_out = outbox.flush(timeout)
        else:
            # A test or a command where there is no broker: its end shall not be late.
            is_out = outbox.settle(timeout)
        if not is_out:
            outbox.close()

    def flush(self, timeout: float) -> bool:
        """Wait until the outbox is empty, but not for a right to publish that is not there."""
        outbox = self.outbox
        return outbox.settle(timeout) if outbox.trouble else outbox.flush(timeout)

    def stop(self, timeout: float) -> None:
        """Drop, and count, what could not be published."""
        del timeout
        self.listener.stopped()
        self.outbox.close()

    def abandon(self) -> None:
        """Have no part of it, in a forked child: connections and messages are the parent's."""
        self._subscription = None  # its listener is not the one that tasks are told of
        self.outbox.abandon()
        self.listener.abandon()

    # Health

    def checks(self) -> Mapping[str, Check]:
        """Return the checks of listener, broker and outbox."""
        listener, outbox, broker = self.listener, self.outbox, self.broker
        state = listener.state
        if state is ListenerState.RUNNING:
            status = Status.PASS
        elif state is ListenerState.RECONNECTING:
            status = self._outage()
        else:
            status = Status.FAIL
        age = None if listener.heard_at is None else round(clock() - listener.heard_at, 3)
        probes = "end to end" if self._transport.is_probing else "connection only"
        fill = Status.PASS
        if outbox.fill >= 1 and not outbox.trouble:
            fill = Status.FAIL
        elif outbox.fill >= _WARN_FILL or outbox.trouble:
            # Without a right to publish, a process serves its own clients.
            fill = Status.WARN
        return {
            "listener:state": Check(status, str(state), output=listener.trouble),
            "listener:probeAge": Check(Status.PASS, age, "s"),
            "listener:probes": Check(Status.PASS, probes),
            "listener:restarts": Check(Status.PASS, listener.restarts),
            "broker:reachable": Check(Status.PASS, True)
            if broker.is_reachable
            else Check(self._outage(), False, output=broker.trouble),
            "outbox:messages": Check(fill, len(outbox), output=outbox.trouble),
            "outbox:size": Check(fill, outbox.size, "B"),
        }

    def _outage(self) -> Status:
        """Say what it means that the broker does not answer.

        All processes have that trouble, if it is one of the broker. A process that has never
        reached it, or that it will not have, was set up wrongly, and is not to get traffic.
        """
        is_own = self.broker.is_refusing or self.listener.heard_at is None
        return Status.FAIL if is_own or self._config.broker_down == "fail" else Status.WARN

    # Records

    def _broker_changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        if is_reachable:
            self.listener.broker_answers()
        else:
            self.listener.broker_lost(reason)
        is_refusing = self.broker.is_refusing
        self._telemetry.send(BrokerChange(is_reachable, reason, duration, is_refusing))

    def _task_changed(self, change: TaskChange) -> None:
        if change.name == LISTENER_TASK and change.new is TaskState.BACKING_OFF:
            self.listener.crashed(f"the reader ended: {change.reason}")

    def _refused(self, reason: str) -> None:
        if reason:
            logger.error(
                "the message queue refuses what is published: clients of this process get it, and "
                "others what the outbox keeps until it is no longer refused: %s",
                printable(without_secrets(reason)),
            )
        else:
            logger.warning("the message queue takes what is published again")
        self._lifecycle.refresh()

"""The message queue of a process: its outbox, its listener, and their health."""

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
        runtime: Provides flags and sleep.
        lifecycle: Runs writer, reader and prober, and knows the state of the process.
        config: Settings.
        transport: Connects to the broker.
        telemetry: Receives records of losses, failures and changes of state.
        handle: Handles one message of another process; see :class:`~.listener.Listener`.
        is_write_only: Whether the process serves no clients, and so does not listen until it
            asks other processes for something.

    Attributes:
        outbox: Messages to publish.
        listener: Receives the messages of other processes.
        broker: Whether the broker is reachable.
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
        """State of the listener; ``ABSENT`` in a write-only process that has not started one."""
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
        """Put a message into the outbox, and start the writer if necessary.

        A process that serves no clients may end at any moment, even without exit functions
        (``os._exit``), and often does so right after its last emit. The same is true for a
        process that is exiting. In both, this method blocks for up to ``broker_timeout`` seconds
        until the broker has the message, as upstream's emit does.

        Raises:
            OutboxFull: See :meth:`.Outbox.put`.
        """
        self.outbox.put(payload)
        if self._writer is None:
            self._start_writing()
        if self._may_end_soon or not self._lifecycle.has_served:
            self._wait_until_published()

    def _wait_until_published(self) -> None:
        task = current_task()
        is_writer = task is not None and task.is_internal
        is_stopping = self._lifecycle.stopping.is_set()
        if not is_writer and not is_stopping and self._runtime.can_wait():
            self.outbox.settle(self._config.broker_timeout)

    def listen(self) -> None:
        """Make sure that answers of other processes are received.

        A write-only process starts its listener at its first question. This method then blocks
        until the listener has subscribed, for up to ``resubscribe_timeout`` seconds, because
        answers that arrive earlier would be lost.
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
        """Return the number of other processes that receive messages; ``None`` if unknown.

        The broker reports the number of subscribers when it has taken a message.

        Args:
            timeout: Longest wait in seconds until the last message is published.
        """
        subscribers = self.outbox.subscribers if self.outbox.flush(timeout) else None
        return None if subscribers is None else subscribers - 1

    def flush_last(self) -> None:
        """Publish the last messages before the process ends, or drop them after a timeout."""
        self._may_end_soon = True  # exit functions of the application may still emit
        outbox, timeout = self.outbox, self._config.exit_flush_timeout
        if not len(outbox):
            return
        if outbox.trouble:
            is_out = False
        elif self._is_write_only or self.broker.has_answered:
            is_out = outbox.flush(timeout)
        else:
            # A test or a command without a broker: do not delay its exit.
            is_out = outbox.settle(timeout)
        if not is_out:
            outbox.close()

    def flush(self, timeout: float) -> bool:
        """Wait until the outbox is empty, but do not wait for a broker that refuses messages."""
        outbox = self.outbox
        return outbox.settle(timeout) if outbox.trouble else outbox.flush(timeout)

    def stop(self, timeout: float) -> None:
        """Drop and count the messages that could not be published."""
        del timeout
        self.listener.stopped()
        self.outbox.close()

    def abandon(self) -> None:
        """Drop everything in a forked child: connections and messages are the parent's."""
        self._subscription = None  # the child's tasks must not reach the parent's listener
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
            # A process that may not publish can still serve its own clients.
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
        """Return the health status while the broker does not answer.

        An outage of the broker affects all processes alike. A process that has never reached the
        broker, or that the broker refuses, is misconfigured and must not receive traffic.
        """
        is_misconfigured = self.broker.is_refusing or self.listener.heard_at is None
        if is_misconfigured or self._config.broker_down == "fail":
            return Status.FAIL
        return Status.WARN

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
                "the message queue refuses to publish messages: clients of this process still "
                "receive them, those of other processes only what the outbox can keep until "
                "publishing is allowed again: %s",
                printable(without_secrets(reason)),
            )
        else:
            logger.warning("the message queue publishes messages again")
        self._lifecycle.refresh()

"""The listener on the message queue, whose liveness is proven by probes.

It consists of two tasks: the reader, which runs no code of the application, and
the prober, which checks the reader. A probe is published like any message and must
come back through the reader; neither a running task nor a subscriber count proves
that messages arrive.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..backoff import Backoff
from ..core.runtime import TIME_SLICE, Flag, Runtime, clock
from ..core.supervisor import Restart, RestartPolicy, Supervisor, TaskHandle, is_stopping, sleep
from ..errors import BrokerError
from ..states import LISTENER_TRANSITIONS, ListenerEvent, ListenerState, StateMachine
from ..telemetry.records import LISTENER_TASK
from .transport import Probe, Subscription

if TYPE_CHECKING:
    from collections.abc import Callable

    from .reachability import Reachability

PROBE_TASK = "socketio-guard:probe"

_READ_TIMEOUT = 0.5  # seconds
_STABLE_TIME = 1.0  # seconds; the loss of a connection that lasted longer resets the backoff
_VERDICT_TIME = 0.1  # seconds before the probe timeout at which checking the reader begins


class Listener:
    """The supervised listener of one process.

    Args:
        runtime: Provides flags and sleep.
        supervisor: Runs reader and prober.
        broker: Reachability of the broker, shared with the outbox.
        subscribe: Makes a subscription over a new connection, or raises
            :class:`~flask_socketio_guard.errors.BrokerError`.
        handle: Handles one message; must neither block nor run code of the application.
        send_probe: Publishes the probe with the given token.
        probe_interval: Seconds between probes.
        probe_timeout: Seconds after which a probe is overdue.
        reconnect_max_delay: Cap of the delay between attempts to subscribe, in seconds.
        on_change: Called as ``on_change(old, new, reason)``.
        on_message_failure: Called with an exception that *handle* raised.
    """

    def __init__(
        self,
        runtime: Runtime,
        supervisor: Supervisor,
        broker: Reachability,
        *,
        subscribe: Callable[[], Subscription],
        handle: Callable[[bytes | str | dict[str, object]], None],
        send_probe: Callable[[int], None],
        probe_interval: float,
        probe_timeout: float,
        reconnect_max_delay: float,
        on_change: Callable[[ListenerState, ListenerState, str], None],
        on_message_failure: Callable[[BaseException], None],
    ) -> None:
        self._runtime = runtime
        self._supervisor = supervisor
        self._broker = broker
        self._subscribe = subscribe
        self._handle = handle
        self._send_probe = send_probe
        self._probe_interval = probe_interval
        self._probe_timeout = probe_timeout
        self._backoff = Backoff(reconnect_max_delay)
        self._on_message_failure = on_message_failure
        self._lock = threading.RLock()  # a subscriber of a change may cause the next one
        self._machine: StateMachine[ListenerState, ListenerEvent] = StateMachine(
            ListenerState.IDLE, LISTENER_TRANSITIONS, on_change=on_change
        )
        self._reader: TaskHandle | None = None
        self._subscription: Subscription | None = None
        self._run: object | None = None
        self._refusals = 0  # failures to subscribe, in a row, to a broker that answers
        self._token = 0
        self._published = 0
        self._pending: tuple[int, float] | None = None  # oldest unreturned: token, sent at
        self._probe_now: Flag = runtime.flag()
        self.heard_at: float | None = None
        """When a probe last came back, on the runtime's clock; ``None`` if none ever has."""
        self.trouble = ""
        """Category of the error that prevents subscribing although the broker answers."""

    @property
    def state(self) -> ListenerState:
        """State of the listener."""
        return self._machine.state

    @property
    def restarts(self) -> int:
        """Number of times that the reader was restarted."""
        return 0 if self._reader is None else self._reader.restarts

    def start(self) -> None:
        """Start reader and prober."""
        self._send(ListenerEvent.START)
        policy = RestartPolicy(
            restart=Restart.ALWAYS, first_delay=0.0, max_delay=5.0, max_restarts=None
        )
        self._reader = self._supervisor.watch(
            LISTENER_TASK, self._read, policy=policy, is_internal=True, wake=self._close
        )
        self._supervisor.watch(
            PROBE_TASK, self._probe, policy=policy, is_internal=True, wake=self._probe_now.set
        )

    def stopped(self) -> None:
        """Record that both tasks have ended."""
        self._send(ListenerEvent.STOP)

    def abandon(self) -> None:
        """Release the connection in a forked child: it is the parent's."""
        self._run = None
        self._close()

    def crashed(self, reason: str) -> None:
        """Record that the reader ended, or cannot subscribe although the broker answers."""
        self._send(ListenerEvent.CRASHED, reason)

    def broker_lost(self, reason: str) -> None:
        """Record that the broker does not answer."""
        self._send(ListenerEvent.BROKER_LOST, reason)

    def broker_answers(self) -> None:
        """Probe at once after an outage; probes from before it prove nothing."""
        self._pending = None
        self._probe_now.set()

    def probe_published(self, token: int) -> None:
        """Record that the broker has accepted the probe *token*."""
        self._published = max(self._published, token)

    # The reader

    def _read(self) -> None:
        self._run = run = object()
        failures = 0
        while not is_stopping() and self._run is run:
            started_at = clock()
            try:
                self._read_one_connection(run)
            except BrokerError as exc:
                if is_stopping() or self._run is not run:
                    return
                if clock() - started_at > _STABLE_TIME and self._subscription is not None:
                    failures = 0
                self._connection_failed(exc, failures)
                failures += 1

    def _connection_failed(self, exc: BrokerError, failures: int) -> None:
        reason = str(exc)
        is_established = self._subscription is not None
        if is_established:
            self._broker.report_lost(reason, exc.category)
            self.broker_lost(reason)
        elif self._broker.check():
            # The broker may have recovered between the failure and the check: one refusal alone
            # proves nothing.
            self._refusals += 1
            if self._refusals > 1:
                self.trouble = exc.category
                self.crashed(f"cannot subscribe: {reason}")
        else:
            self._refusals = 0
        if failures or not is_established:
            sleep(self._runtime, self._backoff.delay(failures))

    def _read_one_connection(self, run: object) -> None:
        """Subscribe, and pass messages to *handle* until the connection is lost."""
        self._subscription = None
        subscription = self._subscription = self._subscribe()
        self._refusals = 0
        try:
            self._broker.report_answer()
            self._probe_now.set()
            while not is_stopping():
                arrivals = subscription.read(_READ_TIMEOUT)
                slice_ends_at = clock() + TIME_SLICE
                for arrival in arrivals:
                    if clock() >= slice_ends_at:
                        self._runtime.yield_control()  # several broadcasts to many clients
                        slice_ends_at = clock() + TIME_SLICE
                    if self._run is not run:
                        return  # replaced meanwhile by another reader
                    if isinstance(arrival, Probe):
                        self._probe_returned(arrival.token)
                    else:
                        self._deliver(arrival)
                if len(arrivals) > 1:
                    # read() does not block, and so does not yield, while messages are available.
                    self._runtime.yield_control()
        finally:
            subscription.close()

    def _deliver(self, message: bytes | str | dict[str, object]) -> None:
        try:
            self._handle(message)
        except Exception as exc:  # noqa: BLE001 - one message must not stop the next
            self._on_message_failure(exc)

    def _close(self) -> None:
        if self._subscription is not None:
            self._subscription.close()

    # The prober

    def _probe(self) -> None:
        while not is_stopping():
            self._probe_now.clear()
            self._check_reader()
            self._token += 1
            if self._pending is None:
                self._pending = (self._token, clock())
            self._send_probe(self._token)
            self._probe_now.wait(self._time_to_next_check())

    def _time_to_next_check(self) -> float:
        if self._pending is None:
            return self._probe_interval
        remaining = self._overdue_at(self._pending) - clock()
        return min(self._probe_interval, remaining) if remaining > 0 else self._probe_interval

    def _overdue_at(self, pending: tuple[int, float]) -> float:
        return pending[1] + max(self._probe_timeout / 2, self._probe_timeout - _VERDICT_TIME)

    def _check_reader(self) -> None:
        """Replace the reader if a probe that the broker accepted has not come back in time."""
        pending = self._pending
        if pending is None or clock() < self._overdue_at(pending):
            return
        if self._subscription is not None and self._subscription.is_receiving:
            return  # a large message on a slow link
        # If the probe was never published, that is not the listener's fault.
        if not self._broker.check() or self._published < pending[0]:
            return
        if self._pending is not pending:
            return  # it came back while the broker was checked
        self._pending = None
        self._run = None
        elapsed = clock() - pending[1]
        self._send(ListenerEvent.PROBE_OVERDUE, f"a probe has not come back after {elapsed:.1f} s")
        self._close()
        if self._reader is not None:
            self._reader.replace("a probe is overdue")

    def _probe_returned(self, token: int) -> None:
        if token > self._token:
            return  # forged: anyone who can write to the channel can send one
        self.heard_at = clock()
        self.trouble = ""
        if self._pending is not None and token >= self._pending[0]:
            self._pending = None
        self._send(ListenerEvent.HEARD)

    def _send(self, event: ListenerEvent, reason: str = "") -> None:
        with self._lock:
            if self._machine.allows(event):
                self._machine.send(event, reason)

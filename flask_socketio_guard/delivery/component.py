"""Acknowledged delivery as a whole: store, store client, API and dispatcher of one process."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..core.component import Check, Component, Status, Watch
from ..errors import ConfigError, DeliveryStoreError
from ..queue.reachability import Reachability
from ..telemetry.records import DeliveryEnd, DeliveryLoss, Failure, StoreChange, logger
from .api import DeliveryApi
from .batching_store_client import BatchingStoreClient
from .dispatcher import Connections, Dispatcher
from .memory import MemoryStore
from .records import DEAD, DeadLetter, Retry
from .redis_store import RedisStore
from .request import require_limit
from .store import DeliveryStore, SharedStore
from .store_client import DirectStoreClient
from .sync import ChangeFeed, ExpiryLeader, Gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..clients.connections import Connection
    from ..config import GuardConfig
    from ..core.deadlines import Deadlines
    from ..core.runtime import Runtime
    from ..telemetry.records import Telemetry
    from .receipts import Receipt
    from .records import Delivery
    from .request import DeliveryRequest
    from .store_client import StoreClient

_MAX_DEAD_LETTERS: Final = 1000
_WARN_FILL: Final = 0.5


class Clients(Connections, Protocol):
    """The clients of this process."""

    def present(self) -> Iterable[tuple[str, str]]:
        """Yield what clients can be reached by, with namespaces: session ids and rooms."""

    def rooms_of(self, sid: str, namespace: str) -> Iterable[str]:
        """Yield what one client can be reached by."""


class Deliveries(Component):
    """The component that builds and runs the parts.

    Args:
        config: Settings.
        runtime: For events and tasks.
        clients: The clients of this process.
        deadlines: For timeouts.
        channel: Of the message queue; applications with different ones share nothing.
        encode: Returns JSON text without spaces around it.
        run: Runs a function of the application in a task of its own.
        telemetry: Receives the records of ends, failures and the store.
        hooks: Of the application, called with each :class:`.DeadLetter`; the list may grow.
        has_queue: Whether there is a message queue, and so perhaps other processes.
        is_write_only: Whether this process serves nobody.
    """

    def __init__(
        self,
        config: GuardConfig,
        runtime: Runtime,
        clients: Clients,
        *,
        deadlines: Deadlines,
        channel: str,
        encode: Callable[[object], str],
        run: Callable[[Callable[..., object], tuple[object, ...]], None],
        telemetry: Telemetry,
        hooks: list[Callable[[DeadLetter], object]],
        has_queue: bool,
        is_write_only: bool,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._clients = clients
        self._deadlines = deadlines
        self._run = run
        self._telemetry = telemetry
        self._hooks = hooks
        self._has_queue = has_queue
        self._is_write_only = is_write_only
        self._has_warned_of_memory = False
        self._retry = Retry(config.delivery_ack_timeout)
        self.store = _store(config, channel)
        self._gap = Gap(self._look_again)
        self._server = Reachability(
            lambda: None, on_change=lambda *change: telemetry.send(StoreChange(*change))
        )
        self._shared: BatchingStoreClient | None = None
        self._local: DirectStoreClient | None = None
        store_client: StoreClient
        if isinstance(self.store, SharedStore):
            store_client = self._shared = BatchingStoreClient(
                runtime,
                self.store,
                on_end=self._ended,
                on_failure=lambda exc: telemetry.send(Failure("hook", exc, "deadline")),
                on_unsure=self._gap.open,
                server=self._server,
            )
        else:
            store_client = self._local = DirectStoreClient(self.store, on_end=self._ended)
        self.store_client = store_client
        self.api = DeliveryApi(
            runtime,
            store_client,
            encode=encode,
            max_size=config.delivery_max_message_bytes,
            run=run,
        )
        self.dispatcher = Dispatcher(
            store_client, clients, deadlines, max_in_flight=config.delivery_max_in_flight
        )
        self.api.dispatcher = self.dispatcher

    def start(self, watch: Watch) -> None:
        """Start the tasks that a shared store needs."""
        if self._shared is None:
            return
        assert isinstance(self.store, SharedStore)
        feed = ChangeFeed(
            self._runtime,
            self.store,
            self._gap,
            on_stored=self.dispatcher.stored,
            on_end=self._ended,
            on_answer=self._answered,
            on_lost=self._server.report_lost,
        )
        watch("socketio-guard:deliveries", self._shared.run, self._shared.wake)
        watch("socketio-guard:delivery-changes", feed.follow, None)

    def serve(self, watch: Watch) -> None:
        """Start to expire messages, if no other process does.

        A process that only emits does not: it may end at any time.
        """
        if not isinstance(self.store, SharedStore) or self._is_write_only:
            return
        leader = ExpiryLeader(
            self._runtime,
            self.store,
            self._gap,
            lease=self._config.delivery_lease,
            on_forgotten=self.dispatcher.join_again,
            on_end=self._ended,
        )
        watch("socketio-guard:delivery-leader", leader.lead, None)

    def require_usable_store(self) -> None:
        """Make sure that Redis is not a cluster, if it answers now.

        Raises:
            ConfigError: It is one.
        """
        if isinstance(self.store, RedisStore):
            with suppress(DeliveryStoreError):
                self.store.require_no_cluster()

    def poll(self) -> None:
        """Expire messages in memory, and look up those that did not reach the dispatcher."""
        if self._local is not None:
            self._local.expire()
        if self.api.is_behind:
            self.api.is_behind = False
            self.dispatcher.look_again(self._clients.present())

    def stop(self, timeout: float) -> None:
        """Apply the steps that are still queued, within *timeout* seconds."""
        if self._shared is not None:
            self._shared.flush(min(timeout, self._config.exit_flush_timeout))
        self.store.close()
        self.record_loss()

    def record_loss(self) -> None:
        """Record how many messages are lost with the memory of this process."""
        count = len(self.store) if isinstance(self.store, MemoryStore) else 0
        if count:
            self._telemetry.send(DeliveryLoss(count))

    def checks(self) -> dict[str, Check]:
        """Return whether a shared store answers, and how full the store is.

        A full one is no failure: other traffic goes on.
        """
        checks: dict[str, Check] = {}
        if self._shared is not None:
            is_reachable = self._server.is_reachable
            status = Status.PASS if is_reachable else Status.WARN
            checks["deliveries:store"] = Check(status, is_reachable)
        usage = self.store.usage
        if usage is not None:
            trouble = "memory" if usage.is_out_of_memory else ""
            fill = Status.WARN if trouble or usage.fill >= _WARN_FILL else Status.PASS
            checks["deliveries:messages"] = Check(fill, usage.messages, output=trouble)
            checks["deliveries:size"] = Check(fill, usage.size, "B")
        return checks

    def gauges(self) -> dict[str, int]:
        """Return how many messages await an acknowledgement, and how full the store is."""
        gauges = {"deliveries:inFlight": self.dispatcher.in_flight}
        if (usage := self.store.usage) is not None:
            gauges["deliveries:fillPercent"] = int(100 * usage.fill)
        return gauges

    # Clients

    def connected(self, client: Connection) -> None:
        """Send what was waiting for a client; sent after its CONNECT packet."""
        dispatcher, namespace = self.dispatcher, client.namespace
        for room in self._clients.rooms_of(client.sid, namespace):
            if room != client.sid:
                dispatcher.recipient_online(room, namespace)
        dispatcher.session_opened(client.sid, namespace)

    def entered(self, client: Connection, room: str) -> None:
        """Send what was waiting for the members of a room."""
        self.dispatcher.recipient_online(room, client.namespace)

    def disconnected(self, client: Connection) -> None:
        """Hand the messages of a client that has left to others."""
        left = partial(
            self.dispatcher.session_closed,
            client.sid,
            client.namespace,
            client.surviving_transport(),
        )
        if self._runtime.can_kill:
            left()
        else:
            # The lock of the connections is held here; a thread in the dispatcher may wait for it.
            self._deadlines.call_later(0.0, left)

    def identify(self, client: Connection, identity: str) -> None:
        """Note that a client is a device of *identity*."""
        self._runtime.run_on_loop(self.dispatcher.identify, client.sid, client.namespace, identity)

    def deliver(self, request: DeliveryRequest) -> Receipt:
        """Store a message, and send it if its recipient is here; see :meth:`.DeliveryApi.put`."""
        return self.api.put(request, ttl=self._config.delivery_ttl, retry=self._retry)

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return at most *limit* dead letters, newest first.

        Raises:
            ConfigError: *limit* is not an integer >= 1.
            DeliveryStoreError: The store does not answer.
        """
        require_limit(limit)
        return self.store_client.dead_letters(limit)

    def require_store(self) -> None:
        """Make sure that the processes of the recipients can read what is stored.

        Raises:
            ConfigError: This process only emits, and its store is its own memory.
        """
        if self.store.is_shared or not self._has_queue:
            return
        if self._is_write_only:
            raise ConfigError(
                "a process that only emits needs a store that it shares with others: set "
                "SOCKETIO_GUARD_DELIVERY_STORE in its environment, or pass delivery_store="
            )
        if not self._has_warned_of_memory:
            self._has_warned_of_memory = True
            logger.warning(
                "acknowledged messages are kept in the memory of this process, although there is "
                "a message queue: set SOCKETIO_GUARD_DELIVERY_STORE"
            )

    def _answered(self) -> None:
        assert self._shared is not None
        if not self._shared.is_refused:  # a store may send changes, and yet refuse to write
            self._server.report_answer()

    def _look_again(self) -> None:
        self.dispatcher.look_again(self._clients.present())
        self.api.look_again()

    def _ended(self, delivery: Delivery, is_new: bool) -> None:
        self.api.ended(delivery)
        if not is_new:
            return
        state = delivery.state
        self._telemetry.send(
            DeliveryEnd(delivery.id, delivery.recipient, delivery.event, state, delivery.attempts)
        )
        if state in DEAD:
            for hook in self._hooks:
                self._run(hook, (DeadLetter(delivery, time.time()),))


def _store(config: GuardConfig, channel: str) -> DeliveryStore:
    if callable(config.delivery_store):
        made = config.delivery_store()
        if not isinstance(made, DeliveryStore):
            raise ConfigError(
                f"SOCKETIO_GUARD_DELIVERY_STORE must return a DeliveryStore, not {made!r}"
            )
        return made
    bounds: dict[str, Any] = {
        "max_messages": config.delivery_max_messages,
        "max_size": config.delivery_max_bytes,
        "retention": config.delivery_retention,
        "max_ended_size": config.delivery_max_receipt_bytes,
        "max_dead_letters": _MAX_DEAD_LETTERS,
        "max_dead_size": config.delivery_max_dead_letter_bytes,
        "dead_retention": config.delivery_dead_letter_retention,
    }
    if config.delivery_store is None:
        return MemoryStore(**bounds)
    return RedisStore(
        config.delivery_store,
        prefix=f"socketio-guard:{channel}:",
        host=uuid.uuid4().hex,
        timeout=config.broker_timeout,
        lease=config.delivery_lease,
        service=channel,
        **bounds,
    )

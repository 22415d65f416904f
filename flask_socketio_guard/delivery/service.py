"""Acknowledged delivery as a whole: store, desk, office and courier of one process."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..broker import Broker
from ..errors import ConfigError, DeliveryStoreError
from .courier import Courier
from .desk import LocalDesk
from .fleet import DeliveryFleet
from .memory import MemoryStore
from .office import DeliveryOffice
from .records import Retry
from .redis_store import RedisStore
from .shared_desk import SharedDesk
from .store import DeliveryStore, SharedStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..config import GuardConfig
    from ..hooks import Deadlines
    from ..runtime import Runtime
    from .courier import Connections
    from .desk import Desk
    from .records import Delivery

_MAX_DEAD_LETTERS: Final = 1000

Watch = Callable[[str, Callable[[], object], Callable[[], object] | None], object]


class DeliveryService:
    """Puts the parts together.

    Args:
        config: Settings.
        runtime: For events and tasks.
        connections: The clients.
        present: Returns recipients that are here, with their namespaces: clients and rooms.
        deadlines: For timeouts.
        channel: Of the message queue; applications with different ones share nothing.
        encode: Returns JSON text without spaces around it.
        run: Runs a function of the application in a task of its own.
        on_end: Called with each message that this process has ended.
        on_failure: Called with what a step raised that the store cannot do.
        on_store_change: Called as ``on_store_change(is_reachable, reason, duration)``.
    """

    def __init__(
        self,
        config: GuardConfig,
        runtime: Runtime,
        connections: Connections,
        *,
        present: Callable[[], Iterable[tuple[str, str]]],
        deadlines: Deadlines,
        channel: str,
        encode: Callable[[object], str],
        run: Callable[[Callable[..., object], tuple[object, ...]], None],
        on_end: Callable[[Delivery], None],
        on_failure: Callable[[BaseException], None],
        on_store_change: Callable[[bool, str, float], None],
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._present = present
        self._on_end = on_end
        self.retry = Retry(config.delivery_ack_timeout)
        self.store = _store(config, channel)
        self._fleet: DeliveryFleet | None = None
        self._server = Broker(lambda: None, on_change=on_store_change)
        self._shared: SharedDesk | None = None
        self._local: LocalDesk | None = None
        desk: Desk
        if isinstance(self.store, SharedStore):
            desk = self._shared = SharedDesk(
                runtime,
                self.store,
                on_end=self._ended,
                on_failure=on_failure,
                on_unsure=self._note_gap,
                server=self._server,
            )
        else:
            desk = self._local = LocalDesk(self.store, on_end=self._ended)
        self.desk = desk
        self.office = DeliveryOffice(
            runtime, desk, encode=encode, max_size=config.delivery_max_message_bytes, run=run
        )
        self.courier = Courier(
            desk, connections, deadlines, max_in_flight=config.delivery_max_in_flight
        )
        self.office.courier = self.courier

    def start(self, watch: Watch) -> None:
        """Start the tasks that a shared store needs.

        Args:
            watch: Starts a task: its name, what it does, and what lets it see at
                once that it shall stop.
        """
        if self._shared is None:
            return
        assert isinstance(self.store, SharedStore)
        fleet = self._fleet = DeliveryFleet(
            self._runtime,
            self.store,
            lease=self._config.delivery_lease,
            on_stored=self.courier.stored,
            on_gap=self._look_again,
            on_forgotten=self.courier.join_again,
            on_end=self._ended,
            on_answer=self._answered,
            on_lost=self._server.report_lost,
        )
        watch("socketio-guard:deliveries", self._shared.run, self._shared.wake)
        watch("socketio-guard:delivery-news", fleet.hear, None)

    def lead(self, watch: Watch) -> None:
        """Start to give up what has expired, if no other process does.

        One that only emits does not: it may end at any time.
        """
        if self._fleet is not None:
            watch("socketio-guard:delivery-leader", self._fleet.lead, None)

    def require_usable_store(self) -> None:
        """Make sure that the store can do what is asked of it, as far as it answers now.

        Raises:
            ConfigError: It cannot.
        """
        if isinstance(self.store, RedisStore):
            with suppress(DeliveryStoreError):
                self.store.require_no_cluster()

    @property
    def is_store_reachable(self) -> bool | None:
        """Whether the store answers; ``None`` if it is in this process."""
        return None if self._shared is None else self._server.is_reachable

    def tick(self) -> None:
        """Give up what has expired in memory, and catch up with what was not handed over."""
        if self._local is not None:
            self._local.expire()
        if self.office.is_behind:
            self.office.is_behind = False
            self.courier.look_again(self._present())

    def stop(self, timeout: float) -> None:
        """Take to the store what is still noted, within *timeout* seconds."""
        if self._shared is not None:
            self._shared.flush(timeout)
        self.store.close()

    @property
    def abandoned(self) -> int:
        """How many messages end with this process, because they are in its memory."""
        return len(self.store) if isinstance(self.store, MemoryStore) else 0

    def _note_gap(self) -> None:
        if self._fleet is not None:
            self._fleet.has_gap = True

    def _answered(self) -> None:
        assert self._shared is not None
        if not self._shared.is_refused:  # a store may be heard, and yet take nothing
            self._server.report_answer()

    def _look_again(self) -> None:
        self.courier.look_again(self._present())
        self.office.look_again()

    def _ended(self, delivery: Delivery, is_new: bool) -> None:
        self.office.ended(delivery)
        if is_new:
            self._on_end(delivery)


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

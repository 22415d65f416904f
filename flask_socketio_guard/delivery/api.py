"""Accepts messages, resolves receipts, and reports outcomes to senders."""

from __future__ import annotations

import os
from _thread import RLock
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import is_text
from ..errors import DeliveryInvalid, DeliveryStoreFull, LoopQueueFull, UnknownDelivery
from ..states import DeliveryState
from .receipts import Receipt
from .records import DEAD, Delivery

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Flag, Runtime
    from .dispatcher import Dispatcher
    from .records import Retry
    from .request import DeliveryRequest
    from .store_client import StoreClient


_IDS_AT_A_TIME = 128


class _Watch(NamedTuple):
    on_delivered: Callable[[Receipt], object] | None
    on_expired: Callable[[Receipt], object] | None


class DeliveryApi:
    """Accepts messages for acknowledged delivery, from any task or thread.

    Args:
        runtime: For events.
        store_client: The way to the store.
        encode: Returns JSON text without spaces around it; raises ``TypeError`` or
            ``ValueError`` where there is none.
        max_size: Characters of JSON that the arguments of one message may take, >= 1.
        run: Runs ``run(function, arguments)`` of the application in a task of its own and
            catches whatever it raises.
    """

    def __init__(
        self,
        runtime: Runtime,
        store_client: StoreClient,
        *,
        encode: Callable[[object], str],
        max_size: int,
        run: Callable[[Callable[..., object], tuple[object, ...]], None],
    ) -> None:
        self._runtime = runtime
        self._store_client = store_client
        self._encode = encode
        self._max_size = max_size
        self._run = run
        self.dispatcher: Dispatcher | None = None
        self.is_behind = False
        """Whether a message or an end did not reach the dispatcher, which has to look it up."""
        self._lock = RLock()  # never held during a wait
        self._ids: deque[str] = deque()
        self._watches: dict[str, _Watch] = {}
        self._waiting: dict[str, list[Flag]] = {}

    def put(self, request: DeliveryRequest, *, ttl: float, retry: Retry) -> Receipt:
        """Store a message and send it, if its recipient is here.

        Args:
            request: What is to be delivered.
            ttl: Time to live in seconds, where the request has none.
            retry: Retry schedule, where the request has none.

        Raises:
            DeliveryInvalid: JSON or UTF-8 cannot represent it, or it is too large.
            DeliveryStoreFull: Too many messages wait, or Redis is out of memory.
            DeliveryStoreError: The store does not answer.
        """
        delivery = Delivery(
            self._new_id(),
            request.recipient,
            request.event,
            self._encoded(request.arguments),
            ttl if request.ttl is None else request.ttl,
            request.namespace,
            retry if request.retry is None else request.retry,
            request.key,
            request.is_ordered,
            request.requires_all,
            request.has_id,
        )
        if request.on_delivered is not None or request.on_expired is not None:
            self._watches[delivery.id] = _Watch(request.on_delivered, request.on_expired)
        try:
            stored = self._stored(delivery)
        except BaseException:
            self._watches.pop(delivery.id, None)
            raise
        if stored.has_ended:  # an earlier attempt to store it got no answer
            self.ended(stored)
        elif self.dispatcher is not None:
            self._on_loop(self.dispatcher.offer, stored)
        return Receipt(self, delivery.id)

    def _new_id(self) -> str:
        """Return an id that cannot be guessed; they are made in batches, at a tenth of the cost."""
        try:
            return self._ids.popleft()
        except IndexError:
            random = os.urandom(16 * _IDS_AT_A_TIME).hex()
            ids = [random[start : start + 32] for start in range(32, len(random), 32)]
            self._ids.extend(ids)
            return random[:32]

    def _stored(self, delivery: Delivery) -> Delivery:
        stored = self._store_client.put(delivery)
        if stored.delivery is None:
            raise DeliveryStoreFull(stored.full)
        return stored.delivery

    def _on_loop(self, target: Callable[[Delivery], None], delivery: Delivery) -> None:
        try:
            self._runtime.run_on_loop(target, delivery)
        except LoopQueueFull:
            self.is_behind = True

    def _encoded(self, arguments: list[Any]) -> str:
        try:
            body = self._encode(arguments)
        except (TypeError, ValueError, RecursionError) as exc:
            raise DeliveryInvalid(f"JSON cannot represent the arguments: {exc}") from exc
        if len(body) > self._max_size:
            raise DeliveryInvalid(
                f"the arguments take {len(body)} bytes of JSON, more than {self._max_size}: see "
                "SOCKETIO_GUARD_DELIVERY_MAX_MESSAGE_BYTES"
            )
        return body

    def receipt(self, id: str) -> Receipt:
        """Return the receipt of a message.

        Raises:
            UnknownDelivery: There is none, or it ended too long ago.
        """
        # Ids may come from clients, which may send anything.
        if not isinstance(id, str) or not is_text(id) or self.find(id) is None:
            raise UnknownDelivery(id)
        return Receipt(self, id)

    def find(self, id: str) -> Delivery | None:
        """Return a message as it is now."""
        return self._store_client.find(id)

    def cancel(self, id: str) -> bool:
        """Cancel a message; return whether it had not ended before."""
        return self._store_client.end(id, DeliveryState.CANCELLED)

    def wait(self, id: str, timeout: float | None) -> None:
        """Wait until a message has ended, or the time is up."""
        event = self._runtime.flag()
        with self._lock:
            self._waiting.setdefault(id, []).append(event)
        try:
            delivery = self.find(id)  # it may have ended before
            if delivery is not None and not delivery.has_ended:
                event.wait(timeout)
        finally:
            with self._lock:
                events = self._waiting[id]
                events.remove(event)
                if not events:
                    del self._waiting[id]

    def look_again(self) -> None:
        """Look up every message with a waiter or a callback: its end may have been missed."""
        with self._lock:
            ids = list({*self._waiting, *self._watches})
        for id in ids:
            delivery = self.find(id)
            if delivery is None:  # it ended long ago, or the store was emptied
                self._tell(id, None)
            elif delivery.has_ended:
                self.ended(delivery)

    def ended(self, delivery: Delivery) -> None:
        """Pass on that a message has ended, in whichever process."""
        if self.dispatcher is not None:
            self._on_loop(self.dispatcher.ended, delivery)
        self._tell(delivery.id, delivery)

    def _tell(self, id: str, delivery: Delivery | None) -> None:
        if id in self._waiting:
            with self._lock:
                for event in self._waiting.get(id, ()):
                    event.set()
        watch = self._watches.pop(id, None)
        if watch is None or delivery is None:
            return
        hook = None
        if delivery.state is DeliveryState.DELIVERED:
            hook = watch.on_delivered
        elif delivery.state in DEAD:
            hook = watch.on_expired
        if hook is not None:
            self._run(hook, (Receipt(self, id),))

"""What a process does for messages that all processes of an application share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..backoff import DELIVERY_STORE
from ..core.runtime import clock
from ..core.supervisor import is_stopping, sleep
from ..errors import DeliveryStoreError
from .steps import Expire

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Runtime
    from .records import Delivery
    from .store import SharedStore

_CHANGES_TIMEOUT: Final = 0.5  # seconds; so long a stop may have to wait
_PAUSE: Final = 0.003  # seconds
_EXPIRED_AT_A_TIME: Final = 200
_LOOK_INTERVAL: Final = 0.2  # seconds between two looks at what has expired


class StoreSync:
    """Two tasks: one hears what others do, the other gives up what has expired.

    Args:
        runtime: For sleep.
        store: Shared.
        lease: Seconds after which others take over what a dead process did, > 0.
        on_stored: Called with each address for which others have stored messages.
        on_gap: Called when a change has been missed; again if it raises that the store does
            not answer.
        on_forgotten: Called when others may have taken this process for dead.
        on_end: Called with each message that has ended, and whether by this process, just now.
        on_answer: Called when the store answers.
        on_lost: Called with the reason when it does not.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: SharedStore,
        *,
        lease: float,
        on_stored: Callable[[str], None],
        on_gap: Callable[[], None],
        on_forgotten: Callable[[], None],
        on_end: Callable[[Delivery, bool], None],
        on_answer: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._lease = lease
        self._on_stored = on_stored
        self._on_gap = on_gap
        self._on_forgotten = on_forgotten
        self._on_end = on_end
        self._on_answer = on_answer
        self._on_lost = on_lost
        self.has_gap = False
        """Whether a change has been missed, or some answer, and is not looked up yet."""
        self._next_reap_at = 0.0

    def follow(self) -> None:
        """Hear what others do, until the task is asked to stop."""
        failures = 0
        while not is_stopping():
            try:
                self._follow_some()
                failures = 0
                self._on_answer()
            except DeliveryStoreError as exc:
                self._on_lost(str(exc))
                sleep(self._runtime, DELIVERY_STORE.delay(failures))
                failures += 1

    def _follow_some(self) -> None:
        if self.has_gap:
            self.has_gap = False
            try:
                self._on_gap()
            except BaseException:
                self.has_gap = True
                raise
        changes = self._store.changes(_CHANGES_TIMEOUT)
        if changes is None:
            self.has_gap = True
            return
        try:
            for delivery in changes.ended:
                self._on_end(delivery, False)
            for address in changes.stored:
                self._on_stored(address)
        except BaseException:  # the rest has not been heard
            self.has_gap = True
            raise
        if changes.ended or changes.stored:
            # Each look costs much more than each change.
            self._runtime.sleep(_PAUSE)

    def lead(self) -> None:
        """Give up what has expired, while this process leads, until it is asked to stop."""
        failures = 0
        while not is_stopping():
            try:
                if self._store.heartbeat():
                    self._on_forgotten()
                if self._store.lead():
                    self._give_up()
                failures = 0
                sleep(self._runtime, _LOOK_INTERVAL)
            except DeliveryStoreError:
                self.has_gap = True  # what was given up may have been, unheard
                sleep(self._runtime, DELIVERY_STORE.delay(failures))
                failures += 1

    def _give_up(self) -> None:
        if clock() >= self._next_reap_at:
            for delivery in self._store.reap_dead_processes():
                self._on_end(delivery, True)
            self._next_reap_at = clock() + self._lease
        while expired := self._store.do(Expire(_EXPIRED_AT_A_TIME)):
            for delivery in expired:
                self._on_end(delivery, True)

"""Keeps a process in step with the others that share a store: a feed of changes, and a leader."""

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
    from .store import Changes, SharedStore

_CHANGES_TIMEOUT: Final = 0.5  # seconds; a stop may have to wait for so long
_PAUSE: Final = 0.003  # seconds
_EXPIRED_AT_A_TIME: Final = 200
_EXPIRY_INTERVAL: Final = 0.25  # seconds between two looks at whether a message has expired
_ROUNDS: Final = 2  # heartbeats for each lease


class Gap:
    """Whether a change of another process, or an answer of the store, may have been missed.

    Safe for threads and greenlets.

    Args:
        on_gap: Looks everything up. If it raises, it is called again.
    """

    def __init__(self, on_gap: Callable[[], None]) -> None:
        self._on_gap = on_gap
        self._is_open = False

    def open(self) -> None:
        """Note that something may have been missed."""
        self._is_open = True

    def close(self) -> None:
        """Look everything up, if something may have been missed."""
        if not self._is_open:
            return
        self._is_open = False  # before: what is missed meanwhile has to be looked up, too
        try:
            self._on_gap()
        except BaseException:
            self._is_open = True
            raise


class ChangeFeed:
    """Hears what other processes do.

    Args:
        runtime: For sleep.
        store: Shared.
        gap: Opened when a change has been missed; closed as soon as the store answers.
        on_stored: Called with each address for which others have stored messages.
        on_end: Called with each message that others have ended, and ``False``; with each that
            this process has ended without getting the answer, and ``True``.
        on_answer: Called when the store answers.
        on_lost: Called with the reason when it does not.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: SharedStore,
        gap: Gap,
        *,
        on_stored: Callable[[str], None],
        on_end: Callable[[Delivery, bool], None],
        on_answer: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._gap = gap
        self._on_stored = on_stored
        self._on_end = on_end
        self._on_answer = on_answer
        self._on_lost = on_lost

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
        self._gap.close()
        changes = self._store.changes(_CHANGES_TIMEOUT)
        if changes is None:
            self._gap.open()
            return
        try:
            self._report(changes)
        except BaseException:  # the rest of them is lost
            self._gap.open()
            raise
        if changes.ended or changes.stored:
            # To ask the store costs much more than each change.
            self._runtime.sleep(_PAUSE)

    def _report(self, changes: Changes) -> None:
        for delivery in changes.own_ended:
            self._on_end(delivery, True)
        for delivery in changes.ended:
            self._on_end(delivery, False)
        for address in changes.stored:
            self._on_stored(address)


class ExpiryLeader:
    """Sends the heartbeat of this process; gives up what has expired, while it leads.

    Args:
        runtime: For sleep.
        store: Shared.
        gap: Opened when the store does not answer: it may have ended messages all the same.
        lease: Seconds after which others take over what a dead process did, > 0.
        on_forgotten: Called when others may have taken this process for dead.
        on_end: Called with each message that has ended, and ``True``.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: SharedStore,
        gap: Gap,
        *,
        lease: float,
        on_forgotten: Callable[[], None],
        on_end: Callable[[Delivery, bool], None],
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._gap = gap
        self._lease = lease
        self._on_forgotten = on_forgotten
        self._on_end = on_end
        self._next_round_at = 0.0
        self._next_reap_at = 0.0
        self._is_leading = False

    def lead(self) -> None:
        """Give up what has expired, while this process leads, until the task is asked to stop."""
        failures = 0
        while not is_stopping():
            try:
                if clock() >= self._next_round_at:
                    self._do_round()
                elif self._is_leading and self._store.has_expired():
                    self._expire()
                failures = 0
                sleep(self._runtime, _EXPIRY_INTERVAL)
            except DeliveryStoreError:
                self._gap.open()
                self._next_round_at = 0.0
                sleep(self._runtime, DELIVERY_STORE.delay(failures))
                failures += 1
            finally:
                self._store.told()

    def _do_round(self) -> None:
        """Send the heartbeat, take or renew the lease, and clear up once in a lease."""
        begun_at = clock()
        if self._store.heartbeat():
            self._on_forgotten()
        self._is_leading = self._store.lead()
        if self._is_leading:
            if clock() >= self._next_reap_at:
                for delivery in self._store.reap_dead_processes():
                    self._on_end(delivery, True)
                self._give_up_expired()
                self._next_reap_at = clock() + self._lease
            elif self._store.has_expired():
                self._give_up_expired()
        self._next_round_at = begun_at + self._lease / _ROUNDS

    def _expire(self) -> None:
        # Nothing expires because the clock of the store has jumped: the leader looks first.
        self._is_leading = self._store.lead()
        if self._is_leading:
            self._give_up_expired()

    def _give_up_expired(self) -> None:
        while expired := self._store.do(Expire(_EXPIRED_AT_A_TIME)):
            for delivery in expired:
                self._on_end(delivery, True)

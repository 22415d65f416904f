"""Which ends of this process the store has answered for, and which have been told."""

from __future__ import annotations

import _thread
import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Held(NamedTuple):
    """An entry of the change feed whose call may yet be answered."""

    what: bytes
    running: frozenset[int]  # the calls that may have written it


class OwnCalls:
    """Finds the entries of the change feed that this process wrote without getting the answer.

    A call runs from :meth:`begin` to :meth:`end`; its answer has the numbers of the entries that
    it wrote. If the feed shows another entry of this process, and none of the calls that ran when
    it was read runs any longer, the answer was lost.

    Safe for threads and greenlets without a lock: each method changes what is shared in single
    operations, in an order that makes a reader in between tell an end again rather than never.
    Only the reader of the feed calls :meth:`read`, :meth:`passed`, :meth:`restart`,
    :meth:`lost` and :meth:`lost_are_told`.

    Args:
        limit: Entries that the feed keeps, >= 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._serials = itertools.count()
        self._running: set[int] = set()
        self._answered: set[int] = set()  # entries that the feed has yet to pass
        self._untold: dict[int, int] = {}  # by task: the first entry whose ends it has yet to tell
        self._held: dict[int, _Held] = {}
        self._passed = 0
        self._is_unsure = False  # a call failed, and may have written an entry all the same
        self._sure_from: int | None = None  # an entry that was written after that

    def begin(self) -> int:
        """Note that a call begins; return its serial number."""
        serial = next(self._serials)
        self._running.add(serial)
        return serial

    def end(self, serial: int, counts: list[int] | None) -> None:
        """Note that a call is over.

        Args:
            serial: Of the call.
            counts: Numbers of the entries that it wrote; ``None`` if it was not answered.
        """
        if counts is None:
            self._is_unsure, self._sure_from = True, None
        for count in counts or ():
            self._untold.setdefault(_thread.get_ident(), count)
            self._answered.add(count)
            if self._is_unsure and self._sure_from is None:
                self._sure_from = count
        if len(self._answered) > 2 * self._limit:  # nobody reads the feed; these are trimmed
            self._answered.difference_update(sorted(self._answered)[: self._limit])
        self._running.discard(serial)

    def told(self) -> None:
        """Note that this task has told the ends in the answers that it got."""
        self._untold.pop(_thread.get_ident(), None)

    def read(self, count: int, what: bytes) -> None:
        """Take an entry of this process from the feed."""
        if count in self._answered:
            self._answered.discard(count)
        else:
            self._held[count] = _Held(what, frozenset(self._running.copy()))

    def passed(self, count: int) -> None:
        """Note the number of the newest entry that was read, of whichever process."""
        if 0 < count < self._passed:  # Redis came back older, and uses the numbers again
            self._answered.clear()
        self._passed = count
        if self._sure_from is not None and count >= self._sure_from:
            self._is_unsure, self._sure_from = False, None

    def restart(self, count: int) -> None:
        """Note that the feed goes on behind entry *count*, and those before are missed."""
        self._answered.clear()
        self.passed(count)

    def lost(self) -> dict[int, bytes]:
        """Return the entries whose answers were lost, by number, until they are told."""
        found: dict[int, bytes] = {}
        for count, held in sorted(self._held.items()) if self._held else ():
            if not held.running.isdisjoint(self._running):
                continue
            if count in self._answered:
                self._answered.discard(count)
                del self._held[count]
            else:
                found[count] = held.what
        return found

    def lost_are_told(self, counts: Iterable[int]) -> None:
        """Note that the ends in entries that :meth:`lost` has returned have been told."""
        for count in counts:
            self._held.pop(count, None)

    def told_up_to(self) -> int:
        """Return the number of an entry up to which all ends of this process have been told."""
        # In this order: an entry is held or untold before it is passed or no longer held.
        passed = self._passed
        open_entries = [*list(self._held), *list(self._untold.values())]
        return min(passed, *(count - 1 for count in open_entries)) if open_entries else passed

    @property
    def is_settled(self) -> bool:
        """Whether each end of this process is known to be told."""
        return not (self._held or self._untold or self._running or self._is_unsure)

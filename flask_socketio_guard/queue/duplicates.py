"""Deduplication of messages that other processes publish more than once."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

_MAX_HOSTS: Final = 1024
_WINDOW: Final = 1024  # messages; a publisher sends one batch again, which is half of that


class Duplicates:
    """Remembers the last messages of each process.

    After a connection breaks, a publisher sends every unacknowledged message again, although some
    may have been delivered. A redelivered message is identical byte for byte and has the same
    number.

    The number alone proves nothing: anyone who can write to the channel can forge one, and a high
    number must not make later messages look old. Therefore the order of numbers is ignored, and a
    message is a duplicate only if both its number and its content were seen before.

    Memory is bounded: 8 KiB for each process, for at most 1024 processes; the one that has been
    silent for the longest is evicted first.
    """

    def __init__(self) -> None:
        self._hosts: OrderedDict[str, array[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hosts)

    def has_seen(self, host_id: str, sequence: int, content: int) -> bool:
        """Record a message, and return whether it is among the last ones of its process.

        Args:
            host_id: Name of the process on the message queue.
            sequence: Number of the message there.
            content: Hash of the whole message, its number included, in 64 bits.
        """
        window = self._hosts.get(host_id)
        if window is None:
            window = self._hosts[host_id] = array("q", bytes(8 * _WINDOW))
            if len(self._hosts) > _MAX_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(host_id)
        place = sequence % _WINDOW
        if window[place] == content:
            return True
        window[place] = content
        return False

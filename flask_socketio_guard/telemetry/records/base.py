"""The base class of records: the signal, the counters and the log line of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from blinker import NamedSignal, Namespace

from ..printable import printable

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

signals: Final = Namespace()

LONGEST_NAME: Final = 100
"""Characters logged of a name that a client may have sent."""

_LONGEST_DETAIL = 200

NOTHING: Final[Mapping[str, int]] = {}
"""The amounts of a record that is not counted."""


@dataclass(slots=True)  # frozen ones take twice as long to make
class Fold:
    """How repeats of a log line are folded; see :mod:`~..log_deduplication`.

    Attributes:
        key: Identifies the class of lines that are repeats of each other.
        repeated: Text of the summary line; input from clients in it must be escaped.
        count: Number of events that the line stands for.
        burst: Lines of the class to write in one interval, >= 1.
    """

    key: Hashable
    repeated: str
    count: int = 1
    burst: int = 1


@dataclass(slots=True)
class Entry:
    """A log line.

    Attributes:
        message: As for ``logger.log``.
        arguments: As for ``logger.log``.
        fold: How repeats are folded; with ``None``, every line is written.
        extra: As for ``logger.log``.
        exception: As ``exc_info`` of ``logger.log``.
    """

    message: str
    arguments: tuple[object, ...] = ()
    fold: Fold | None = None
    extra: Mapping[str, object] | None = None
    exception: BaseException | None = None


class Record:
    """One event. Each subclass defines how its records are counted and logged.

    Subclasses are frozen dataclasses. Subscribers to all kinds find them by
    :func:`record_classes`.

    Attributes:
        signal: The signal on which the records are sent.
        counters: The counters that a record may increase, by their names in health.
    """

    signal: ClassVar[NamedSignal]
    counters: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        _classes.append(cls)

    @property
    def level(self) -> int | None:
        """Level of the log line; ``None`` if the record is not logged."""
        return None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return the increments of :attr:`counters`, by name.

        Args:
            memory: State shared by all records of the application, such as the ids of open
                connections; the caller holds its lock.
        """
        del memory
        return dict.fromkeys(self.counters, 1)

    def entry(self) -> Entry:
        """Return the log line; called only if the level is enabled."""
        raise NotImplementedError


_classes: list[type[Record]] = []


def record_classes() -> tuple[type[Record], ...]:
    """Return all record classes, one for each signal."""
    return tuple({each.signal: each for each in _classes}.values())


def safe(text: str) -> str:
    """Return *text* escaped for the log, at most 200 characters of it."""
    return printable(text, _LONGEST_DETAIL)


def in_brackets(text: str) -> str:
    """Return *text* like :func:`safe`, as a suffix in brackets; ``""`` if it is empty."""
    return f" ({safe(text)})" if text else ""

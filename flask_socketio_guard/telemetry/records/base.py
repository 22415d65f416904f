"""What a record says of itself: its signal, how it is counted, how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from blinker import NamedSignal, Namespace

from ..printable import printable

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

signals: Final = Namespace()

LONGEST_NAME: Final = 100
"""Characters of a name that a client may have sent."""

_LONGEST_DETAIL = 200

NOTHING: Final[Mapping[str, int]] = {}
"""The amounts of a record that is not counted."""


@dataclass(slots=True)  # frozen ones take twice as long to make
class Fold:
    """The class of lines of which one in an interval is written, and the rest counted.

    Attributes:
        key: Tells the class from others.
        repeated: What repeats are told with; nothing in it may come from a client unescaped.
        count: How many things the line tells of.
        burst: How many lines of the class are written in one interval, >= 1.
    """

    key: Hashable
    repeated: str
    count: int = 1
    burst: int = 1


@dataclass(slots=True)
class Entry:
    """A line of the log.

    Attributes:
        message: As for ``logger.log``.
        arguments: As for ``logger.log``.
        fold: How repeats are folded; ``None`` writes each.
        extra: As for ``logger.log``.
        exception: As ``exc_info`` of ``logger.log``.
    """

    message: str
    arguments: tuple[object, ...] = ()
    fold: Fold | None = None
    extra: Mapping[str, object] | None = None
    exception: BaseException | None = None


class Record:
    """One fact. A class of records says here, and nowhere else, how it is counted and told.

    A subclass is a frozen dataclass; whatever listens to all kinds finds it by
    :func:`record_classes`.

    Attributes:
        signal: Where it is sent.
        counters: The counters that it may add to, as health shows them.
    """

    signal: ClassVar[NamedSignal]
    counters: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        _classes.append(cls)

    @property
    def level(self) -> int | None:
        """Level of its line in the log; ``None`` if it has none."""
        return None

    def amounts(self, memory: set[str]) -> Mapping[str, int]:
        """Return what it adds to which of :attr:`counters`.

        Args:
            memory: What records of the application have left for those that follow; the
                caller holds its lock.
        """
        del memory
        return dict.fromkeys(self.counters, 1)

    def entry(self) -> Entry:
        """Return its line in the log; asked only if somebody reads such a level."""
        raise NotImplementedError


_classes: list[type[Record]] = []


def record_classes() -> tuple[type[Record], ...]:
    """Return every kind of record that has been defined, one for each signal."""
    return tuple({each.signal: each for each in _classes}.values())


def safe(text: str) -> str:
    """Return *text*, fit for a log and not too long."""
    return printable(text, _LONGEST_DETAIL)


def in_brackets(text: str) -> str:
    """Return *text*, fit for a log, to be put behind other text."""
    return f" ({safe(text)})" if text else ""

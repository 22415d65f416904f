"""How much of each kind a run tries: a part in each run, and the whole before a release.

``make soak-sizes`` sets ``FULL_SIZE``. Random examples differ from run to run, so that what one run
does not try the next may.
"""

from __future__ import annotations

import os

IS_WHOLE = os.environ.get("FULL_SIZE", "") not in ("", "0")
"""Whether everything is tried in full."""

_PART = 10
_FEWEST_EXAMPLES = 20


def examples(whole: int) -> int:
    """Return how many random examples to try: *whole*, or a tenth but at least 20 of them."""
    return whole if IS_WHOLE else min(whole, max(_FEWEST_EXAMPLES, whole // _PART))


def size(whole: int) -> int:
    """Return how many of a kind to use: *whole*, or a tenth."""
    return whole if IS_WHOLE else max(1, whole // _PART)

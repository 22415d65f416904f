"""Session ids that every process of a fleet recognizes as such.

A message to a session id goes to all processes as one to a room of that name, for its sender may
not know where that client is. A client that may choose the name of its room, in another process,
would receive it as well. No process has a list of the other processes' clients, so a session id
is recognizable: it ends with a checksum of its beginning. The checksum is not a secret. Nobody can
choose another client's session id, and a client that forges a text of that form is merely refused
the room of that name.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2s
from typing import Final

_RANDOM: Final = 11  # bytes; OWASP asks for 8 at least
_CHECKSUM: Final = 4  # bytes: one text in four thousand million of that form is taken for an id
_PERSON: Final = b"sio-sid"
_FORM: Final = re.compile("[A-Za-z0-9_-]{20}")


def new_session_id() -> str:
    """Return an unpredictable session id: 20 characters, as upstream's.

    Source:
        OWASP, "Session Management Cheat Sheet": at least 64 bits of entropy.
    """
    random = secrets.token_bytes(_RANDOM)
    return urlsafe_b64encode(random + _checksum(random)).decode()


def is_session_id(text: object) -> bool:
    """Return whether *text* was made by :func:`new_session_id`, in any process."""
    if not isinstance(text, str) or not _FORM.fullmatch(text):
        return False
    raw = urlsafe_b64decode(text)
    return _checksum(raw[:_RANDOM]) == raw[_RANDOM:]


def _checksum(random: bytes) -> bytes:
    return blake2s(random, digest_size=_CHECKSUM, person=_PERSON).digest()

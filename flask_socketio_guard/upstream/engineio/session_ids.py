"""Session ids that every process of a fleet recognizes as such.

A message to a session id goes to all processes as a message to the room of that name, because its
sender may not know which process has the client. If an application lets clients choose a room's
name, a client in another process could join that room and receive the message as well. No process
has a list of the other processes' clients, so session ids are made recognizable: each ends with a
checksum of its beginning. The checksum is not a secret. A client cannot choose its own session
id, and one that forges a room name of that form is merely refused that room.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2s
from typing import Final

_RANDOM: Final = 11  # bytes; OWASP asks for at least 8
_CHECKSUM: Final = 4  # bytes: one in four billion texts of that form is mistaken for an id
_PERSON: Final = b"sio-sid"
_FORM: Final = re.compile("[A-Za-z0-9_-]{20}")


def new_session_id() -> str:
    """Return an unpredictable session id of 20 characters, as long as upstream's.

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

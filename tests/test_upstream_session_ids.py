"""Session ids that are known for what they are."""

from __future__ import annotations

import secrets

from flask_socketio_guard.upstream.engineio.session_ids import is_session_id, new_session_id
from tests.support.cases import in_turn


def test_session_ids_are_known_and_differ() -> None:
    ids = [new_session_id() for _ in range(500)]
    assert len(set(ids)) == 500
    assert {len(id) for id in ids} == {20}
    assert all(is_session_id(id) for id in ids)


OTHERS = [None, 5, "", "room", b"x" * 20, "x" * 20, "\N{KELVIN SIGN}" * 20]


@in_turn("text", OTHERS, ids=range(len(OTHERS)))
def test_anything_else_is_none(text: object) -> None:
    assert not is_session_id(text)
    assert not is_session_id(new_session_id() + "\n")


def test_other_names_of_that_form_are_none() -> None:
    """Firebase, for one, has ids of twenty such characters."""
    assert not any(is_session_id(secrets.token_urlsafe(15)) for _ in range(5000))
    id = new_session_id()
    swapped = "A" if id[3] != "A" else "B"
    assert not is_session_id(id[:3] + swapped + id[4:])

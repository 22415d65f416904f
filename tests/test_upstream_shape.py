"""How many containers a packet holds, how deep they are, and where its attachments go."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from socketio.packet import Packet

from flask_socketio_guard.events.shape import (
    MAX_DEPTH,
    Places,
    TooDeep,
    TooManyContainers,
    require_shape,
)
from tests.support.cases import in_turn
from tests.support.scale import examples

texts = st.text(alphabet='"\\[]{}a,:ä', max_size=8)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)
PAD = "[" * MAX_DEPTH
"""In a string, so that all is looked at."""


def shape_of(value: Any) -> tuple[int, int]:
    """Return how many containers there are, and how deep they are."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [shape_of(each) for each in (value if isinstance(value, list) else value.values())]
    return 1 + sum(count for count, _ in inner), 1 + max([depth for _, depth in inner] or [0])


def is_taken(text: str, *, max_containers: int = 10**9) -> bool:
    try:
        require_shape(text, max_containers=max_containers)
    except (TooManyContainers, TooDeep):
        return False
    return True


@settings(deadline=None, max_examples=examples(300))
@given(values, st.booleans(), st.sampled_from([0, 5, *range(90, 103)]))
def test_it_counts_what_a_decoder_would_make(value: Any, is_ascii: bool, depth: int) -> None:
    """Strings hold brackets, quotes and backslashes; what is around the value makes it deep."""
    for _ in range(depth):
        value = [value]
    text = f"42/space,7{json.dumps([PAD, value], ensure_ascii=is_ascii)}"
    count, deepest = shape_of([PAD, value])
    assert is_taken(text, max_containers=count) == (deepest <= MAX_DEPTH)
    assert not is_taken(text, max_containers=count - 1)


@in_turn("name", ['/"', '/a"b"c"', '/\\"', '/?"', '/["{'])
@in_turn("head", ["2", "51-", "3"])
def test_quotes_in_the_name_of_a_namespace_hide_nothing(head: str, name: str) -> None:
    """What is behind the name is decoded before anybody asks whether it is served."""
    many = json.dumps(["e", *[[]] * 200])
    deep = '["e",' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "]"
    for event in (many, deep):
        assert json.loads(event) == Packet(encoded_packet=f"{head}{name},7{event}").data
        assert not is_taken(f"{head}{name},7{event}", max_containers=200)
    assert is_taken(f"{head}{name},7{many}", max_containers=201)


@in_turn("height", [1, 3, 4, 5, 6, 50])
@in_turn("brackets", ["[]", "{}"])
def test_depth_is_known_to_the_level(height: int, brackets: str) -> None:
    """However many there are beside the deepest, and however deep these are."""
    opening, closing = ("[", "]") if brackets == "[]" else ('{"a":', "}")

    def nested(depth: int) -> str:
        return opening * depth + "0" + closing * depth

    beside = ",".join([nested(height)] * 50)
    assert is_taken(f"[{beside},{nested(MAX_DEPTH - 1)},{beside}]")
    assert not is_taken(f"[{beside},{nested(MAX_DEPTH)},{beside}]")


@settings(deadline=None, max_examples=examples(200))
@given(st.text(alphabet='"\\[]{}a,', max_size=400), st.integers(1, 200))
def test_what_is_no_json_is_looked_at_all_the_same(text: str, bound: int) -> None:
    is_taken(text + PAD, max_containers=bound)


def test_a_table_of_fifty_thousand_rows_passes() -> None:
    rows = [[number, f"{number}"] for number in range(50_000)]
    text = f"2{json.dumps(['table', rows], separators=(',', ':'))}"
    assert len(text) < 1_000_000
    require_shape(text, max_containers=100_000)


def test_a_packet_that_is_refused_takes_no_more_memory_than_its_text() -> None:
    text = f'2["event"{",[]" * 333_000}]'
    tracemalloc.start()
    with pytest.raises(TooManyContainers, match="333001 lists and objects, more than 100000"):
        require_shape(text, max_containers=100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(text)


# Attachments


def with_places(value: Any, numbers: list[Any]) -> Any:
    """Return *value* with a placeholder for each ``None``, as long as there are numbers."""
    if value is None and numbers:
        return {"_placeholder": True, "num": numbers.pop()}
    if isinstance(value, list):
        return [with_places(each, numbers) for each in value]
    if isinstance(value, dict):
        return {key: with_places(each, numbers) for key, each in value.items()}
    return value


@settings(deadline=None, max_examples=examples(300))
@given(values, st.permutations(range(6)), st.integers(0, 6))
def test_each_attachment_goes_where_upstream_puts_it(
    value: Any, order: list[int], extra: int
) -> None:
    body = ["event", None, {"a": [None], "b": {"c": None}}, value]
    numbers = [number for number in order if number < 3 + extra]
    left = list(numbers)
    packet = json.loads(json.dumps(with_places(body, left)))
    count = len(numbers)
    attachments = [bytes([number]) for number in range(count)]
    if left:
        with pytest.raises(ValueError, match="has no place"):
            Places(packet, count)
        return
    wanted = Packet.reconstruct_binary(packet, attachments)
    assert Places(packet, count).fill(attachments) == wanted


@in_turn(
    ("numbers", "count", "text"),
    [
        ([0, 0], 1, "attachment 0 has two places"),
        ([1, 0, 1], 2, "attachment 1 has two places"),
        ([0], 2, "attachment 1 has no place"),
        ([], 1, "attachment 0 has no place"),
        ([1], 1, "no number of an attachment"),
        ([-1], 1, "no number of an attachment"),
        ([False], 1, "no number of an attachment"),
        ([0.0], 1, "no number of an attachment"),
        (["0"], 1, "no number of an attachment"),
        ([None], 1, "no number of an attachment"),
        ([[0]], 1, "no number of an attachment"),
    ],
)
@in_turn("is_spread", [False, True])
def test_each_attachment_has_one_place(
    numbers: list[Any], count: int, text: str, is_spread: bool
) -> None:
    data: list[Any] = ["event"]
    for depth, number in enumerate(numbers):
        place: Any = {"_placeholder": True, "num": number}
        for _ in range(depth if is_spread else 0):
            place = {"in": [place]}
        data.append(place)
    with pytest.raises(ValueError, match=text):
        Places(data, count)


@pytest.mark.parametrize("count", [1, 3])
def test_attachments_among_many_containers_are_found(count: int) -> None:
    """At each depth, beside hundreds of others."""
    many: list[Any] = [[[{"a": [number]}]] for number in range(1000)]
    many += [{"_placeholder": False, "b": [{}]} for _ in range(300)]
    data: Any = ["event", many]
    for number in range(count):
        many[400 + number][0][0]["a"].append([{"_placeholder": True, "num": number}])
    packet = json.loads(json.dumps(data))
    attachments = [bytes([number]) for number in range(count)]
    wanted = Packet.reconstruct_binary(packet, attachments)
    assert Places(packet, count).fill(attachments) == wanted
    many[-1]["b"].append({"_placeholder": True, "num": 0})
    with pytest.raises(ValueError, match="attachment 0 has two places"):
        Places(json.loads(json.dumps(data)), count)


def test_what_only_looks_like_a_placeholder_stays() -> None:
    """As upstream has it: something true, and a number."""
    data = ["e", {"_placeholder": False, "num": 0}, {"_placeholder": True}, {"num": 0}]
    place = {"_placeholder": 1, "num": 0}
    assert Places([*data, place], 1).fill([b"x"]) == [*data, b"x"]
    assert Places(place, 1).fill([b"x"]) == b"x"

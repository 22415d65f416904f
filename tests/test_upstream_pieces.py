"""JSON that is decoded a piece at a time: the same result, and small steps whatever comes."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pytest
from engineio import json as upstream_json
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_socketio_guard.core.runtime import GeventRuntime
from flask_socketio_guard.events import pieces
from flask_socketio_guard.events.pieces import Line, PieceDecoder, TimeSlice
from flask_socketio_guard.events.shape import MAX_DEPTH, Places, TooDeep, TooManyContainers
from flask_socketio_guard.upstream.engineio.violations import ProtocolViolation, TooLarge
from flask_socketio_guard.upstream.socketio import decoding, encoding
from flask_socketio_guard.upstream.socketio.encoding import KeptPacket
from tests.support.cases import in_turn
from tests.support.scale import examples

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 300_000  # characters
SEPARATORS = [(",", ":"), (", ", ": "), (" ,\n", " :\t")]
TRICKS = ['","', "],[", "},{", '"', "\\", "a,b", "[", "}"]

texts = st.text(alphabet='"\\[]{}a,: \n€', max_size=8) | st.sampled_from(TRICKS)
atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**99) | texts
values: st.SearchStrategy[Any] = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(texts, inner, max_size=12),
    max_leaves=60,
)


def decoded(text: str, *, max_containers: int = 10**9) -> Any:
    return PieceDecoder(
        text,
        scan_for=encoding._scan_for,
        max_containers=max_containers,
        take_turn=lambda: None,
    ).decode()


def outcome(decode: Callable[[str], Any], text: str) -> str:
    try:
        return repr(decode(text))
    except (ValueError, RecursionError):
        return "refused"


@pytest.fixture(params=[5, 32])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short texts as often as long ones."""
    monkeypatch.setattr(pieces, "_FIRST", request.param)
    monkeypatch.setattr(pieces, "_MOST", 4 * request.param)
    monkeypatch.setattr(pieces, "_FEWER", 2 * request.param)
    monkeypatch.setattr(pieces, "_MANY", 4)


@pytest.mark.usefixtures("small_pieces")
class TestSameResult:
    """As of upstream's decoder, which takes a text in one go."""

    @settings(deadline=None, max_examples=examples(40))
    @given(values, st.sampled_from(SEPARATORS), st.booleans())
    def test_of_what_is_json(self, value: Any, separators: tuple[str, str], is_ascii: bool) -> None:
        text = json.dumps(value, separators=separators, ensure_ascii=is_ascii)
        assert repr(decoded(text)) == repr(upstream_json.loads(text))
        assert repr(decoded(f" {text}\n")) == repr(upstream_json.loads(text))

    @settings(deadline=None, max_examples=examples(80))
    @given(values, st.data())
    def test_of_what_was_json_before_it_broke(self, value: Any, data: st.DataObject) -> None:
        text = json.dumps(value, separators=(",", ":"))
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 2))
        put = data.draw(st.text(alphabet=',[]{}:"\\ 0-.e1', max_size=2))
        text = text[:at] + put + text[at + gone :]
        assert outcome(decoded, text) == outcome(upstream_json.loads, text)

    @in_turn(
        "text",
        [
            *(
                "",
                " ",
                "[",
                "[1",
                "[1,",
                "[1,]",
                "[,1]",
                "[1,,2]",
                "[1, ,2]",
                "[1,2, ]",
                "[ ]",
                "[1 2]",
                "[1]]",
                "[1] 2",
            ),
            *("{", '{"a"', '{"a":', '{"a":1', '{"a":1,', '{"a":1,}', '{,"a":1}', "{1:2}", "{a:1}"),
            *(
                '{"a" 1}',
                '{"a":1 "b":2}',
                '{"a":1}}',
                '{"a":1,"a":2,"b":3}',
                '["a',
                "nul",
                "-",
                "1.",
            ),
            *("[1.5e3,-0,1E5]", "[1.,2]", "[NaN,-Infinity]", "[[[[[[1]]]]],2]", '{"a":{"b":{}}}'),
            *(f"[{'1' * 100}]", f"[{'1' * 101}]", f"[1,-{'1' * 100}]", f"[1.{'1' * 200}]"),
            "\ufeff[]",
        ],
    )
    def test_of_texts_at_the_edge(self, text: str) -> None:
        assert outcome(decoded, text) == outcome(upstream_json.loads, text)


def filled(unit: str, *, head: str = "[", tail: str = "0]") -> str:
    return head + unit * (SIZE // len(unit)) + tail


KINDS = {
    "numbers": filled("1,"),
    "floats": filled("1.2345678901234567e-300,"),
    "spaced": filled("1 , "),
    "strings": filled('"",'),
    "lists": filled("[],"),
    "rows": filled('{"id":12345,"name":"some name","tags":["a","b"]},'),
    "keys": "{" + ",".join(f'"{number:x}":{number}' for number in range(SIZE // 10)) + "}",
    "nested": filled("[" * 90 + "]" * 90 + ","),
    "below": '{"a":{"b":[{"c":' * 20 + filled("[1,{}],") + "}]}}" * 20,
    "columns": '{"a":' + filled("1,") + ',"b":' + filled('"x",') + "}",
    # Commas that look like the one before, and are another list's or a string's.
    "commas in strings": filled('1,"a,b,c,d",'),
    "quotes in strings": filled('"\\",",'),
    "like the list": filled("[1],[[2],[3]],"),
    "like the string": filled('"a",["b","c"],'),
    "deep and large": filled("[1," * 90 + f'"{"x" * 5000}"' + "]" * 90 + ","),
}


@in_turn("kind", KINDS)
def test_no_step_is_large_and_little_is_done_twice(kind: str) -> None:
    """Whatever a text looks like; between two steps it is looked whether others have waited."""
    text = KINDS[kind]
    largest, total, turns, since = 0, 0, 0, 0

    def scan_for(piece: str) -> Any:
        scan = encoding._scan_for(piece)

        def counted(text: str, at: int) -> tuple[Any, int]:
            nonlocal largest, total, since
            value: Any = None
            end = len(text)
            try:
                value, end = scan(text, at)
            finally:
                # A large string, and what is looked at of a value in a piece, end where they end.
                total += end - at
                since += end - at
                largest = max(largest, since)
            return value, end

        return counted

    def take_turn() -> None:
        nonlocal turns, since
        turns += 1
        since = 0

    value = PieceDecoder(
        text, scan_for=scan_for, max_containers=10**6, take_turn=take_turn
    ).decode()
    assert value == json.loads(text)
    assert largest <= 2 * pieces._MOST
    assert turns >= len(text) / pieces._MOST
    assert total <= 3 * len(text)


def test_pieces_with_many_lists_are_smaller() -> None:
    """Python's garbage collector looks at all new lists in one go."""
    sizes = []

    def scan_for(piece: str) -> Any:
        sizes.append(len(piece))
        return encoding._scan_for(piece)

    text = KINDS["lists"]
    PieceDecoder(text, scan_for=scan_for, max_containers=10**6, take_turn=lambda: None).decode()
    assert sorted(sizes)[-2] <= pieces._FEWER + 2


def test_lists_and_objects_are_counted_over_all_pieces() -> None:
    text = '["[{",' + "[{}]," * 20_000 + '{"a":{"[":[]}}]'
    count = 1 + 2 * 20_000 + 3
    assert decoded(text, max_containers=count)[-1] == {"a": {"[": []}}
    with pytest.raises(TooManyContainers, match=f"more than {count - 1} lists and objects"):
        decoded(text, max_containers=count - 1)


@in_turn("filling", ["", "1," * 400, "1," * 40_000])
@in_turn("outer", [1, 50, MAX_DEPTH - 1])
def test_depth_is_known_to_the_level_over_all_pieces(outer: int, filling: str) -> None:
    """However much is beside it in each list."""
    inner = MAX_DEPTH - outer
    text = ("[" + filling[:1000]) * (outer - 1) + "[" + filling
    deepest = "[" * inner + "]" * inner + "]" * outer
    assert decoded(text + deepest)
    with pytest.raises(TooDeep):
        decoded(f"{text}[{deepest}]")


@pytest.mark.parametrize("text", ["[" * 400_000, '{"a":' * 100_000, "[1," * 99_999])
def test_what_never_ends_is_refused(text: str) -> None:
    with pytest.raises((TooDeep, ValueError)):
        decoded(text)


def test_after_a_cut_in_the_wrong_place_values_are_decoded_one_by_one() -> None:
    """Else each next comma in one more text is tried, and each try decodes what was before."""
    scanned = 0

    def scan_for(text: str) -> Any:
        scan = encoding._scan_for(text)

        def counting(text: str, at: int) -> Any:
            nonlocal scanned
            try:
                value, end = scan(text, at)
            except BaseException:
                scanned += len(text) - at
                raise
            scanned += end - at
            return value, end

        return counting

    text = json.dumps(([1] * 100 + ["a," * 400]) * 100)
    decoder = PieceDecoder(text, scan_for=scan_for, max_containers=10**9, take_turn=lambda: None)
    assert decoder.decode() == json.loads(text)
    assert scanned < 3 * len(text), scanned / len(text)


def test_a_time_slice_pauses_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """And before it begins: several may begin in one turn of the event loop."""
    now = 100.0
    monkeypatch.setattr(pieces, "clock", lambda: now)
    pauses: list[float] = []
    turn = TimeSlice(lambda: pauses.append(now))
    for _ in range(10):
        turn.check()
        now += pieces.TIME_SLICE / 4
    assert len(pauses) == 3


def test_one_of_those_who_wait_goes_on_in_each_turn_of_the_loop() -> None:
    """In order, however often each comes again, and others have their turn in between."""
    runtime = GeventRuntime()
    line = Line(runtime)
    seen: list[str] = []

    def decode(name: str) -> None:
        for _ in range(10):
            line.pause()
            seen.append(name)

    def live() -> None:
        while len(seen) - seen.count("other") < 40:
            seen.append("other")
            runtime.yield_control()

    jobs = [runtime.spawn(partial(decode, name), name=name) for name in "abcd"]
    jobs.append(runtime.spawn(live, name="other"))
    for job in jobs:
        assert job.join(5.0)
        assert job.exception is None
    decoders = [name for name in seen if name != "other"]
    assert decoders == list("abcd" * 10)
    longest = max(len(list(run)) for is_other, run in groupby(seen, lambda name: name == "other"))
    assert longest <= 2


def test_a_line_that_nobody_moves_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may have killed all greenlets that there are."""
    monkeypatch.setattr(pieces, "_PATIENCE", 0.01)
    runtime = GeventRuntime()
    line = Line(runtime)
    monkeypatch.setattr(line, "_is_moving", True)
    job = runtime.spawn(line.pause, name="waiting")
    assert job.join(5.0)
    assert job.exception is None


# Packets


@pytest.mark.parametrize("head", ["2", "21", "2/space,7", "3/space,1", "0", f"2/{'x' * 40_000},"])
def test_packets_of_each_type_are_decoded_in_pieces(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TIME_SLICE", 0.0)
    body = KINDS["rows"]
    turns: list[int] = []
    packet = decoding.decode(
        KeptPacket, head + body, max_containers=10**6, pause=lambda: turns.append(1)
    )
    assert packet.data == json.loads(body)
    assert len(turns) >= len(body) / pieces._MOST
    with pytest.raises(TooLarge, match="more than 100 lists"):
        decoding.decode(KeptPacket, head + body, max_containers=100)
    with pytest.raises(ProtocolViolation, match="nested too deep"):
        decoding.decode(KeptPacket, f"{head}{'[' * 101}{body}{']' * 101}", max_containers=10**6)
    with pytest.raises(ProtocolViolation, match="Socket"):
        decoding.decode(KeptPacket, head + body[:-1], max_containers=10**6)


def test_a_long_namespace_hides_no_depth() -> None:
    """What is behind it may be short, and is looked at all the same."""
    head = f"2/{'x' * 40_000},"
    with pytest.raises(ProtocolViolation, match="nested too deep"):
        decoding.decode(KeptPacket, f'{head}["e",{"[" * 100}{"]" * 100}]', max_containers=10**6)


def test_small_packets_wait_for_nobody() -> None:
    turns: list[int] = []
    text = f'2["event",{json.dumps([[number] for number in range(3000)])}]'
    assert len(text) < encoding.IN_PIECES
    decoding.decode(KeptPacket, text, max_containers=10**6, pause=lambda: turns.append(1))
    assert turns == []


def test_a_long_text_waits_for_nobody() -> None:
    """It is one value, which has no pieces; many values of the same length have."""
    turns: list[int] = []
    for large in ("x" * 200_000, "one, two; " * 8000, "\\" * 100_000):
        text = f'21["event",{json.dumps(large)}]'
        packet = decoding.decode(
            KeptPacket, text, max_containers=10**6, pause=lambda: turns.append(1)
        )
        assert packet.data == ["event", large]
    assert turns == []
    few_commas = [["x" * 30]] * 4000
    for values in (
        ["x" * 300_000],
        list(range(20_000)),
        [[]] * 12_000,
        [{"a": 1}] * 4000,
        few_commas,
    ):
        before = len(turns)
        text = f'21["event",{json.dumps(values)}]'
        decoding.decode(KeptPacket, text, max_containers=10**6, pause=lambda: turns.append(1))
        assert len(turns) > before


def test_attachments_are_looked_for_a_part_at_a_time() -> None:
    """In one list of many values, and in many lists of few."""
    for large in ([1] * 100_000, [[[1]]] * 30_000, {str(number): 1 for number in range(50_000)}):
        turns: list[int] = []
        data: list[Any] = ["event", large, {"_placeholder": True, "num": 0}]
        places = Places(data, 1, take_turn=lambda turns=turns: turns.append(1))
        assert len(turns) >= len(large) / 4096
        assert places.fill([b"x"]) == ["event", large, b"x"]

"""Payloads against their schema: what passes, what is refused, and what is said of it."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import ipaddress
import re
import subprocess
import sys
import time
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from flask_socketio_guard.errors import ConfigError, EventInvalid
from flask_socketio_guard.events.schema import validator
from tests.support.cases import in_turn
from tests.support.scale import examples

SECRET = "s3cret"
ADVICE = 'schema= needs the package pydantic: pip install "Flask-SocketIO-Guard[validation]"'


class Chat(BaseModel):
    text: str
    count: int = Field(default=1, ge=1)
    inner: Chat | None = None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    number: int = Field(validation_alias="number of items")
    deep: int = Field(default=0, validation_alias=AliasPath("nested", "deep"))


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    bark: int


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Point(TypedDict):
    x: int
    y: int


@dataclasses.dataclass
class Size:
    width: int
    height: int


class Colour(enum.Enum):
    RED = "red"


class Rude(BaseModel):
    """Validators that repeat what they were given."""

    word: str = ""
    number: int = 0
    custom: str = ""

    @field_validator("word")
    @classmethod
    def check_word(cls, word: str) -> str:
        raise ValueError(f"{word} is not nice")

    @field_validator("number")
    @classmethod
    def check_number(cls, number: int) -> int:
        assert number == 1, f"{number} is not 1"
        return number

    @field_validator("custom")
    @classmethod
    def check_custom(cls, custom: str) -> str:
        raise PydanticCustomError("not_nice", "{word} is not nice", {"word": custom})


class Secretive(BaseModel):
    """What a default says is nobody's business."""

    counts: dict[str, int]
    token: str = SECRET


class Plain:
    """A class that pydantic knows nothing of."""


class Holder(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    value: Plain | list[int]


class Broken(BaseModel):
    """A validator with a mistake in it."""

    word: Any

    @field_validator("word")
    @classmethod
    def check_word(cls, word: Any) -> Any:
        return word.strip()


class Unfinished(BaseModel):
    other: Missing  # type: ignore[name-defined] # noqa: F821


def handler(*args: Any) -> None: ...


def refusal(schema: object, *args: object, of: Any = handler) -> str:
    """Return what the client is told."""
    with pytest.raises(EventInvalid) as caught:
        validator(schema, of)(args)
    assert caught.value.code == "invalid"
    assert str(caught.value) == caught.value.message
    assert len(caught.value.message) <= 300
    # What the error drags along could reach a log.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return caught.value.message


# What passes


@in_turn(
    ("schema", "value", "converted"),
    [
        (Chat, {"text": "hi"}, Chat(text="hi")),
        (Size, {"width": 1, "height": "2"}, Size(1, 2)),
        (Point, {"x": 1, "y": "2"}, {"x": 1, "y": 2}),
        (list[int], ["1", 2], [1, 2]),
        (Optional[int], None, None),  # noqa: UP045 - as people write it
        (int | None, "3", 3),
        (Pet, {"kind": "cat", "lives": 9}, Cat(kind="cat", lives=9)),
        (Colour, "red", Colour.RED),
        (Annotated[str, Field(max_length=3)], "abc", "abc"),
        (tuple[int, str], [1, "a"], (1, "a")),
        (bytes, b"\0", b"\0"),
        (Any, {"anything": [1]}, {"anything": [1]}),
    ],
)
def test_the_handler_gets_what_the_schema_makes_of_it(
    schema: object, value: object, converted: object
) -> None:
    assert validator(schema, handler)((value,)) == (converted,)


def test_a_tuple_is_a_schema_for_each_argument() -> None:
    check = validator((Chat, int | None, list[int]), handler)
    assert check(({"text": "hi"}, None, ["1"])) == (Chat(text="hi"), None, [1])
    assert validator((), handler)(()) == ()


@in_turn(
    ("schema", "count", "told"),
    [
        (int, 0, "expected arguments: 1, received: 0"),
        (int, 2, "expected arguments: 1, received: 2"),
        ((int, int), 1, "expected arguments: 2, received: 1"),
        ((int, int), 3, "expected arguments: 2, received: 3"),
        ((), 1, "expected arguments: 0, received: 1"),
    ],
)
def test_the_number_of_arguments_is_checked(schema: object, count: int, told: str) -> None:
    assert refusal(schema, *range(count)) == told


# The handler's own annotations


def annotated(chat: Chat, size: Size | None = None, anything=None) -> Nowhere:  # type: ignore[no-untyped-def, name-defined] # noqa: F821
    """The annotations are texts, and that of the result leads nowhere."""


def test_annotations_are_the_schema() -> None:
    """They are texts in this module."""
    check = validator(True, annotated)
    assert check(({"text": "hi"},)) == (Chat(text="hi"),)
    assert check(({"text": "hi"}, None)) == (Chat(text="hi"), None)
    assert check(({"text": "hi"}, {"width": 1, "height": 2}, {1})) == (
        Chat(text="hi"),
        Size(1, 2),
        {1},
    )
    assert refusal(True, of=annotated) == "expected arguments: 1 to 3, received: 0"
    assert refusal(True, 1, 2, 3, 4, of=annotated) == "expected arguments: 1 to 3, received: 4"
    assert refusal(True, {}, of=annotated) == "0.text: Field required"


def test_an_annotation_may_carry_constraints() -> None:
    def handle(text: Annotated[str, Field(max_length=3)]) -> None: ...

    assert refusal(True, "abcd", of=handle) == "0: String should have at most 3 characters"


def test_further_arguments_have_the_type_of_the_star() -> None:
    def handle(first: int, *rest: float, flag: bool = False, **options: Missing) -> None:  # type: ignore[name-defined] # noqa: F821
        """What cannot come from a client needs no type that is known."""

    check = validator(True, handle)
    assert check(("1",)) == (1,)
    assert check(("1", "2.5", 3)) == (1, 2.5, 3.0)
    assert refusal(True, of=handle) == "expected arguments: 1 or more, received: 0"
    assert refusal(True, 1, 2, "x", of=handle).startswith("2: Input should be a valid number")


class Namespace:
    """Handlers that are no plain functions."""

    def on_size(self, size: Size) -> None: ...

    def __call__(self, size: Size) -> None: ...


def _two(number: int, size: Size) -> None: ...


@pytest.mark.parametrize(
    "handle",
    [Namespace().on_size, Namespace(), functools.partial(_two, 1)],
    ids=["method", "callable", "partial"],
)
def test_annotations_are_found_on_whatever_can_be_called(handle: Any) -> None:
    assert validator(True, handle)(({"width": 1, "height": 2},)) == (Size(1, 2),)
    assert refusal(True, of=handle) == "expected arguments: 1, received: 0"


def test_annotations_are_found_behind_a_decorator() -> None:
    """One that passes on whatever it gets."""

    @functools.wraps(annotated)
    def passing_on(*args: Any, **kwargs: Any) -> None: ...

    assert refusal(True, {}, of=passing_on) == "0.text: Field required"


def test_the_signature_of_a_decorator_that_has_its_own_counts() -> None:
    @functools.wraps(annotated)
    def changing(number: int) -> None: ...

    changing.__annotations__ = {"number": "int"}
    assert validator(True, changing)(("1",)) == (1,)


def test_annotations_are_resolved_in_the_module_of_the_handler() -> None:
    """Not in that of a decorator around it, nor here."""
    names: dict[str, Any] = {"Mine": Size}
    exec("def handle(size: 'Mine'): ...", names)

    @functools.wraps(names["handle"])
    def passing_on(*args: Any) -> None: ...

    value = {"width": 1, "height": 2}
    assert validator(True, names["handle"])((value,)) == (Size(1, 2),)
    assert validator(True, passing_on)((value,)) == (Size(1, 2),)


# What a client is told


@in_turn(
    ("schema", "value", "told"),
    [
        (Chat, {}, "0.text: Field required"),
        (
            Chat,
            {"text": 1, "count": 0},
            "0.text: Input should be a valid string; "
            "0.count: Input should be greater than or equal to 1",
        ),
        (
            Chat,
            {"text": "", "inner": {"text": None}},
            "0.inner.text: Input should be a valid string",
        ),
        (list[int], [1, None], "0.1: Input should be a valid integer"),
        (Strict, {"number of items": "1"}, "0.number of items: Input should be a valid integer"),
        (
            Strict,
            {"number of items": 1, "nested": {"deep": "1"}},
            "0.nested.deep: Input should be a valid integer",
        ),
        (Colour, "blue", "0: Input should be 'red'"),
        (
            int | list[int],
            None,
            "0.int: Input should be a valid integer; 0.list[int]: Input should be a valid list",
        ),
        (
            Holder,
            {"value": None},
            "0.value.is-instance[Plain]: Input should be an instance of Plain; "
            "0.value.list[int]: Input should be a valid list",
        ),
        (Pet, {"kind": "cat"}, "0.cat.lives: Field required"),
        (Pet, {}, "0: Unable to extract tag using discriminator 'kind'"),
        (dict[int, int], {"1": None}, "0.*: Input should be a valid integer"),
    ],
)
def test_places_and_kinds_are_told(schema: object, value: object, told: str) -> None:
    assert refusal(schema, value) == told


def test_every_argument_is_looked_at() -> None:
    assert refusal((int, str, int), None, "", None) == (
        "0: Input should be a valid integer; 2: Input should be a valid integer"
    )


@in_turn(
    ("schema", "value", "told"),
    [
        (Strict, {"number of items": 1, SECRET: 1}, "0.*: Extra inputs are not permitted"),
        (dict[str, int], {SECRET: None}, "0.*: Input should be a valid integer"),
        (dict[str, int], {"<b>": None}, "0.*: Input should be a valid integer"),
        (dict[str, int], {"<int>": None}, "0.*: Input should be a valid integer"),
        (Secretive, {"counts": {SECRET: None}}, "0.counts.*: Input should be a valid integer"),
        (dict[str, int], {"[]": None}, "0.*: Input should be a valid integer"),
        (dict[str, int], {"int, " + SECRET: None}, "0.*: Input should be a valid integer"),
        (dict[int, int], {4929000011112222: None}, "0.*: Input should be a valid integer"),
        (dict[int, int], {SECRET: 1}, "0.*.[key]: Input should be a valid integer, unable"),
        (Pet, {"kind": SECRET}, "0: Union tag invalid"),
        (uuid.UUID, SECRET, "0: Uuid parsing"),
        (datetime.datetime, SECRET, "0: Datetime"),
        (Rude, {"word": SECRET}, "0.word: Value error"),
        (Rude, {"number": 4929000011112222}, "0.number: Assertion error"),
        (Rude, {"custom": SECRET}, "0.custom: Not nice"),
        (ipaddress.IPv4Address, SECRET, "0: Ip v4 address"),
        (Literal["a"], SECRET, "0: Input should be 'a'"),
        (Json, SECRET, "0: Json invalid"),
        (complex, SECRET, "0: Complex"),
        (complex, [], "0: Complex type"),
    ],
)
def test_nothing_of_what_was_sent_is_repeated(schema: object, value: object, told: str) -> None:
    message = refusal(schema, value)
    assert message.startswith(told)
    assert SECRET not in message
    assert "4929" not in message
    assert "http" not in message
    assert "<" not in message


def test_a_long_list_of_errors_is_cut() -> None:
    message = refusal(list[int], [None] * 50)
    assert message.startswith("0.0: Input should be a valid integer; 0.1: ")
    assert message.endswith("...")
    assert len(message) == 300


def test_countless_errors_are_counted_only() -> None:
    """To spell them out takes ten times as long as to find them."""
    values = [""] * 200_000
    began_at = time.process_time()
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(values)
    caught.value.errors()
    spelt_out = time.process_time() - began_at
    began_at = time.process_time()
    assert refusal(list[int], values) == "0: 200000 errors"
    assert time.process_time() - began_at < spelt_out / 2


def test_countless_arguments_are_not_all_looked_at() -> None:
    looked_at = []

    class Counting(BaseModel):
        word: str

        @field_validator("word")
        @classmethod
        def check(cls, word: str) -> str:
            looked_at.append(word)
            raise ValueError

    def handle(*words: Any) -> None: ...

    handle.__annotations__["words"] = Counting
    refusal(True, *[{"word": "x"}] * 100_000, of=handle)
    assert len(looked_at) <= 101


# Hostile payloads


def nested(depth: int, key: str | None = None) -> Any:
    """Return lists in lists, or dicts in dicts with a text."""
    value: Any = None
    for _ in range(depth):
        value = [value] if key is None else {"text": "x", key: value}
    return value


def test_deep_nesting_is_refused() -> None:
    """Deeper than any JSON parser would go."""
    place = "0" + 8 * ".inner" + "..."
    message = refusal(Chat, nested(100_000, "inner"))
    assert re.fullmatch(re.escape(place) + ": Recursion [a-z -]+", message)
    assert "Recursion" in refusal(JsonValue, nested(100_000))
    assert "0: Json invalid" in refusal(Json, "[" * 100_000)
    assert validator(Any, handler)((nested(100_000),))


def test_what_a_value_provokes_in_a_type_is_refused() -> None:
    """Here a recursion in the compiler of patterns."""
    told = refusal(re.Pattern, "(" * 10_000)
    assert told in ("0: Input cannot be read", "0: Pattern regex")


def test_a_text_that_cannot_be_encoded_is_refused() -> None:
    """Half a surrogate pair, which JSON may carry, in what a validator says."""
    assert refusal(Rude, {"word": "\ud800"}) == "0: Input cannot be read"
    assert refusal(Rude, {"custom": "\ud800"}) == "0: Input cannot be read"
    assert refusal(Pet, {"kind": "\ud800"}) == "0: Union tag invalid"
    assert refusal(dict[str, int], {"\ud800": None}) == "0.*: Input should be a valid integer"


class Recursive(BaseModel):
    """A validator that recurses as deep as the value goes."""

    value: Any

    @field_validator("value")
    @classmethod
    def check(cls, value: Any) -> Any:
        return repr(value)


def test_a_validator_that_runs_out_of_stack_refuses() -> None:
    assert refusal(Recursive, {"value": nested(100_000)}) == "0: Input cannot be read"


class PanicException(BaseException):
    """As pydantic's compiled part raises it."""


class Panicking(BaseModel):
    error: Any

    @field_validator("error")
    @classmethod
    def check(cls, error: Any) -> Any:
        raise error


def test_a_panic_of_pydantic_refuses() -> None:
    """Whichever value it is that makes the installed version panic."""
    assert refusal(Panicking, {"error": PanicException()}) == "0: Input cannot be read"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), gevent.GreenletExit(), gevent.Timeout(1)])
def test_what_ends_a_handler_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        validator(Panicking, handler)(({"error": error},))


def test_a_mistake_in_a_validator_is_no_fault_of_the_client() -> None:
    """It has to be seen by who can mend it."""
    with pytest.raises(AttributeError):
        validator(Broken, handler)(({"word": 1},))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats()
    | st.text(st.characters(categories=["Cs", "Lu", "Nd", "Sm", "Zs"]), max_size=10)
    | st.binary(max_size=10)
    | st.sampled_from(["1e999999", "9" * 5000, "PT1S", "2020-01-01", "-1", "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "count", "inner", "kind", "x", "y", "word", "nested"])
            | st.text(max_size=5)
            | st.text(st.characters(categories=["Cs"]), max_size=2),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
SCHEMAS: list[Any] = [
    Chat, Strict, Pet, Point, Size, Colour, Rude, int, float, str, bytes, Decimal, complex,
    datetime.datetime, datetime.date, datetime.time, datetime.timedelta, uuid.UUID, Path,
    ipaddress.IPv4Address, ipaddress.IPv6Network, list[int], set[str], dict[str, int],
    dict[int, Chat], frozenset[Any], tuple[int, ...], tuple[int, str], JsonValue, Json, re.Pattern,
    int | str | Chat | None, Literal[1, "a"], Annotated[Decimal, Field(multiple_of=2)],
    Annotated[int, Field(multiple_of=3)], Annotated[str, Field(pattern="^a", max_length=3)],
]  # fmt: skip
CHECKS = [validator(schema, handler) for schema in SCHEMAS]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ipaddress")
@settings(max_examples=examples(300), deadline=None)
@given(value=JSON)
def test_no_value_leads_to_another_exception(value: object) -> None:
    for check in CHECKS:
        message = "0"
        try:
            assert len(check((value,))) == 1
        except EventInvalid as exc:
            message = exc.message
        assert message.startswith("0")
        assert len(message.encode()) <= 300


# Schemas that cannot be used


@in_turn(
    ("schema", "reason"),
    [
        (5, "Unable to generate pydantic-core schema for 5."),
        (False, "Unable to generate pydantic-core schema for False."),
        ((int, "Missing"), "Missing"),
        (list["Missing"], "Missing"),  # type: ignore[name-defined] # noqa: F821
        (Unfinished, "defined"),
        (list[Unfinished], "defined"),
        (handler, "handler is a function, not a type"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(schema: object, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^the schema of handler cannot be used: .*{re.escape(reason)}"
    ) as caught:
        validator(schema, handler)
    assert "\n" not in str(caught.value)


def test_annotations_that_cannot_be_used_are_refused_at_once() -> None:
    def unknown(value: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821

    def by_keyword(value: int, *, flag: bool) -> None: ...

    with pytest.raises(ConfigError, match="unknown cannot be used: name 'Missing' is not defined"):
        validator(True, unknown)
    with pytest.raises(
        ConfigError,
        match=r"by_keyword cannot be used: the argument flag can be passed by keyword only",
    ):
        validator(True, by_keyword)
    assert validator(int, by_keyword)(("1",)) == (1,)


def test_a_schema_without_pydantic_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ConfigError) as caught:
        validator(int, handler)
    assert str(caught.value) == ADVICE


def test_nothing_of_pydantic_is_imported_before_a_schema_is_used() -> None:
    program = (
        "import sys; import flask_socketio_guard.events.schema;"
        "sys.exit(any(name.startswith('pydantic') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)

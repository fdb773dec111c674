"""Named tuples made cheaply are what typing makes of the same class."""

import pickle
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm import named


class Ours(named.NamedTuple):
    """A name, a length and more."""

    name: str
    length: int = 3
    """In bytes."""
    more: "tuple[object, ...]" = ()

    @property
    def doubled(self) -> int:
        """Twice the length."""
        return 2 * self.length


class Theirs(typing.NamedTuple):
    """A name, a length and more."""

    name: str
    length: int = 3
    """In bytes."""
    more: "tuple[object, ...]" = ()

    @property
    def doubled(self) -> int:
        """Twice the length."""
        return 2 * self.length


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, with names; or which exception it raises."""
    try:
        value = call()
    except (TypeError, ValueError) as error:
        return type(error)
    return (tuple(value), value._asdict(), repr(value).partition("(")[2], value.doubled)


names = st.sampled_from(("name", "length", "more", "none"))


@given(st.lists(st.integers(), max_size=4), st.dictionaries(names, st.integers()))
def test_they_take_what_typings_take(values: list[int], given_by_name: dict[str, int]) -> None:
    ours = outcome(lambda: Ours(*values, **given_by_name))  # type: ignore[arg-type]
    assert ours == outcome(lambda: Theirs(*values, **given_by_name))  # type: ignore[arg-type]


@given(st.dictionaries(names, st.integers()))
def test_they_are_replaced_as_typings_are(changed: dict[str, Any]) -> None:
    ours, theirs = Ours("a"), Theirs("a")
    found = outcome(lambda: ours._replace(**changed))
    expected = outcome(lambda: theirs._replace(**changed))
    assert found == expected or {found, expected} == {TypeError, ValueError}  # 3.13 has the former


def test_they_are_tuples_with_nothing_more() -> None:
    one = Ours("a", 1)
    name, length, more = one
    assert (name, length, more) == one == ("a", 1, ()) == Theirs("a", 1)
    assert hash(one) == hash(("a", 1, ()))
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 (our own)
    assert Ours._make(["b", 2, ()]) == Ours("b", 2)
    assert (Ours._fields, Ours._field_defaults) == (Theirs._fields, Theirs._field_defaults)
    assert Ours.__doc__ == Theirs.__doc__
    for field in ("length", "other"):
        with pytest.raises(AttributeError):
            setattr(one, field, 2)
    match one:
        case Ours("a", size):
            assert size == 1
        case _:
            raise AssertionError


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="they are typing's")
def test_a_class_of_more_fields_than_there_are_places_for_is_none() -> None:
    annotations = {f"field{number}": int for number in range(1000)}
    with pytest.raises(TypeError, match="Many has more than"):
        types.new_class(
            "Many", (named.NamedTuple,), {}, lambda space: space.update(__annotations__=annotations)
        )

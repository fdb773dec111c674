"""One source of truth: what the methods take and give, what is checked, and what docs/ says."""

import json
from typing import Annotated, Any, TypedDict

import pytest

from tests.control_docs import DOCS, described, page, schema_text
from tinyvmm.instances.control_schema import check, limits, params_of, problem_of, schema_of
from tinyvmm.methods.supervised import Supervised


class Point(TypedDict):
    """A point."""

    x: int
    label: str | None


def take(
    *,
    words: Annotated[list[str], limits(minItems=1, maxItems=2)],
    port: Annotated[int, limits(minimum=1, maximum=9)] | None = None,
    share: float = 0.5,
) -> Point:
    """Take."""
    raise NotImplementedError


def test_annotations_become_json_schema() -> None:
    assert schema_of(list[int]) == {"type": "array", "items": {"type": "integer"}}
    assert schema_of(dict[str, bool])["additionalProperties"] == {"type": "boolean"}
    assert schema_of(int | None) == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema_of(Point)["required"] == ["x", "label"]
    params = params_of(take)
    assert params["required"] == ["words"]
    assert params["properties"]["share"] == {"type": "number", "default": 0.5}
    port = params["properties"]["port"]["anyOf"][0]
    assert port == {"type": "integer", "minimum": 1, "maximum": 9}
    with pytest.raises(TypeError, match="no schema"):
        schema_of(bytes)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"words": ["a"]}, None),
        ({"words": ["a", "b"], "port": None, "share": 1}, None),
        ({"words": ["a"], "port": 9}, None),
        ({}, "words is missing"),
        ({"words": []}, "words has fewer than 1 items"),
        ({"words": ["a", "b", "c"]}, "words is longer than 2"),
        ({"words": ["a", 2]}, "words[1] is no string"),
        ({"words": "ab"}, "words is no array"),
        ({"words": ["a"], "port": 0}, "port is not within 1 to 9"),
        ({"words": ["a"], "port": True}, "port is no integer"),
        ({"words": ["a"], "port": {}}, "port is no integer"),
        ({"words": ["a"], "share": "1"}, "share is no number"),
        (
            {"words": ["a"], "pork": 1},
            "'pork' is no parameter: there are words, port, share",
        ),
    ],
)
def test_what_a_method_is_given_is_checked(params: dict[str, Any], problem: str | None) -> None:
    assert problem_of(take, params) == problem


def test_what_a_method_gives_can_be_checked() -> None:
    assert check(schema_of(Point), {"x": 1, "label": None}, "") is None
    assert check(schema_of(Point), {"x": 1}, "") == "label is missing"
    assert check(schema_of(Point), {"x": 1, "label": 3}, "") == "label is no string"


def test_every_method_says_what_it_takes_and_gives() -> None:
    for name, method in described()["methods"].items():
        assert method["summary"], name
        assert method["params"]["additionalProperties"] is False
    assert set(described()["methods"]) == set(Supervised("").methods())


def test_the_documents_are_the_methods() -> None:
    """If this fails: python -m tests.control_docs."""
    assert (DOCS / "control.schema.json").read_text() == schema_text()
    assert (DOCS / "control.md").read_text() == page()
    assert json.loads(schema_text()) == described()

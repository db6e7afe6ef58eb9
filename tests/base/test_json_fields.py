import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from gpt2.base import json_fields
from gpt2.base.json_fields import Timestamp, from_json


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Line:
    points: tuple[Point, ...]
    name: str | None = None
    length: float = 0.0
    drawn: Timestamp = 0.0
    style: Literal["solid", "dotted"] = "solid"
    more: Mapping[str, Any] = field(default_factory=dict)


def test_values_become_fields():
    assert from_json(Point, {"x": 1, "y": 2}, "a.json") == Point(1, 2)
    assert from_json(Point, {"x": 1}, "a.json") == Point(1, 0)


def test_unknown_fields_are_ignored_with_one_warning(tmp_path: Path, caplog):
    path = tmp_path / "points.json"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert from_json(Point, {"x": 1, "z": 3, "w": 4}, path) == Point(1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: ignored unknown fields of Point: w, z"
    ]


@pytest.mark.parametrize(("values", "message"), [({"y": 1}, "x"), ([1, 2], "JSON object, got")])
def test_other_values_are_a_type_error(values, message: str):
    with pytest.raises(TypeError, match=message):
        from_json(Point, values, "a.json")


def test_lists_become_tuples_and_objects_dataclasses():
    values = {"points": [{"x": 1}, {"x": 2}], "name": None, "length": 3, "style": "dotted"}
    expected = Line((Point(1), Point(2)), None, 3, style="dotted")
    assert from_json(Line, values, "a.json") == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("points", {}, "points: expected a list, got {}"),
        ("points", [{"x": "1"}], "points: x: expected a 64-bit integer, got '1'"),
        ("points", [{"x": True}], "x: expected a 64-bit integer, got True"),
        ("points", [{"x": 2**63}], "x: expected a 64-bit integer, got 9223372036854775808"),
        ("name", 1, "name: expected text, got 1"),
        ("length", 10**400, "length: expected a number, got 1000"),
        ("drawn", float("inf"), "drawn: expected seconds since 1970, got inf"),
        ("style", "dashed", "style: expected solid or dotted, got 'dashed'"),
        ("more", [], r"more: expected an object, got \[\]"),
    ],
)
def test_a_value_of_another_type_is_a_type_error(name: str, value: object, message: str):
    with pytest.raises(TypeError, match=message):
        from_json(Line, {"points": []} | {name: value}, "a.json")


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_a_value_error(depth: int):
    with pytest.raises(ValueError, match="too deeply nested"):
        json_fields.parse("[" * depth + "]" * depth)

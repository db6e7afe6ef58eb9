import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpt2.base.json_fields import from_json


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


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

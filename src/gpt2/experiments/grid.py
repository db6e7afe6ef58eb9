"""Grids of values: parsing, all combinations, and names of the points. Pure."""

import contextlib
import itertools
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from gpt2.base.errors import ConfigError

Point = dict[str, Any]
"""one value for each field of a grid"""


def parse_grid(items: Sequence[str]) -> dict[str, list[Any]]:
    """`learning_rate=1e-3,3e-4 n_layer=2,4` as lists of values: numbers, True, False, None, text.

    Raises ConfigError for an item without a name or value, and for a duplicate name or value.
    """
    grid: dict[str, list[Any]] = {}
    for item in items:
        name, _, texts = item.partition("=")
        name = name.strip().replace("-", "_")
        values = [_value(text.strip()) for text in texts.split(",")]
        if not name.isidentifier() or "" in values:
            raise ConfigError(f"--grid {item}: expected NAME=VALUE,VALUE, as in n_layer=2,4")
        if name in grid or any(values.count(value) > 1 for value in values):
            raise ConfigError(f"--grid {item}: duplicate name or value")
        grid[name] = values
    return grid


def points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of one value per name; an empty grid has one point, the empty one."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def point_name(point: Mapping[str, Any]) -> str:
    """`learning_rate=0.001,n_layer=2`, safe as a file name; empty for the empty point."""
    return file_name(",".join(f"{name}={value}" for name, value in point.items()))


def file_name(text: str) -> str:
    """The text with `_` in place of all that a file name should not have."""
    return re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)


def free_key(key: str, names: Container[str]) -> str:
    """`key`, or `the key` where `names`, which are parameters of a function, have it already."""
    return f"the {key}" if key in names else key


def _value(text: str) -> Any:
    """The number, True, False or None that the text spells; else the text."""
    words = {"true": True, "false": False, "none": None}
    for read in (lambda: words[text.lower()], lambda: int(text), lambda: float(text)):
        with contextlib.suppress(KeyError, ValueError):
            value = read()
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"--grid: expected a finite number, got {text}")
            return value
    return text

"""Grids of values: parsing, all combinations, and names of the points. Pure."""

import contextlib
import itertools
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from gpt2.base.errors import ConfigError

NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile("[+-]?(nan|inf|infinity)")
WORDS = {"true": True, "false": False, "none": None}
Point = dict[str, Any]
"""one value for each field of a grid"""


def parse_grid(
    items: Sequence[str], texts: Container[str] = (), optional_texts: Container[str] = ()
) -> dict[str, list[Any]]:
    """`learning_rate=1e-3,3e-4 n_layer=2,4` as lists of values: numbers, True, False, None, text.

    The values of the names in `texts` are text, whatever they look like; those of the names in
    `optional_texts` are text or None. Raises ConfigError for an item without a name or value, for a
    duplicate name or value, and for NaN and infinity.
    """
    grid: dict[str, list[Any]] = {}
    for item in items:
        name, _, listed = item.partition("=")
        name = name.strip().replace("-", "_")
        given = [text.strip() for text in listed.split(",")]
        if not name.isidentifier() or "" in given:
            raise ConfigError(f"--grid {item}: expected NAME=VALUE,VALUE, as in n_layer=2,4")
        if name in texts:
            values: list[Any] = given
        elif name in optional_texts:
            values = [None if text.lower() == "none" else text for text in given]
        else:
            values = [_value(item, text) for text in given]
        distinct = {(isinstance(value, bool), value) for value in values}  # 1 == True
        if name in grid or len(distinct) < len(values):
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


def _value(item: str, text: str) -> Any:
    """The number, True, False or None that the text spells; else the text. A text such as 007 or
    1_0 is none of a number's usual spellings."""
    word = text.lower()
    if word in WORDS:
        return WORDS[word]
    if NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(word):
        with contextlib.suppress(ValueError):  # no integer, or one of too many digits
            return int(text)
        if not math.isfinite(value := float(text)):
            raise ConfigError(f"--grid {item:.80}: expected a finite number, got {text:.40}")
        return value
    return text

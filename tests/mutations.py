"""Damaged versions of files: what disks, other tools and later versions may leave of them."""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXAMPLES = int(os.environ.get("MUTATIONS", "25"))
"""damaged versions of each file; a number in the environment looks for faults for longer"""
DEEP = "a list in a list in a list"
"""stands for a value that `json.dumps` could not write"""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 10**30, -(10**400), 1e308, float("inf"), float("nan")),
    *("", "text", "../x", "\x1b[31m", "\ud800", [], {}, [[]], [None], {"text": {}}, DEEP),
)
"""values of wrong types, sizes and shapes"""
OTHER_CONTENT = (b"", b"\xff\xfe", b"\x00" * 64, b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5000)
Mutate = Callable[[random.Random], Any]


def each(mutate: Mutate, examples: int = EXAMPLES) -> Iterator[Any]:
    """`examples` damaged versions, the same ones in every process."""
    for seed in range(examples):
        yield mutate(random.Random(seed))


def of_json(content: Any) -> Mutate:
    """Versions of a file with the JSON of `content`, damaged in one place."""

    def mutate(rng: random.Random) -> bytes:
        kind = rng.choice(("value", "value", "value", "missing", "extra", "whole", "bytes"))
        if kind == "bytes":
            return of_bytes(json.dumps(content).encode())(rng)
        if kind == "whole":
            return as_json(rng.choice(ODD_VALUES))
        return as_json(changed(rng, content, kind))

    return mutate


def of_lines(content: list[Any]) -> Mutate:
    """As `of_json`, of a file with one object per line: one of them is damaged."""

    def mutate(rng: random.Random) -> bytes:
        lines = [json.dumps(line).encode() for line in content]
        at = rng.randrange(len(lines))
        lines[at] = of_json(content[at])(rng)
        return b"\n".join(lines) + b"\n"

    return mutate


def of_bytes(content: bytes) -> Mutate:
    """Versions of `content`: cut off, with a damaged byte, or something else altogether."""

    def mutate(rng: random.Random) -> bytes:
        at = rng.randrange(len(content))
        flipped = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        return rng.choice((content[:at], flipped, flipped, flipped, rng.choice(OTHER_CONTENT)))

    return mutate


def changed(rng: random.Random, content: Any, kind: str, odd: Any = ODD_VALUES) -> Any:
    """`content` with an odd `value` in one place, or a place `missing`, or an `extra` key."""
    copy = _copied(content)
    parent, key = rng.choice(_places(copy))
    if kind == "missing":
        del parent[key]
    elif kind == "extra" and isinstance(parent, dict):
        parent["another"] = rng.choice(odd)
    else:
        parent[key] = rng.choice(odd)
    return copy


def as_json(content: Any) -> bytes:
    """The JSON of `content`, where DEEP stands for more lists than any parser follows."""
    text = json.dumps(content)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


@contextmanager
def named(content: object) -> Iterator[None]:
    """Adds the damaged content to errors that are raised in the block."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"damaged content: {content!r:.2000}")
        raise


def _places(content: Any) -> list[tuple[Any, Any]]:
    """All places in objects and lists, as the parent and its key."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    for key in keys:
        if isinstance(content[key], dict | list):
            found += _places(content[key])
    return found


def _copied(content: Any) -> Any:
    """A copy of dicts and lists; tuples become lists. Other values stay the same."""
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list | tuple) else content

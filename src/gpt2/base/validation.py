"""Checks of option values, with error messages that name a valid one. Pure."""

import difflib
from collections.abc import Collection
from typing import Any

from gpt2.base.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(part: Any, minimum: float, *names: str) -> None:
    """Raises ConfigError if a field of `part` is less than `minimum`; None (off) is valid."""
    for name in names:
        value = getattr(part, name)
        require(
            value is None or value >= minimum,
            f"{name}={value} is too small; expected {minimum} or more",
        )


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` around `value`, for an error message."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)


def suggestion(given: str, known: Collection[str]) -> str:
    """`; did you mean …?` with the names in `known` that are nearest to `given`, or nothing."""
    near = difflib.get_close_matches(given, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""

"""Checks of option values, with error messages that name a valid one. Pure."""

import difflib
import math
from collections.abc import Collection
from typing import Any

from gpt2.base.errors import ConfigError

LARGEST = 10**12
"""largest number of steps, tokens, rows or files that an option takes"""
LARGEST_SEED = 2**63 - 1
"""a 64-bit integer, so that NumPy and torch use all of it"""
MOST_PROCESSES = 10_000
"""largest number of processes or GPUs that an option takes"""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_within(part: Any, minimum: float, maximum: float, *names: str) -> None:
    """Raises ConfigError if a field of `part` is NaN, less than `minimum` or more than `maximum`;
    None (off) is valid."""
    for name in names:
        value = getattr(part, name)
        if value is None or minimum <= value <= maximum:
            continue
        if value < minimum:
            raise ConfigError(f"{name}={value} is too small; expected {minimum} or more")
        if value > maximum:
            raise ConfigError(f"{name}={value} is too large; expected {maximum} at most")
        raise ConfigError(f"{name}={value} is invalid; expected {minimum} to {maximum}")


def require_positive(part: Any, maximum: float, *names: str) -> None:
    """Raises ConfigError unless fields of `part` are above 0 and at most `maximum`, or None."""
    for name in names:
        value = getattr(part, name)
        require(
            value is None or 0 < value <= maximum,
            f"{name}={value} is invalid; expected more than 0 and at most {maximum}",
        )


def is_finite(value: float) -> bool:
    """Whether a number is neither NaN nor infinite, nor an integer beyond the range of floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` around `value`, for an error message."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)


def suggestion(given: str, known: Collection[str]) -> str:
    """`; did you mean …?` with the names in `known` that are nearest to `given`, or nothing."""
    near = difflib.get_close_matches(given, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""

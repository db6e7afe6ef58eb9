"""Dataclasses from the JSON objects that this or another version of the package wrote."""

import logging
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


def from_json(kind: type[T], values: Any, source: object) -> T:
    """The dataclass `kind` with the values of a JSON object that was read from `source`.

    A key that `kind` does not know, as a later version may write, is ignored with a warning. Raises
    TypeError if `values` is not an object or lacks a field that has no default.
    """
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {values!r:.80}")
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - names):
        _warn_once(str(source), kind.__name__, tuple(unknown))
    return kind(**{name: value for name, value in values.items() if name in names})


@cache  # a live view reads the same file every few seconds
def _warn_once(source: str, kind: str, unknown: tuple[str, ...]) -> None:
    logger.warning("%s: ignored unknown fields of %s: %s", source, kind, ", ".join(unknown))

"""JSON files of small content, and dataclasses from the objects in them.

A file may be damaged, or of another version of the package: what is read has the types that its
dataclass declares, or is refused. Callers handle `UNREADABLE`.
"""

import contextlib
import json
import logging
import sys
import types
from collections.abc import Mapping  # what a hint of Mapping[…] has as its origin
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from gpt2.base import regular_file

logger = logging.getLogger(__name__)
T = TypeVar("T")

Timestamp = Annotated[float, "seconds since 1970"]
LAST_TIMESTAMP = 32503680000
"""the year 3000: later ones cannot be shown everywhere"""
LARGEST_INTEGER = 2**63 - 1
DEEPEST = 50
"""nested lists and objects of a file; those of this package have less than 10"""
UNREADABLE = (OSError, ValueError, TypeError, LookupError)
"""what reading a file as an object may raise"""


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises OSError if the file cannot be read, ValueError if it is not JSON, and TypeError if it is
    not an object.
    """
    return require_object(parse(regular_file.read_bytes(path)))


def parse(content: str | bytes, **options: Any) -> Any:
    """As `json.loads`; its ValueError also stands for lists in lists without end."""
    try:
        values = json.loads(content, **options)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    _require_shallow(values)
    return values


def require_object(values: Any) -> dict[str, Any]:
    """`values`; raises TypeError if that is not an object."""
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {_shown(values)}")
    return values


def from_json(kind: type[T], values: Any, source: object) -> T:
    """The dataclass `kind` with the values of a JSON object that was read from `source`.

    A key that `kind` does not know, as a later version may write, is ignored with a warning. Raises
    TypeError if `values` is not an object, lacks a field that has no default, or has a value of
    another type than the field. Lists become tuples, and objects dataclasses, as the field says.
    """
    require_object(values)
    hints, found = _hints(kind), {}  # type: ignore[arg-type]
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            try:
                found[field.name] = _converted(hints[field.name], values[field.name], source)
            except TypeError as error:
                raise TypeError(f"{field.name}: {error}") from error
        elif field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{field.name} is missing")
    if unknown := sorted(values.keys() - found.keys()):
        _warn_once(str(source), kind.__name__, tuple(unknown))
    return kind(**found)


def require_type(hint: Any, value: Any) -> None:
    """Raises TypeError if `value`, which was read from JSON, is not of the type `hint`."""
    _converted(hint, value, "")


def _converted(hint: Any, value: Any, source: object) -> Any:
    """`value`, which was read from JSON, as the type `hint`; raises TypeError if it is not."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in parts:
            return None
        *others, last = (part for part in parts if part is not type(None))
        for other in others:
            with contextlib.suppress(TypeError):
                return _converted(other, value, source)
        return _converted(last, value, source)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, source)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is tuple and parts[-1] is not Ellipsis and len(value) != len(parts):
            raise TypeError(f"expected {len(parts)} values, got {_shown(value)}")
        return origin(_converted(parts[0], item, source) for item in value)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {name: _converted(parts[1], item, source) for name, item in value.items()}
    if not _is_of(hint, value):
        raise TypeError(f"expected {_name(hint)}, got {_shown(value)}")
    return value


def _is_of(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint == Timestamp:
        return is_number and 0 <= value <= LAST_TIMESTAMP
    if hint is float:
        return is_number and (isinstance(value, float) or abs(value) <= sys.float_info.max)
    if hint is int:
        return is_number and isinstance(value, int) and abs(value) <= LARGEST_INTEGER
    return isinstance(hint, type) and isinstance(value, hint)


def _name(hint: Any) -> str:
    """What a message calls a type."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if hint == Timestamp:
        return str(hint.__metadata__[0])
    origin = get_origin(hint) or hint
    names = {str: "text", int: "a 64-bit integer", float: "a number", bool: "true or false"}
    return names.get(origin, "a list" if origin in (list, tuple) else "an object")


def _shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    return f"{value!r:.80}"


def _require_shallow(values: Any) -> None:
    level = [values]
    for _ in range(DEEPEST):
        level = [part for value in level for part in _parts(value)]
        if not level:
            return
    raise ValueError("too deeply nested")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache  # a live view reads the same file every few seconds
def _warn_once(source: str, kind: str, unknown: tuple[str, ...]) -> None:
    logger.warning("%s: ignored unknown fields of %s: %s", source, kind, ", ".join(unknown))

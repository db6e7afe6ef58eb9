"""Options by name: set from flags, TOML files and stored configurations; compared at a resume."""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gpt2.base.errors import ConfigError
from gpt2.base.validation import require, suggestion
from gpt2.config import presets
from gpt2.config.model import ModelConfig
from gpt2.config.run import OptimConfig, RunConfig

# What a checkpoint fixes: with other values its weights do not fit, or the tokens of step N would
# be others than those the run has seen.
FIXED_BY_CHECKPOINT = (
    *(f"model.{part.name}" for part in fields(ModelConfig) if part.name != "dropout"),
    "data.total_batch_size",
    "data.shuffle",
    "optim.optimizer",
    "machine.seed",
)
# What the course of training depends on: free to change at a resume, but never silently.
NOTED_AT_RESUME = (
    "model.dropout",
    *(f"optim.{part.name}" for part in fields(OptimConfig) if part.name != "optimizer"),
    "machine.dtype",
    "machine.fast",
    "data.max_steps",  # the learning rate's decay ends with the run
    "data.epochs",
)
# What checkpoints meant before they said so.
UNSAID = {"model": {"architecture": "gpt2"}, "optim": {"optimizer": "adamw"}}


def of_stored(stored: Mapping[str, Any]) -> RunConfig:
    """The configuration that a checkpoint keeps; fields of other versions are left out."""
    table = _field_table()
    known = {
        f"{part}.{name}": value
        for part, values in stored.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
        if table.get(name, ("",))[0] == part
    }
    return overlay(presets.preset(stored["preset"]), known)


def changed(
    old: Mapping[str, Any], new: RunConfig, names: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of each field in `names` that a stored config has otherwise.

    A field that the stored config lacks is one that did not exist when it was written; unless it
    is UNSAID, it counts as unchanged.
    """
    rows = []
    plain = new.to_dict()
    for name in names:
        part, field = name.split(".")
        stored = UNSAID.get(part, {}) | dict(old.get(part, {}))
        if field in stored and stored[field] != plain[part][field]:
            rows.append((field, stored[field], plain[part][field]))
    return rows


def overlay(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with other values, by name: `learning_rate` and `optim.learning_rate` both work.

    Values may be nested by part, as in a TOML file. Raises ConfigError for an unknown name, with
    the nearest known ones, and for a value of the wrong type.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in _flatten(values):
        owner, field, hint = locate(name)
        parts.setdefault(owner, {})[field] = _coerce(name, value, hint)
    top = parts.pop("", {})
    changed_parts = {owner: replace(getattr(config, owner), **new) for owner, new in parts.items()}
    return replace(config, **top, **changed_parts)


def locate(name: str) -> tuple[str, str, Any]:
    """The part, the field and the type of an option; "" is the part of RunConfig's own fields.

    Raises ConfigError for an unknown name, with the nearest known ones.
    """
    part, _, field = name.replace("-", "_").rpartition(".")
    owner, hint = _field_table().get(field, ("", None))
    if hint is None or (part and part != owner):
        raise ConfigError(f"unknown option {name}{suggestion(field, list(_field_table()))}")
    return owner, field, hint


def from_toml(config: RunConfig, text: str, source: str) -> RunConfig:
    """`config` with the values of a TOML document; `source` names it in errors."""
    try:
        values = tomllib.loads(text)
        require("preset" not in values, "preset stands on the command line: --preset NAME")
        return overlay(config, values)
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


@cache
def _field_table() -> dict[str, tuple[str, Any]]:
    """Field name -> (the part that owns it, its type); "" owns the fields of RunConfig itself."""
    table: dict[str, tuple[str, Any]] = {}
    for name, hint in get_type_hints(RunConfig).items():
        if is_dataclass(hint):
            for inner, inner_hint in get_type_hints(hint).items():
                assert inner not in table, f"two parts have a field {inner}: flags would clash"
                table[inner] = (name, inner_hint)
        else:
            table[name] = ("", hint)
    return table


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{inner}", item) for inner, item in value.items()]
        else:
            rows.append((name, value))
    return rows


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field: text to Path or back, int to float, "None" to None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value in ("None", "none")):
        return None
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is Path and isinstance(value, str | Path):
            return Path(value)
        if option is str and isinstance(value, Path):
            return str(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if type(value) is option:
            return value
    wanted = " or ".join(
        repr(get_args(option)) if get_origin(option) is Literal else option.__name__
        for option in options
    )
    raise ConfigError(f"{name}={value!r} does not fit; needed: {wanted}")

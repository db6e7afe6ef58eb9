"""Options by name: set from flags, TOML files and stored configs, compared on resume. Pure."""

import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gpt2.base import addresses
from gpt2.base.errors import ConfigError
from gpt2.base.validation import is_finite, require, suggestion
from gpt2.config import mixture, presets
from gpt2.config.model import MODERN_FLAGS, ModelConfig
from gpt2.config.run import OptimConfig, RunConfig

T = TypeVar("T")
MODERN_PARTS = {
    part.name: part.default for part in fields(ModelConfig) if part.name in MODERN_FLAGS
}
LR_RATIOS = {"embedding_lr_ratio": 1.0, "head_lr_ratio": 1.0, "scalar_lr_ratio": 1.0}
# With other values, the weights of a checkpoint would have the wrong shape, or step N would read
# other rows.
FIXED_BY_CHECKPOINT = (
    *(f"model.{part.name}" for part in fields(ModelConfig) if part.name != "dropout"),
    "data.total_batch_size",
    "data.batch_ramp",
    "data.shuffle",
    "optim.optimizer",
    *(f"optim.{name}" for name in LR_RATIOS),
    "machine.seed",
    "machine.residual_dtype",
)
# Options that affect training and may change on resume; a change is reported.
NOTED_AT_RESUME = (
    "model.dropout",
    *(
        name
        for name in (f"optim.{part.name}" for part in fields(OptimConfig))
        if name not in FIXED_BY_CHECKPOINT
    ),
    "machine.dtype",
    "machine.grad_dtype",
    "data.max_steps",  # the learning rate's decay ends with the run
    "data.epochs",
)
# Options of one process: a resumed run has those that are typed, never those of its checkpoint.
NEVER_FROM_CHECKPOINT = (
    "data.cache_dir",
    "checkpoint.resume",
    "checkpoint.init_from",
    "checkpoint.checkpoint_dir",
    "checkpoint.trust_checkpoint",
    "watch.log_dir",
    "watch.runs_dir",
    "watch.profile",
    "watch.memory_snapshot",
    "machine.device",
    "machine.collective_timeout",
    "experiment.experiment_name",
    "experiment.gpu_id",
    "experiment.wandb_run_name",  # it names an experiment, too
)
# Options that no file sets, with their flags. A file may come from another user, and with
# trust_checkpoint it would run that user's code.
ONLY_TYPED = {"preset": "--preset NAME", "trust_checkpoint": "--trust_checkpoint"}
# Values of options that did not exist when old checkpoints were written.
IMPLICIT: dict[str, dict[str, Any]] = {
    "model": {"architecture": "gpt2", **MODERN_PARTS},
    "data": {"batch_ramp": []},
    "optim": {"optimizer": "adamw", **LR_RATIOS},
    "machine": {"residual_dtype": "float32"},
}
# Options of earlier versions, which files may still have, with the values that they now stand for.
FORMER = {"fast": True}
# Options that earlier versions did not have, with the values for what these did.
LATER: dict[str, Any] = {
    "skip_spikes": False,
    "shard_optimizer": False,
    "grad_dtype": "float32",
    "residual_dtype": "float32",
    "profile": None,
    "memory_snapshot": False,
    "mixture": [],
    "batch_ramp": [],
    "cautious_decay": False,
    "momentum_warmup": 0,
    **MODERN_PARTS,
    **LR_RATIOS,
}


def of_stored(stored: Mapping[str, Any]) -> RunConfig:
    """The configuration in a checkpoint; fields that this version does not have are ignored.

    Raises ConfigError for values that flags could not have.
    """
    require(isinstance(stored, Mapping), f"expected a configuration, got {stored!r:.40}")
    table = _field_table()
    known = {
        f"{part}.{name}": value
        for part, values in (IMPLICIT | dict(stored)).items()
        if isinstance(values, Mapping)
        for name, value in (IMPLICIT.get(part, {}) | dict(values)).items()
        if table.get(name, ("",))[0] == part
    }
    return overlay(presets.preset(str(stored.get("preset"))), known)


def on_stored(config: RunConfig, stored: Mapping[str, Any]) -> RunConfig:
    """The configuration in a checkpoint, with what is never taken from one as it is in `config`.

    An address with a password counts as such.
    """
    before = of_stored(stored)
    taken = before.to_dict()
    for part, name in (option.split(".") for option in NEVER_FROM_CHECKPOINT):
        del taken[part][name]
    if any(map(addresses.has_secret, before.data.data_root)):
        del taken["data"]["data_root"], taken["data"]["mixture"]
    return overlay(config, taken)


def password_warning(stored_roots: Sequence[str], config: RunConfig) -> str | None:
    """What to type if `on_stored` has left out an address for its password; None if it is typed."""
    before, now = addresses.public(stored_roots), addresses.public(config.data.data_root)
    if before == now or not any(map(addresses.has_secret, stored_roots)):
        return None
    address = " ".join(before)
    return f"--data_root {address} is not taken from the checkpoint, as it has a password: type it"


def overridden(old: Mapping[str, Any], new: RunConfig) -> list[tuple[str, Any, Any]]:
    """As `changed`, of every option that may have another value than in the checkpoint."""
    kept = {*NEVER_FROM_CHECKPOINT, *FIXED_BY_CHECKPOINT}
    names = (f"{part}.{name}" for name, (part, _) in _field_table().items() if part)
    return changed(old, new, tuple(name for name in names if name not in kept))


def changed(
    old: Mapping[str, Any], new: RunConfig, names: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of each field in `names` that differs from the stored config.

    A field that the stored config lacks did not exist when it was written: its old value is that in
    IMPLICIT, else it counts as unchanged.
    """
    rows: list[tuple[str, Any, Any]] = []
    plain = new.to_dict()
    for name in names:
        part, field = name.split(".")
        stored = IMPLICIT.get(part, {}) | dict(old.get(part, {}))
        if field not in stored:
            continue
        before, now = addresses.public(stored[field]), addresses.public(plain[part][field])
        if before != now:
            rows.append((field, _shown(before), _shown(now)))
    return rows


def _shown(value: Any) -> Any:
    """A value of an option as it is typed."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else value


def overlay(config: RunConfig, values: Mapping[str, Any], *, is_complete: bool = True) -> RunConfig:
    """`config` with some values replaced, by name: `learning_rate` or `optim.learning_rate`.

    Values may be nested by part, as in a TOML file. Of weights in `data_root` and in `mixture`,
    those in `values` count. Raises ConfigError for an unknown name, with the nearest known names,
    for a value of the wrong type, and if `is_complete` for values that do not fit each other.
    """
    changed_copy = replace if is_complete else _unchecked_copy
    parts: dict[str, dict[str, Any]] = {}
    for name, value in _flatten(values):
        if name.rpartition(".")[2] not in FORMER:
            owner, field, hint = locate(name)
            parts.setdefault(owner, {})[field] = _coerce(name, value, hint)
    if data := parts.get("data"):
        if data.get("mixture") and "data_root" not in data:
            data["data_root"] = mixture.without_weights(config.data.data_root)
        elif "mixture" not in data and mixture.has_weights(data.get("data_root", ())):
            data["mixture"] = ()
    top = parts.pop("", {})
    changed_parts = {
        owner: changed_copy(getattr(config, owner), **new) for owner, new in parts.items()
    }
    return changed_copy(config, **top, **changed_parts)


def _unchecked_copy(part: T, **changes: Any) -> T:
    """As `dataclasses.replace`, of a part that is replaced again before it is used."""
    made = object.__new__(type(part))
    for field in fields(part):  # type: ignore[arg-type]
        value = changes.get(field.name, getattr(part, field.name))
        object.__setattr__(made, field.name, value)
    return made


def locate(name: str) -> tuple[str, str, Any]:
    """The part, field and type of an option; the part of RunConfig's own fields is "".

    Raises ConfigError for an unknown name, with the nearest known names.
    """
    part, _, field = name.replace("-", "_").rpartition(".")
    owner, hint = _field_table().get(field, ("", None))
    if hint is None or (part and part != owner):
        raise ConfigError(f"unknown option {name}{suggestion(field, list(_field_table()))}")
    return owner, field, hint


def is_text(name: str) -> bool:
    """Whether the values of an option are texts or paths; raises ConfigError for an unknown one."""
    return locate(name)[2] in (str, Path, tuple[str, ...])


def from_toml(config: RunConfig, text: str, source: str, *, is_complete: bool = True) -> RunConfig:
    """`config` with the values of a TOML document, as `overlay` does; error messages call it
    `source`."""
    try:
        values = tomllib.loads(text)
        require_valid_in_file(name for name, _ in _flatten(values))
        require(
            not isinstance(values.get("mixture"), dict),
            "mixture is a list of tables; use [[mixture]] for each phase",
        )
        return overlay(config, values, is_complete=is_complete)
    except (ValueError, ConfigError) as error:  # of TOML, or of an integer with too many digits
        raise ConfigError(f"{source}: {error}") from error


def require_valid_in_file(names: Iterable[str]) -> None:
    """Raises ConfigError for an option in ONLY_TYPED, however it is written."""
    for name in names:
        field = name.replace("-", "_").rpartition(".")[2]
        require(
            field not in ONLY_TYPED,
            f"{field} is not valid in a file; use {ONLY_TYPED.get(field)} on the command line",
        )


@cache
def _field_table() -> dict[str, tuple[str, Any]]:
    """Field name -> (its part, its type); the part of RunConfig's own fields is ""."""
    table: dict[str, tuple[str, Any]] = {}
    for name, hint in get_type_hints(RunConfig).items():
        if is_dataclass(hint):
            for inner, inner_hint in get_type_hints(hint).items():
                assert inner not in table, (
                    f"duplicate field {inner}: two parts would have the same flag"
                )
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
    """`value` with the type of its field: str to Path or back, int to float, "None" to None, one
    text or a list of them to a tuple. A table in a list is a phase of a mixture."""
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        has_tables = name.rpartition(".")[2] == "mixture"
        texts = (
            mixture.text_of(item) if has_tables and isinstance(item, Mapping) else item
            for item in items
        )
        return tuple(_coerce(name, text, str) for text in texts)
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and value in (None, "None"):
        return None
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is Path and isinstance(value, str | Path):
            return Path(value)
        if option is str and isinstance(value, Path):
            return str(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            require(is_finite(value), f"{name}: expected a finite number, got {value!r:.40}")
            return float(value)
        if type(value) is option:
            return value
    expected = " or ".join(
        " or ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else option.__name__
        for option in options
    )
    raise ConfigError(f"{name}: expected {expected}, got {value!r}")

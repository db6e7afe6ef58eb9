"""The search space: the values of each searched option, read from a TOML file. Pure.

[learning_rate]        # an option of `gpt2 train`, also written optim.learning_rate
low = 1e-4
high = 1e-2
log = true

[n_layer]
low = 2
high = 12
step = 2

[n_head]
choices = [4, 8, 12]
"""

import itertools
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from gpt2.base.errors import ConfigError
from gpt2.base.validation import nearest_multiples, require, suggestion
from gpt2.config import options
from gpt2.config.options import FIXED_BY_CHECKPOINT, NOTED_AT_RESUME
from gpt2.config.run import RunConfig

Values = dict[str, Any]
KEYS = ("low", "high", "log", "step", "choices")
SEARCHABLE = sorted({name.split(".")[1] for name in (*FIXED_BY_CHECKPOINT, *NOTED_AT_RESUME)})
"""options that the result of a training depends on, without those of data and validation"""
SHAPE = ("architecture", "n_embd", "block_size", "window")
"""options that restrict the number of heads, or the rows of a batch"""
MAX_SHAPES = 5000
"""combinations that are checked before a search begins"""
TOKEN_TOLERANCE = 0.05
"""share by which the tokens before a validation may differ between trials if batch sizes are a
range: no number of steps gives the same tokens for all of them"""

DEFAULT = """\
[learning_rate]
low = {rates[0]}
high = {rates[1]}
log = true

[weight_decay]
low = 1e-3
high = 0.3
log = true

[warmup_steps]
low = 0
high = {warmup}

[beta2]
low = 0.9
high = 0.999

[total_batch_size]
choices = {batches}

[n_layer]
low = {layers[0]}
high = {layers[1]}

[n_head]
choices = {heads}

[n_embd]
choices = {widths}
"""


@dataclass(frozen=True)
class Dimension:
    """The values of one option: a range or a list of choices."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    is_integer: bool = False
    """whether a range has integers only"""

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(str(value) for value in self.choices)
        step = [f"step {self.step}"] if self.step is not None else []
        return ", ".join([f"{self.low} to {self.high}", *step, *["log"] * self.log])

    def values(self) -> Sequence[Any] | None:
        """All values, or None for a range of real numbers."""
        if self.choices:
            return self.choices
        if not self.is_integer:
            return None
        assert self.low is not None and self.high is not None
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))


Space = tuple[Dimension, ...]


def parse(text: str, run: RunConfig, source: str) -> Space:
    """The space in a TOML document, for trainings that are otherwise configured as `run`.

    Raises ConfigError, with `source` in front, for unknown options or keys, invalid values, and a
    space with a model that cannot be built.
    """
    try:
        tables = tomllib.loads(text)
        found = tuple(_dimension(name, table, run) for name, table in _tables(tables))
        names = [dimension.name for dimension in found]
        require(bool(names), "expected a table such as [learning_rate], got none")
        for name in names:
            require(names.count(name) == 1, f"duplicate option {name}")
        _require_shapes_that_fit(found, run)
        _require_even_validations(found, run)
        return found
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


def default(run: RunConfig) -> Space:
    """The default space around `run`: learning rate, weight decay, warm-up, beta2, batch size,
    layers, heads and width.

    Every width is a multiple of every number of heads, and every batch has whole rows. A batch size
    is left out if its validations cannot follow the same numbers of tokens as those of `run`.
    """
    return parse(default_text(run), run, "the default space")


def default_text(run: RunConfig) -> str:
    """The default space as a TOML document."""
    rows, layers, heads = run.rows_per_step, run.model.n_layer, run.model.n_head
    interval = run.evaluation.eval_interval or 0
    batches = [2 * rows, rows, *[rows // 2] * (rows % 2 == 0)]
    numbers = [heads // 2, heads] if heads % 2 == 0 else [heads]
    unit = 2 * heads  # every head gets an even width
    around = {run.model.n_embd * share // 4 // unit * unit for share in (2, 3, 4, 5)}
    return DEFAULT.format(
        rates=("4e-4", "4e-2") if run.optim.optimizer == "muon" else ("1e-4", "1e-2"),
        warmup=max(2, min(2 * run.optim.warmup_steps, (run.data.max_steps or 10**9) // 2)),
        batches=sorted(
            count * run.model.block_size for count in batches if interval * rows % count == 0
        ),
        layers=(max(1, layers // 2), layers + max(1, layers // 3)),
        heads=numbers,
        widths=sorted({max(unit, width) for width in around}),
    )


def apply(run: RunConfig, space: Space, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a trial: `run` with these values of the space.

    If the values do not fit each other, the nearest fitting value of the space replaces one of
    them: first the number of heads, then the width if it is a range, then the batch size. Raises
    ConfigError if no value fits.
    """
    adjusted = dict(values)
    rows = {"total_batch_size": adjusted.get("block_size", run.model.block_size)}
    for name, others in (("n_head", rows), ("n_embd", rows), ("total_batch_size", {})):
        dimension = next((item for item in space if item.name == name), None)
        if dimension is None or _fits(run, adjusted | others):
            continue
        if name == "n_embd" and dimension.choices:  # listed widths are never replaced
            continue
        for value in _nearest(dimension.values() or (), adjusted[name]):
            if _fits(run, adjusted | others | {name: value}):
                adjusted[name] = value
                break
    return same_tokens(run, options.overlay(run, adjusted), values)


def same_tokens(run: RunConfig, changed: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`changed` with steps and validations scaled so that it can be compared with `run`.

    It trains on as many tokens as `run`, and validates after the same numbers of tokens on the same
    rows; with another block size, on as many rows as have the same tokens. Options in `values` are
    not scaled.
    """
    share = run.data.total_batch_size / changed.data.total_batch_size
    steps, interval = run.data.max_steps, run.evaluation.eval_interval
    eval_tokens = run.eval_rows * run.model.block_size
    scaled = {
        "max_steps": steps and max(1, round(steps * share)),
        "eval_interval": interval and max(1, round(interval * share)),
        "eval_rows": max(1, round(eval_tokens / changed.model.block_size)),
    }
    return options.overlay(
        changed, {name: value for name, value in scaled.items() if name not in values}
    )


def describe(space: Space) -> dict[str, str]:
    """The values of each option as text, as `0.0001 to 0.01, log`."""
    return {dimension.name: str(dimension) for dimension in space}


def combinations(space: Space) -> float:
    """The number of combinations; infinite if the space has a range of real numbers."""
    values = (item.values() for item in space)
    return math.prod(math.inf if each is None else len(each) for each in values)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two described spaces, a line for each option."""
    return [
        f"{name}: {before.get(name, 'not searched')} before, {now.get(name, 'not searched')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _tables(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options and their tables; `[optim.learning_rate]` is nested one level deeper."""
    for name, table in tables.items():
        is_part = isinstance(table, Mapping) and not set(table) & set(KEYS)
        if is_part and table and all(isinstance(item, Mapping) for item in table.values()):
            yield from ((f"{name}.{inner}", item) for inner, item in table.items())
        else:
            yield name, table


def _dimension(name: str, table: Any, run: RunConfig) -> Dimension:
    _, field, hint = options.locate(name)
    require(
        field in SEARCHABLE,
        f"{field} cannot be searched: it does not change results, or makes them incomparable; "
        f"use one of {', '.join(SEARCHABLE)}",
    )
    require(
        isinstance(table, Mapping),
        f"expected a table such as [{name}] with low and high, or choices, got {name} = {table!r}",
    )
    for key in table:
        require(
            key in KEYS,
            f"{name}: unknown key {key}{suggestion(key, KEYS)}; expected {', '.join(KEYS)}",
        )
    if "choices" in table:
        return _choice(field, table, run)
    return _range(field, table, _types(hint), run)


def _choice(name: str, table: Mapping[str, Any], run: RunConfig) -> Dimension:
    choices = table["choices"]
    require(len(table) == 1, f"{name}: choices cannot be combined with {', '.join(KEYS[:4])}")
    require(
        isinstance(choices, list) and len(choices) > 0,
        f"{name}: expected choices = [VALUE, …], got {choices!r}",
    )
    plain = [None if value in ("None", "none") else value for value in choices]
    require(len(set(map(str, plain))) == len(plain), f"{name}: duplicate choice")
    for value in plain:
        is_finite = not isinstance(value, float) or math.isfinite(value)
        require(
            is_finite,
            f"{name}: expected a finite number, got {value}; use None to turn the option off",
        )
        _require_value(name, value, run)
    return Dimension(name, choices=tuple(plain))


def _range(name: str, table: Mapping[str, Any], kinds: Sequence[type], run: RunConfig) -> Dimension:
    is_integer = int in kinds and float not in kinds
    require(is_integer or float in kinds, f"{name} has no range; use choices = […]")
    require("low" in table and "high" in table, f"{name}: expected low and high, or choices = […]")
    low, high = (_number(name, key, table[key], is_integer) for key in ("low", "high"))
    step = _number(name, "step", table["step"], is_integer) if "step" in table else None
    log = table.get("log", False)
    require(log in (True, False), f"{name}: expected log = true or false, got {log!r}")
    require(low < high, f"{name}: low={low} must be less than high={high}")
    require(
        step is None or 0 < step <= high - low, f"{name}: step={step} does not fit into the range"
    )
    require(not log or low > 0, f"{name}: low={low} must be more than 0 with log = true")
    require(not log or step is None, f"{name}: step and log cannot be combined; leave one out")
    for value in (low, high):
        _require_value(name, value, run)
    if step is not None:  # the last value that steps from `low` reach
        high = low + step * math.floor((high - low) / step + 1e-9)
    return Dimension(name, low, high, bool(log), step, is_integer=is_integer)


def _number(name: str, key: str, value: Any, is_integer: bool) -> Any:
    expected = "an integer" if is_integer else "a finite number"
    is_number = isinstance(value, int if is_integer else int | float) and not isinstance(
        value, bool
    )
    require(
        is_number and math.isfinite(value), f"{name}: expected {expected} for {key}, got {value!r}"
    )
    return value


def _require_value(name: str, value: Any, run: RunConfig) -> None:
    """Raises ConfigError for a value that is invalid whatever values the other options have."""
    part, field, _ = options.locate(name)
    if field in ("n_head", "n_embd", "total_batch_size", "block_size", "window", "architecture"):
        # Values of the other options that fit to any valid value of this one.
        others: Values = {"n_head": 1, "n_embd": 2, "total_batch_size": 1, "window": 1}
        others |= {"block_size": 1, "architecture": "gpt2"}
        if field == "n_head" and isinstance(value, int):
            others["n_embd"] = 2 * value
        if field in ("block_size", "window") and isinstance(value, int):
            others |= {"block_size": value, "total_batch_size": value}
        options.overlay(run, others | {field: value})
    else:
        options.overlay(run, {f"{part}.{field}": value})


def _require_shapes_that_fit(space: Space, run: RunConfig) -> None:
    """Raises ConfigError for values of SHAPE options to which no values of the others fit."""
    shapes = {item.name: item.values() or () for item in space if item.name in SHAPE}
    combinations = itertools.product(*shapes.values())
    for combination in itertools.islice(combinations, MAX_SHAPES):
        shape = dict(zip(shapes, combination, strict=True))
        others = {item.name: _first(item) for item in space if item.name not in shape}
        try:
            apply(run, space, others | shape)
        except ConfigError as error:
            given = ", ".join(f"{name}={value}" for name, value in shape.items()) or "the space"
            raise ConfigError(
                f"no values of the space fit to {given}: {error}; for a range, use a step whose "
                "values fit"
            ) from error
    _require_use_of_heads(space, run)


def _require_use_of_heads(space: Space, run: RunConfig) -> None:
    """Raises ConfigError for a listed number of heads that divides no width of the space."""
    found = {item.name: item for item in space}
    if "n_head" not in found or not found["n_head"].choices:
        return
    widths = found["n_embd"].values() if "n_embd" in found else None
    for heads in found["n_head"].choices:
        kinds = found["architecture"].choices if "architecture" in found else ()
        pairs = itertools.product(widths or (run.model.n_embd,), kinds or (None,))
        draws = (
            {"n_head": heads, "n_embd": width} | ({"architecture": kind} if kind else {})
            for width, kind in pairs
        )
        require(
            any(_fits(run, draw) for draw in draws),
            f"n_head={heads} divides no n_embd of the space; leave it out, or add a multiple of it",
        )


def _require_even_validations(space: Space, run: RunConfig) -> None:
    """Raises ConfigError if trials with different batch sizes cannot validate after the same
    numbers of tokens."""
    dimension = next((item for item in space if item.name == "total_batch_size"), None)
    interval, default_size = run.evaluation.eval_interval, run.data.total_batch_size
    if dimension is None or interval is None:
        return
    if dimension.choices:
        blocks = next((item.values() for item in space if item.name == "block_size"), None)
        used = [
            batch
            for batch in dimension.choices
            if any(batch % block == 0 for block in blocks or (run.model.block_size,))
        ]
        unit = math.lcm(*(batch // math.gcd(batch, default_size) for batch in used))
        require(
            interval % unit == 0,
            f"eval_interval={interval} is not a whole number of steps for each total_batch_size: "
            f"validations would follow different numbers of tokens; nearest: "
            f"{nearest_multiples(interval, unit)}",
        )
        return
    assert dimension.high is not None
    least = math.ceil(dimension.high / default_size / (2 * TOKEN_TOLERANCE))
    require(
        interval >= least,
        f"eval_interval={interval} is too small for total_batch_size={int(dimension.high)}: "
        f"validations would follow different numbers of tokens; use at least {least}",
    )


def _first(dimension: Dimension) -> Any:
    return dimension.choices[0] if dimension.choices else dimension.low


def _fits(run: RunConfig, values: Mapping[str, Any]) -> bool:
    try:
        options.overlay(run, values)
    except ConfigError:
        return False
    return True


def _nearest(values: Iterable[Any], target: Any) -> list[Any]:
    """`values` in the order of their distance to `target`."""
    return sorted(values, key=lambda value: abs(value - target))


def _types(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)

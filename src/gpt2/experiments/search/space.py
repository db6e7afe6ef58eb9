"""What a search may choose: values for options, from a TOML file; and trainings that fit. Pure.

[learning_rate]        # an option of `gpt2 train`; optim.learning_rate works too
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
from gpt2.config import options as config
from gpt2.config.options import FIXED_BY_CHECKPOINT, NOTED_AT_RESUME
from gpt2.config.run import RunConfig

Values = dict[str, Any]
WORDS = ("low", "high", "log", "step", "choices")
SEARCHABLE = sorted({name.split(".")[1] for name in (*FIXED_BY_CHECKPOINT, *NOTED_AT_RESUME)})
"""what the result of a training depends on, data and validation aside"""
SHAPE = ("architecture", "n_embd", "block_size", "window")
"""what the number of heads, and of rows in a batch, must fit to"""
MOST_SHAPES = 5000
"""combinations that are tried before a search begins"""
UNEVEN = 0.05
"""share by which a validation's tokens may differ where batches are a range: no number of steps is
whole for all of them"""

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
    """The values that an option may have: a range, or a list."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    is_whole: bool = False
    """whether a range is of whole numbers"""

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(str(value) for value in self.choices)
        how = [f"step {self.step}"] if self.step is not None else []
        return ", ".join([f"{self.low} to {self.high}", *how, *["log"] * self.log])

    def values(self) -> Sequence[Any] | None:
        """All of them, or None if these are no finite number."""
        if self.choices:
            return self.choices
        if not self.is_whole:
            return None
        assert self.low is not None and self.high is not None
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))


Space = tuple[Dimension, ...]


def parse(text: str, run: RunConfig, source: str) -> Space:
    """The space that a TOML document describes, for trainings that are else as `run` says.

    Raises ConfigError, which names `source`, for a field that is none, a value that cannot be one,
    and for a space with a model that cannot be built.
    """
    try:
        tables = tomllib.loads(text)
        found = tuple(_dimension(name, table, run) for name, table in _tables(tables))
        names = [dimension.name for dimension in found]
        require(bool(names), "it names no option; needed is a table such as [learning_rate]")
        for name in names:
            require(names.count(name) == 1, f"{name} stands there twice")
        _require_shapes_that_fit(found, run)
        _require_even_validations(found, run)
        return found
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


def default(run: RunConfig) -> Space:
    """A space around `run`: rates, decay, warm-up, beta2, batch size, layers, heads and width.

    Each width is a multiple of each number of heads, and each batch of whole rows; a batch whose
    validations would be at other numbers of tokens is left out.
    """
    return parse(default_text(run), run, "the default space")


def default_text(run: RunConfig) -> str:
    """The same as a TOML document."""
    rows, layers, heads = run.rows_per_step, run.model.n_layer, run.model.n_head
    interval = run.evaluation.eval_interval or 0
    batches = [2 * rows, rows, *[rows // 2] * (rows % 2 == 0)]
    numbers = [heads // 2, heads] if heads % 2 == 0 else [heads]
    unit = 2 * heads  # an even width for every head
    around = {run.model.n_embd * share // 4 // unit * unit for share in (2, 3, 4, 5)}
    return DEFAULT.format(
        rates=("1e-4", "1e-2") if run.optim.optimizer == "adamw" else ("4e-4", "4e-2"),
        warmup=max(2, min(2 * run.optim.warmup_steps, (run.data.max_steps or 10**9) // 2)),
        batches=sorted(
            count * run.model.block_size for count in batches if interval * rows % count == 0
        ),
        layers=(max(1, layers // 2), layers + max(1, layers // 3)),
        heads=numbers,
        widths=sorted({max(unit, width) for width in around}),
    )


def fitted(run: RunConfig, space: Space, values: Mapping[str, Any]) -> RunConfig:
    """The training with these values of the space; where they do not fit each other, with the
    nearest value of the space that does: of the heads first, then, in a range, of the width; of
    the batch. Raises ConfigError if there is none.
    """
    mended = dict(values)
    rows = {"total_batch_size": mended.get("block_size", run.model.block_size)}
    for name, others in (("n_head", rows), ("n_embd", rows), ("total_batch_size", {})):
        dimension = next((item for item in space if item.name == name), None)
        if dimension is None or _fits(run, mended | others):
            continue
        if name == "n_embd" and dimension.choices:  # each of them was meant
            continue
        for value in _nearest(dimension.values() or (), mended[name]):
            if _fits(run, mended | others | {name: value}):
                mended[name] = value
                break
    return same_tokens(run, config.overlay(run, mended), values)


def same_tokens(run: RunConfig, changed: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`changed` with as many steps as give it the tokens of `run`, and with its validations at the
    same numbers of tokens and of the same rows, so that trainings with batches of different sizes
    can be compared. Rows of another length are as many as have the same tokens."""
    share = run.data.total_batch_size / changed.data.total_batch_size
    steps, interval = run.data.max_steps, run.evaluation.eval_interval
    eval_tokens = run.eval_rows * run.model.block_size
    scaled = {
        "max_steps": steps and max(1, round(steps * share)),
        "eval_interval": interval and max(1, round(interval * share)),
        "eval_rows": max(1, round(eval_tokens / changed.model.block_size)),
    }
    return config.overlay(
        changed, {name: value for name, value in scaled.items() if name not in values}
    )


def described(space: Space) -> dict[str, str]:
    """Each option with its values, in words."""
    return {dimension.name: str(dimension) for dimension in space}


def combinations(space: Space) -> float:
    """How many there are at most; infinitely many with a range of numbers that are not whole."""
    values = (item.values() for item in space)
    return math.prod(math.inf if each is None else len(each) for each in values)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is other in a space, a line for each option."""
    return [
        f"{name}: {before.get(name, 'not searched')} before, {now.get(name, 'not searched')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _tables(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options with their tables; `[optim.learning_rate]` is nested one deeper."""
    for name, table in tables.items():
        is_part = isinstance(table, Mapping) and not set(table) & set(WORDS)
        if is_part and table and all(isinstance(item, Mapping) for item in table.values()):
            yield from ((f"{name}.{inner}", item) for inner, item in table.items())
        else:
            yield name, table


def _dimension(name: str, table: Any, run: RunConfig) -> Dimension:
    _, field, hint = config.locate(name)
    require(
        field in SEARCHABLE,
        f"{field} cannot be searched: results would not be comparable, or the same; possible are "
        f"{', '.join(SEARCHABLE)}",
    )
    require(
        isinstance(table, Mapping),
        f"{name}: needed is a table, as in [{name}] low = 1, high = 3, or choices = [1, 2]",
    )
    for word in table:
        require(
            word in WORDS,
            f"{name}: unknown word {word}{suggestion(word, WORDS)}; there are {', '.join(WORDS)}",
        )
    if "choices" in table:
        return _choice(field, table, run)
    return _range(field, table, _types(hint), run)


def _choice(name: str, table: Mapping[str, Any], run: RunConfig) -> Dimension:
    choices = table["choices"]
    require(len(table) == 1, f"{name}: choices stand alone, without {', '.join(WORDS[:4])}")
    require(
        isinstance(choices, list) and len(choices) > 0,
        f"{name}: choices={choices!r}; needed is a list of values",
    )
    plain = [None if value in ("None", "none") else value for value in choices]
    require(len(set(map(str, plain))) == len(plain), f"{name}: a choice stands there twice")
    for value in plain:
        is_finite = not isinstance(value, float) or math.isfinite(value)
        require(is_finite, f"{name}: {value} is no finite number; None is off")
        _require_value(name, value, run)
    return Dimension(name, choices=tuple(plain))


def _range(name: str, table: Mapping[str, Any], kinds: Sequence[type], run: RunConfig) -> Dimension:
    is_whole = int in kinds and float not in kinds
    require(is_whole or float in kinds, f"{name} has no range; needed is choices = […]")
    require(
        "low" in table and "high" in table, f"{name}: needed are low and high, or choices = […]"
    )
    low, high = (_number(name, word, table[word], is_whole) for word in ("low", "high"))
    step = _number(name, "step", table["step"], is_whole) if "step" in table else None
    log = table.get("log", False)
    require(log in (True, False), f"{name}: log={log!r}; needed is true or false")
    require(low < high, f"{name}: low={low} must be less than high={high}")
    require(step is None or 0 < step <= high - low, f"{name}: step={step} is none of this range")
    require(not log or low > 0, f"{name}: low={low} must be more than 0 with log = true")
    require(not log or step is None, f"{name}: step and log do not go together; leave one out")
    for value in (low, high):
        _require_value(name, value, run)
    if step is not None:  # the last value that the steps reach
        high = low + step * math.floor((high - low) / step + 1e-9)
    return Dimension(name, low, high, bool(log), step, is_whole=is_whole)


def _number(name: str, word: str, value: Any, is_whole: bool) -> Any:
    wanted = "a whole number" if is_whole else "a finite number"
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    require(is_number and math.isfinite(value), f"{name}: {word}={value!r}; needed is {wanted}")
    return value


def _require_value(name: str, value: Any, run: RunConfig) -> None:
    """Raises ConfigError for a value that the option never has; whether it fits others is not
    asked here."""
    part, field, _ = config.locate(name)
    if field in ("n_head", "n_embd", "total_batch_size", "block_size", "window", "architecture"):
        # 2 ** 20 has whole heads and rows of nearly anything, and one head fits all.
        others: Values = {"n_head": 1, "n_embd": 2, "total_batch_size": 1, "window": 1}
        others |= {"block_size": 1, "architecture": "gpt2"}
        if field == "n_head" and isinstance(value, int):
            others["n_embd"] = 2 * value
        if field in ("block_size", "window") and isinstance(value, int):
            others |= {"block_size": value, "total_batch_size": value}
        config.overlay(run, others | {field: value})
    else:
        config.overlay(run, {f"{part}.{field}": value})


def _require_shapes_that_fit(space: Space, run: RunConfig) -> None:
    """Raises ConfigError for values of the shape to which nothing in the space fits."""
    shapes = {item.name: item.values() or () for item in space if item.name in SHAPE}
    combinations = itertools.product(*shapes.values())
    for combination in itertools.islice(combinations, MOST_SHAPES):
        shape = dict(zip(shapes, combination, strict=True))
        middle = {item.name: _first(item) for item in space if item.name not in shape}
        try:
            fitted(run, space, middle | shape)
        except ConfigError as error:
            said = ", ".join(f"{name}={value}" for name, value in shape.items()) or "the space"
            raise ConfigError(
                f"nothing in the space fits to {said}: {error}; for a range, give a step of "
                "values that fit"
            ) from error
    _require_use_of_heads(space, run)


def _require_use_of_heads(space: Space, run: RunConfig) -> None:
    """Raises ConfigError for a number of heads in a list that fits to no width of the space."""
    found = {item.name: item for item in space}
    if "n_head" not in found or not found["n_head"].choices:
        return
    widths = found["n_embd"].values() if "n_embd" in found else None
    for heads in found["n_head"].choices:
        kinds = found["architecture"].choices if "architecture" in found else ()
        options = itertools.product(widths or (run.model.n_embd,), kinds or (None,))
        draws = (
            {"n_head": heads, "n_embd": width} | ({"architecture": kind} if kind else {})
            for width, kind in options
        )
        require(
            any(_fits(run, draw) for draw in draws),
            f"n_head={heads} fits to no n_embd of the space; leave it out, or add a multiple",
        )


def _require_even_validations(space: Space, run: RunConfig) -> None:
    """Raises ConfigError if validations of trials with batches of other sizes cannot be at the same
    numbers of tokens."""
    dimension = next((item for item in space if item.name == "total_batch_size"), None)
    interval, usual = run.evaluation.eval_interval, run.data.total_batch_size
    if dimension is None or interval is None:
        return
    if dimension.choices:
        blocks = next((item.values() for item in space if item.name == "block_size"), None)
        used = [
            batch
            for batch in dimension.choices
            if any(batch % block == 0 for block in blocks or (run.model.block_size,))
        ]
        unit = math.lcm(*(batch // math.gcd(batch, usual) for batch in used))
        require(
            interval % unit == 0,
            f"eval_interval={interval} is no whole number of steps for each total_batch_size: "
            f"validations would not be at the same tokens; nearest: "
            f"{nearest_multiples(interval, unit)}",
        )
        return
    assert dimension.high is not None
    least = math.ceil(dimension.high / usual / (2 * UNEVEN))
    require(
        interval >= least,
        f"eval_interval={interval} is too small for total_batch_size={int(dimension.high)}: "
        f"validations would not be at the same tokens; needed are {least} or more",
    )


def _first(dimension: Dimension) -> Any:
    return dimension.choices[0] if dimension.choices else dimension.low


def _fits(run: RunConfig, values: Mapping[str, Any]) -> bool:
    try:
        config.overlay(run, values)
    except ConfigError:
        return False
    return True


def _nearest(values: Iterable[Any], wanted: Any) -> list[Any]:
    """`values`, those next to `wanted` first."""
    return sorted(values, key=lambda value: abs(value - wanted))


def _types(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)

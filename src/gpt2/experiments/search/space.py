"""The search space: the values of each searched option, read from a TOML file. Pure.

learning_rate = {low = 1e-4, high = 1e-2, log = true}  # an option of `gpt2 train`
n_layer = {low = 2, high = 12, step = 2}
n_head = {choices = [4, 8, 12]}

A table may also be written as `[n_layer]`, and an option with its part, as `model.n_layer`.
"""

import itertools
import math
import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial

from gpt2.base.errors import ConfigError
from gpt2.base.validation import is_finite, nearest_multiples, require
from gpt2.config import options
from gpt2.config.options import FIXED_BY_CHECKPOINT, NOTED_AT_RESUME
from gpt2.config.run import RunConfig

Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
Space = Mapping[str, Distribution]
"""the values of each option, by its name"""
SEARCHABLE = sorted(
    {name.split(".")[1] for name in (*FIXED_BY_CHECKPOINT, *NOTED_AT_RESUME)} - {"batch_ramp"}
)
"""options that the result of a training depends on, without those of data and validation, and
without the ramp: trials with other ones would train on other numbers of tokens"""
SHAPE = ("architecture", "n_embd", "block_size", "window", "n_head")
"""options that must fit each other"""
LARGEST_SIZE = 10**6
"""largest end of a range of sizes, whose values are listed"""
MAX_SHAPES = 5000
"""combinations that are checked before a search begins"""
TOKEN_TOLERANCE = 0.05
"""share by which the tokens before a validation may differ between trials if batch sizes are a
range: no number of steps gives the same tokens for all of them"""
USED = "used_"
"""attributes of a trial with this prefix: the value that it used in place of the drawn one"""

DEFAULT = """\
learning_rate = {{low = {rates[0]}, high = {rates[1]}, log = true}}
weight_decay = {{low = 1e-3, high = 0.3, log = true}}
warmup_steps = {{low = 0, high = {warmup}}}
beta2 = {{low = 0.9, high = 0.999}}
{batch}n_layer = {{low = {layers[0]}, high = {layers[1]}}}
n_head = {{choices = {heads}}}
n_embd = {{choices = {widths}}}
"""


def parse(text: str, run: RunConfig, source: str) -> Space:
    """The space in a TOML document, for trainings that are otherwise configured as `run`.

    Raises ConfigError, with `source` in front, for unknown options or keys, invalid values, and a
    space with a model that cannot be built.
    """
    space: dict[str, Distribution] = {}
    try:
        for name, table in _tables(tomllib.loads(text)):
            _, field, hint = options.locate(name)
            require(field not in space, f"duplicate option {field}")
            space[field] = _distribution(field, table, get_args(hint) or (hint,))
        require(bool(space), "expected a table such as [learning_rate], got none")
        sizes = [name for name in ("total_batch_size", "block_size") if name in space]
        require(
            not (sizes and run.data.batch_ramp),
            f"{' and '.join(sizes)} cannot be searched beside --batch_ramp, whose steps and tokens "
            "are those of one batch size; leave one of them out",
        )
        _require_valid_values(space, run)
        _require_even_validations(space, run)
    except (ValueError, ConfigError) as error:  # of TOML, or of an integer with too many digits
        raise ConfigError(f"{source}: {error}") from error
    return space


def default(run: RunConfig) -> Space:
    """The default space around `run`: learning rate, weight decay, warm-up, beta2, batch size,
    layers, heads and width.

    Every width is a multiple of every number of heads, and every batch has whole rows. A batch size
    is left out if its validations cannot follow the same numbers of tokens as those of `run`, and
    all are if there is a ramp.
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
    listed = sorted(
        count * run.model.block_size for count in batches if interval * rows % count == 0
    )
    return DEFAULT.format(
        rates=("4e-4", "4e-2") if run.optim.optimizer != "adamw" else ("1e-4", "1e-2"),
        warmup=max(2, min(2 * run.optim.warmup_steps, (run.data.max_steps or 10**9) // 2)),
        batch="" if run.data.batch_ramp else f"total_batch_size = {{choices = {listed}}}\n",
        layers=(max(1, layers // 2), layers + max(1, layers // 3)),
        heads=numbers,
        widths=sorted({max(unit, width) for width in around}),
    )


def apply(run: RunConfig, space: Space, drawn: Mapping[str, Any]) -> RunConfig:
    """The configuration of a trial: `run` with these values of the space.

    If the values do not fit each other, the nearest fitting value of the space replaces one of
    them: first the number of heads, then the width if it is a range, then the batch size. Raises
    ConfigError if no value fits.

    Steps and validations that are not drawn are scaled, so that it can be compared with `run`: it
    trains on as many tokens, and validates after the same numbers of tokens on the same rows; with
    another block size, on as many rows as have the same tokens.
    """
    used = dict(drawn)
    whole_batch = {"total_batch_size": used.get("block_size", run.model.block_size)}
    for name, others in (
        ("n_head", whole_batch),
        ("n_embd", whole_batch),
        ("total_batch_size", {}),
    ):
        is_list = isinstance(space.get(name), CategoricalDistribution)
        # A listed width is never replaced.
        if name in space and not (name == "n_embd" and is_list) and not _fits(run, used | others):
            nearest = sorted(values(space[name]), key=lambda value: abs(value - used[name]))
            fitting = (value for value in nearest if _fits(run, used | others | {name: value}))
            used[name] = next(fitting, used[name])
    changed = options.overlay(run, used)
    share = run.data.total_batch_size / changed.data.total_batch_size
    steps, interval = run.data.max_steps, run.evaluation.eval_interval
    eval_tokens = run.eval_rows * run.model.block_size
    scaled = {
        "max_steps": steps and max(1, round(steps * share)),
        "eval_interval": interval and max(1, round(interval * share)),
        "eval_rows": max(1, round(eval_tokens / changed.model.block_size)),
    }
    return options.overlay(changed, {n: value for n, value in scaled.items() if n not in drawn})


def _fits(run: RunConfig, used: Mapping[str, Any]) -> bool:
    try:
        options.overlay(run, used)
    except ConfigError:
        return False
    return True


def describe(space: Space) -> dict[str, str]:
    """The values of each option as text, as `0.0001 to 0.01, log`."""
    return {name: _text(distribution) for name, distribution in space.items()}


def _text(distribution: Distribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    step = "" if distribution.step in (None, 1) else f", step {distribution.step}"
    return f"{distribution.low} to {distribution.high}{step}{', log' * distribution.log}"


def comparable(described: object) -> dict[str, str]:
    """`describe` as this version writes it: earlier ones wrote 1 for 1.0, and the step 1. Nothing
    where a damaged file has something else."""

    def shortest(found: re.Match[str]) -> str:
        return f"{float(found[0]):.9g}" if found[0][0].isdigit() else ""

    pattern = r"\d+\.\d+|, step 1(?=,|$)"
    known = described if isinstance(described, Mapping) else {}
    return {name: re.sub(pattern, shortest, str(text)) for name, text in known.items()}


def values(distribution: Distribution) -> Sequence[Any]:
    """All values of an option; none for a range of real numbers."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    return ()


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """The values that the study's sampler draws for the trial, as `exact` has them; the same ones
    if called again.

    Raises ValueError or OverflowError for an enqueued value of another type.
    """
    drawn: dict[str, Any] = {}
    for name, kind in space.items():
        if isinstance(kind, CategoricalDistribution):
            drawn[name] = trial.suggest_categorical(name, kind.choices)
            continue
        draw: Any = trial.suggest_int if isinstance(kind, IntDistribution) else trial.suggest_float
        drawn[name] = exact(kind, draw(name, kind.low, kind.high, step=kind.step, log=kind.log))
    return drawn


def exact(distribution: BaseDistribution, value: Any) -> Any:
    """A value of a range with steps without the error of Optuna's floats: of 0.1 to 0.7, step 0.2,
    they have 0.30000000000000004 as the second."""
    has_steps = isinstance(distribution, FloatDistribution) and distribution.step is not None
    return float(f"{value:.12g}") if has_steps else value


def used_values(item: FrozenTrial) -> dict[str, Any]:
    """The values that a trial trained with: the drawn ones, or those that replaced them."""
    drawn = {name: exact(item.distributions[name], value) for name, value in item.params.items()}
    return {name: item.user_attrs.get(USED + name, value) for name, value in drawn.items()}


def _tables(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options and their tables; `[optim.learning_rate]` is nested one level deeper."""
    for name, table in tables.items():
        if isinstance(table, Mapping) and all(isinstance(item, Mapping) for item in table.values()):
            yield from ((f"{name}.{inner}", item) for inner, item in table.items())
        else:
            yield name, table


def _distribution(name: str, table: Any, types: Sequence[type]) -> Distribution:
    """The values that a table gives to an option of these types."""
    require(
        name in SEARCHABLE,
        f"{name} cannot be searched: it does not change results, or makes them incomparable; "
        f"use one of {', '.join(SEARCHABLE)}",
    )
    is_integer = int in types and float not in types
    expected = f"expected [{name}] with low, high and perhaps step or log, or with choices alone"
    require(isinstance(table, Mapping), f"{expected}, got {table!r:.80}")
    if "choices" in table:
        return _choices(name, table, expected)
    require(is_integer or float in types, f"{name} has no range; use choices")
    is_range = {"low", "high"} <= table.keys() <= {"low", "high", "step", "log"}
    require(is_range, f"{expected}, got {', '.join(table)}")
    for key in {"low", "high", "step"} & table.keys():
        is_number = type(table[key]) in ((int,) if is_integer else (int, float))
        require(
            is_number and is_finite(table[key]),
            f"{name}: expected {'an integer' if is_integer else 'a number'} for {key}, "
            f"got {table[key]!r:.40}",
        )
    require(
        name not in SHAPE or table.get("high", 0) <= LARGEST_SIZE,
        f"{name}: high={table.get('high')} is too large; expected {LARGEST_SIZE} at most",
    )
    low, high, step = table["low"], table["high"], table.get("step")
    require(low <= high, f"{name}: expected low <= high, got low={low}, high={high}")
    require(step is None or step > 0, f"{name}: expected a step above 0, got {step}")
    is_log = table.get("log", False)
    require(isinstance(is_log, bool), f"{name}: expected true or false for log, got {is_log!r:.40}")
    require(low > 0 or not is_log, f"{name}: expected low above 0 with log = true, got {low}")
    require(not (is_log and step), f"{name}: expected step or log = true, not both")
    with warnings.catch_warnings():  # a `high` between two steps becomes the lower one
        warnings.simplefilter("ignore")
        return (IntDistribution if is_integer else FloatDistribution)(**table)


def _choices(name: str, table: Mapping[str, Any], expected: str) -> CategoricalDistribution:
    """The values that a table lists for an option; their types are checked later."""
    require(table.keys() == {"choices"}, f"{expected}, got {', '.join(table)}")
    listed = table["choices"]
    require(
        isinstance(listed, list) and len(listed) > 0,
        f"{name}: expected a list of at least one value for choices, got {listed!r:.40}",
    )
    with warnings.catch_warnings():  # values that are no plain ones
        warnings.simplefilter("ignore")
        return CategoricalDistribution([None if value == "None" else value for value in listed])


def _require_valid_values(space: Space, run: RunConfig) -> None:
    """Raises ConfigError for an invalid value, for a combination of SHAPE options to which no
    values of the others fit, and for a listed number of heads that no model has."""
    ends = {
        name: kind.choices if isinstance(kind, CategoricalDistribution) else (kind.low, kind.high)
        for name, kind in space.items()
    }
    for name in ends.keys() - {*SHAPE, "total_batch_size"}:
        for value in ends[name]:
            options.overlay(run, {name: value})
    shapes = {name: values(space[name]) for name in SHAPE if name in space}
    first = {name: listed[0] for name, listed in ends.items()}
    used_heads = set()
    for combination in itertools.islice(itertools.product(*shapes.values()), MAX_SHAPES):
        shape = dict(zip(shapes, combination, strict=True))
        try:
            used_heads.add(apply(run, space, first | shape).model.n_head)
        except ConfigError as error:
            given = ", ".join(f"{name}={value}" for name, value in shape.items()) or "the space"
            raise ConfigError(
                f"no values of the space fit to {given}: {error}; for a range, use a step whose "
                "values fit"
            ) from error
    are_all_checked = math.prod(map(len, shapes.values())) <= MAX_SHAPES
    if are_all_checked and isinstance(space.get("n_head"), CategoricalDistribution):
        for heads in ends["n_head"]:
            require(
                heads in used_heads,
                f"n_head={heads} divides no n_embd of the space; leave it out, or add a multiple",
            )


def _require_even_validations(space: Space, run: RunConfig) -> None:
    """Raises ConfigError if trials with different batch sizes cannot validate after the same
    numbers of tokens."""
    batches = space.get("total_batch_size")
    interval, default_size = run.evaluation.eval_interval, run.data.total_batch_size
    if batches is None or interval is None:
        return
    if isinstance(batches, CategoricalDistribution):
        block = space.get("block_size") or CategoricalDistribution([run.model.block_size])
        used = [b for b in values(batches) if any(b % size == 0 for size in values(block))]
        unit = math.lcm(*(batch // math.gcd(batch, default_size) for batch in used))
        is_even, needed = interval % unit == 0, f"nearest: {nearest_multiples(interval, unit)}"
    else:
        least = math.ceil(batches.high / default_size / (2 * TOKEN_TOLERANCE))
        is_even, needed = interval >= least, f"use at least {least}"
    require(
        is_even,
        f"eval_interval={interval} is not a whole number of steps for each total_batch_size: "
        f"validations would follow different numbers of tokens; {needed}",
    )

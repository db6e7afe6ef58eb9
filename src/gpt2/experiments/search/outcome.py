"""What a trial of a search draws, and what becomes of it."""

from collections.abc import Mapping
from typing import Any

from optuna.trial import Trial, TrialState

from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments.search.space import Dimension, Space


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """A value of the dimension; a trial that has one already keeps it."""
    name, low, high = dimension.name, dimension.low, dimension.high
    if dimension.choices:
        return trial.suggest_categorical(name, dimension.choices)
    assert low is not None and high is not None
    if dimension.is_whole:
        step = int(dimension.step or 1)
        return trial.suggest_int(name, int(low), int(high), step=step, log=dimension.log)
    return trial.suggest_float(name, low, high, step=dimension.step, log=dimension.log)


def values_of(run_config: RunConfig, space: Space) -> dict[str, Any]:
    """What the training has for each option of the space."""
    plain = run_config.to_dict()
    places = {item.name: options.locate(item.name)[0] for item in space}
    return {name: plain[part][name] for name, part in places.items()}


def place_of(step: int, run_config: RunConfig, base: RunConfig) -> int:
    """A validation's step in terms of `base`: validations of trials with batches of other sizes
    have the same place when they have seen the same tokens."""
    every, everywhere = run_config.evaluation.eval_interval, base.evaluation.eval_interval
    assert every is not None and everywhere is not None
    return -(-step // every) * everywhere


def is_exhausted(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` validations were all no better than one before them."""
    ordered = [losses[place] for place in sorted(losses)]
    if patience is None or len(ordered) <= patience:
        return False
    return min(ordered[-patience:]) >= min(ordered[:-patience])


def outcome(
    losses: Mapping[int, float], ending: str, kind: str, reason: str
) -> tuple[TrialState, str]:
    """The state that the study is told, and why."""
    if kind == "failed":
        return TrialState.FAIL, reason
    if reason or ending == "diverged":
        return TrialState.PRUNED, reason or "its validation loss is no finite number"
    if kind == "pruned" and ending == "pruned":
        return TrialState.PRUNED, ""
    if not losses:
        return TrialState.FAIL, "it ended without a validation; use a smaller --eval_interval"
    return TrialState.COMPLETE, ""

"""The values of a trial, when it ends, and the state that its outcome gives it in the study."""

from collections.abc import Mapping
from typing import Any

from optuna.trial import Trial, TrialState

from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments.search.space import Dimension, Space


def suggest(trial: Trial, dimension: Dimension) -> Any:
    """A value of the dimension from the study's sampler; the same one if called again.

    Raises ValueError or OverflowError for an enqueued value of another type.
    """
    name, low, high = dimension.name, dimension.low, dimension.high
    if dimension.choices:
        return trial.suggest_categorical(name, dimension.choices)
    assert low is not None and high is not None
    if dimension.is_integer:
        step = int(dimension.step or 1)
        return trial.suggest_int(name, int(low), int(high), step=step, log=dimension.log)
    return trial.suggest_float(name, low, high, step=dimension.step, log=dimension.log)


def option_values(run_config: RunConfig, space: Space) -> dict[str, Any]:
    """The value that the training uses for each option of the space."""
    plain = run_config.to_dict()
    parts = {item.name: options.locate(item.name)[0] for item in space}
    return {name: plain[part][name] for name, part in parts.items()}


def reference_step(step: int, run_config: RunConfig, base: RunConfig) -> int:
    """The step of `base` that corresponds to a validation at `step` of `run_config`.

    Validations of trials with different batch sizes have the same reference step if they follow the
    same number of tokens.
    """
    interval, base_interval = run_config.evaluation.eval_interval, base.evaluation.eval_interval
    assert interval is not None and base_interval is not None
    return -(-step // interval) * base_interval


def is_patience_exhausted(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether none of the last `patience` validations has a lower loss than one before them."""
    ordered = [losses[step] for step in sorted(losses)]
    if patience is None or len(ordered) <= patience:
        return False
    return min(ordered[-patience:]) >= min(ordered[:-patience])


def trial_outcome(
    losses: Mapping[int, float], ending: str, kind: str, reason: str
) -> tuple[TrialState, str]:
    """The state of an ended trial in the study, and the reason if it is not COMPLETE.

    `ending` is the search's decision to end it, `kind` the event with which its job ended.
    """
    if kind == "failed":
        return TrialState.FAIL, reason
    if reason or ending == "diverged":
        return TrialState.PRUNED, reason or "its validation loss is NaN or infinite"
    if kind == "pruned" and ending == "pruned":
        return TrialState.PRUNED, ""
    if not losses:
        return TrialState.FAIL, "it ended without a validation; use a smaller --eval_interval"
    return TrialState.COMPLETE, ""

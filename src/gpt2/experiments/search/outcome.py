"""When a trial ends, and the state that its outcome gives it in the study. Pure."""

from collections.abc import Mapping

from optuna.trial import TrialState

from gpt2.config.run import RunConfig


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

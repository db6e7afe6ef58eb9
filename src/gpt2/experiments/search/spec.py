"""What a search is: its options, as the command line gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments import results
from gpt2.experiments.results import ExperimentDescription
from gpt2.experiments.search import space
from gpt2.experiments.search.space import Space
from gpt2.experiments.training import training_job

DERIVED = {
    "tokens_per_step": "tokens per step (--total_batch_size)",
    "eval_tokens": "tokens per validation (--eval_batches, --eval_rows)",
}
"""what messages call the values of a search that are no options"""


@dataclass(frozen=True)
class Search:
    """The options of a search."""

    run: RunConfig
    """the training whose options are searched"""
    space: Space
    n_trials: int = 24
    """trials in all, including those of earlier starts"""
    patience: int | None = 15
    """a trial ends after this many validations in a row without a lower loss; None is never"""
    prune: bool = True
    startup_trials: int = 5
    """trials that finish before any is pruned"""
    folder: Path = Path("checkpoints/search")
    log_dir: Path = Path("checkpoints/search/logs")
    storage: str | None = None
    """URL of the study's database; None is a file in `folder`"""
    study_name: str = "search"
    keep_checkpoints: bool = False
    ranks: int = 1
    """GPUs of each trial, or processes on the CPU"""

    def __post_init__(self) -> None:
        training_job.require_fresh_start(self.run)
        if self.run.evaluation.eval_interval is None:
            raise ConfigError("--eval_interval None: a search compares validation losses")

    def description(self) -> ExperimentDescription:
        """The identity of this search; trials may be added to it later."""
        all_options = training_job.result_options(self.run)
        fixed = {name: value for name, value in all_options.items() if name not in self.space}
        if {"total_batch_size", "block_size"} & self.space.keys():
            # The tokens of a trial and of a validation are derived from these options of `run`.
            fixed["tokens_per_step"] = self.run.data.total_batch_size
            fixed["eval_tokens"] = self.run.eval_rows * self.run.model.block_size
        fixed["space"] = space.describe(self.space)
        return ExperimentDescription("search", fixed, total=self.n_trials)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each option in which two searches differ, by the `fixed` values of both."""
    spaces = [space.comparable(fixed.get("space", {})) for fixed in (before, now)]
    old, new = (
        {**fixed, **of, "space": ""} for fixed, of in zip((before, now), spaces, strict=True)
    )
    for name in set().union(*spaces):  # a single choice is the text of the same value
        known = [values.get(name, options.LATER.get(name)) for values in (old, new)]
        if str(known[0]) == str(known[1]):
            old[name] = new[name] = known[0]
    for name, title in DERIVED.items():
        pair = [values.pop(name, None) for values in (old, new)]
        if None not in pair:  # else only one of them searches the options that set it
            old[title], new[title] = pair
    return results.value_differences(old, new)

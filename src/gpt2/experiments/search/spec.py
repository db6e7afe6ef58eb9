"""What a search is: its options, as the command line gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.config.run import RunConfig
from gpt2.experiments.results import ExperimentDescription
from gpt2.experiments.search import space as spaces
from gpt2.experiments.search.space import Space
from gpt2.experiments.training import training_job


@dataclass(frozen=True)
class Search:
    """What is searched, and how."""

    run: RunConfig
    """the training that the space changes"""
    space: Space
    n_trials: int = 24
    """in all, those of earlier starts included"""
    patience: int | None = 15
    """validations in a row without a better one, after which a trial ends"""
    prune: bool = True
    startup_trials: int = 5
    """trials that have finished before any is pruned"""
    folder: Path = Path("checkpoints/search")
    log_dir: Path = Path("logs")
    storage: str | None = None
    """URL of a data base that several machines share; None is a file in `folder`"""
    study_name: str = "search"
    keep_checkpoints: bool = False
    ranks: int = 1
    """GPUs of each trial, or processes on the CPU"""

    def __post_init__(self) -> None:
        training_job.require_fresh_start(self.run)
        if self.run.evaluation.eval_interval is None:
            raise ConfigError("--eval_interval None: a search compares validation losses")

    def description(self) -> ExperimentDescription:
        """What all trials have in common; more of them may be added later."""
        searched = spaces.described(self.space)
        decisive = training_job.result_options(self.run).items()
        fixed = {name: value for name, value in decisive if name not in searched}
        if {"total_batch_size", "block_size"} & searched.keys():
            # The tokens of a trial, and of a validation, are counted in what the options say.
            fixed["tokens_per_step"] = self.run.data.total_batch_size
            fixed["eval_tokens"] = self.run.eval_rows * self.run.model.block_size
        return ExperimentDescription("search", {**fixed, "space": searched}, total=self.n_trials)

    def differences(self, before: ExperimentDescription) -> list[str]:
        """What another search had otherwise."""
        return differences(before.fixed, self.description().fixed)

    @property
    def is_shared(self) -> bool:
        """Whether other machines may have trials of the study."""
        return self.storage is not None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two searches: the values of their spaces, and what all trials share."""
    spaces_then, spaces_now = before.get("space", {}), now.get("space", {})
    searched = {*spaces_then, *spaces_now}
    rows = [
        f"{name}: {before.get(name)} before, {now.get(name)} now"
        for name in sorted({*before, *now} - {"space"} - searched)
        if before.get(name) != now.get(name)
    ]
    return rows + spaces.differences(spaces_then, spaces_now)

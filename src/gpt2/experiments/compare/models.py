"""Trains several models on the same data and token budget, and compares them."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt2.base.errors import ConfigError
from gpt2.config import flops, options
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import RunConfig
from gpt2.experiments import results
from gpt2.experiments.compare import job_group, model_table
from gpt2.experiments.compare.job_group import AT_ONCE, JobGroup, LoggedConsole
from gpt2.experiments.compare.model_table import ModelRow
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.training import training_job
from gpt2.inspection import figures

logger = logging.getLogger(__name__)

TABLE, PICTURE = "comparison.csv", "comparison.png"
MODELS: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in ARCHITECTURES}
"""the options of each model that differ from the options of the comparison"""


@dataclass(frozen=True)
class Comparison:
    """The same training with each of several models."""

    run: RunConfig
    """the configuration that all models share"""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=MODELS.copy)
    """name -> options that differ for this model"""
    folder: Path = Path("checkpoints/models")
    log_dir: Path = Path("logs")
    ranks: int = 1
    """GPUs of each training, or processes on the CPU"""

    def __post_init__(self) -> None:
        training_job.require_fresh_start(self.run)
        if self.run.checkpoint.init_from != "scratch":
            raise ConfigError(
                "--init_from cannot be used with several models: the weights fit only one of them"
            )
        if self.run.model.architecture != ModelConfig().architecture:
            raise ConfigError("--architecture is what is compared; choose with --models")
        for name in self.models:
            self.run_of(name)  # raises ConfigError for invalid options

    def run_of(self, name: str) -> RunConfig:
        """The configuration of one model's training."""
        try:
            return options.overlay(self.run, self.models[name])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def group(self) -> JobGroup:
        """The trainings as a group of jobs; models may be added to it later."""
        compared = {name for changes in self.models.values() for name in changes}
        shared = training_job.result_options(self.run)
        data = self.run.data
        budget = f"{data.epochs} epochs of {data.data_root}"
        if data.max_steps is not None:
            budget = f"{data.max_steps * data.total_batch_size:,} tokens of {data.data_root}"
        on_ranks = f", on {self.ranks} ranks" if self.ranks > 1 else ""
        return JobGroup(
            kind="models",
            heading=f"Models {', '.join(self.models)}: {budget} each{on_ranks}",
            jobs=[
                training_job.job(name, self.run_of(name), self.folder / name, ranks=self.ranks)
                for name in self.models
            ],
            values={name: {"model": name} for name in self.models},
            fixed={name: value for name, value in shared.items() if name not in compared},
            noun="training",
            folder=self.folder,
            log_dir=self.log_dir,
        )


def at_once(
    models: int, count: int | None, are_gpus_named: bool, parallel: bool, ddp: int = 1
) -> tuple[int | None, int | None]:
    """The number of slots and the maximum number of GPUs for `models` trainings; None is no limit.

    One slot if not `parallel` or for a single model, else `count`, and by default two slots of
    `ddp` GPUs each.
    """
    if models == 1 or not parallel:
        return 1, None
    return count, None if count or are_gpus_named else AT_ONCE * ddp


def run(comparison: Comparison, engine: Engine, limits: Limits, out: Console) -> int:
    """Trains the models that have not finished yet, and compares all of them.

    Returns the exit code: 1 if a model failed, 128 plus the signal's number if it was stopped.
    """
    training_job.require_data(comparison.run, comparison.ranks)

    def summarize(store: ResultsStore, console: LoggedConsole) -> None:
        _summarize(comparison, store, console)

    return job_group.run(comparison.group(), engine, limits, out, summarize).exit_code


def _summarize(comparison: Comparison, store: ResultsStore, console: LoggedConsole) -> None:
    """Prints the table, and writes table and picture to files."""
    folder, names = comparison.folder, list(comparison.models)
    rows = [_row(comparison, store.results[name]) for name in names if name in store.results]
    if not rows:
        return
    console.print("")
    console.print(model_table.models_table(rows))
    store.save(summary=[asdict(row) for row in rows])
    written = [str(folder / results.RESULTS_FILE), TABLE]
    try:
        model_table.write_csv(rows, folder / TABLE)
        if runs := model_table.logged(folder, names):
            batch_tokens = comparison.run.data.total_batch_size
            figures.write(lambda: model_table.draw(runs, batch_tokens), folder / PICTURE)
            written.append(PICTURE)
        console.print(f"Kept: {', '.join(written)}")
    except (ConfigError, OSError) as error:
        logger.warning("the comparison could not be written completely: %s", error)


def _row(comparison: Comparison, result: JobResult) -> ModelRow:
    parameters = flops.parameter_count(comparison.run_of(result.job).model)
    return ModelRow.of(result.job, parameters, result.state, result.result)

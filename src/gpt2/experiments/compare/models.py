"""Several models on the same data and token budget, at the same time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt2.base.errors import ConfigError
from gpt2.config import flops
from gpt2.config import options as config
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import RunConfig
from gpt2.experiments import results
from gpt2.experiments.compare import job_group, model_table
from gpt2.experiments.compare.job_group import AT_ONCE, Group, Say
from gpt2.experiments.compare.model_table import Row
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.training import training_job
from gpt2.inspection import plot

TABLE, PICTURE = "comparison.csv", "comparison.png"
MODELS: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in ARCHITECTURES}
"""what is compared, with the options by which the training of each differs from the others"""


@dataclass(frozen=True)
class Comparison:
    """The same training with several models."""

    run: RunConfig
    """what they have in common"""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=MODELS.copy)
    """name -> options of its own"""
    folder: Path = Path("checkpoints/models")
    log_dir: Path = Path("logs")
    ranks: int = 1
    """GPUs of each training, or processes on the CPU"""

    def __post_init__(self) -> None:
        training_job.require_fresh_start(self.run)
        if self.run.checkpoint.init_from != "scratch":
            raise ConfigError("--init_from does not go with several models: weights fit one only")
        if self.run.model.architecture != ModelConfig().architecture:
            raise ConfigError("--architecture is what is compared; --models chooses among them")
        for name in self.models:
            self.run_of(name)  # raises for what this model cannot be

    def run_of(self, name: str) -> RunConfig:
        """The training of one model."""
        try:
            return config.overlay(self.run, self.models[name])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def group(self) -> Group:
        """The trainings, and what they have in common; models may be added later."""
        own = {option for options in self.models.values() for option in options}
        decisive = training_job.result_options(self.run)
        data = self.run.data
        budget = f"{data.epochs} epochs of {data.data_root}"
        if data.max_steps is not None:
            budget = f"{data.max_steps * data.total_batch_size:,} tokens of {data.data_root}"
        on_ranks = f", on {self.ranks} ranks" if self.ranks > 1 else ""
        return Group(
            kind="models",
            heading=f"Models {', '.join(self.models)}: {budget} each{on_ranks}",
            jobs=[
                training_job.job(name, self.run_of(name), self.folder / name, ranks=self.ranks)
                for name in self.models
            ],
            values={name: {"model": name} for name in self.models},
            fixed={name: value for name, value in decisive.items() if name not in own},
            noun="training",
            folder=self.folder,
            log_dir=self.log_dir,
        )


def at_once(
    models: int, count: int | None, are_gpus_named: bool, parallel: bool, ddp: int = 1
) -> tuple[int | None, int | None]:
    """How many slots, and on how many GPUs at most, `models` trainings have: two unless more are
    asked for, one if not `parallel`; each on `ddp` GPUs. None is no limit."""
    if models == 1 or not parallel:
        return 1, None
    return count, None if count or are_gpus_named else AT_ONCE * ddp


def run(asked: Comparison, engine: Engine, limits: Limits, out: Console) -> int:
    """Trains the models that have not finished yet, and compares all; the exit code: 1 if one has
    failed, 128 and the signal's number if it was stopped."""
    training_job.require_data(asked.run, asked.ranks)

    def conclude(store: ResultsStore, say: Say) -> None:
        _conclude(asked, store, say)

    return job_group.run(asked.group(), engine, limits, out, conclude).exit_code


def _conclude(asked: Comparison, store: ResultsStore, say: Say) -> None:
    """The table and the picture, on the console and in files."""
    rows = [_row(asked, store.results[name]) for name in asked.models if name in store.results]
    if not rows:
        return
    say("")
    say(model_table.listing(rows))
    store.save(summary=[asdict(row) for row in rows])
    kept = [str(asked.folder / results.RESULTS_FILE), TABLE, PICTURE]
    runs = model_table.logged(asked.folder, list(asked.models))
    batch_tokens = asked.run.data.total_batch_size
    try:
        model_table.write_csv(rows, asked.folder / TABLE)
        if runs:
            plot.write(lambda: model_table.draw(runs, batch_tokens), asked.folder / PICTURE)
        else:
            kept.remove(PICTURE)
        say(f"Kept: {', '.join(kept)}")
    except (ConfigError, OSError) as error:
        say(f"WARNING: not everything could be kept: {error}")


def _row(asked: Comparison, record: JobResult) -> Row:
    parameters = flops.parameter_count(asked.run_of(record.job).model)
    return Row.of(record.job, parameters, record.state, record.result)

"""`gpt2 search`: an Optuna study of trainings."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.base import log
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import LARGEST, require_within
from gpt2.cli.experiment_notices import posting_end
from gpt2.cli.parse import CommandOptions, guarded, text_of_file
from gpt2.cli.pool_options import (
    TrainingPoolOptions,
    default_folder,
    list_checkpoints,
    parse_beside_run,
)
from gpt2.cli.train import TrainCommand
from gpt2.config.run import RunConfig

if TYPE_CHECKING:
    from gpt2.experiments.search.space import Space


@dataclass(frozen=True)
class SearchCommand(CommandOptions):
    """Search for the options with the lowest validation loss: an Optuna study of trainings.

    Each GPU, or each group of --ddp GPUs, runs one trial at a time. All options of `gpt2 train`
    work too and set the options that are not searched. The same command again resumes what was
    stopped. Exit code: 1 if fewer than --n_trials trials ended without a failure.
    """

    n_trials: int = 24
    """trials in total, including those of earlier starts; failed ones do not count"""
    space: Path | None = None
    """TOML file of the search space: a table per option with low, high, log and step, or choices"""
    print_space: bool = False
    """print the default search space as TOML and exit"""
    patience: int | None = 15
    """validations in a row without a lower loss that finish a trial early; None never does"""
    prune: bool = True
    """end trials that are worse than the median of the other trials at the same step"""
    startup_trials: int = 5
    """trials that must finish before any trial is pruned"""
    storage: str | None = None
    """database of the study, one search at a time: postgresql+psycopg://user:password@host/name;
    default is optuna_study.db in --checkpoint_dir"""
    study_name: str = "search"
    """name of the study in the database"""
    keep_checkpoints: bool = False
    """keep the checkpoints of trials that have ended, not only best_model.pth"""
    pool: TrainingPoolOptions = TrainingPoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the study: trials, summary and best_overall; default is checkpoints/search,
    below --out_dir"""
    log_dir: Path | None = None
    """folder of search_DATE_TIME.log and of the workers' logs;
    default is logs in --checkpoint_dir"""

    def __post_init__(self) -> None:
        require_within(self, 1, LARGEST, "n_trials", "patience")
        require_within(self, 0, LARGEST, "startup_trials")


def search_main() -> int:
    """`gpt2 search` and `src/parallel_search.py`."""

    def body() -> int:
        command, train, _ = parse_beside_run(SearchCommand, sys.argv[1:])
        log.setup(command.log_level)
        return _run(command, train)

    return guarded(body)


def _run(command: SearchCommand, train: TrainCommand) -> int:
    folder = command.checkpoint_dir or default_folder(train, "search")
    if train.list_checkpoints:
        return list_checkpoints(folder)
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("gpt2 search needs Optuna; first: pip install 'optuna>=4.5,<6'")
    # They import torch, see `gpt2.cli.parse`, and Optuna, which is optional.
    from gpt2.experiments.search import run, space, spec
    from gpt2.experiments.training import training_job

    if command.print_space:
        print(space.default_text(train.run), end="")
        return 0
    pool = command.pool
    search = spec.Search(
        run=train.run,
        space=read_space(command.space, train.run),
        n_trials=command.n_trials,
        patience=command.patience,
        prune=command.prune,
        startup_trials=command.startup_trials,
        folder=folder,
        log_dir=command.log_dir or folder / "logs",
        storage=command.storage,
        study_name=command.study_name,
        keep_checkpoints=command.keep_checkpoints,
        ranks=pool.ddp,
    )
    with posting_end(train.notify, f"search {folder}", folder) as ended:
        training_job.prepare(search.run, search.ranks)
        with pool.opened(folder, train.run.machine.device, ddp=pool.ddp) as engine:
            return ended(run.run(search, engine, pool.limits(), console()))


def read_space(path: Path | None, run: RunConfig) -> Space:
    from gpt2.experiments.search import space

    if path is None:
        return space.default(run)
    text = text_of_file(path, "--space", f"; --print_space > {path} makes one")
    return space.parse(text, run, str(path))

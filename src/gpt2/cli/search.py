"""What the `gpt2` command does with an Optuna study: `search`."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import require_at_least
from gpt2.cli.parse import guarded
from gpt2.cli.pool_options import PoolOptions, folder_of, list_checkpoints, parse_beside_run
from gpt2.config.run import RunConfig
from gpt2.experiments.search import space as spaces
from gpt2.experiments.search.space import Space


@dataclass(frozen=True)
class SearchCommand:
    """Search for the options with the lowest validation loss: an Optuna study of trainings.

    One trial on each GPU at a time, or on every --ddp GPUs. All options of `gpt2 train` work too,
    and say what a trial is beside the options that are searched. The same command goes on with what
    was stopped. Exit code: 1 if there are less trials than asked for, as others have failed.
    """

    n_trials: int = 24
    """trials in all, those of earlier starts included; failed ones do not count"""
    space: Path | None = None
    """TOML file of what is searched: a table per option with low, high, log, step, or choices"""
    print_space: bool = False
    """print the default space, as a file to begin with, and exit"""
    patience: int | None = 15
    """validations in a row without a lower loss, after which a trial has finished; None is never"""
    prune: bool = True
    """end trials that are worse than the median of the others at the same step"""
    startup_trials: int = 5
    """trials that have finished before any is pruned"""
    storage: str | None = None
    """data base that several machines share, as in postgresql+psycopg://user:password@host/name;
    default is optuna_study.db in --checkpoint_dir"""
    study_name: str = "search"
    """name of the study in that data base"""
    keep_checkpoints: bool = False
    """keep those of trials that have ended, too, not only best_model.pth"""
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the study, its trials, summary and best_overall; default is checkpoints/search"""
    log_dir: Path | None = None
    """folder of search_DATE_TIME.log and of the workers' logs; default is logs"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "n_trials", "patience")
        require_at_least(self, 0, "startup_trials")


def search_main() -> int:
    """`gpt2 search` and `src/parallel_search.py`."""

    def body() -> int:
        command, train = parse_beside_run(SearchCommand, sys.argv[1:])
        folder = command.checkpoint_dir or folder_of(train, "search")
        if train.list_checkpoints:
            return list_checkpoints(folder)
        if command.print_space:
            print(spaces.default_text(train.run), end="")
            return 0
        space = _read_space(command.space, train.run)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError("gpt2 search needs Optuna; first: pip install 'optuna>=4.5,<6'")
        from gpt2.experiments.search import run as run_module
        from gpt2.experiments.search import spec

        pool = command.pool
        asked = spec.Search(
            run=train.run,
            space=space,
            n_trials=command.n_trials,
            patience=command.patience,
            prune=command.prune,
            startup_trials=command.startup_trials,
            folder=folder,
            log_dir=command.log_dir or train.run.watch.log_dir,
            storage=command.storage,
            study_name=command.study_name,
            keep_checkpoints=command.keep_checkpoints,
            ranks=pool.ddp,
        )
        with pool.opened(folder, train.run.machine.device) as engine:
            return run_module.run(asked, engine, pool.limits(), console())

    return guarded(body)


def _read_space(path: Path | None, run: RunConfig) -> Space:
    if path is None:
        return spaces.default(run)
    try:
        return spaces.parse(path.read_text("utf-8-sig"), run, str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--space {path} is no text in UTF-8: {error}; save it as that"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read --space {path}: {error.strerror}; --print_space > {path} makes one"
        ) from error

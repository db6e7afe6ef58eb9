"""`gpt2 seeds`: trains with many seeds at every point of a grid."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.base import log
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import LARGEST_SEED, require_within
from gpt2.cli.experiment_notices import posting_end
from gpt2.cli.parse import CommandOptions, guarded
from gpt2.cli.pool_options import (
    TrainingPoolOptions,
    default_folder,
    list_checkpoints,
    parse_beside_run,
)
from gpt2.cli.train import TrainCommand
from gpt2.config import options
from gpt2.experiments import grid
from gpt2.experiments.pool.function_call import OPTIONAL_TEXT, TEXT, Call

FUNCTION_FLAGS = ("device", "out_dir", "list_checkpoints", "notify")
"""options of `gpt2 train` that apply to the functions of --target, too"""
MOST_SEEDS = 10**6


@dataclass(frozen=True)
class SeedsCommand(CommandOptions):
    """Train with every seed at every point of a grid, on all GPUs; or call any function instead.

    All options of `gpt2 train` work too, except --checkpoint_interval, which belongs to the sweep;
    set that of its trainings in a --config file. The same command again resumes a sweep that was
    stopped. Exit code: 1 if a job failed, or no result has --metric.
    """

    num_seeds: int = 10
    """number of seeds at each point"""
    first_seed: int = 0
    """the first seed; the others follow it"""
    grid: tuple[str, ...] = ()
    """options and values: learning_rate=1e-3,3e-4 n_layer=2,4 gives four points; default is one"""
    target: str | None = None
    """module:function to call instead of a training, with the seed and the values of a point"""
    metric: str | None = None
    """result to compare; default is val_loss, and with --target the only number that it returns, or
    the one named value"""
    pool: TrainingPoolOptions = TrainingPoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, with a folder for each training; default is checkpoints/seeds,
    below --out_dir"""
    checkpoint_interval: float = 1800.0
    """seconds between two writes of results.json, which also follow every 50 results"""
    keep_checkpoints: bool = True
    """keep the checkpoints of finished trainings, not only their results"""
    log_dir: Path | None = None
    """folder of seeds_DATE_TIME.log and of the workers' logs; default is logs"""

    def __post_init__(self) -> None:
        require_within(self, 1, MOST_SEEDS, "num_seeds")
        require_within(self, 0, LARGEST_SEED - MOST_SEEDS, "first_seed")
        require_within(self, 0, 10**8, "checkpoint_interval")


def seeds_main() -> int:
    """`gpt2 seeds` and `src/main_multi_gpu.py`."""

    def body() -> int:
        command, train, train_flags = parse_beside_run(SeedsCommand, sys.argv[1:])
        log.setup(command.log_level)
        return _run(command, train, train_flags)

    return guarded(body)


def _run(command: SeedsCommand, train: TrainCommand, train_flags: Sequence[str]) -> int:
    folder = command.checkpoint_dir or default_folder(train, "seeds")
    if train.list_checkpoints:
        return list_checkpoints(folder)
    # They take a while to import: see `gpt2.cli.parse`.
    from gpt2.experiments import job_group
    from gpt2.experiments.sweep import sweep

    run, pool = train.run, command.pool
    call = None if command.target is None else _call(command, train_flags)
    planned = sweep.Sweep(
        grid.points(grid_of(command, call)),
        range(command.first_seed, command.first_seed + command.num_seeds),
        command.metric or (None if command.target else "val_loss"),
    )
    place: dict[str, Any] = {
        "folder": folder,
        "log_dir": command.log_dir or run.watch.log_dir,
        "save_every_s": command.checkpoint_interval,
    }
    if call is not None:
        group = planned.of_function(call, **place)
    else:
        group = planned.of_training(
            run, ranks=pool.ddp, keep_checkpoints=command.keep_checkpoints, **place
        )
    with (
        posting_end(train.notify, f"seeds {folder}", folder) as ended,
        pool.opened(folder, run.machine.device, ddp=pool.ddp) as engine,
    ):
        if call is None:
            from gpt2.experiments.training import training_job  # imports torch

            training_job.prepare(run, pool.ddp)
        return ended(job_group.run(group, engine, pool.limits(), console()).exit_code)


def _call(command: SeedsCommand, train_flags: Sequence[str]) -> Call:
    """The function of --target."""
    if flag := _training_flag(command, train_flags):
        raise ConfigError(f"{flag} applies to trainings only; leave it out with --target")
    sys.path.insert(0, os.getcwd())  # the target's module may lie in the current folder
    assert command.target is not None
    return Call.of(command.target)


def grid_of(command: SeedsCommand, call: Call | None) -> dict[str, list[Any]]:
    """The grid, where the values of texts stay as they were typed."""
    if call is not None:
        texts, optional_texts = call.annotated(TEXT), call.annotated(OPTIONAL_TEXT)
        return grid.parse_grid(command.grid, texts, optional_texts)
    names = (item.partition("=")[0].strip() for item in command.grid)
    known = {name.replace("-", "_") for name in names if name.replace("-", "_").isidentifier()}
    return grid.parse_grid(command.grid, {name for name in known if options.is_text(name)})


def _training_flag(command: SeedsCommand, train_flags: Sequence[str]) -> str | None:
    """The first flag that only a training can use, if there is one."""
    if command.pool.ddp > 1:
        return f"--ddp {command.pool.ddp}"
    if not command.keep_checkpoints:
        return "--no_keep_checkpoints"
    flags = [item.partition("=")[0] for item in train_flags if item.startswith("--")]
    names = (flag.removeprefix("--").replace("-", "_") for flag in flags)
    return next((f"--{name}" for name in names if name not in FUNCTION_FLAGS), None)

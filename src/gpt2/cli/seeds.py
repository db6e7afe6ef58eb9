"""`gpt2 seeds`: many seeds at every point of a grid."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import require_at_least
from gpt2.cli.parse import guarded, parse_known
from gpt2.cli.pool_options import (
    FOR_FUNCTIONS,
    PoolOptions,
    folder_of,
    list_checkpoints,
    parse_beside_run,
)
from gpt2.config.run import MachineConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class SeedsCommand:
    """Train with every seed of every point of a grid, on all GPUs at once; or call any function so.

    All options of `gpt2 train` work too, but for --checkpoint_interval, which is the sweep's here;
    that of its trainings may stand in a --config file. The same command goes on with a sweep that
    was stopped. Exit code: 1 if a job failed.
    """

    num_seeds: int = 10
    """seeds of each point"""
    first_seed: int = 0
    """the first of them; the others follow it"""
    grid: tuple[str, ...] = ()
    """points: learning_rate=1e-3,3e-4 n_layer=2,4 are four; default is one, as the options say"""
    target: str | None = None
    """module:function to call with seed and the values of a point, instead of a training"""
    metric: str | None = None
    """which result is compared: default is val_loss, of a function `value`, what it returns"""
    max_gpus: int | None = None
    """GPUs at most, each with a worker process; default is all"""
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, and of a folder for each training; default is checkpoints/seeds"""
    checkpoint_interval: float = 1800.0
    """seconds after which results.json is written, if 50 results do not come before"""
    keep_checkpoints: bool = True
    """keep those of finished trainings, not only their results"""
    log_dir: Path | None = None
    """folder of seeds_DATE_TIME.log and of the workers' logs; default is logs"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_seeds", "max_gpus")
        require_at_least(self, 0, "first_seed", "checkpoint_interval")


def seeds_main() -> int:
    """`gpt2 seeds` and `src/main_multi_gpu.py`."""

    def body() -> int:
        command, train = parse_beside_run(SeedsCommand, sys.argv[1:])
        folder = command.checkpoint_dir or folder_of(train, "seeds")
        if train.list_checkpoints:
            return list_checkpoints(folder)
        from gpt2.experiments import grid as plan
        from gpt2.experiments.pool.function_call import Call
        from gpt2.experiments.sweep import sweep as seeds
        from gpt2.experiments.sweep.training_sweep import TrainingTarget

        if train.run.machine.seed != MachineConfig().seed:
            raise ConfigError(seeds.SEEDS_ONLY_BY_FLAGS)
        pool, device = command.pool, train.run.machine.device
        target: seeds.SweepTarget = TrainingTarget(train.run, command.keep_checkpoints, pool.ddp)
        if command.target is not None:
            if flag := _of_a_training(sys.argv[1:]):
                raise ConfigError(f"{flag} is for trainings; leave it out with --target")
            sys.path.insert(0, os.getcwd())  # where it is looked for
            target = seeds.FunctionTarget(Call.of(command.target))
        sweep = seeds.Sweep(
            target,
            points=plan.points(plan.parse_grid(command.grid)),
            seeds=range(command.first_seed, command.first_seed + command.num_seeds),
            metric=command.metric or ("value" if command.target else "val_loss"),
            folder=folder,
            log_dir=command.log_dir or train.run.watch.log_dir,
            save_every_s=command.checkpoint_interval,
        )
        with pool.opened(folder, device, max_gpus=command.max_gpus) as engine:
            return seeds.run_sweep(sweep, engine, pool.limits(), console()).exit_code

    return guarded(body)


def _of_a_training(arguments: Sequence[str]) -> str | None:
    """The first flag of `gpt2 seeds` that means nothing to a function."""
    command, others = parse_known(SeedsCommand, arguments)
    if command.pool.ddp > 1:
        return f"--ddp {command.pool.ddp}"
    if not command.keep_checkpoints:
        return "--no_keep_checkpoints"
    flags = (item.partition("=")[0].replace("-", "_") for item in others if item[:2] == "--")
    names = (flag.removeprefix("__") for flag in flags)
    return next((f"--{name}" for name in names if name not in FOR_FUNCTIONS), None)

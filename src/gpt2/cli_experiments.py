"""What the `gpt2` command does with many trainings: `seeds`, `models`, `experiments`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt2 import cli
from gpt2.cli_parse import guarded, parse_known
from gpt2.config import RunConfig, require_at_least, suggestion
from gpt2.errors import ConfigError
from gpt2.tables import console

T = TypeVar("T")


@dataclass(frozen=True)
class SeedsCommand:
    """Train with every seed of every point of a grid, on all GPUs at once; or call any function so.

    All options of `gpt2 train` work too, but --checkpoint_interval and --checkpoint_dir, which are
    the sweep's; those of its trainings: a --config file, and folders of their own. The same command
    goes on with a sweep that was stopped.
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
    slots: int | None = None
    """worker processes; default is one per GPU, and without GPUs 2, which share the cores"""
    checkpoint_dir: Path = Path("checkpoints/seeds")
    """folder of the results, and of the checkpoints of each training"""
    checkpoint_interval: float = 1800.0
    """seconds after which results.json is written, if 50 results do not come before"""
    keep_checkpoints: bool = True
    """keep those of finished trainings, not only their results"""
    log_dir: Path = Path("logs")
    """folder of the sweep's log and of those of its workers"""
    retries: int = 1
    """more attempts for a job whose process died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging"""
    grace: float = 60.0
    """seconds for saving after Ctrl+C"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_seeds", "max_gpus", "slots")
        require_at_least(self, 0, "first_seed", "checkpoint_interval")


def seeds_main() -> int:
    """`gpt2 seeds` and `src/main_multi_gpu.py`."""

    def body() -> int:
        command, run_config = parse_beside_run(SeedsCommand, sys.argv[1:])
        from gpt2.experiments import plan, seeds, slots
        from gpt2.experiments.pool import Limits

        sys.path.insert(0, os.getcwd())  # where --target is looked for
        grid = plan.parse_grid(command.grid)
        of_function = "value" if command.target else "val_loss"
        sweep = seeds.Sweep(
            run=run_config,
            target=command.target,
            points=plan.points(grid),
            seeds=range(command.first_seed, command.first_seed + command.num_seeds),
            metric=command.metric or of_function,
            folder=command.checkpoint_dir,
            save_every_s=command.checkpoint_interval,
            keep_checkpoints=command.keep_checkpoints,
        )
        found = slots.of_machine(command.slots, device=run_config.machine.device)
        limits = Limits(command.retries, command.job_timeout, command.grace)
        chosen = found[: command.max_gpus]
        return seeds.run(sweep, chosen, limits, command.log_dir, console())

    return guarded(body)


@dataclass(frozen=True)
class ModelsCommand:
    """Train several models on the same data and token budget, and compare them.

    Two at the same time, each on a GPU; the third follows on the second GPU as soon as that is
    free. Without GPUs, shares of the CPU cores take their place. All options of `gpt2 train` work
    too, for all of the models. The same command goes on with what was stopped. Exit code: 1 if a
    model failed.
    """

    models: str | None = None
    """which, as in gpt2,mlp; default is all: gpt2, modern, mlp"""
    gpus: str | None = None
    """physical GPUs, as in 1,2; default is the first two"""
    slots: int | None = None
    """trainings at a time; default is one per GPU, and without GPUs 2, which share the cores"""
    parallel: bool = True
    """--no_parallel trains them one after another, on the first GPU"""
    checkpoint_dir: Path | None = None
    """folder of the results, and of a folder for each model; default is checkpoints/models"""
    log_dir: Path | None = None
    """folder of training_DATE_TIME.log and of each model's MODEL_DATE_TIME.log; default is logs"""
    retries: int = 1
    """more attempts for a model whose process died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a training counts as hanging"""
    grace: float = 60.0
    """seconds for saving after Ctrl+C"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "slots")


def models_main() -> int:
    """`gpt2 models` and `src/train_models.py`."""

    def body() -> int:
        command, others = parse_known(ModelsCommand, sys.argv[1:])
        train = cli.parse_train(others)
        out_dir = train.out_dir or Path()
        folder = command.checkpoint_dir or out_dir / "checkpoints" / "models"
        if train.list_checkpoints:
            from gpt2 import monitor

            monitor.print_checkpoints(folder, console())
            return 0
        from gpt2.experiments import models
        from gpt2.experiments.pool import Limits

        names = _listed("models", command.models) or list(models.MODELS)
        for name in names:
            if name not in models.MODELS:
                raise ConfigError(
                    f"--models: there is no {name}{suggestion(name, list(models.MODELS))}; there "
                    f"are {', '.join(models.MODELS)}"
                )
        asked = models.Comparison(
            train.run,
            {name: models.MODELS[name] for name in models.MODELS if name in names},
            folder,
            command.log_dir or train.run.watch.log_dir,
        )
        places = models.choose_slots(
            len(asked.models),
            command.slots,
            _listed("gpus", command.gpus),
            command.parallel,
            train.run.machine.device,
        )
        limits = Limits(command.retries, command.job_timeout, command.grace)
        return models.run(asked, places, limits, console())

    return guarded(body)


def _listed(flag: str, text: str | None) -> list[str] | None:
    """`1,2` as a list; None stays None."""
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    if "" in items or len(set(items)) < len(items):
        raise ConfigError(f"--{flag} {text}: needed are different names, as in a,b")
    return items


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, RunConfig]:
    """The command, and the training that the other arguments say; the command's flags come first,
    where both have one of the same name."""
    command, others = parse_known(kind, arguments)
    return command, cli.parse_train(others).run

"""`gpt2 models`: trains several models side by side."""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt2.base import log
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import suggestion
from gpt2.cli.parse import CommandOptions, guarded
from gpt2.cli.pool_options import (
    PoolOptions,
    default_folder,
    list_checkpoints,
    listed,
    parse_beside_run,
)
from gpt2.cli.train import TrainCommand


@dataclass(frozen=True)
class ModelsCommand(CommandOptions):
    """Train several models on the same data with the same number of tokens, and compare them.

    Two models train at the same time, each on a GPU; the third follows on the second GPU as soon as
    it is free. Without GPUs, each takes a share of the CPU cores. All options of `gpt2 train` work
    too and apply to all models. The same command again resumes what was stopped. Exit code: 1 if a
    model failed.
    """

    models: str | None = None
    """models to train, for example gpt2,mlp; default is all: gpt2, modern, mlp"""
    parallel: bool = True
    """--no_parallel trains the models one after another, on the first GPU"""
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, with a folder for each model; default is checkpoints/models"""
    log_dir: Path | None = None
    """folder of training_DATE_TIME.log and of each model's MODEL_DATE_TIME.log; default is logs"""


def models_main() -> int:
    """`gpt2 models` and `src/train_models.py`."""

    def body() -> int:
        command, train, _ = parse_beside_run(ModelsCommand, sys.argv[1:])
        log.setup(command.log_level)
        return _run(command, train)

    return guarded(body)


def _run(command: ModelsCommand, train: TrainCommand) -> int:
    folder = command.checkpoint_dir or default_folder(train, "models")
    if train.list_checkpoints:
        return list_checkpoints(folder)
    # It imports torch: see `gpt2.cli.parse`.
    from gpt2.experiments.compare import models

    names = listed("models", command.models) or list(models.MODELS)
    for name in names:
        if name not in models.MODELS:
            raise ConfigError(
                f"--models: unknown model {name}{suggestion(name, models.MODELS)}; expected "
                f"{', '.join(models.MODELS)}"
            )
    comparison = models.Comparison(
        train.run,
        {name: models.MODELS[name] for name in models.MODELS if name in names},
        folder,
        command.log_dir or train.run.watch.log_dir,
        ranks=command.pool.ddp,
    )
    pool, device = command.pool, train.run.machine.device
    room = models.at_once(
        len(comparison.models), pool.slots, pool.gpus is not None, command.parallel, pool.ddp
    )
    with pool.opened(folder, device, *room) as engine:
        return models.run(comparison, engine, pool.limits(), console())

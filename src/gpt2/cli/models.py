"""`gpt2 models`: several models at the same time."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import suggestion
from gpt2.cli.parse import guarded
from gpt2.cli.pool_options import PoolOptions, folder_of, list_checkpoints, listed, parse_beside_run

if TYPE_CHECKING:
    pass


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
    parallel: bool = True
    """--no_parallel trains them one after another, on the first GPU"""
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, and of a folder for each model; default is checkpoints/models"""
    log_dir: Path | None = None
    """folder of training_DATE_TIME.log and of each model's MODEL_DATE_TIME.log; default is logs"""


def models_main() -> int:
    """`gpt2 models` and `src/train_models.py`."""

    def body() -> int:
        command, train = parse_beside_run(ModelsCommand, sys.argv[1:])
        folder = command.checkpoint_dir or folder_of(train, "models")
        if train.list_checkpoints:
            return list_checkpoints(folder)
        from gpt2.experiments.compare import models

        names = listed("models", command.models) or list(models.MODELS)
        for name in names:
            if name not in models.MODELS:
                raise ConfigError(
                    f"--models: there is no {name}{suggestion(name, models.MODELS)}; there "
                    f"are {', '.join(models.MODELS)}"
                )
        asked = models.Comparison(
            train.run,
            {name: models.MODELS[name] for name in models.MODELS if name in names},
            folder,
            command.log_dir or train.run.watch.log_dir,
            ranks=command.pool.ddp,
        )
        pool, device = command.pool, train.run.machine.device
        room = models.at_once(
            len(asked.models), pool.slots, pool.gpus is not None, command.parallel, pool.ddp
        )
        with pool.opened(folder, device, *room) as engine:
            return models.run(asked, engine, pool.limits(), console())

    return guarded(body)

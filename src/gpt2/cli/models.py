"""`gpt2 models`: trains several models side by side."""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gpt2.base import log
from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import suggestion
from gpt2.cli.experiment_notices import posting_end
from gpt2.cli.parse import CommandOptions, guarded
from gpt2.cli.pool_options import (
    TrainingPoolOptions,
    default_folder,
    list_checkpoints,
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
    pool: TrainingPoolOptions = TrainingPoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, with a folder for each model; default is checkpoints/models,
    below --out_dir"""
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
    # They import torch: see `gpt2.cli.parse`.
    from gpt2.experiments import job_group
    from gpt2.experiments.compare import models
    from gpt2.experiments.training import training_job

    names = _names(command.models, models.MODELS)
    pool = command.pool
    group = models.group(
        train.run,
        {name: models.MODELS[name] for name in models.MODELS if name in names},
        folder,
        ranks=pool.ddp,
        log_dir=command.log_dir or train.run.watch.log_dir,
    )
    at_once = min(len(names), job_group.AT_ONCE)
    device = train.run.machine.device
    with (
        posting_end(train.notify, f"models {folder}", folder) as ended,
        pool.opened(folder, device, at_once=at_once, ddp=pool.ddp) as engine,
    ):
        training_job.prepare(train.run, pool.ddp)
        return ended(job_group.run(group, engine, pool.limits(), console()).exit_code)


def _names(text: str | None, known: Collection[str]) -> list[str]:
    """The models of --models; all without it."""
    if text is None:
        return list(known)
    names = [item.strip() for item in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"--models {text}: expected different names separated by commas")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--models: unknown model {name}{suggestion(name, known)}; expected "
                f"{', '.join(known)}"
            )
    return names

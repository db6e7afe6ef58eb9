"""A trial of a search as a job: a training, and the files that it leaves in its folder.

`config.json` is the whole configuration, `metrics.csv` the curves of its log, and `best_model.pth`
the state dict of the model at its lowest validation loss, for
`torch.load(path, weights_only=True)`.
"""

import contextlib
import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt2.base import addresses, atomic_files
from gpt2.base.errors import Diverged
from gpt2.checkpoint import store
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments.pool.job import Job
from gpt2.experiments.training import training_job
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun
from gpt2.train import dataset
from gpt2.train.report import Report

TARGET = "gpt2.experiments.search.trial:run"
CONFIG, METRICS, WEIGHTS = "config.json", "metrics.csv", "best_model.pth"
COLUMNS = ("step", "loss", "val_loss", "learning_rate", "tokens_per_s", "elapsed_s")
KEPT_CHECKPOINTS = 2
"""newest checkpoints that are kept beside the best one"""


def name_of(number: int) -> str:
    return f"trial_{number:03d}"


def job(
    number: int,
    run_config: RunConfig,
    folder: Path,
    parameters: Mapping[str, Any],
    ranks: int = 1,
) -> Job:
    """The training of a trial, which continues from its own newest checkpoint.

    Its files are in a subfolder of `folder`. `parameters` are the searched values, for config.json.
    It has a checkpoint at every validation, and no other evaluations.
    """
    name = name_of(number)
    interval = run_config.checkpoint.checkpoint_interval
    eval_interval = run_config.evaluation.eval_interval
    assert eval_interval is not None
    made = training_job.job(
        name,
        run_config,
        folder / name,
        ranks=ranks,
        checkpoint_interval=(
            interval if interval and eval_interval % interval == 0 else eval_interval
        ),
        keep_last=KEPT_CHECKPOINTS,
        hellaswag_interval=None,
        sample_interval=None,
    )
    kwargs = {**made.kwargs, "number": number, "parameters": parameters}
    return replace(made, target=TARGET, kwargs=kwargs)


def run(
    report: Report,
    run: Mapping[str, Any],
    run_name: str,
    number: int,
    parameters: Mapping[str, Any],
    ranks: int = 1,
) -> dict[str, Any]:
    """Trains, writes the trial's files and returns the result of the training.

    If training diverged, the result has the reason as `diverged`. Raises Stopped if the training
    was stopped, after it has saved, and EndedAs if one of several ranks failed.
    """
    run_config = options.of_stored(run)
    folder = run_config.checkpoint.checkpoint_dir
    folder.mkdir(parents=True, exist_ok=True)
    complete = dataset.with_vocab_size_if_known(run_config)
    about = {"trial": number, "parameters": parameters, **addresses.public(complete.to_dict())}
    atomic_files.write_text(folder / CONFIG, json.dumps(about, indent=1) + "\n")
    try:
        result = training_job.run(report, run, run_name, ranks)
    except Diverged as error:
        result = {"diverged": str(error)}
    logged = log_reader.read_runs(folder / "log.txt")
    write_metrics(logged[-1], folder / METRICS)
    return result | {"best_step": write_best(folder)}


def write_best(folder: Path) -> int | None:
    """Writes the weights of the best checkpoint; returns its step, or None without validations."""
    best = store.find_best(store.list_checkpoints(folder))
    if best is None:
        return None
    state = store.load(best.path)
    with atomic_files.writing(folder / WEIGHTS) as file:
        torch.save({name: tensor.clone() for name, tensor in state["model"].items()}, file)
    return best.training.step


def write_metrics(logged: LoggedRun, path: Path) -> None:
    """Writes a row for each step; `val_loss` is empty at steps without validation."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for step in sorted({*logged.steps, *logged.val_losses}):
        row: dict[str, Any] = {"step": step, "val_loss": logged.val_losses.get(step)}
        if update := logged.steps.get(step):
            row |= {name: getattr(update, name) for name in COLUMNS if name != "val_loss"}
        writer.writerow(row)
    atomic_files.write_text(path, text.getvalue())


def drop_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a trial; their metadata first, so that none is left incomplete."""
    for path in [*folder.glob("step_*.json"), *folder.glob("*.pt")]:
        with contextlib.suppress(OSError):
            path.unlink()

"""A trial of a search as a job: a training, and the files that people know by name.

`config.json` is the whole configuration, `metrics.csv` the curves of its log, and `best_model.pth`
the weights at its lowest validation loss: what `torch.save(model.state_dict())` writes, nothing
else, for `torch.load(path, weights_only=True)`.
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

from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError, Diverged
from gpt2.checkpoint import store
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.experiments.pool.job import Job
from gpt2.experiments.training import training_job
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun
from gpt2.train.report import Report

TARGET = "gpt2.experiments.search.trial:run"
CONFIG, METRICS, WEIGHTS = "config.json", "metrics.csv", "best_model.pth"
COLUMNS = ("step", "loss", "val_loss", "learning_rate", "tokens_per_s", "elapsed_s")
KEPT = 2
"""newest checkpoints, beside the best"""


def name_of(number: int) -> str:
    return f"trial_{number:03d}"


def job(
    number: int,
    run_config: RunConfig,
    folder: Path,
    parameters: Mapping[str, Any],
    ranks: int = 1,
) -> Job:
    """The training of a trial, in a folder of its own in `folder`; it goes on where it was."""
    name = name_of(number)
    changes = _judged_by_validation(run_config)
    made = training_job.job(name, run_config, folder / name, ranks=ranks, **changes)
    return replace(
        made, target=TARGET, kwargs={**made.kwargs, "number": number, "parameters": parameters}
    )


def _judged_by_validation(run_config: RunConfig) -> dict[str, Any]:
    """A checkpoint at every validation, so that the best is kept; nothing else is measured."""
    every, judged = run_config.checkpoint.checkpoint_interval, run_config.evaluation.eval_interval
    assert judged is not None
    return {
        "checkpoint_interval": every if every and judged % every == 0 else judged,
        "keep_last": KEPT,
        "hellaswag_interval": None,
        "sample_interval": None,
    }


def run(
    report: Report,
    run: Mapping[str, Any],
    run_name: str,
    number: int,
    parameters: Mapping[str, Any],
    ranks: int = 1,
) -> dict[str, Any]:
    """Trains, and writes the trial's files; `diverged` of the result says why training gave up.

    Raises Stopped if it was stopped, after saving, and JobLost if one of several ranks has died.
    """
    run_config = options.of_stored(run)
    folder = run_config.checkpoint.checkpoint_dir
    folder.mkdir(parents=True, exist_ok=True)
    about = {"trial": number, "parameters": parameters, **run_config.to_dict()}
    atomic_files.write_text(folder / CONFIG, json.dumps(about, indent=1) + "\n")
    try:
        facts = training_job.run(report, run, run_name, ranks)
    except Diverged as error:
        facts = {"diverged": str(error)}
    logged = log_reader.read_runs(folder / "log.txt")
    write_metrics(logged[-1], folder / METRICS)
    return facts | {"best_step": write_best(folder)}


def write_best(folder: Path) -> int | None:
    """Writes the weights of the best checkpoint; its step, or None if nothing was ever judged."""
    best = store.find_best(store.list_checkpoints(folder))
    if best is None:
        return None
    state = store.load(best.path)
    try:
        with atomic_files.writing(folder / WEIGHTS) as file:
            torch.save({name: tensor.clone() for name, tensor in state["model"].items()}, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {folder / WEIGHTS}: {error}; make room") from error
    return best.training.step


def write_metrics(logged: LoggedRun, path: Path) -> None:
    """A row for each step; where there was no validation, that column is empty."""
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
    """Removes what only a training that goes on needs; the marks first, as always."""
    for path in [*folder.glob("step_*.json"), *folder.glob("*.pt")]:
        with contextlib.suppress(OSError):
            path.unlink()

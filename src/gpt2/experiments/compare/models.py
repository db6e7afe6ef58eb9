"""Trains several models on the same data and token budget, and compares them.

The comparison is a table, as text and as CSV, and curves of the losses from the trainings' logs.
"""

from __future__ import annotations  # matplotlib is imported where something is drawn

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from gpt2.base import addresses
from gpt2.base.errors import ConfigError
from gpt2.base.text import counted, table
from gpt2.config import flops, options
from gpt2.config.flops import duration
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import RunConfig
from gpt2.experiments.job_group import JobGroup, Records, Summary, Values
from gpt2.experiments.results import JobResult
from gpt2.experiments.training import training_job
from gpt2.inspection import figures, plot
from gpt2.inspection.figures import Numbers
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun
from gpt2.train import dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in ARCHITECTURES}
"""the options of each model that differ from the options of the comparison"""
Row = dict[str, Any]
"""one model: its name, parameters, state, and what its training returned; None is unknown"""
COSTS = ("tokens", "tokens_per_s", "peak_memory_gb", "train_s")
RETURNED = ("train_loss", "val_loss", "bits_per_byte", "hellaswag", *COSTS)
COLUMNS = {
    "train_loss": ("train loss", "{:.4f}  "),
    "val_loss": ("val loss", "{:.4f}  "),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "peak_memory_gb": ("peak memory", "{:.2f} GB"),
}
"""title and format of each"""


def group(
    run: RunConfig, models: Mapping[str, Values], folder: Path, ranks: int = 1, **more: Any
) -> JobGroup:
    """The training `run` with each of `models`, which are options by the name of the model.

    Each training has `ranks` GPUs, or processes on the CPU. `more` are options of JobGroup.
    """
    training_job.require_fresh_start(run)
    if run.checkpoint.init_from != "scratch":
        raise ConfigError(
            "--init_from cannot be used with several models: the weights fit only one of them"
        )
    if run.model.architecture != ModelConfig().architecture:
        raise ConfigError(
            f"--architecture is what is compared; choose with --models, not with --architecture or "
            f"--preset {run.preset}, which gave {run.model.architecture}"
        )
    runs = {}
    for name, changes in models.items():
        try:
            runs[name] = dataset.with_vocab_size_if_known(options.overlay(run, changes))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def summarize(records: Records) -> Summary:
        sizes = {name: flops.parameter_count(runs[name].model) for name in records}
        rows = [row(item, sizes[name]) for name, item in records.items()]
        files: dict[str, str | figures.Draw] = {
            "comparison.csv": as_csv(rows),
            "comparison.png": lambda: draw(logged(folder, models), run.tokens_before),
        }
        return Summary(lambda: models_table(rows), files, {"summary": rows})

    data, steps = " ".join(addresses.public(run.data.data_root)), run.data.max_steps
    epochs = counted(run.data.epochs, "epoch")
    budget = epochs if steps is None else f"{run.tokens_before(steps):,} tokens"
    on_ranks = f", on {ranks} ranks" if ranks > 1 else ""
    compared = {name for changes in models.values() for name in changes}
    shared = training_job.result_options(run)
    return JobGroup(
        kind="models",
        log_name="training",
        heading=f"Models {', '.join(models)}: {budget} of {data} each{on_ranks}",
        fixed={name: value for name, value in shared.items() if name not in compared},
        values={name: {"model": name} for name in models},
        job=lambda name, _: training_job.job(name, runs[name], folder / name, ranks=ranks),
        summarize=summarize,
        folder=folder,
        **more,
    )


def row(item: JobResult, parameters: int) -> Row:
    found = {name: item.numbers.get(name) for name in RETURNED}
    return {"model": item.job, "parameters": parameters, "state": item.state, **found}


def models_table(rows: Sequence[Row]) -> Table:
    """The table of models. A star marks the lowest validation loss, or training loss if no model
    was validated."""
    built = table(
        "Models", "model", "parameters", *(title for title, _ in COLUMNS.values()), "time"
    )
    loss = "train_loss" if all(row["val_loss"] is None for row in rows) else "val_loss"
    lowest = min((row[loss] for row in rows if row[loss] is not None), default=None)
    for row in rows:
        cells = {
            name: "-" if row[name] is None else form.format(row[name])
            for name, (_, form) in COLUMNS.items()
        }
        if len(rows) > 1 and row[loss] is not None and row[loss] == lowest:
            cells[loss] = f"{lowest:.4f} *"
        time = row["state"] if row["train_s"] is None else duration(row["train_s"])
        built.add_row(row["model"], f"{row['parameters'] / 1e6:.1f} M", *cells.values(), time)
    return built


def as_csv(rows: Sequence[Row]) -> str:
    """The table with full precision, for other tools."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "parameters", "state", *RETURNED], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def logged(folder: Path, names: Iterable[str]) -> list[LoggedRun]:
    """The newest logged run of each training in `folder`, named after its model."""
    paths = {name: folder / name / "log.txt" for name in names}
    found = {name: log_reader.read_runs(path) for name, path in paths.items() if path.exists()}
    return [replace(runs[-1], name=name) for name, runs in found.items() if runs]


def draw(runs: Sequence[LoggedRun], tokens_before: Callable[[int], int]) -> Figure:
    """Training and validation losses of each model against tokens and against training time.

    `tokens_before(step)` are the tokens of the first `step` steps.
    """

    def million_tokens(_: LoggedRun, steps: Numbers) -> Numbers:
        return np.array([tokens_before(int(step)) for step in steps]) / 1e6

    panels = []
    for panel in (plot.LOSS, plot.VALIDATION):
        panels.append(replace(panel, x_label="million tokens", x_of=million_tokens))
        panels.append(replace(panel, x_label="minutes", x_of=minutes_at))
    return plot.draw(runs, panels)


def minutes_at(run: LoggedRun, steps: Numbers) -> Numbers:
    """Training time in minutes at each of `steps`: the sum of the step times up to it."""
    known = [run.first_step, *run.steps]
    passed_s = np.cumsum([0.0, *(item.elapsed_s for item in run.steps.values())])
    minutes: Numbers = np.interp(steps, known, passed_s) / 60
    return minutes

"""Compares trainings of several models on the same data: a table, and curves of their losses.

The curves come from the trainings' logs.
"""

from __future__ import annotations  # matplotlib is imported where something is drawn

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from gpt2.base import atomic_files
from gpt2.base.text import table
from gpt2.config.flops import duration
from gpt2.experiments.results import JobResult
from gpt2.inspection import plot
from gpt2.inspection.figures import Numbers
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""one model: its name, parameters, state, and what its training returned; None is unknown"""
RETURNED = (
    *("train_loss", "val_loss", "hellaswag", "tokens", "tokens_per_s"),
    *("peak_memory_gb", "train_s"),
)
COLUMNS = {
    "train loss": ("train_loss", "{:.4f}  "),
    "val loss": ("val_loss", "{:.4f}  "),
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
    "peak memory": ("peak_memory_gb", "{:.2f} GB"),
}
"""the result and its format"""


def row(item: JobResult, parameters: int) -> Row:
    found = {name: (item.result or {}).get(name) for name in RETURNED}
    return {"model": item.job, "parameters": parameters, "state": item.state, **found}


def models_table(rows: Sequence[Row]) -> Table:
    """The table of models. A star marks the lowest validation loss, or training loss if no model
    was validated."""
    built = table("Models", "model", "parameters", *COLUMNS, "time")
    has_val = any(row["val_loss"] is not None for row in rows)
    title, judged = ("val loss", "val_loss") if has_val else ("train loss", "train_loss")
    lowest = min((row[judged] for row in rows if row[judged] is not None), default=None)
    for row in rows:
        cells = {
            column: "-" if row[name] is None else form.format(row[name])
            for column, (name, form) in COLUMNS.items()
        }
        if len(rows) > 1 and row[judged] is not None and row[judged] == lowest:
            cells[title] = f"{row[judged]:.4f} *"
        time = row["state"] if row["train_s"] is None else duration(row["train_s"])
        built.add_row(row["model"], f"{row['parameters'] / 1e6:.1f} M", *cells.values(), time)
    return built


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the table with full precision, for other tools."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_files.write_text(path, text.getvalue())


def draw(runs: Mapping[str, LoggedRun], batch_tokens: int) -> Figure:
    """Training and validation losses of each model against tokens and against training time."""
    axes: tuple[dict[str, Any], ...] = (
        {"x_label": "million tokens", "x_of": lambda _, steps: steps * batch_tokens / 1e6},
        {"x_label": "minutes", "x_of": lambda run, steps: seconds_at(run, steps) / 60},
    )
    panels = [replace(panel, **axis) for panel in (plot.LOSS, plot.VALIDATION) for axis in axes]
    return plot.draw([replace(run, name=name) for name, run in runs.items()], panels)


def seconds_at(run: LoggedRun, steps: Numbers) -> Numbers:
    """Training time in seconds at each of `steps`: the sum of the step times up to it."""
    known = [run.first_step, *run.steps]
    passed = np.cumsum([0.0, *(item.elapsed_s for item in run.steps.values())])
    seconds: Numbers = np.interp(steps, known, passed)
    return seconds


def logged(folder: Path, names: Iterable[str]) -> dict[str, LoggedRun]:
    """The newest logged run of each training in `folder` that has at least one step."""
    paths = {name: folder / name / "log.txt" for name in names}
    return {
        name: run
        for name, path in paths.items()
        if path.exists()
        for run in [run for run in log_reader.read_runs(path) if run.steps][-1:]
    }

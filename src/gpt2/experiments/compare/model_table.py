"""Compares trainings of several models on the same data: a table, and curves of their losses.

The curves come from the trainings' logs.
"""

from __future__ import annotations  # matplotlib is imported where something is drawn

import contextlib
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from gpt2.base import atomic_files
from gpt2.base.text import table
from gpt2.config.flops import duration
from gpt2.inspection import figures, plot
from gpt2.inspection.figures import Curve, Numbers
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT, GREY = 0.4, "#666666"
SMOOTHED, STEEP = 0.04, 0.15
"""as in `plot`, with values for curves that are compared at their end"""
TOKEN_UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
TIME_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))
MIN_UNITS = 2
"""an axis is labelled in the largest unit of which it shows at least this many"""


@dataclass(frozen=True)
class ModelRow:
    """The result of one model."""

    model: str
    parameters: int
    state: str
    """finished or failed"""
    train_loss: float | None = None
    """of the last step"""
    val_loss: float | None = None
    hellaswag: float | None = None
    """acc_norm"""
    tokens: int | None = None
    tokens_per_s: float | None = None
    """median over the steps"""
    peak_memory_gb: float | None = None
    train_s: float | None = None
    """sum over the steps, without the time between them"""

    @classmethod
    def of(
        cls, model: str, parameters: int, state: str, result: Mapping[str, Any] | None
    ) -> ModelRow:
        """`result` is the return value of the training, or None if it has not finished."""
        known = {item.name for item in fields(cls)} & set(result or {})
        return cls(model, parameters, state, **{name: (result or {})[name] for name in known})


def best(rows: Sequence[ModelRow]) -> ModelRow | None:
    """The row with the lowest validation loss; of the training loss if no model was validated."""
    for loss in ("val_loss", "train_loss"):
        if validated := [row for row in rows if getattr(row, loss) is not None]:
            return min(validated, key=attrgetter(loss))
    return None


def models_table(rows: Sequence[ModelRow]) -> Table:
    """The table of models; the best loss is bold and marked with a star."""
    columns = ("train loss", "val loss", "tokens/s", "peak memory", "time")
    built = table("Models", "model", "parameters", *columns)
    winner = best(rows) if len(rows) > 1 else None
    for row in rows:
        by_val = row is winner and row.val_loss is not None
        built.add_row(
            row.model,
            f"{row.parameters / 1e6:.1f} M",
            _loss(row.train_loss, marked=row is winner and not by_val),
            _loss(row.val_loss, marked=by_val),
            "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "-" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.2f} GB",
            row.state if row.train_s is None else duration(row.train_s),
        )
    return built


def _loss(value: float | None, marked: bool) -> Text:
    if value is None:
        return Text("-  ")
    return Text(f"{value:.4f} *", style="bold green") if marked else Text(f"{value:.4f}  ")


def write_csv(rows: Sequence[ModelRow], path: Path) -> None:
    """Writes the table with full precision, for other tools."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(ModelRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_files.write_text(path, text.getvalue())


def draw(runs: Mapping[str, LoggedRun], batch_tokens: int) -> Figure:
    """Losses of each model against tokens and against the time of its steps.

    More than `figures.MANY` models are a band, from which the best stand out.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is ever opened

    runs = {name: run for name, run in runs.items() if run.steps or run.val_losses}
    if not runs:
        return figures.empty("no model has a logged step yet")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    tokens_axes, time_axes = figure.subplots(1, 2, sharey=True)
    places = figures.highlighted([_last_loss(run) for run in runs.values()])
    names = [list(runs)[place] for place in places]
    colors = dict(zip(names, figures.distinct_colors(len(names)), strict=True))
    over_tokens = _draw_panel(
        tokens_axes, runs, colors, TOKEN_UNITS, lambda _, steps: steps * float(batch_tokens)
    )
    _draw_panel(time_axes, runs, colors, TIME_UNITS, seconds_at)
    if shown := plot.loss_range(over_tokens, STEEP):
        tokens_axes.set_ylim(*shown)
    tokens_axes.set_title("loss against tokens", loc="left")
    time_axes.set_title("loss against training time", loc="left")
    tokens_axes.set_ylabel("loss")
    _add_legend(figure, runs, colors)
    return figure


def seconds_at(run: LoggedRun, steps: Numbers) -> Numbers:
    """Training time in seconds at each of `steps`: the sum of the step times up to it."""
    known = [run.first_step, *run.steps]
    passed = np.cumsum([0.0, *(item.elapsed_s for item in run.steps.values())])
    seconds: Numbers = np.interp(steps, known, passed)
    return seconds


def _draw_panel(
    axes: Axes,
    runs: Mapping[str, LoggedRun],
    colors: Mapping[str, str],
    units: Sequence[tuple[float, str]],
    x_of: Callable[[LoggedRun, Numbers], Numbers],
) -> list[Curve]:
    """Draws smoothed training losses and validation losses over `x_of(run, steps)`."""

    def curve(name: str, losses: Mapping[int, float]) -> Curve:
        xs = x_of(runs[name], np.array(list(losses), float))
        return Curve(name, colors.get(name), xs / unit, np.array([*losses.values()]))

    reach = max(float(x_of(run, np.array([_last_step(run)], float))[0]) for run in runs.values())
    unit, word = _unit(reach, units)
    trained = [curve(name, _train_losses(run)) for name, run in runs.items() if run.steps]
    validated = [curve(name, run.val_losses) for name, run in runs.items() if run.val_losses]
    if len(colors) < len(runs):
        figures.draw_band(axes, validated or trained)
    for item in (item for item in trained if item.color):
        axes.plot(item.steps, item.values, color=item.color, alpha=FAINT, linewidth=1.1)
    few = max((len(item.values) for item in validated), default=0) <= plot.MARKED
    for item in (item for item in validated if item.color):
        marker = "o" if few else None
        axes.plot(item.steps, item.values, color=item.color, marker=marker, markersize=3.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(word)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return [*trained, *validated]


def _unit(reach: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which an axis up to `reach` shows at least MIN_UNITS."""
    small = "seconds" if units is TIME_UNITS else "tokens"
    return next((item for item in units if reach >= MIN_UNITS * item[0]), (1, small))


def _add_legend(figure: Figure, runs: Mapping[str, LoggedRun], colors: Mapping[str, str]) -> None:
    """Adds a legend with each model's last loss, and the line styles."""
    from matplotlib.lines import Line2D

    short = dict(zip(runs, figures.short_names(list(runs)), strict=True))
    lost = {name: _last_loss(runs[name]) for name in colors}
    labels = [
        f"{short[name]}: {loss:.3f}" if loss < 1000 else f"{short[name]}: {loss:.3g}"
        for name, loss in lost.items()
    ]
    entries = figures.line_entries(labels, list(colors.values()))
    if any(run.val_losses for run in runs.values()):
        entries.append((Line2D([], [], marker="o", markersize=3.5, color=GREY), "validation"))
    entries.append((Line2D([], [], alpha=FAINT, linewidth=1.1, color=GREY), "training"))
    if len(colors) < len(runs):
        entries += figures.band_entries(len(runs), "models")
    figures.add_legend(figure, entries)


def _last_step(run: LoggedRun) -> int:
    return max([run.first_step, *run.steps, *run.val_losses])


def _last_loss(run: LoggedRun) -> float:
    """The last validation loss, else the last smoothed training loss; NaN if there is none."""
    return next(reversed([*_train_losses(run).values(), *run.val_losses.values()]), math.nan)


def _train_losses(run: LoggedRun) -> dict[int, float]:
    """The loss at each step, smoothed."""
    losses = np.array([item.loss for item in run.steps.values()])
    return dict(zip(run.steps, plot.smoothed(losses, SMOOTHED).tolist(), strict=True))


def logged(folder: Path, names: Sequence[str]) -> dict[str, LoggedRun]:
    """The newest logged run of each training in `folder` that has at least one step."""
    found: dict[str, LoggedRun] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            runs = [run for run in log_reader.read_runs(folder / name / "log.txt") if run.steps]
            found |= {name: runs[-1]} if runs else {}
    return found

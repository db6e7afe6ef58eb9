"""The report of a search: a table, pictures, a CSV file of the best trials, an HTML page."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import base64
import csv
import functools
import html
import io
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gpt2.base import atomic_files
from gpt2.base.text import four_digits, table
from gpt2.config.flops import duration
from gpt2.experiments.search import space, study, trial
from gpt2.inspection import figures, plot
from gpt2.inspection.figures import GREY, RED
from gpt2.metrics.log_reader import LoggedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "summary"
COMPARISON, HISTORY = "all_trials_comparison.png", "optimization_history.png"
RELATIONSHIPS = "hyperparameter_relationships.png"
TOP, PAGE = "top5_trials.csv", "report.html"
BEST = 5
BLUE = "#1f77b4"
OUTCOMES: Any = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
LOG_RATIO = 20
"""an axis is logarithmic if the largest value is more than this many times the smallest"""
MAX_COLUMNS = 4
"""plots of relationships side by side"""
PANEL_INCHES, TITLE_LETTERS = 3.4, 28
"""width of such a plot, and the letters of a line of its title"""
OUTLIER = 3
"""a loss this many times the middle half's width above it is not drawn"""
HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; }} pre {{ background: #f3f3f3; padding: 1em; white-space: pre-wrap; }}
td {{ padding: .2em .8em; text-align: right; }} tr:nth-child(even) {{ background: #f6f6f6; }}
</style>
<h1>Search {title}</h1>
<h2>Command that trains the best trial in full</h2><pre>{command}</pre>
{pictures}
<h2>All trials</h2>
<table>{rows}</table>
</html>
"""


def loss_of(item: FrozenTrial) -> float:
    """The value of a finished trial, else its lowest finite validation loss; NaN without one."""
    if item.state == TrialState.COMPLETE and item.value is not None:
        return item.value
    return min(filter(math.isfinite, item.intermediate_values.values()), default=math.nan)


def train_s(item: FrozenTrial) -> float | None:
    """The training time in seconds, without interruptions if the training has measured it."""
    took_s: float | None = item.user_attrs.get("result", {}).get("train_s")
    if took_s is None and item.duration is not None:
        return item.duration.total_seconds()
    return took_s


def option_names(trials: Sequence[FrozenTrial]) -> list[str]:
    """The options for which at least one trial has a value."""
    return list(dict.fromkeys(name for item in trials for name in item.params))


def best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials, those with the lowest losses first."""
    finished = [item for item in trials if item.state == TrialState.COMPLETE]
    return sorted(finished, key=lambda item: (item.value, item.number))


def best_trials_table(trials: Sequence[FrozenTrial], out: Console) -> Table:
    """The table of the best trials, with a column for each option, or a single one for all options
    if the console is too narrow."""
    names = option_names(trials)
    counts = Counter(item.state.name for item in trials)
    title = f"The best of {counts['COMPLETE']} finished and {counts['PRUNED']} pruned trials"
    rows = [cells(item, names) for item in best_first(trials)[:BEST]]
    wide = table(title, "job", "val loss", *names, "time")
    for row in rows:
        wide.add_row(*row)
    if Measurement.get(out, out.options.update(width=10_000), wide).maximum <= out.width:
        return wide
    narrow = table(title, "job", "val loss", "time", "values")
    narrow.columns[-1].no_wrap, narrow.columns[-1].justify = False, "left"
    for job, loss, *values, took in rows:
        narrow.add_row(job, loss, took, " ".join(map("=".join, zip(names, values, strict=True))))
    return narrow


def cells(item: FrozenTrial, names: Sequence[str]) -> list[str]:
    """The row of a trial in a table: its name, loss, values of options, and time."""
    loss, seconds = loss_of(item), train_s(item)
    return [
        trial.name_of(item.number),
        "-" if math.isnan(loss) else f"{loss:.4f}",
        *(cell(space.used_values(item).get(name)) for name in names),
        "-" if seconds is None else duration(seconds),
    ]


def cell(value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return four_digits(value) if type(value) is int else str(value)


def write(optuna_study: Study, folder: Path, command: str | None) -> list[Path]:
    """Writes the report to `summary` in `folder`; returns its files, none if there is no result.

    Raises ConfigError or OSError if a file cannot be written.
    """
    trials = optuna_study.get_trials(deepcopy=False)
    if not any(item.state.is_finished() or item.intermediate_values for item in trials):
        return []
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    names, best = option_names(trials), best_first(trials)[:BEST]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "trial", "val_loss", *names, "seconds", "folder"])
    for rank, item in enumerate(best, 1):
        values = map(space.used_values(item).get, names)
        location = study.location_of(optuna_study, item, folder)
        writer.writerow([rank, item.number, item.value, *values, train_s(item), location])
    atomic_files.write_text(target / TOP, text.getvalue())
    pictures = {
        COMPARISON: draw_comparison,
        HISTORY: draw_history,
        RELATIONSHIPS: draw_relationships,
    }
    for name, draw in pictures.items():
        figures.write(functools.partial(draw, optuna_study), target / name)
    paths = [target / name for name in pictures]
    atomic_files.write_text(target / PAGE, html_page(trials, folder.name, command, paths))
    return [target / TOP, *paths, target / PAGE]


def draw_comparison(study: Study) -> Figure:
    """The validation losses of each trial; of many, a band from which the best stand out."""
    curves = []
    for item in study.get_trials(deepcopy=False):
        if item.intermediate_values:
            curves.append(LoggedRun(trial.name_of(item.number), 0))
            curves[-1].val_losses.update(sorted(item.intermediate_values.items()))
    return plot.draw(curves)


def draw_history(study: Study) -> Figure:
    """The loss of each finished trial, and the lowest one so far, drawn by Optuna."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return figures.empty("no trial has finished yet")
    import matplotlib
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_optimization_history

    matplotlib.use("agg")  # no window is ever opened
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        axes = plot_optimization_history(study, target_name="validation loss")
    figure = axes.get_figure(root=True)
    assert figure is not None
    pyplot.close(figure)
    figure.set_layout_engine("constrained")
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if legend := axes.get_legend():
        legend.remove()
    figures.add_legend(figure, entries)
    figures.use_whole_numbers(axes)
    _limit_losses(axes, finished)
    return figure


def draw_relationships(study: Study) -> Figure:
    """Validation loss against each searched value."""
    from matplotlib.figure import Figure

    trials = [item for item in study.get_trials(deepcopy=False) if math.isfinite(loss_of(item))]
    names = option_names(trials)
    if not names:
        return figures.empty("no trial has a validation loss yet")
    finished = best_first(trials)
    colors = {item.number: BLUE if item in finished else GREY for item in trials}
    colors |= {item.number: RED for item in finished[:1]}
    trials.sort(key=lambda item: colors[item.number] == RED)  # drawn above the others
    columns = min(MAX_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    rises = []
    for name, axes in zip(names, grid.flat, strict=False):
        drawn = [item for item in trials if name in item.params]
        places, rise = _place(axes, [space.used_values(item)[name] for item in drawn])
        shades = [colors[item.number] for item in drawn]
        axes.scatter(places, [loss_of(item) for item in drawn], c=shades, s=22, linewidths=0)
        title = figures.wrapped(name, TITLE_LETTERS)
        axes.set_title(title, loc="left")
        rises.append(rise + 1.2 * figures.LINE_INCHES * title.count("\n"))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        _limit_losses(axes, trials)
    figure.set_size_inches(PANEL_INCHES * columns, 0.2 + lines * (2.9 + max(rises)))
    counts = f"finished ({len(finished)})", f"not finished ({len(trials) - len(finished)})"
    figures.add_legend(figure, figures.line_entries(["best", *counts], [RED, BLUE, GREY]))
    return figure


def _limit_losses(axes: Axes, trials: Sequence[FrozenTrial]) -> None:
    """Labels the y axis, and ends it below outliers; the label has their number."""
    losses = [loss_of(item) for item in trials]
    lower, upper = np.quantile(losses, (0.25, 0.75))
    edge = upper + OUTLIER * (upper - lower)
    beyond = sum(loss > edge for loss in losses) if lower < upper else 0
    if beyond:
        axes.set_ylim(top=edge)
    above = f" ({beyond} above {figures.plain_number(float(f'{edge:.3g}'))})" if beyond else ""
    axes.set_ylabel(f"validation loss{above}")


def _place(axes: Axes, values: Sequence[Any]) -> tuple[Sequence[float], float]:
    """Prepares the x axis for the values of an option.

    Returns the place of each value, and the height in inches that the labels need.
    """
    from matplotlib.ticker import MaxNLocator

    is_number = [type(value) in (int, float) for value in values]
    if not all(is_number):
        pairs = zip(is_number, values, strict=True)
        in_order = sorted(pairs, key=lambda pair: (0, pair[1]) if pair[0] else (1, str(pair[1])))
        labels = list(dict.fromkeys(cell(value) for _, value in in_order))
        axes.set_xlim(-0.5, len(labels) - 0.5)
        rise = figures.label_categories(axes, labels, PANEL_INCHES - 0.9)
        return [labels.index(cell(value)) for value in values], rise
    if min(values) > 0 and max(values) > LOG_RATIO * min(values):
        axes.set_xscale("log")
    else:
        whole = all(isinstance(value, int) for value in values)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=whole, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda value, _: figures.plain_number(value))
    return values, 0.0


def html_page(
    trials: Sequence[FrozenTrial], title: str, command: str | None, pictures: Sequence[Path]
) -> str:
    """A self-contained page: the pictures are embedded."""
    names = option_names(trials)
    others = [item for item in trials if item.state != TrialState.COMPLETE]
    rows = [["trial", "val loss", *names, "time", "state"]]
    for item in [*best_first(trials), *others]:
        state = item.state.name
        rows.append([*cells(item, names), OUTCOMES.get(state, state.lower())])
    images = (base64.b64encode(path.read_bytes()).decode() for path in pictures)
    return HTML.format(
        title=html.escape(title),
        command=html.escape(command or "None: the best trial has no files in this folder."),
        pictures="\n".join(f'<img src="data:image/png;base64,{image}">' for image in images),
        rows="\n".join("<tr><td>" + "<td>".join(map(html.escape, row)) for row in rows),
    )

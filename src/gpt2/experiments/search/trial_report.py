"""The report of a search: a table, two pictures, a CSV file of the best trials, an HTML page."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import base64
import csv
import html
import io
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gpt2.base import atomic_files
from gpt2.base.text import four_digits, table
from gpt2.config.flops import duration
from gpt2.experiments.search import ownership, trial
from gpt2.inspection import figures, plot
from gpt2.inspection.figures import GREY, RED, Curve, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "summary"
COMPARISON, RELATIONSHIPS = "all_trials_comparison.png", "hyperparameter_relationships.png"
TOP, PAGE = "top5_trials.csv", "report.html"
BEST = 5
USED = "used_"
"""attributes with this prefix: the value that a trial used in place of the drawn one"""
BLUE = "#1f77b4"
STATES = {"PRUNED": ("pruned", GREY), "COMPLETE": ("finished", BLUE)}
"""how trials in a state are called and coloured"""
LOG_RATIO = 20
"""an axis is logarithmic if the largest value is more than this many times the smallest"""
MAX_COLUMNS = 4
"""plots of relationships side by side"""
PANEL_INCHES, TITLE_LETTERS = 3.4, 28
"""width of such a plot, and the letters of a line of its title"""
OUTLIER = 3
"""a loss this many times the middle half's width above it is drawn at the edge of the picture"""


@dataclass(frozen=True)
class TrialRow:
    """A trial of the study."""

    number: int
    state: str
    value: float | None
    """lowest validation loss"""
    values: Mapping[str, Any]
    losses: Mapping[int, float]
    """validation losses by step"""
    took_s: float | None
    """training time in seconds, without interruptions"""
    folder: str
    """its folder, with the host in front if an owner in another folder ran it"""
    reason: str = ""

    @property
    def is_reportable(self) -> bool:
        """Whether it has ended, or has a validation."""
        return self.state in ("COMPLETE", "PRUNED", "FAIL") or bool(self.losses)

    @property
    def outcome(self) -> str:
        return {"COMPLETE": "finished", "FAIL": "failed"}.get(self.state, self.state.lower())


def used_values(item: FrozenTrial) -> dict[str, Any]:
    """The values that a trial trained with: the drawn ones, or those that replaced them."""
    return {name: item.user_attrs.get(USED + name, value) for name, value in item.params.items()}


def trial_rows(study: Study, folder: Path) -> list[TrialRow]:
    """The trials of a study in the order of their numbers."""
    return [
        TrialRow(
            item.number,
            item.state.name,
            item.value if item.state == TrialState.COMPLETE else lowest_loss(item),
            used_values(item),
            dict(sorted(item.intermediate_values.items())),
            _train_s(item),
            ownership.location_of(study, item, folder),
            item.user_attrs.get("reason", ""),
        )
        for item in study.get_trials(deepcopy=False)
    ]


def _train_s(item: FrozenTrial) -> float | None:
    took_s: float | None = item.user_attrs.get("result", {}).get("train_s")
    if took_s is None and item.duration is not None:
        return item.duration.total_seconds()
    return took_s


def option_names(rows: Sequence[TrialRow]) -> list[str]:
    """The options for which at least one trial has a value."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def lowest_loss(item: FrozenTrial) -> float | None:
    """The lowest finite validation loss of a trial; None if there is none."""
    return min(filter(math.isfinite, item.intermediate_values.values()), default=None)


def top(rows: Sequence[TrialRow], count: int = BEST) -> list[TrialRow]:
    """The finished trials with the lowest losses, the best first."""
    finished = [row for row in rows if row.state == "COMPLETE" and row.value is not None]
    return sorted(finished, key=lambda row: (row.value, row.number))[:count]


def best_trials_table(rows: Sequence[TrialRow], out: Console) -> Table:
    """The table of the best trials, with a column for each option, or a single one for all options
    if the console is too narrow."""
    names = option_names(rows)
    ended = {word: sum(row.state == word for row in rows) for word in ("COMPLETE", "PRUNED")}
    title = f"The best of {ended['COMPLETE']} finished and {ended['PRUNED']} pruned trials"
    built = table(title, "job", "val loss", *names, "time")
    narrow = table(title, "job", "val loss", "time", "values")
    narrow.columns[-1].no_wrap, narrow.columns[-1].justify = False, "left"
    for row in top(rows):
        took = "-" if row.took_s is None else duration(row.took_s)
        values = [cell(row.values.get(name)) for name in names]
        beginning = (trial.name_of(row.number), f"{row.value:.4f}")
        built.add_row(*beginning, *values, took)
        pairs = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        narrow.add_row(*beginning, took, " ".join(pairs))
    needed = Measurement.get(out, out.options.update(width=10_000), built).maximum
    return built if needed <= out.width else narrow


def cell(value: Any) -> str:
    """A value as the tables show it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return four_digits(value)
    return str(value)


def write(rows: Sequence[TrialRow], folder: Path, command: str | None) -> list[Path]:
    """Writes the report to `summary` in `folder`; returns its files.

    Raises ConfigError or OSError if a file cannot be written.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    _write_csv(top(rows), target / TOP)
    written = [target / TOP]
    if any(row.losses for row in rows):
        figures.write(lambda: draw_comparison(rows), target / COMPARISON)
        written.append(target / COMPARISON)
    if any(row.value is not None and row.values for row in rows):
        figures.write(lambda: draw_relationships(rows), target / RELATIONSHIPS)
        written.append(target / RELATIONSHIPS)
    pictures = [path for path in written if path.suffix == ".png"]
    atomic_files.write_text(target / PAGE, html_page(rows, folder.name, command, pictures))
    return [*written, target / PAGE]


def _write_csv(rows: Sequence[TrialRow], path: Path) -> None:
    text = io.StringIO()
    names = option_names(rows)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "trial", "val_loss", *names, "seconds", "folder"])
    for rank, row in enumerate(rows, 1):
        values = [row.values.get(name) for name in names]
        writer.writerow([rank, row.number, row.value, *values, row.took_s, row.folder])
    atomic_files.write_text(path, text.getvalue())


def draw_comparison(rows: Sequence[TrialRow]) -> Figure:
    """Validation curves of all trials, and the lowest loss so far over the trials."""
    from matplotlib.figure import Figure  # not pyplot: no window is ever opened

    validated = [row for row in rows if any(map(math.isfinite, row.losses.values()))]
    if not validated:
        return figures.empty("no trial has a validation loss yet")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, progress = figure.subplots(1, 2)
    _draw_curves(curves, validated, {row.number for row in top(rows, 1)})
    ended = [row for row in rows if row.state in STATES and _has_loss(row)]
    edge = _edge(ended)
    _draw_progress(progress, ended, edge)
    entries = _entries(rows, edge)
    if len(validated) > figures.MANY:
        entries += figures.band_entries(len(validated), "curves", BLUE)
    figures.add_legend(figure, entries)
    return figure


def _draw_curves(axes: Axes, rows: Sequence[TrialRow], best: Container[int]) -> None:
    """The validation losses of each trial; of many, a band with the curve of the best trial."""
    curves = [
        Curve(
            trial.name_of(row.number),
            RED if row.number in best else STATES.get(row.state, ("", GREY))[1],
            np.array(list(row.losses), float),
            np.array(list(row.losses.values()), float),
        )
        for row in sorted(rows, key=lambda row: row.number in best)
    ]
    shown = curves
    if len(curves) > figures.MANY:
        figures.draw_band(axes, curves, BLUE)
        shown = [curve for curve in curves if curve.color == RED]
    for curve in shown:
        marker = "o" if len(curve.values) <= plot.MARKED else None
        alpha = 1.0 if curve.color == RED else 0.55
        style: dict[str, Any] = {"color": curve.color, "alpha": alpha, "marker": marker}
        axes.plot(curve.steps, curve.values, markersize=3, **style)
    if curves and (limits := plot.loss_range(curves)):
        axes.set_ylim(*limits)
    figures.use_whole_numbers(axes)
    axes.set_title("validation loss of each trial", loc="left")
    axes.set_xlabel("step")


def _has_loss(row: TrialRow) -> bool:
    return row.value is not None and math.isfinite(row.value)


def _edge(rows: Sequence[TrialRow]) -> float:
    """The loss above which a trial is drawn at the edge; infinite without outliers."""
    if not rows:
        return math.inf
    lower, upper = np.quantile([row.value for row in rows], (0.25, 0.75))
    edge = float(upper + OUTLIER * (upper - lower))
    return edge if lower < upper else math.inf


def _draw_losses(
    axes: Axes, rows: Sequence[TrialRow], places: Sequence[float], edge: float
) -> None:
    """A dot for each trial, over its place; the best in red, those above the edge as triangles."""
    best = {row.number for row in top(rows, 1)}
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, place in zip(rows, places, strict=True):
        color = RED if row.number in best else STATES.get(row.state, ("", GREY))[1]
        loss = row.value if row.value is not None else math.nan
        groups.setdefault((color, "^" if loss > edge else "o"), []).append((place, min(loss, edge)))
    for (color, marker), points in groups.items():
        order = 3 if color == RED else 2
        style: dict[str, Any] = {"color": color, "marker": marker, "zorder": order}
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=22, alpha=0.8, linewidths=0, **style)


def _draw_progress(axes: Axes, ended: Sequence[TrialRow], edge: float) -> None:
    """The loss of each trial by its number, and the lowest loss so far."""
    _draw_losses(axes, ended, [row.number for row in ended], edge)
    lowest, line = math.inf, []
    finished = [row for row in ended if row.state == "COMPLETE"]
    for row in finished:
        lowest = min(lowest, math.inf if row.value is None else row.value)
        line.append(min(lowest, edge))
    if finished:
        numbers = [*(row.number for row in finished), ended[-1].number]
        axes.step(numbers, [*line, line[-1]], where="post", color=RED)
    figures.use_whole_numbers(axes)
    axes.set_title("lowest validation loss over the trials", loc="left")
    axes.set_xlabel("trial")


def _entries(rows: Sequence[TrialRow], edge: float) -> list[Entry]:
    """The lines of the legend: the states with their counts, and losses beyond the edge."""
    from matplotlib.lines import Line2D

    counts = {state: sum(row.state == state for row in rows) for state in ("COMPLETE", "PRUNED")}
    names = {
        "best": RED,
        f"finished ({counts['COMPLETE']})": BLUE,
        f"pruned ({counts['PRUNED']})": GREY,
    }
    entries = figures.line_entries(list(names), list(names.values()))
    if beyond := sum(row.value > edge for row in rows if row.value is not None):
        mark = Line2D([], [], color="#666666", marker="^", linestyle="")
        entries.append((mark, f"above {figures.plain_number(float(f'{edge:.3g}'))} ({beyond})"))
    return entries


def draw_relationships(rows: Sequence[TrialRow]) -> Figure:
    """Validation loss against each searched value."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if _has_loss(row)]
    names = option_names(shown)
    if not names:
        return figures.empty("no trial has a validation loss yet")
    columns = min(MAX_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    edge = _edge(shown)
    rises = [
        _draw_relationship(axes, name, [row for row in shown if name in row.values], edge)
        for name, axes in zip(names, grid, strict=False)
    ]
    for row in range(lines):
        grid[row * columns].set_ylabel("validation loss")
    figure.set_size_inches(PANEL_INCHES * columns, 0.2 + lines * (2.9 + max(rises)))
    figures.add_legend(figure, _entries(shown, edge))
    return figure


def _draw_relationship(axes: Axes, name: str, shown: Sequence[TrialRow], edge: float) -> float:
    """Draws losses over the values of an option; returns the inches that its texts need."""
    from matplotlib.ticker import MaxNLocator

    values = [row.values.get(name) for row in shown]
    numbers = [value for value in values if _is_number(value)]
    numbers_first = sorted(values, key=lambda value: (not _is_number(value), _order(value)))
    labels = list(dict.fromkeys(cell(value) for value in numbers_first))
    are_numbers = len(numbers) == len(values)
    places: list[float] = (
        numbers if are_numbers else [labels.index(cell(value)) for value in values]
    )
    _draw_losses(axes, shown, places, edge)
    rise = 0.0
    if not are_numbers:
        rise = figures.label_categories(axes, labels, PANEL_INCHES - 0.9)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif min(numbers) > 0 and max(numbers) > LOG_RATIO * min(numbers):
        axes.set_xscale("log")
    else:
        whole = all(isinstance(value, int) for value in numbers)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=whole, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda value, _: figures.plain_number(value))
    title = figures.wrapped(name, TITLE_LETTERS)
    axes.set_title(title, loc="left")
    return rise + 1.2 * figures.LINE_INCHES * title.count("\n")


def _order(value: Any) -> tuple[float, str]:
    return (value, "") if _is_number(value) else (0, str(value))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def html_page(
    rows: Sequence[TrialRow], title: str, command: str | None, pictures: Sequence[Path]
) -> str:
    """A self-contained page: the pictures are embedded."""
    images = "\n".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    names = option_names(rows)
    head = "".join(f"<th>{html.escape(name)}" for name in ("trial", "state", "val loss", *names))
    order = [*top(rows, len(rows)), *(row for row in rows if row.state != "COMPLETE")]
    body = "\n".join(f"<tr>{_cells(row, names)}" for row in order)
    shown = (
        f"<h2>Command that trains the best trial in full</h2><pre>{html.escape(command)}</pre>"
        if command
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; }} pre {{ background: #f3f3f3; padding: 1em; white-space: pre-wrap; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .2em .8em; text-align: right; }}
tr:nth-child(even) {{ background: #f6f6f6; }}
</style>
<h1>Search {html.escape(title)}</h1>
{shown}
{images}
<h2>All trials</h2>
<table><tr>{head}
{body}
</table>
</html>
"""


def _cells(row: TrialRow, names: Sequence[str]) -> str:
    value = "-" if row.value is None else f"{row.value:.4f}"
    texts = [str(row.number), row.outcome, value, *(cell(row.values.get(name)) for name in names)]
    return "".join(f"<td>{html.escape(text)}" for text in texts)

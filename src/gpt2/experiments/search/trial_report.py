"""The report of a search: a table, two pictures, a CSV file of the best trials, an HTML page."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gpt2.base import atomic_files
from gpt2.base.text import four_digits, table
from gpt2.config.flops import duration
from gpt2.experiments.search import ownership, trial
from gpt2.inspection import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "summary"
COMPARISON, RELATIONSHIPS = "all_trials_comparison.png", "hyperparameter_relationships.png"
TOP, PAGE = "top5_trials.csv", "report.html"
BEST = 5
USED = "used_"
"""attributes with this prefix: the value that a trial used in place of the drawn one"""
GREY, BLUE, RED = "#9a9a9a", "#1f77b4", "#d62728"
LOG_RATIO = 20
"""an axis is logarithmic if the largest value is more than this many times the smallest"""
MAX_COLUMNS = 4
"""plots of relationships side by side"""


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
    """The lowest validation loss of a trial; None without validations."""
    return min(item.intermediate_values.values(), default=None)


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
        plot.write(lambda: draw_comparison(rows), target / COMPARISON)
        written.append(target / COMPARISON)
    if any(row.value is not None and row.values for row in rows):
        plot.write(lambda: draw_relationships(rows), target / RELATIONSHIPS)
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

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    curves, progress = figure.subplots(1, 2)
    best = {row.number for row in top(rows, 1)}
    for row in sorted(rows, key=lambda row: row.number in best):
        color = RED if row.number in best else BLUE if row.state == "COMPLETE" else GREY
        alpha = 1.0 if row.number in best else 0.55
        marker = "o" if len(row.losses) <= plot.MARKED else None
        style: dict[str, Any] = {"color": color, "alpha": alpha, "marker": marker}
        curves.plot(list(row.losses), list(row.losses.values()), markersize=3, **style)
    curves.set_title("validation loss of each trial", loc="left")
    curves.set_xlabel("step")
    _draw_progress(progress, rows)
    _add_legend(figure, rows)
    return figure


def _draw_progress(axes: Axes, rows: Sequence[TrialRow]) -> None:
    """The loss of each trial by its number, and the lowest loss so far."""
    from matplotlib.ticker import MaxNLocator

    ended = [row for row in rows if row.value is not None]
    for state, color in (("PRUNED", GREY), ("COMPLETE", BLUE)):
        shown = {row.number: row.value or math.nan for row in ended if row.state == state}
        axes.scatter(list(shown), list(shown.values()), s=22, color=color)
    lowest, line = math.inf, []
    finished = [row for row in ended if row.state == "COMPLETE"]
    for row in finished:
        lowest = min(lowest, row.value or math.inf)
        line.append(lowest)
    if finished:
        numbers = [*(row.number for row in finished), ended[-1].number]
        axes.step(numbers, [*line, lowest], where="post", color=RED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("lowest validation loss over the trials", loc="left")
    axes.set_xlabel("trial")


def _add_legend(figure: Figure, rows: Sequence[TrialRow]) -> None:
    from matplotlib.lines import Line2D

    counts = {state: sum(row.state == state for row in rows) for state in ("COMPLETE", "PRUNED")}
    names = {
        "best": RED,
        f"finished ({counts['COMPLETE']})": BLUE,
        f"pruned ({counts['PRUNED']})": GREY,
    }
    handles = [Line2D([], [], color=color, linewidth=2.5) for color in names.values()]
    figure.legend(handles, list(names), loc="outside upper left", ncols=len(names))


def draw_relationships(rows: Sequence[TrialRow]) -> Figure:
    """Validation loss against each searched value."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.value is not None]
    names = option_names(shown)
    columns = min(MAX_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.5 + 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, grid, strict=False):
        _draw_relationship(axes, name, [row for row in shown if name in row.values])
    for row in range(lines):
        grid[row * columns].set_ylabel("validation loss")
    _add_legend(figure, shown)
    return figure


def _draw_relationship(axes: Axes, name: str, shown: Sequence[TrialRow]) -> None:
    from matplotlib.ticker import MaxNLocator

    best = {row.number for row in top(shown, 1)}
    values = [row.values.get(name) for row in shown]
    numbers = [value for value in values if isinstance(value, int | float)]
    are_numbers = len(numbers) == len(values) and not any(isinstance(v, bool) for v in values)
    labels = sorted({str(value) for value in values})
    for row, value in zip(shown, values, strict=True):
        x: Any = value if are_numbers else labels.index(str(value))
        color = RED if row.number in best else BLUE if row.state == "COMPLETE" else GREY
        order = 3 if row.number in best else 2
        loss = row.value or math.nan
        axes.scatter([x], [loss], s=24, color=color, alpha=0.8, zorder=order)
    if not are_numbers:
        axes.set_xticks(range(len(labels)), labels)
    elif min(numbers) > 0 and max(numbers) > LOG_RATIO * min(numbers):
        axes.set_xscale("log")
    elif all(isinstance(value, int) for value in numbers):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(name, loc="left")


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

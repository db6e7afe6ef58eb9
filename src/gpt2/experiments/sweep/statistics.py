"""Statistics over seeds: mean, standard deviation and confidence interval, as table and plot."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from gpt2.base.text import table
from gpt2.experiments.grid import Point
from gpt2.experiments.results import JobResult
from gpt2.inspection import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
MAX_ROWS = 40
"""of more points, only the END_ROWS with the lowest means and as many with the highest are drawn"""
END_ROWS = 20
LABEL_LETTERS, AXES_INCHES = 44, 7.0
"""letters of a line of a label, and the width of the picture without labels"""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a metric over the seeds of one point of a grid."""

    count: int
    """seeds whose result has the metric as a finite number"""
    mean: float
    std: float | None
    """sample standard deviation (count - 1); None for a single value"""
    low: float | None
    high: float | None
    """`low` to `high` is the 95 % confidence interval of the mean (Student's t)"""

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics | None:
        """The statistics of the values, or None if there are none."""
        if not values:
            return None
        count, mean = len(values), statistics.fmean(values)
        if count == 1:
            return cls(count, mean, None, None, None)
        from scipy import stats  # half a second

        std = statistics.stdev(values)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)
        return cls(count, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class PointSummary:
    """The results of the seeds of one point."""

    point: Point
    finished: int
    failed: int
    values: dict[int, float]
    """seed -> value of the chosen metric"""
    metrics: dict[str, Statistics] = field(default_factory=dict)
    """statistics of every number that the jobs returned"""


def numbers(result: Any) -> dict[str, float]:
    """The numbers that a job returned by name; a single number is called `value`."""
    named = result if isinstance(result, Mapping) else {"value": result}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def missing_metric(results: Iterable[JobResult], metric: str) -> str:
    """Why results cannot be compared by the metric; empty if no job has finished."""
    returned = [item.result for item in results if item.state != "failed"]
    if not returned:
        return ""
    named = [item if isinstance(item, Mapping) else {"value": item} for item in returned]
    what = f"a finite {metric}" if any(metric in names for names in named) else metric
    known = sorted({name for item in returned for name in numbers(item)})
    others = f"; --metric may be one of {', '.join(known)}" if known else ""
    return f"No result has {what}{others}"


def summarize(
    points: Sequence[Point], results: Iterable[JobResult], metric: str
) -> list[PointSummary]:
    """The results of each point; the `values` of a result are its point and seed."""
    by_point: dict[str, list[JobResult]] = {str(point): [] for point in points}
    for item in results:
        point = {name: value for name, value in item.values.items() if name != "seed"}
        by_point.setdefault(str(point), []).append(item)
    return [_summarize(point, by_point[str(point)], metric) for point in points]


def _summarize(point: Point, results: list[JobResult], metric: str) -> PointSummary:
    finished = [item for item in results if item.state != "failed"]
    found = {item.values["seed"]: numbers(item.result) for item in finished}
    names = dict.fromkeys(name for values in found.values() for name in values)
    collected = {
        name: Statistics.of([values[name] for values in found.values() if name in values])
        for name in names
    }
    return PointSummary(
        point,
        len(finished),
        len(results) - len(finished),
        {seed: values[metric] for seed, values in sorted(found.items()) if metric in values},
        {name: item for name, item in collected.items() if item is not None},
    )


def points_table(summaries: Sequence[PointSummary], metric: str) -> Table:
    """The table of points: a column for each name of the grid, and statistics of the metric."""
    names = list(summaries[0].point)
    built = table(f"{metric} over seeds", *names, "seeds", "failed", "mean", "std", "95 % interval")
    for item in summaries:
        built.add_row(
            *(str(item.point[name]) for name in names),
            _seeds_cell(item, metric),
            f"{item.failed or '-'}",
            *_cells(item.metrics.get(metric)),
        )
    return built


def draw(summaries: Sequence[PointSummary], metric: str) -> Figure:
    """A row for each point: its seeds as dots, and above them their mean with its interval.

    Of more than MAX_ROWS points the picture has the lowest and the highest means, in order, and one
    row for all between them.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is ever opened

    shown = [item for item in summaries if any(map(math.isfinite, item.values.values()))]
    if not shown:
        return figures.empty(f"no point has a finite {figures.shortened(metric)}")
    rows: list[Sequence[PointSummary]] = [[item] for item in shown]
    if len(shown) > MAX_ROWS:
        order = sorted(shown, key=lambda item: item.metrics[metric].mean)
        between = order[END_ROWS:-END_ROWS]
        low, high = order[:END_ROWS], order[-END_ROWS:]
        rows = [*([item] for item in low), between, *([item] for item in high)]
    labels = _labels(rows)
    lines = max(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.splitlines())
    words = (
        f"{metric} over {max(len(item.values) for item in shown)} seeds",
        f"{metric}: mean with its 95 % interval, and each seed",
    )
    title, caption = (figures.wrapped(text, int(10 * AXES_INCHES) - 10) for text in words)
    row_inches = max(0.42, 0.12 + figures.LINE_INCHES * lines)
    height = 1.4 + row_inches * max(2, len(rows))
    height += figures.LINE_INCHES * (1.2 * title.count("\n") + caption.count("\n"))
    width = AXES_INCHES + figures.LETTER_INCHES * longest
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for row, items in enumerate(rows):
        _draw_row(axes, row, items, metric)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first point at the top
    axes.grid(axis="y", visible=False)
    figures.use_few_ticks(axes)
    axes.set_xlabel(caption)
    axes.set_title(title, loc="left")
    return figure


def _draw_row(axes: Axes, row: int, items: Sequence[PointSummary], metric: str) -> None:
    color = f"C{row % 10}"
    if len(items) > 1:
        means = [item.metrics[metric].mean for item in items]
        axes.plot([min(means), max(means)], [row] * 2, color=figures.GREY, linewidth=6, alpha=0.5)
        return
    values = list(items[0].values.values())
    axes.scatter(values, [row + 0.16] * len(values), s=14, color=color, alpha=0.45, linewidths=0)
    found = items[0].metrics[metric]
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [row - 0.1] * 2, color=color, linewidth=2.4)
    axes.plot([found.mean], [row - 0.1], "D", color=color, markersize=6)


def _labels(rows: Sequence[Sequence[PointSummary]]) -> list[str]:
    """The label of each row: the values in which its point differs, or how many points it has."""
    points = [items[0].point for items in rows if len(items) == 1]
    names = dict.fromkeys(name for point in points for name in point)
    differing = [name for name in names if len({str(point.get(name)) for point in points}) > 1]
    labels = []
    for items in rows:
        point = items[0].point
        known = [name for name in differing or names if name in point]
        text = ", ".join(f"{name}={_text(point[name])}" for name in known) or "all seeds"
        text = f"means of {len(items):,} points" if len(items) > 1 else text
        labels.append(figures.wrapped(text, LABEL_LETTERS))
    return labels


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _seeds_cell(item: PointSummary, metric: str) -> str:
    """`8`, or `7 of 8` if one of the finished seeds has no finite number."""
    count = item.metrics[metric].count if metric in item.metrics else 0
    return f"{item.finished}" if count == item.finished else f"{count} of {item.finished}"


def _cells(found: Statistics | None) -> tuple[str, str, str]:
    """Mean, standard deviation and interval, rounded to three digits of the deviation."""
    if found is None:
        return "-", "-", "-"
    if found.std is None or found.low is None or found.high is None:
        return f"{found.mean:.5g}", "-", "-"
    exponent = math.floor(math.log10(found.std)) if found.std > 0 else -3
    digits = min(max(0, 2 - exponent), 9)
    interval = f"{found.low:.{digits}f} to {found.high:.{digits}f}"
    return f"{found.mean:.{digits}f}", f"{found.std:.{digits}f}", interval

"""Statistics over seeds: mean, standard deviation and confidence interval, as table and plot."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from gpt2.base.text import counted, table
from gpt2.experiments import grid
from gpt2.experiments.grid import Point
from gpt2.experiments.results import JobResult
from gpt2.inspection import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
MAX_ROWS = 40
"""more points than this are drawn in the order of their means, and only some have a label"""
LABEL_LETTERS = 60
"""a longer label of a point is shortened"""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a metric over the seeds of one point of a grid."""

    count: int
    """seeds whose result has the metric as a finite number"""
    mean: float
    std: float | None = None
    """sample standard deviation (count - 1)"""
    low: float | None = None
    high: float | None = None
    """`low` to `high` is the 95 % confidence interval of the mean (Student's t). All three are None
    for a single value, and beyond the range of floats"""

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics:
        count, mean = len(values), statistics.mean(map(float, values))
        if count == 1:
            return cls(count, mean)
        from scipy import stats  # half a second

        try:
            std = statistics.stdev(values)
        except OverflowError:
            std = math.inf
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)
        if math.isinf(abs(mean) + half):
            return cls(count, mean)
        return cls(count, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class PointSummary:
    """The results of the seeds of one point."""

    point: Point
    finished: int
    failed: int
    values: dict[int, float]
    """seed -> value of the chosen metric"""
    metrics: dict[str, Statistics]
    """statistics of every number that the jobs returned"""


MakeTable = Callable[[Sequence[PointSummary], str], RenderableType]
MakeFigure = Callable[[Sequence[PointSummary], str], "Figure"]
"""makes the table and the picture of the points, for a metric"""


def default_metric(results: Iterable[JobResult]) -> str:
    """The name of the only number that the results have; `value` if they have none or several."""
    names = {name for item in results for name in item.numbers}
    return names.pop() if len(names) == 1 else "value"


def missing_metric(results: Iterable[JobResult], metric: str) -> str:
    """Why no result can be compared by the metric."""
    known = sorted({name for item in results for name in item.numbers})
    others = f"; --metric may be one of {', '.join(known)}" if known else ""
    return f"No result has a finite {metric}{others}"


def summarize(
    points: Sequence[Point], results: Iterable[JobResult], metric: str
) -> list[PointSummary]:
    """The results of each point; the `values` of a result are its point and seed."""
    by_point: dict[str, list[JobResult]] = defaultdict(list)
    for item in results:
        point = {name: value for name, value in item.values.items() if name != "seed"}
        by_point[str(point)].append(item)
    summaries = []
    for point in points:
        ended = by_point[str(point)]
        finished = [item for item in ended if item.state != "failed"]
        values: dict[str, dict[int, float]] = defaultdict(dict)
        for item in sorted(finished, key=lambda item: item.values["seed"]):
            for name, value in item.numbers.items():
                values[name][item.values["seed"]] = value
        measured = {name: Statistics.of([*of_name.values()]) for name, of_name in values.items()}
        failed = len(ended) - len(finished)
        summaries.append(PointSummary(point, len(finished), failed, values[metric], measured))
    return summaries


def points_table(summaries: Sequence[PointSummary], metric: str) -> Table:
    """The table of points: a column for each name of the grid, and statistics of the metric."""
    names = list(summaries[0].point)
    built = table(f"{metric} over seeds", *names, "seeds", "failed", "mean", "std", "95 % interval")
    for item in summaries:
        values = (str(item.point[name]) for name in names)
        count = f"{len(item.values)} of {item.finished}"
        seeds = f"{item.finished}" if len(item.values) == item.finished else count
        built.add_row(*values, seeds, f"{item.failed or '-'}", *_cells(item.metrics.get(metric)))
    return built


def _cells(found: Statistics | None) -> tuple[str, str, str]:
    """Mean, standard deviation and interval, rounded to three digits of the deviation."""
    if found is None:
        return "-", "-", "-"
    if found.std is None:
        return f"{found.mean:.5g}", "-", "-"
    exponent = math.floor(math.log10(found.std)) if found.std > 0 else -3
    digits = min(max(0, 2 - exponent), 9)
    mean, std, low, high = (
        f"{value:.{digits}f}" for value in (found.mean, found.std, found.low, found.high)
    )
    return mean, std, f"{low} to {high}"


def draw(summaries: Sequence[PointSummary], metric: str) -> Figure:
    """A row for each point: its seeds as dots, and above them their mean with its interval."""
    from matplotlib.figure import Figure  # not pyplot: no window is ever opened

    shown = [item for item in summaries if item.values]
    if not shown:
        return figures.empty(f"no point has a finite {figures.shortened(metric)}")
    if len(shown) > MAX_ROWS:
        shown.sort(key=lambda item: item.metrics[metric].mean)
    labelled = range(0, len(shown), -(-len(shown) // MAX_ROWS))
    names = figures.short_names([grid.point_name(shown[row].point) for row in labelled])
    labels = [figures.shortened(name, LABEL_LETTERS) or "all seeds" for name in names]
    width = 7.0 + figures.LETTER_INCHES * max(map(len, labels))
    height = 1.7 + 0.42 * max(2, len(labels))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for row, item in enumerate(shown):
        found, color = item.metrics[metric], f"C{row % 10}"
        seeds = [row + 0.16] * len(item.values)
        axes.plot([*item.values.values()], seeds, ".", color=color, alpha=0.45, markersize=7)
        half = None if found.high is None else found.high - found.mean
        axes.errorbar(found.mean, row - 0.1, xerr=half, fmt="D", color=color, elinewidth=2.4)
    axes.set_yticks(labelled, labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)  # the first point at the top
    axes.grid(axis="y", visible=False)
    figures.use_few_ticks(axes)
    axes.set_xlabel("mean with its 95 % interval, and each seed")
    most = max(len(item.values) for item in shown)
    figures.set_title(figure, f"{metric} over {counted(most, 'seed')}")
    return figure

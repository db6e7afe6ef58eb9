"""The curves of runs as a picture: `gpt2 plot`."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2.base.errors import DataError
from gpt2.evaluation import baselines
from gpt2.inspection import figures, run_status
from gpt2.inspection.figures import Curve, Numbers
from gpt2.inspection.run_status import LOG_NAMES, Run
from gpt2.metrics import log_reader
from gpt2.metrics.log_reader import LoggedRun
from gpt2.train import status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEEP = 0.05
"""share of a run, at its beginning, whose losses may be cut off"""
FEW = 6
"""measurements, which are shown from the first one on"""
NOISE = (0.001, 0.995)
"""quantiles of the other losses between which the picture reaches"""
SMOOTHED = 0.01
"""half the width of the smoothing window, as a share of the curve"""
MARKED = 60
"""a curve of at most so many measurements has a point at each"""
GPT2_124M_HELLASWAG = baselines.HELLASWAG["completion"][1]
"""acc_norm of the published GPT-2 124M"""
GUESSING_HELLASWAG = 0.25


@dataclass(frozen=True)
class Panel:
    """One quantity of all runs."""

    title: str
    of: Callable[[LoggedRun], dict[int, float]] | None
    """its values by step; None for the validation losses of the corpora of a single run"""
    draw: Callable[[Axes, list[Curve]], None]
    x_label: str = "step"
    x_of: Callable[[LoggedRun, Numbers], Numbers] = lambda _, steps: steps
    """where steps of a run are on the x axis"""


@dataclass(frozen=True)
class _Source:
    """A log, or a folder with one."""

    path: Path
    run_name: str | None = None
    """of the only run of it that is read; None for all"""
    folder: Path | None = None
    """with the checkpoints of that run"""


def read(
    given: Sequence[Path], last: int | None = None, root: Path = Path("checkpoints")
) -> list[LoggedRun]:
    """The runs in `given` that have a step or a validation, under distinct names.

    Each of `given` is a log file, a folder with one, such as an --out_dir, the checkpoint folder of
    a run, the folder of an experiment, or a name whose runs are in `root`; what is given twice is
    read once. Of a log, only the `last` so many runs are returned. Their names include the path of
    the log if there are several. A run that is found by its checkpoint folder or by a name keeps
    its name, and has the path of that folder before it only if another one has the same name.
    Raises DataError if a log has no such run.
    """
    found, places = [], []
    sources = [*dict.fromkeys(source for item in given for source in _sources(item, root))]
    for source in sources:
        runs = [run for run in _read_log(source) if run.steps or run.val_losses]
        if not runs:
            raise DataError(
                f"{source.path} has no logged step yet; try again when the run has trained"
            )
        runs = runs[-last:] if last else runs
        if len(sources) > 1 and not source.run_name:
            several = [f"{source.path} {run.name}" for run in runs]
            names = several if len(runs) > 1 else [str(source.path)]
            runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
        found += runs
        places += [source.folder or source.path] * len(runs)
    count = Counter(run.name for run in found)
    return [
        replace(run, name=f"{place} {run.name}") if count[run.name] > 1 else run
        for run, place in zip(found, places, strict=True)
    ]


def _sources(given: Path, root: Path) -> list[_Source]:
    """The logs that `given` stands for: its own, else that of the run or those of the experiment
    whose folder or name it is. Raises DataError if it is none of these."""
    if _log_of(given):
        return [_Source(given)]
    folders = [given] if given.is_dir() else run_status.folders_of_name(str(given), root)
    runs = [Run(folder, current) for folder in folders if (current := status.read(folder))]
    if runs:
        return [_Source(run.log, run.status.plan.run_name, run.folder) for run in runs]
    logs = {path.parent for name in LOG_NAMES for path in given.glob(f"*/{name}")}
    if not logs:
        raise DataError(
            f"no log at {given}; expected a log.txt, a folder with logs/log.txt, such as the "
            f"--out_dir of a run, or an --experiment_name that has a run in {root}"
        )
    return [_Source(log) for log in sorted(logs)]


def _log_of(source: Path) -> Path | None:
    folders = (source / "logs", source)
    paths = [source, *(folder / name for folder in folders for name in LOG_NAMES)]
    return next((path for path in paths if path.is_file()), None)


def _read_log(source: _Source) -> list[LoggedRun]:
    path = _log_of(source.path) or source.path
    try:
        runs = log_reader.read_runs(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return [run for run in runs if source.run_name in (None, run.name)]


def save(runs: Sequence[LoggedRun], path: Path) -> None:
    """Draws the curves of `runs` into a file of the format that its suffix names.

    Raises ConfigError as `figures.write` does.
    """
    figures.write(lambda: draw(runs), path)


def draw(runs: Sequence[LoggedRun], panels: Sequence[Panel] | None = None) -> Figure:
    """A panel for each quantity that at least one run has, two in a row; by default all PANELS.

    More than `figures.MANY` runs are a band, from which the best stand out.
    """
    from matplotlib.figure import Figure  # not pyplot: no window is ever opened

    chosen = figures.highlighted([_score(run) for run in runs])
    colors = dict(zip(chosen, figures.distinct_colors(len(chosen)), strict=True))
    known = [(panel, _curves(panel, runs, colors)) for panel in panels or PANELS]
    shown = [(panel, curves) for panel, curves in known if curves]
    if not shown:
        return figures.empty("no step has been logged yet")
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(11, 0.5 + 2.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    wide = len(shown) % 2  # if their number is odd, the first one has a row of its own
    for index, (panel, curves) in enumerate(shown, start=wide):
        axes = figure.add_subplot(grid[0, :] if wide and index == 1 else grid[divmod(index, 2)])
        axes.set_title(panel.title, loc="left")
        (figures.use_whole_numbers if panel.x_label == "step" else figures.use_few_ticks)(axes)
        panel.draw(axes, curves)
        same_axis = [other for item, other in shown if item.x_label == panel.x_label]
        places = np.concatenate([curve.steps for other in same_axis for curve in other])
        axes.set_xlim(*_widened(places.min(), places.max(), least=1))
        if index // 2 == rows - 1:
            axes.set_xlabel(panel.x_label)
    if len(runs) == 1:
        figures.set_title(figure, summary(runs[0]))
    else:
        names = figures.short_names([run.name for run in runs])
        entries = figures.line_entries([names[i] for i in chosen], list(colors.values()))
        if len(chosen) < len(runs):
            entries += figures.band_entries(len(runs), "runs")
        figures.add_legend(figure, entries)
    return figure


def _curves(panel: Panel, runs: Sequence[LoggedRun], colors: Mapping[int, str]) -> list[Curve]:
    """The curves of a panel; those of highlighted runs have a colour, by the index of the run."""
    if panel.of is None:
        return _curves_of_corpora(runs[0]) if len(runs) == 1 else []
    return [
        Curve(
            run.name,
            colors.get(i),
            panel.x_of(run, np.array([*values], float)),
            np.array([*values.values()]),
        )
        for i, run in enumerate(runs)
        if (values := panel.of(run))
    ]


def _curves_of_corpora(run: LoggedRun) -> list[Curve]:
    """The validation losses of the corpora of a mixture; none of one, or if there are too many."""
    found = {name: values for name, values in run.corpus_losses.items() if values}
    if not 1 < len(found) <= figures.MANY:
        return []
    return [
        Curve(name, color, np.array([*values], float), np.array([*values.values()]))
        for (name, values), color in zip(
            found.items(), figures.distinct_colors(len(found)), strict=True
        )
    ]


def _score(run: LoggedRun) -> float:
    """The last validation loss, else the last smoothed training loss; lower is better."""
    if run.val_losses:
        return list(run.val_losses.values())[-1]
    losses = smoothed(np.array([item.loss for item in run.steps.values()]))
    return float(losses[-1]) if len(losses) else math.nan


def summary(run: LoggedRun) -> str:
    """The newest values of a run: `name: step 19,073, loss 3.2812, val loss 3.2901`."""
    last = max([*run.steps, *run.val_losses])
    parts = [f"step {last:,}"]
    if run.steps:
        final = np.array([item.loss for item in run.steps.values()])
        parts.append(f"loss {smoothed(final)[-1]:.4f}")
    if run.val_losses:
        parts.append(f"val loss {list(run.val_losses.values())[-1]:.4f}")
    if run.bits_per_byte:
        parts.append(f"bits per byte {list(run.bits_per_byte.values())[-1]:.4f}")
    if run.hellaswag:
        parts.append(f"HellaSwag {list(run.hellaswag.values())[-1]:.4f}")
    return f"{run.name}: {', '.join(parts)}"


def smoothed(values: Numbers, share: float = SMOOTHED) -> Numbers:
    """The mean of a window around each value, leaving out NaN and infinity.

    Half the window is at most `share` of the curve. It is narrower near the beginning, where losses
    fall steeply and a wide window would distort them.
    """
    count = len(values)
    positions = np.arange(count)
    half = np.minimum(positions // 10, math.ceil(share * count))
    starts, ends = positions - half, np.minimum(count, positions + half + 1)
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    found = counts[ends] - counts[starts]
    means = (sums[ends] - sums[starts]) / np.maximum(found, 1)
    return np.where(found > 0, means, np.nan)


def loss_range(curves: Sequence[Curve], steep: float = STEEP) -> tuple[float, float] | None:
    """The range of losses to show, or None without a finite loss.

    It cuts off the `steep` beginning, outliers, and losses above those at the first step, as of a
    run that diverges. A run that ended in the steep beginning of the others does not count. Others
    that lie above the range widen it, up to twice its height. Without a steep beginning, first
    losses above their median are shown, too.
    """
    first = min(curve.steps[0] for curve in curves)
    steep_until = first + steep * (max(curve.steps[-1] for curve in curves) - first)
    shown = [curve.values[curve.steps >= steep_until] for curve in curves]
    shown = [finite for values in shown if len(finite := values[np.isfinite(values)])]
    begun_at = np.array([curve.values[0] for curve in curves if len(curve.values) > 1])
    begun_at = begun_at[np.isfinite(begun_at)]
    if not shown:
        return None
    low, high = np.quantile(np.concatenate(shown), NOISE)
    if len(begun_at):
        begin = np.median(begun_at)
        high = min(high, begin if steep else begin + (begin - low))
    lowest = np.array([values.min() for values in shown])
    high = np.max(lowest[lowest <= high + (high - low)], initial=high)
    return _widened(float(low), float(high), 0.05)


def _widened(
    low: float, high: float, share: float = 0.01, least: float = 0.1
) -> tuple[float, float]:
    """The range with a margin of a share of it, or of `least` around a single value."""
    margin = share * (high - low) or least
    return low - margin, high + margin


def _draw_loss(axes: Axes, curves: list[Curve]) -> None:
    _draw_noisy(axes, curves)
    if shown := loss_range(curves):
        axes.set_ylim(*shown)


def _draw_validation(axes: Axes, curves: list[Curve]) -> None:
    _draw_measured(axes, curves)
    steep = STEEP if max(len(curve.steps) for curve in curves) > FEW else 0
    if shown := loss_range(curves, steep):
        axes.set_ylim(*shown)


def _draw_corpora(axes: Axes, curves: list[Curve]) -> None:
    _draw_validation(axes, curves)
    names = [figures.shortened(curve.label) for curve in curves]
    entries = figures.line_entries(names, [curve.color or figures.GREY for curve in curves])
    axes.legend([line for line, _ in entries], [name for _, name in entries], fontsize=8.5)


def _draw_hellaswag(axes: Axes, curves: list[Curve]) -> None:
    _draw_measured(axes, curves)
    low, high = axes.get_ylim()
    low, high = min(low, GUESSING_HELLASWAG), max(high, GPT2_124M_HELLASWAG)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))  # room for the two names
    for value, name, dashes, above in (
        (GPT2_124M_HELLASWAG, f"GPT-2 124M: {GPT2_124M_HELLASWAG}", "--", True),
        (GUESSING_HELLASWAG, "guessing", ":", False),
    ):
        axes.axhline(value, color="#888888", linestyle=dashes, linewidth=1.1)
        axes.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3 if above else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color="#666666",
            fontsize=8.5,
        )


def _draw_rate(axes: Axes, curves: list[Curve]) -> None:
    _draw_lines(axes, curves)
    _begin_at_zero(axes, np.concatenate([curve.values for curve in curves]), 1.05)


def _draw_speed(axes: Axes, curves: list[Curve]) -> None:
    _draw_noisy(axes, curves)
    _begin_at_zero(axes, np.concatenate([smoothed(curve.values) for curve in curves]), 1.15)
    axes.yaxis.set_major_formatter("{x:,.10g}")


def _begin_at_zero(axes: Axes, values: Numbers, room: float) -> None:
    """Shows 0 to `room` times the largest finite value."""
    axes.set_ylim(0, room * float(np.max(values, initial=0, where=np.isfinite(values))) or 1)


def _draw_noisy(axes: Axes, curves: list[Curve]) -> None:
    """Each curve smoothed, over the raw values in a light colour if they differ.

    A band is of smoothed curves, and no raw values are drawn with it.
    """
    if all(curve.color for curve in curves):
        for curve in curves:
            if not np.array_equal(smoothed(curve.values), curve.values, equal_nan=True):
                axes.plot(
                    curve.steps,
                    curve.values,
                    color=curve.color,
                    alpha=0.25,
                    linewidth=0.7,
                    zorder=1.9,  # below the smooth curves of all runs
                    rasterized=True,  # in .svg and .pdf: a hundred thousand points as one picture
                )
    _draw_lines(axes, [replace(curve, values=smoothed(curve.values)) for curve in curves])


def _draw_measured(axes: Axes, curves: list[Curve]) -> None:
    few = max(len(curve.values) for curve in curves) <= MARKED
    _draw_lines(axes, curves, marker="o" if few else None)


def _draw_lines(axes: Axes, curves: Sequence[Curve], marker: str | None = None) -> None:
    """The curves that have a colour, over the band of all if some have none.

    A curve of one value has a point, without which nothing would be seen.
    """
    if not all(curve.color for curve in curves):
        figures.draw_band(axes, curves)
    for curve in curves:
        if curve.color:
            lonely = np.isfinite(curve.values).sum() == 1
            mark = "o" if lonely else marker
            axes.plot(curve.steps, curve.values, color=curve.color, marker=mark, markersize=3.5)


LOSS = Panel("loss", lambda run: {at: item.loss for at, item in run.steps.items()}, _draw_loss)
VALIDATION = Panel("validation loss", lambda run: run.val_losses, _draw_validation)
PANELS = (
    LOSS,
    VALIDATION,
    Panel("validation loss of each corpus", None, _draw_corpora),
    Panel("HellaSwag (acc_norm)", lambda run: run.hellaswag, _draw_hellaswag),
    Panel(
        "learning rate",
        lambda run: {at: item.learning_rate for at, item in run.steps.items()},
        _draw_rate,
    ),
    Panel(
        "tokens/s",
        lambda run: {at: item.tokens_per_s for at, item in run.steps.items()},
        _draw_speed,
    ),
)

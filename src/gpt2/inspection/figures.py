"""What all pictures have in common: style, size, names, legends, bands of curves, tick labels."""

from __future__ import annotations  # matplotlib is imported where something is drawn

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2.base.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
DPI = 150
MAX_PIXELS = 8000
"""the longer side of a picture has at most so many; a larger figure has fewer dots per inch"""
MANY = 12
"""more curves than this become a band"""
HIGHLIGHTED = 5
"""so many curves stand out from a band"""
GREY, RED = "#8c8c8c", "#d62728"
LINE_INCHES, LETTER_INCHES = 0.17, 0.085
"""height of a line and width of a wide letter, in the font size of STYLE"""
LEGEND_LETTERS = 90
"""a longer label of a legend is wrapped"""
MAX_LABELS = 14
"""of the categories on an axis, at most so many have a label"""
LABEL_LETTERS = 20
"""a longer label of a category is shortened"""
TICKS = 5
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.formatter.limits": (-6, 9),  # a power of ten above the axis would cover the title
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.titlesize": 12,
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a name may hold dollars
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
Numbers = npt.NDArray[np.float64]
Draw = Callable[[], "Figure"]
Entry = tuple["Artist", str]
"""a line of a legend: its mark and its label"""


@dataclass(frozen=True)
class Curve:
    """One quantity of one run over its steps."""

    label: str
    color: str | None
    """None if the curve is only part of a band"""
    steps: Numbers
    values: Numbers


def require_kind(path: Path, flag: str = "-o") -> None:
    """Raises ConfigError if the file of a picture, which `flag` gives, has a suffix that is not in
    KINDS."""
    if path.suffix.lower() not in KINDS:
        kinds = ", ".join(KINDS)
        raise ConfigError(f"expected a {kinds} file, got {path}; use {flag} NAME{KINDS[0]}")


def write(draw: Draw, path: Path, flag: str = "-o") -> None:
    """Saves what `draw` returns, in the common style, in the format that the suffix names.

    Raises ConfigError as `require_kind` does, and if it cannot write the file.
    """
    require_kind(path, flag)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = drawn(draw)
        dpi = min(DPI, MAX_PIXELS / max(figure.get_size_inches()))
        try:
            figure.savefig(path, dpi=dpi)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror or error}; choose another file with {flag}"
            ) from error


def drawn(draw: Draw) -> Figure:
    """What `draw` returns, drawn in the common style: tick labels without TeX, legends not cut."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw()
        for axes in figure.axes:
            _use_plain_ticks(axes.xaxis)
            _use_plain_ticks(axes.yaxis)
        for legend in figure.legends:
            width, _ = _size(figure, legend)
            figure.set_figwidth(max(figure.get_figwidth(), width))
        return figure


def empty(words: str) -> Figure:
    """A picture of nothing but words, where there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.5))
    figure.text(0.5, 0.5, words, ha="center", va="center", color="#666666")
    return figure


def highlighted(scores: Sequence[float]) -> list[int]:
    """The curves to draw each on its own: all if they are few, else those with the lowest scores.

    Curves whose score is NaN come last.
    """
    if len(scores) <= MANY:
        return list(range(len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), scores[i], i))
    return order[:HIGHLIGHTED]


def distinct_colors(count: int) -> list[str]:
    """A colour for each of at most MANY curves."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colors = [*(to_hex(color) for color in colormaps["tab10"](range(10))), "#111111", "#f2b701"]
    return colors[:count]


def draw_band(axes: Axes, curves: Sequence[Curve], color: str = GREY) -> None:
    """The range of all curves in a light colour, the middle half of them in a darker one.

    At each step the curves that have begun and not ended count. A curve of one value is a dot.
    """
    finite = [(curve.steps[good], curve.values[good]) for curve, good in _finite(curves)]
    long = [(steps, values) for steps, values in finite if len(steps) > 1]
    dots = [(steps[0], values[0]) for steps, values in finite if len(steps) == 1]
    if dots:
        xs, ys = zip(*dots, strict=True)
        axes.scatter(xs, ys, s=9, color=color, alpha=0.5, linewidths=0)
    if not long:
        return
    places = np.linspace(
        min(steps[0] for steps, _ in long), max(steps[-1] for steps, _ in long), 400
    )
    values = np.array([np.interp(places, *curve, left=np.nan, right=np.nan) for curve in long])
    known = np.isfinite(values).any(axis=0)
    found = np.full((5, len(places)), np.nan)
    found[:, known] = np.nanquantile(values[:, known], [0, 0.25, 0.5, 0.75, 1], axis=0)
    low, lower, middle, upper, high = found
    axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
    axes.fill_between(places, lower, upper, color=color, alpha=0.4, linewidth=0)
    axes.plot(places, middle, color=color, linewidth=1)


def _finite(curves: Sequence[Curve]) -> list[tuple[Curve, npt.NDArray[np.bool_]]]:
    masks = [(curve, np.isfinite(curve.values)) for curve in curves]
    return [(curve, good) for curve, good in masks if good.any()]


def band_entries(count: int, what: str, color: str = GREY) -> list[Entry]:
    """The lines of a legend that explain a band of `count` curves: `all 40 runs`."""
    from matplotlib.patches import Patch

    return [
        (Patch(color=color, alpha=0.6, linewidth=0), f"middle half of {count} {what}"),
        (Patch(color=color, alpha=0.2, linewidth=0), f"all {count} {what}"),
    ]


def line_entries(labels: Sequence[str], colors: Sequence[str]) -> list[Entry]:
    """The lines of a legend for curves that have a label and a colour each."""
    from matplotlib.lines import Line2D

    pairs = zip(labels, colors, strict=True)
    return [(Line2D([], [], color=color, linewidth=2.5), label) for label, color in pairs]


def add_legend(figure: Figure, entries: Sequence[Entry]) -> None:
    """Adds a legend above the panels, in as many columns as fit; the figure grows by its height."""
    if not entries:
        return
    handles = [handle for handle, _ in entries]
    longest = max(len(label) for _, label in entries)
    options = [(columns, LEGEND_LETTERS) for columns in range(min(6, len(entries)), 0, -1)]
    options += [(1, letters) for letters in (60, 40, 25) if letters < longest]
    for columns, letters in options:
        labels = [wrapped(label, letters) for _, label in entries]
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        width, height = _size(figure, legend)
        if width <= figure.get_figwidth() or (columns, letters) == options[-1]:
            figure.set_figheight(figure.get_figheight() + height)
            return
        legend.remove()


def set_title(figure: Figure, text: str) -> None:
    """Sets the title of a figure, wrapped to its width; the figure grows by its lines."""
    title = wrapped(text, int(0.8 * figure.get_figwidth() / LETTER_INCHES))
    figure.suptitle(title, x=0.012, ha="left")
    figure.set_figheight(figure.get_figheight() + 1.3 * LINE_INCHES * title.count("\n"))


def _size(figure: Figure, legend: Any) -> tuple[float, float]:
    """Width and height of a legend in inches, with the margins around it."""
    from matplotlib.backends.backend_agg import RendererAgg

    renderer = RendererAgg(1, 1, figure.dpi)  # type: ignore[no-untyped-call]
    extent = legend.get_window_extent(renderer)
    return extent.width / figure.dpi + 0.4, extent.height / figure.dpi + 0.1


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the beginning that all share, which ends at a `/`, space, comma, _ or -.

    A `name=value` is never cut, nor is a number left alone. A single name stays whole.
    """
    if len(set(names)) < 2:
        return list(names)
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    ends = [match.end() for match in re.finditer(r"[/ ,]", common)]
    end = max(ends, default=0)
    rest = [re.split(r"[/ ,]", name[end:], maxsplit=1)[0] for name in names]
    if not any("=" in word for word in rest):
        parts = [match.end() for match in re.finditer(r"[_-]", common)]
        end = max(
            [end, *(part for part in parts if not any(n[part:][:1].isdigit() for n in names))]
        )
    if any(not name[end:] for name in names):
        return list(names)
    return [name[end:] for name in names]


def wrapped(text: str, letters: int) -> str:
    """The text in lines of at most `letters`, which end after a space or separator if possible."""
    lines = [""]
    for word in re.findall(r"[^/_,= -]*(?:[/_,= -]|$)", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > letters:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > letters:
            lines[-1:] = [lines[-1][:letters], lines[-1][letters:]]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def shortened(text: str, letters: int = LABEL_LETTERS) -> str:
    """The text, with `…` in place of its middle if it is longer than `letters`."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2]}…{text[len(text) - (letters - letters // 2 - 1) :]}"


def label_categories(axes: Axes, labels: Sequence[str], inches: float) -> float:
    """Labels 0, 1, 2, … on the x axis, which is `inches` wide; returns by how much they rise.

    Labels that do not fit side by side are shortened and stand upright. Of many, some are left out.
    """
    for texts in (labels, short := [shortened(label) for label in short_names(labels)]):
        if (max(map(len, texts)) + 1) * len(texts) * LETTER_INCHES <= inches:
            axes.set_xticks(range(len(texts)), texts)
            return 0.0
    every = -(-len(labels) // MAX_LABELS)
    shown = short[::every]
    axes.set_xticks(range(0, len(labels), every), shown, rotation=90)
    return max(map(len, shown)) * LETTER_INCHES


def use_whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers, few enough for large ones: `1,000,000`."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(value):,}")


def use_few_ticks(axes: Axes) -> None:
    """Few ticks on the x axis, so that long numbers do not touch."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(TICKS))


def plain_number(value: float) -> str:
    """A number as a tick label: `0.001`, `20,000`, `3e-5`, `1e6`."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    return re.sub(r"e([+-])0*", lambda sign: "e-" if sign[1] == "-" else "e", f"{value:.4g}")


def _use_plain_ticks(axis: Axis) -> None:
    """Replaces TeX in the labels of a logarithmic axis, and its ticks by few that have a label."""
    from matplotlib.ticker import (
        LogFormatter,
        LogitFormatter,
        LogLocator,
        NullFormatter,
        NullLocator,
    )

    with_tex = (LogFormatter, LogitFormatter)
    if isinstance(axis.get_major_formatter(), with_tex):
        axis.set_major_formatter(lambda value, _: plain_number(value))
    if isinstance(axis.get_minor_formatter(), with_tex):
        axis.set_minor_formatter(NullFormatter())
    if isinstance(axis.get_major_locator(), LogLocator):
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(_log_locator(low, high))
        axis.set_minor_locator(NullLocator())


def _log_locator(low: float, high: float) -> Any:
    """Ticks at 1, 2, 5, or 1, 3, or powers of ten, of which the axis shows 2 to about TICKS."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = -(-(last - first + 1) // TICKS)
    for digits, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), stride)):
        ticks = [digit * 10.0**power for power in range(first, last + 1, step) for digit in digits]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) <= TICKS:
            return FixedLocator(shown) if len(shown) > 1 else MaxNLocator(TICKS)
    return FixedLocator(shown)

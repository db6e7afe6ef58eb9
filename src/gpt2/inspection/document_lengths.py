"""The histogram of the lengths of documents, as a picture: `gpt2 data show --stats --plot`."""

from __future__ import annotations  # matplotlib is imported where something is drawn

from typing import TYPE_CHECKING

from gpt2.base.text import counted
from gpt2.data.statistics import Lengths
from gpt2.inspection import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR, MEDIAN = "#4c78a8", "#111111"
LEAST_RATIO = 8.0
"""from the left end of the axis to the right one: bars of equal lengths are no wall"""


def draw(found: Lengths, name: str) -> Figure:
    """The histogram of documents that are not empty, over a logarithmic axis, with the median and
    the block size; `name` is that of the data."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    bins = [item for item in found.histogram if item.first > 0]
    if not any(item.documents for item in bins):
        return figures.empty(f"{name} has no document with text")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    starts = [item.first for item in bins]
    widths = [item.last + 1 - item.first for item in bins]
    counts = [item.documents for item in bins]
    axes.bar(starts, counts, widths, align="edge", color=BAR, edgecolor="white", linewidth=0.6)
    axes.set_xscale("log")
    ends = (starts[0], starts[-1] + widths[-1], found.block_size, found.median)
    axes.set_xlim(*_range(max(1, min(ends)), max(ends)))
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(figures.TICKS, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: figures.plain_number(value))
    figures.add_legend(figure, _entries(found, name))
    for value, color in ((found.median, MEDIAN), (found.block_size, figures.RED)):
        axes.axvline(value, color=color, linewidth=1.2, linestyle="--")
    return figure


def _entries(found: Lengths, name: str) -> list[figures.Entry]:
    from matplotlib.patches import Patch

    full = counted(found.documents - found.empty, "document")
    without = f", without {counted(found.empty, 'empty one')}"
    median = f"median {counted(found.median, 'token')}, longest {found.longest:,}"
    labels = [median, f"block_size {found.block_size:,}"]
    lines = figures.line_entries(labels, [MEDIAN, figures.RED])
    bars = f"{full} in {name}" + (without if found.empty else "")
    return [(Patch(color=BAR, linewidth=0), bars), *lines]


def _range(low: float, high: float) -> tuple[float, float]:
    """The ends of the axis: at least LEAST_RATIO apart, with `low` to `high` in the middle."""
    margin = max(1.1, (LEAST_RATIO * low / high) ** 0.5)
    return low / margin, high * margin

"""A curve as text: loss over steps, in Braille dots, or in ASCII where a terminal lacks them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from rich.text import Text

from gpt2.inspection import figures, plot

BRAILLE = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""the bit of each dot of a Braille character: two columns of four rows"""
LINE_STYLE, POINT_STYLE, AXIS_STYLE = "cyan", "bold yellow", "dim"
NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
CELLS_PER_LABEL = 18
"""at the horizontal axis"""
LINES_PER_TICK = 3
"""at the vertical axis; with fewer, rounding to whole lines makes equal steps look unequal"""
POINT_EVERY = 3
"""cells from one point to the next at least, so that the line can be seen"""
STEEP = 0.1
"""share of the run, at its beginning, whose losses may be cut off: a chart has few lines"""


class Glyphs(NamedTuple):
    """The characters of a chart."""

    point: str
    vertical: str
    tick_at_left: str
    corner: str
    horizontal: str
    tick_below: str
    line: str
    """in the legend, and everywhere if Braille is not available"""


UNICODE = Glyphs("●", "│", "┤", "└", "─", "┬", "⠒⠒")
ASCII = Glyphs("o", "|", "+", "+", "-", "+", ".")


@dataclass(frozen=True)
class Series:
    """Values over steps."""

    steps: Sequence[float]
    values: Sequence[float]


def loss_chart(
    training: Series, validation: Series, width: int, height: int, *, is_ascii: bool = False
) -> Text | None:
    """Training losses as a line and validation losses as points, in `height` lines of `width` cells
    with axes; None if there is no finite loss.

    The steep beginning of the curve may be cut off, as in `gpt2 plot`.
    """
    glyphs = ASCII if is_ascii else UNICODE
    curve = _curve(training.steps, plot.smoothed(np.array(training.values, float)))
    points = _curve(validation.steps, np.array(validation.values, float))
    present = [item for item in (curve, points) if len(item.steps)]
    shown = plot.loss_range(present, STEEP) if present else None
    if shown is None:
        return None
    rows = height - 2  # below them are the axis and its labels
    ticks = nice_ticks(*shown, most=max(3, rows // LINES_PER_TICK))
    labels = {_row(value, shown, rows): text for value, text in ticks}
    margin = max(len(text) for _, text in ticks) + 1
    columns = max(2, width - margin - 1)
    first = float(min(item.steps[0] for item in present))
    last = float(max(item.steps[-1] for item in present))
    extent = (first, last if last > first else first + 1)
    cells = _line_cells(curve, extent, shown, columns, rows, is_ascii)
    free = columns
    for step, value in zip(points.steps[::-1], points.values[::-1], strict=True):
        at = round((step - extent[0]) / (extent[1] - extent[0]) * (columns - 1))
        if shown[0] <= value <= shown[1] and at < free:
            cells[_row(value, shown, rows)][at] = glyphs.point
            free = at - POINT_EVERY + 1
    chart = Text(no_wrap=True, overflow="crop")
    styles = {glyphs.point: POINT_STYLE, " ": ""}
    for row, line in enumerate(cells):
        label = labels.get(row, "")
        mark = glyphs.tick_at_left if label else glyphs.vertical
        chart.append(f"{label:>{margin - 1}} {mark}", AXIS_STYLE)
        for style, group in groupby(line, lambda cell: styles.get(cell, LINE_STYLE)):
            chart.append("".join(group), style)
        chart.append("\n")
    for axis_line in _step_axis(extent, margin, columns, glyphs):
        chart.append(axis_line, AXIS_STYLE)
    return chart


def legend(*, is_ascii: bool = False) -> Text:
    """What line and points of a chart are."""
    glyphs = ASCII if is_ascii else UNICODE
    return Text.assemble(
        ("loss  ", "bold"), (glyphs.line, LINE_STYLE), " training  ", (glyphs.point, POINT_STYLE)
    ).append(" validation")


def nice_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """At most `most` round values from `low` to `high`, with as many decimals as tell them apart.

    At least one: that nearest to the middle.
    """
    size = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (*NICE, 20.0, 50.0):
        between = factor * size
        found = range(math.ceil(low / between), math.floor(high / between) + 1)
        if len(found) <= most:
            break
    numbers = [index * between for index in found] or [(low + high) / 2]
    exponent = math.floor(math.log10(between))
    decimals = max(0, -exponent + (1 if factor == 2.5 else 0))
    return [(number, f"{number:,.{decimals}f}") for number in numbers]


def _curve(steps: Iterable[float], values: figures.Numbers) -> figures.Curve:
    """The finite values of a curve."""
    finite = np.isfinite(values)
    return figures.Curve("", "", np.array([*steps], float)[finite], values[finite])


def _row(value: float, shown: tuple[float, float], rows: int) -> int:
    """The line of a value, from the top."""
    return round((shown[1] - value) / (shown[1] - shown[0]) * (rows - 1))


def _line_cells(
    curve: figures.Curve,
    extent: tuple[float, float],
    shown: tuple[float, float],
    columns: int,
    rows: int,
    is_ascii: bool,
) -> list[list[str]]:
    """The cells of the line: the mean of each dot's width, connected from dot to dot."""
    across, down = (1, 1) if is_ascii else (2, 4)
    grid = np.zeros((rows * down, columns * across), bool)
    last = columns * across - 1
    if len(curve.steps):
        at = np.round((curve.steps - extent[0]) / (extent[1] - extent[0]) * last).astype(int)
        counts = np.bincount(at, minlength=last + 1)
        means = np.bincount(at, curve.values, last + 1) / np.maximum(counts, 1)
        places = np.flatnonzero(counts)
        heights = (shown[1] - means[places]) / (shown[1] - shown[0]) * (rows * down - 1)
        xs = np.arange(places[0], places[-1] + 1)
        ys = np.round(np.interp(xs, places, heights)).astype(int)
        before = np.concatenate([ys[:1], ys[:-1]])
        for x, y, y_before in zip(xs, ys, before, strict=True):
            near = y_before + np.sign(y - y_before)  # the dot before has that row already
            low, high = sorted((int(near), int(y)))
            if high >= 0 and low < len(grid):
                grid[max(0, low) : high + 1, x] = True
    if is_ascii:
        return [[ASCII.line if dot else " " for dot in line] for line in grid]
    bits = np.array(DOTS).T  # by row and column
    codes = np.einsum("rycx,yx->rc", grid.reshape(rows, 4, columns, 2), bits)
    return [[chr(BRAILLE + code) if code else " " for code in line] for line in codes]


def _step_axis(
    extent: tuple[float, float], margin: int, columns: int, glyphs: Glyphs
) -> tuple[str, str]:
    """The horizontal axis, and the steps below it: the last one, and round ones to its left."""
    axis = [glyphs.horizontal] * columns
    below = [" "] * (margin + columns + 1)
    free = len(below)
    round_steps = nice_ticks(*extent, most=max(2, columns // CELLS_PER_LABEL))
    steps = [extent[1], *(step for step, _ in reversed(round_steps) if step == int(step))]
    for step in steps:
        label = f"{step:,.0f}"
        at = round((step - extent[0]) / (extent[1] - extent[0]) * (columns - 1))
        start = min(max(0, margin + 1 + at - len(label) // 2), len(below) - len(label))
        if start + len(label) <= free:
            axis[at] = glyphs.tick_below
            below[start : start + len(label)] = label
            free = start - 2
    return " " * margin + glyphs.corner + "".join(axis) + "\n", "".join(below).rstrip()

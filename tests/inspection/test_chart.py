import math
import re

import pytest
from rich.cells import cell_len

from gpt2.inspection import chart
from gpt2.inspection.chart import Series

NONE = Series([], [])
FALLING = Series(range(1, 2001), [3 + 5 * math.exp(-step / 300) for step in range(1, 2001)])
VALIDATION = Series(
    range(0, 2001, 250), [3.1 + 5 * math.exp(-s / 300) for s in range(0, 2001, 250)]
)


def lines_of(
    training: Series, validation: Series, width: int = 60, height: int = 12, is_ascii: bool = False
) -> list[str]:
    drawn = chart.loss_chart(training, validation, width, height, is_ascii=is_ascii)
    assert drawn is not None
    return drawn.plain.split("\n")


@pytest.mark.parametrize("is_ascii", [False, True])
@pytest.mark.parametrize("width", [20, 60, 80, 140])
@pytest.mark.parametrize("height", [5, 7, 18])
def test_it_has_the_size_that_is_asked_for(width: int, height: int, is_ascii: bool):
    lines = lines_of(FALLING, VALIDATION, width, height, is_ascii)
    assert len(lines) == height
    assert all(cell_len(line) <= width for line in lines)
    assert cell_len(lines[-2]) == width
    assert not is_ascii or "".join(lines).isascii()


def test_a_falling_loss_falls_from_the_upper_left_to_the_lower_right():
    lines = lines_of(FALLING, NONE, is_ascii=True)[:-2]
    rows = [row for row, line in enumerate(lines) for _ in re.findall(r"\.", line[5:])]
    first_columns = [line.find(".", 5) for line in lines if "." in line[5:]]
    assert first_columns == sorted(first_columns)
    assert (min(rows), max(rows)) == (0, len(lines) - 1)


def test_the_labels_are_where_their_values_are():
    training = Series(range(0, 101), [4 - step / 50 for step in range(0, 101)])
    lines = lines_of(training, NONE, height=20)
    labels = {
        float(found[1]): row
        for row, line in enumerate(lines)
        if (found := re.match(r" *(\d[\d.]*) ┤", line))
    }
    assert len(labels) >= 3
    gaps = {
        round((value - other) / (row - other_row), 1)
        for value, row in labels.items()
        for other, other_row in labels.items()
        if row - other_row > 4
    }
    assert len(gaps) == 1  # the same loss for each line
    assert lines[-1].split()[-1] == "100"
    assert lines[-2].endswith("┬")


def test_validation_is_points_of_their_own():
    assert "".join(lines_of(FALLING, VALIDATION)).count("●") > 4
    assert "●" not in "".join(lines_of(FALLING, NONE))
    assert "●" in "".join(lines_of(NONE, VALIDATION))


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        (Series([1], [3.0]), NONE),
        (Series([1, 2], [3.0, 3.0]), NONE),
        (NONE, Series([0], [11.0])),
        (Series([1, 2, 3], [math.nan, 2.0, math.nan]), Series([3], [math.nan])),
        (Series([5, 6], [1e9, -1e9]), NONE),
        (Series([1, 10**9], [3.0, 2.0]), NONE),
        (Series(range(300), [1e-12] * 300), NONE),
    ],
)
def test_it_draws_whatever_there_is(training: Series, validation: Series):
    assert len(lines_of(training, validation)) == 12


def test_without_a_finite_loss_there_is_no_chart():
    assert chart.loss_chart(NONE, NONE, 60, 12) is None
    assert chart.loss_chart(Series([1], [math.nan]), NONE, 60, 12) is None


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (3.1, 4.0, 4, ["3.25", "3.50", "3.75", "4.00"]),
        (0, 19073, 4, ["0", "5,000", "10,000", "15,000"]),
        (2.96, 3.04, 3, ["2.975", "3.000", "3.025"]),
        (2.0, 11.0, 5, ["2", "4", "6", "8", "10"]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, labels: list[str]):
    found = chart.nice_ticks(low, high, most)
    assert [label for _, label in found] == labels
    for value, label in found:
        assert float(label.replace(",", "")) == pytest.approx(value, abs=1e-9)

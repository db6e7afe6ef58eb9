import math
import sys

import pytest
from rich.console import Console

from gpt2.experiments.results import JobResult
from gpt2.experiments.sweep import statistics
from gpt2.experiments.sweep.statistics import Statistics


def record(seed: int, result: object, rate: float = 0.1, state: str = "finished") -> JobResult:
    return JobResult(f"rate={rate},seed={seed}", state, {"rate": rate, "seed": seed}, result)


def test_interval_is_student_s():
    """t = 2.776 for 95 % and 4 degrees of freedom (any table of the distribution)."""
    found = Statistics.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.std == pytest.approx(math.sqrt(2.5))
    half = 2.776 * math.sqrt(2.5 / 5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)


def test_a_single_value_has_no_spread():
    assert Statistics.of([2.0]) == Statistics(1, 2.0, None, None, None)


def test_what_is_beyond_the_range_of_floats_is_left_out():
    largest = sys.float_info.max
    same = Statistics.of([largest, largest])
    assert (same.mean, same.std, same.low, same.high) == (largest, 0.0, largest, largest)
    apart = Statistics.of([-largest, largest])
    assert (apart.mean, apart.low, apart.high) == (0.0, None, None)
    assert Statistics.of([-1.2e308, 1.2e308]) == Statistics(2, 0.0), "its interval is beyond it"
    assert Statistics.of([2, 10**300]).mean == 5e299


def test_points_keep_their_own_seeds():
    records = [
        record(0, {"loss": 1.0, "words": "no number", "is_good": True}),
        record(1, {"loss": 3.0}),
        record(0, {"loss": 7.0}, rate=0.2),
        record(1, None, rate=0.2, state="failed"),
        record(2, {"loss": None}, rate=0.2),  # it was no finite number
    ]
    first, second = statistics.summarize([{"rate": 0.1}, {"rate": 0.2}], records, "loss")
    assert first.values == {0: 1.0, 1: 3.0} and first.metrics["loss"].mean == 2
    assert set(first.metrics) == {"loss"}
    assert (second.finished, second.failed, second.values) == (2, 1, {0: 7.0})


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([{"loss": None}, {"loss": None}], "No result has a finite loss"),
        ([{"loss": None}, {"rmse": 1.0}], "No result has a finite loss; --metric may be one of"),
        (
            [{"b": 1.0, "a": 2}, 3.0],
            "No result has a finite loss; --metric may be one of a, b, value",
        ),
    ],
)
def test_a_missing_metric_is_explained(results: list[object], words: str):
    """NaN is stored as None."""
    records = [record(seed, result) for seed, result in enumerate(results)]
    said = statistics.missing_metric([*records, record(9, None, state="failed")], "loss")
    assert said.startswith(words)


@pytest.mark.parametrize(
    ("results", "name"),
    [
        ([{"error": 2}, {"error": None}], "error"),
        ([{"error": 2, "value": 1}], "value"),
        ([{"error": 2}, {"rmse": 1}], "value"),
        ([3.0], "value"),
        ([{"error": None}], "value"),
    ],
)
def test_the_only_number_of_the_results_is_the_default(results: list[object], name: str):
    records = [record(seed, result) for seed, result in enumerate(results)]
    assert statistics.default_metric([*records, record(9, None, state="failed")]) == name


def test_table_has_a_row_per_point():
    records = [record(seed, seed * 0.01) for seed in range(3)]
    summaries = statistics.summarize([{"rate": 0.1}, {"rate": 0.2}], records, "value")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(statistics.points_table(summaries, "value"))
    rows = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert rows[-2] == ["0.1", "3", "-", "0.0100", "0.0100", "-0.0148", "to", "0.0348"]
    assert rows[-1] == ["0.2", "0", "-", "-", "-", "-"]

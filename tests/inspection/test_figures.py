"""Every kind of picture, with few and many curves, long names, one value, no value and NaN."""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import optuna
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import TrialState

from gpt2.data.statistics import Lengths, lengths_of
from gpt2.experiments.compare import models
from gpt2.experiments.results import JobResult
from gpt2.experiments.search import trial_report
from gpt2.experiments.sweep import statistics
from gpt2.inspection import document_lengths, figures, plot
from gpt2.metrics.log_reader import LoggedRun, LoggedStep

LONG = "checkpoints/a_long_name_of_an_experiment/with, commas and spaces/and-a_rather_long_end_"
TOUCH = 1.0
"""pixels by which two boxes may overlap: an extent includes a margin for the letters"""


def losses(case: str, place: int, count: int) -> dict[int, float]:
    """Validation losses of a run by step, different for each `place`."""
    random = np.random.default_rng(place)
    steps = range(100, 100 * (count + 1), 100)
    found = {
        step: 3 + 8 / (1 + step / 50) + 0.02 * place + 0.02 * float(random.normal())
        for step in steps
    }
    if case == "one value":
        return {100: found[100]}
    if case == "no value":
        return {}
    if case == "NaN":
        return dict.fromkeys(found, math.nan) if place % 3 == 0 else found | {300: math.nan}
    if case == "huge" and place % 5 == 1:
        return {step: 1e30 if step > 500 else loss for step, loss in found.items()}
    return found


def name(case: str, place: int) -> str:
    return f"{LONG * 2}{place}" if case == "long names" else f"demo_{place}"


def logged(case: str, count: int) -> list[LoggedRun]:
    runs = []
    for place in range(count):
        run = LoggedRun(name(case, place), 0)
        run.val_losses = losses(case, place, 1000 if case == "many steps" else 12)
        scale = 1000 if case == "many steps" else 1
        run.val_losses = {step * scale: loss for step, loss in run.val_losses.items()}
        run.hellaswag = {step: 0.25 + 0.6 * step / 1e6 for step in run.val_losses}
        run.steps = {
            step: LoggedStep(step, loss, 1e-3 * (1 - step / 2e6), 0.5, 1e6 + 1e3 * place)
            for step, loss in run.val_losses.items()
        }
        runs.append(run)
    return runs


def search(case: str, count: int) -> Study:
    """A search of `count` trials, of which every third is pruned."""
    random = np.random.default_rng(0)
    long = "_of_a_group_with_a_very_long_name_" * 2 if case == "long names" else ""
    drawn: dict[str, list[Any]] = {
        f"learning_rate{long}": [float(10 ** random.uniform(-5, -2)) for _ in range(count)],
        f"total_batch_size{long}": [int(2 ** random.integers(17, 21)) for _ in range(count)],
        f"optimizer{long}": [name(case, place % 7) for place in range(count)],
        "schedule": [name(case, place) for place in range(count)],
        "tied": [bool(place % 2) for place in range(count)],
        "beta2": [None, *(float(random.uniform(0.9, 0.999)) for _ in range(count - 1))],
    }
    curves = [losses(case, place, 3 if place % 3 == 2 else 12) for place in range(count)]
    values = [{option: drawn[option][place] for option in drawn} for place in range(count)]
    return study_of(curves, values)


def study_of(curves: list[dict[int, float]], values: list[dict[str, Any]]) -> Study:
    study = optuna.create_study()
    for place, (curve, params) in enumerate(zip(curves, values, strict=True)):
        lowest = min(filter(math.isfinite, curve.values()), default=None)
        is_pruned = place % 3 == 2 or lowest is None
        kinds = {option: CategoricalDistribution([value]) for option, value in params.items()}
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
                value=None if is_pruned else lowest,
                params=params,
                distributions=dict(kinds),
                intermediate_values=curve,
            )
        )
    return study


def points(case: str, count: int) -> list[statistics.PointSummary]:
    long = LONG if case == "long names" else ""
    grid = [{"n_layer": 2, f"rate{long}": 0.001 * place, "seq": 8} for place in range(count)]
    seeds = {"one value": 1, "no value": 0}.get(case, 5)
    results = [
        JobResult(str(seed), "finished", {**point, "seed": seed}, None if is_nan else value)
        for place, point in enumerate(grid)
        for seed in range(seeds)
        for value in [3e5 + 0.01 * place + 0.001 * (seed * 7 % 5)]
        for is_nan in [case == "NaN" and (place % 3 == 0 or seed == 2)]
    ]
    return statistics.summarize(grid, results, "value")


def document_sizes(case: str, count: int) -> Lengths:
    """Documents of equal lengths, empty ones, or of all lengths, one of them huge."""
    drawn = np.random.default_rng(0).lognormal(6, 2, 100 * count) - 5
    sizes = {"one value": np.full(count, 512), "no value": np.zeros(count)}.get(case, drawn)
    longest = [10_000_000] if case == "huge" else []
    return lengths_of(np.array([*sizes.clip(0), *longest], dtype=np.int64), block_size=1024)


KINDS: dict[str, Callable[[str, int], Figure]] = {
    "runs": lambda case, count: plot.draw(logged(case, count)),
    "models": lambda case, count: models.draw(logged(case, count), lambda step: 8192 * step),
    "trials": lambda case, count: trial_report.draw_comparison(search(case, count)),
    "history": lambda case, count: trial_report.draw_history(search(case, count)),
    "options": lambda case, count: trial_report.draw_relationships(search(case, count)),
    "points": lambda case, count: statistics.draw(points(case, count), "value"),
    "documents": lambda case, count: document_lengths.draw(
        document_sizes(case, count), name(case, 0)
    ),
}
CASES = [
    *(("plain", count) for count in (1, 100)),
    ("long names", 12),
    ("NaN", 40),
    *((case, 1) for case in ("one value", "no value")),
]
PICTURES = [
    *((kind, case, count) for kind in KINDS for case, count in CASES),
    *((kind, "one value", 40) for kind in ("runs", "models", "documents")),
    *((kind, "huge", 12) for kind in ("models", "history", "options", "documents")),
    ("runs", "many steps", 3),
    *(
        pytest.param(kind, case, count, marks=pytest.mark.soak)
        for kind in KINDS
        for case, count in (("plain", 3), ("plain", 12), ("plain", 40), ("long names", 1))
    ),
]


def shown_labels(axis: Axis, index: int) -> Iterator[Text]:
    """The tick labels in the range of an axis; matplotlib keeps others that it does not draw."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    for label in [*axis.get_majorticklabels(), *axis.get_minorticklabels()]:
        if low - margin <= label.get_position()[index] <= high + margin:
            yield label


def shown_texts(figure: Figure) -> list[Text]:
    everything = {id(text): text for text in figure.findobj(Text)}
    for axes in figure.axes:
        for index, axis in enumerate((axes.xaxis, axes.yaxis)):
            shown = (
                {id(text) for text in shown_labels(axis, index)} if axes.get_visible() else set()
            )
            shown |= {id(axis.label), id(axis.get_offset_text())}
            for text in axis.findobj(Text):
                if id(text) not in shown:
                    everything.pop(id(text), None)
    return [text for text in everything.values() if text.get_visible() and text.get_text().strip()]


def overlap(one: Bbox, other: Bbox) -> bool:
    both = Bbox.intersection(one, other)
    return both is not None and both.width > TOUCH and both.height > TOUCH


def assert_fine(figure: Figure) -> None:
    """No text has TeX, is cut off or lies over another one; no legend covers a panel."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown_texts(figure)]
    for words, box in boxes:
        assert "$" not in words and "\\" not in words, words
        inside = box.x0 >= -1 and box.y0 >= -1
        inside &= box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"cut off: {words!r}"
    for (words, box), (other, other_box) in combinations(boxes, 2):
        assert not overlap(box, other_box), f"{words!r} over {other!r}"
    for axes in figure.axes:
        panel = axes.get_window_extent(renderer)
        if axes.get_visible():
            assert panel.width > 100 and panel.height > 100, "a panel is squeezed"
            for legend in figure.legends:
                assert not overlap(panel, legend.get_window_extent(renderer))
    assert max(figure.get_size_inches()) <= 40


@pytest.mark.parametrize(("kind", "case", "count"), PICTURES, ids=str)
class TestEveryPicture:
    def test_its_texts_are_plain_whole_and_apart(self, kind: str, case: str, count: int):
        assert_fine(figures.drawn(lambda: KINDS[kind](case, count)))


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_of_many_runs_the_best_stand_out_from_a_band():
    legend = legend_of(plot.draw(logged("plain", 40)))
    assert legend[0] == "demo_0" and legend[5:] == ["middle half of 40 runs", "all 40 runs"]


def test_the_figure_grows_with_its_legend():
    low, high = (plot.draw(logged("plain", count)).get_figheight() for count in (2, 12))
    assert high > low


def test_a_loss_of_zero_is_drawn():
    study = study_of([{100: 0.5}, {100: 0.0}], [{"rate": 0.1}] * 2)
    for figure in (trial_report.draw_history(study), trial_report.draw_relationships(study)):
        heights = np.concatenate([dots.get_offsets()[:, 1] for dots in figure.axes[0].collections])
        assert sorted(heights) == [0.0, 0.5]
    assert list(trial_report.draw_history(study).axes[0].lines[0].get_ydata()) == [0.5, 0.0]


def test_a_loss_far_above_the_others_is_counted_but_not_drawn():
    curves = [{100: 3.0 + 0.1 * (place % 3 or 1e9 * (place == 6))} for place in range(12)]
    study = study_of(curves, [{"rate": 0.1}] * 12)
    for figure in (trial_report.draw_history(study), trial_report.draw_relationships(study)):
        assert figure.axes[0].get_ylim()[1] < 20
        assert figure.axes[0].get_ylabel().startswith("validation loss (1 above ")


def test_1200_points_have_few_labels():
    figure = statistics.draw(points("one value", 1200), "value")
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) <= statistics.MAX_ROWS and figure.get_figheight() < 25


def test_no_picture_is_larger_than_its_limit(tmp_path: Path):
    figures.write(lambda: Figure(figsize=(2, 500)), tmp_path / "tall.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "tall.png").shape
    assert height <= figures.MAX_PIXELS and width >= 20


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-5, 1e-2, ["1e-5", "0.0001", "0.001", "0.01"]),
        (131_072, 1_048_576, ["200,000", "500,000", "1e6"]),
        (1e-12, 1e3, None),
        (1.0, 1.5, None),
    ],
)
def test_a_logarithmic_axis_has_a_few_plain_numbers(low: float, high: float, labels: object):
    def draw() -> Figure:
        figure = Figure()
        axes = figure.add_subplot()
        axes.loglog([low, high], [low, high])
        axes.set_xlim(low, high)
        return figure

    figure = figures.drawn(draw)
    assert_fine(figure)
    shown = [text.get_text() for text in shown_labels(figure.axes[0].xaxis, 0)]
    assert shown == labels if labels else 2 <= len(shown) <= 7


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/a/x", "runs/b/x"], ["a/x", "b/x"]),
        (["big_model-adam", "big_model-muon"], ["adam", "muon"]),
        (
            ["seeds/n_layer=2,seed=0", "seeds/n_layer=4,seed=0"],
            ["n_layer=2,seed=0", "n_layer=4,seed=0"],
        ),
        (["demo_1", "demo_2"], ["demo_1", "demo_2"]),
        (["lr-1e-3", "lr-1e-4"], ["lr-1e-3", "lr-1e-4"]),
        (["run", "run_2"], ["run", "run_2"]),
        (["runs/run", "runs/run/2"], ["run", "run/2"]),
        (["runs/only"], ["runs/only"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_names_lose_what_all_begin_with(names: list[str], short: list[str]):
    assert figures.short_names(names) == short


def test_long_texts_are_wrapped_at_words_and_lose_no_letter():
    text = "a_long_name of/some, words=" + 30 * "x"
    lines = figures.wrapped(text, 12).splitlines()
    assert max(map(len, lines)) <= 12 and "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines[0] == "a_long_name" and figures.wrapped("", 12) == ""
    assert figures.shortened("abcdefgh", 5) == "ab…gh"

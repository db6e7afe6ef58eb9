"""A wide student recovers a low-rank teacher: by gradient descent, and by guess and check.

The teacher is a random matrix of low rank, the student a product U V whose inner dimension is at
least that rank. Both methods get the same linear measurements <A_i, teacher>, and are tested on the
directions that these do not determine. The problem and guess and check are those of Alexander,
Slutzky, Ran-Milo and Cohen, "Do Neural Networks Need Gradient Descent to Generalize?"
(arXiv:2506.03931): students are drawn at random until one fits the measurements. Sizes, prior and
tolerance are chosen so that it takes minutes on a CPU. The same command again resumes, or shows the
results; --help lists the flags.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gpt2.cli.parse import guarded, parse
from gpt2.cli.pool_options import ScriptOptions
from gpt2.experiments.api import ConfigError, PointSummary, Report, sweep, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Array = npt.NDArray[np.float32]
METHODS = {"gd": "gradient descent", "gnc": "guess and check"}
AT_ONCE = 5_000  # guesses between two reports
GD_STEPS, GD_AIM, GD_START = 10_000, 1e-5, 0.01
"""maximum steps; training error at which it ends; scale of the first weights (small: low rank)"""
UNCHECKED = 2.0  # expected test error of a guess without the check


@dataclass(frozen=True)
class Command:
    """Recover a low-rank teacher matrix with a wider student, by gradient descent and by guess and
    check. A student that is narrower than its teacher cannot represent it, and is left out."""

    gnc: bool = False
    """guess and check"""
    gd: bool = False
    """gradient descent; without either flag, both"""
    teacher_ranks: tuple[int, ...] = (2, 4, 8)
    student_dims: tuple[int, ...] = (4, 8, 16)
    """inner dimensions of the student"""
    measurements: tuple[int, ...] = (16, 48)
    """number of linear measurements of the teacher, less than its number of entries"""
    size: int = 8
    """rows and columns of the teacher"""
    num_seeds: int = 8
    """each seed has its own teacher and measurements"""
    guesses: int = 250_000
    """maximum number of guesses; if none fits, the best one is taken"""
    tolerance: float = 0.3
    """training error at which a guess fits; a matrix of zeros has 1"""
    place: ScriptOptions = ScriptOptions(checkpoint_dir=Path("checkpoints/teacher_student"))

    def __post_init__(self) -> None:
        lists = ("teacher_ranks", "student_dims", "measurements")
        for flag in lists:
            values = getattr(self, flag)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{flag} {values}: expected one or more different numbers")
        for flag in (*lists, "num_seeds", "guesses", "tolerance"):
            if not (value := np.min(getattr(self, flag))) > 0:
                raise ConfigError(f"--{flag} {value} must be more than 0")
        for flag, most in (("teacher_ranks", self.size), ("measurements", self.size**2 - 1)):
            if (value := max(getattr(self, flag))) > most:
                raise ConfigError(f"--{flag} {value}: a matrix of --size {self.size} allows {most}")


@dataclass(frozen=True)
class Problem:
    """A teacher, its measurements, and an orthonormal basis of the directions not measured."""

    teacher: Array
    seen: Array
    hidden: Array
    size: int
    random: np.random.Generator
    """for the student"""

    @classmethod
    def draw(cls, seed: int, size: int, rank: int, measurements: int) -> "Problem":
        """A random problem: teacher entries of mean square 1 for any rank, normal measurements."""
        random = np.random.default_rng((seed, size, rank, measurements))
        left = random.standard_normal((size, rank), np.float32)
        teacher = left @ random.standard_normal((rank, size), np.float32)
        teacher *= size / np.linalg.norm(teacher)
        seen = random.standard_normal((size * size, measurements), np.float32)
        hidden = np.linalg.qr(seen, mode="complete")[0][:, measurements:]
        return cls(teacher.ravel(), seen, hidden, size, random)

    def errors(self, students: Array, directions: Array) -> Array:
        """Squared errors of flat students in these directions, relative to the teacher's norm."""
        missed = (students - self.teacher) @ directions
        return np.asarray(np.sum(missed**2, -1) / np.sum((self.teacher @ directions) ** 2))


def recover(
    report: Report,
    seed: int,
    method: str,
    measurements: int,
    teacher_rank: int,
    student_dim: int,
    size: int,
    guesses: int,
    tolerance: float,
) -> dict[str, float]:
    """Trains one student; returns its errors, and `fits`: 1 if it fits the measurements, else 0."""
    problem = Problem.draw(seed, size, teacher_rank, measurements)
    if method == "gd":
        student, aim = descend(problem, student_dim), GD_AIM
    else:
        student, aim = guess(problem, student_dim, guesses, tolerance, report), tolerance
    train, test = (float(problem.errors(student, it)) for it in (problem.seen, problem.hidden))
    return {"train": train, "test": test, "fits": int(train <= aim)}


def descend(problem: Problem, dim: int) -> Array:
    """The student after gradient descent on the mean squared error, from small weights."""
    seen, size, random = problem.seen, problem.size, problem.random
    left = GD_START * random.standard_normal((size, dim), np.float32)
    right = GD_START * random.standard_normal((dim, size), np.float32)
    rate = 0.8 / (np.linalg.norm(seen, 2) ** 2 * size)  # stable where it is steepest
    for _ in range(GD_STEPS):
        student = (left @ right).ravel()
        if problem.errors(student, seen) < GD_AIM:
            break
        slope = (seen @ ((student - problem.teacher) @ seen)).reshape(size, size)
        left, right = left - rate * slope @ right.T, right - rate * left.T @ slope
    return student


def guess(problem: Problem, dim: int, guesses: int, tolerance: float, report: Report) -> Array:
    """The first student that fits, or the best one; normal weights, entries of mean square 1."""
    size, random = problem.size, problem.random
    best, lowest = np.zeros(size * size, np.float32), np.inf
    for done in range(0, guesses, AT_ONCE):
        count = min(AT_ONCE, guesses - done)
        left = random.standard_normal((count, size, dim), np.float32)
        right = random.standard_normal((count, dim, size), np.float32)
        students = (left @ right).reshape(count, -1) / np.float32(np.sqrt(dim))
        errors = problem.errors(students, problem.seen)
        fits = np.flatnonzero(errors <= tolerance)
        chosen = fits[0] if len(fits) else errors.argmin()
        if len(fits) or errors[chosen] < lowest:
            best, lowest = students[chosen], errors[chosen]
        answer = report(step=done + count, total_steps=guesses, loss=float(lowest))
        if len(fits) or answer != "go":
            break
    return best


def listing(points: Sequence[PointSummary], metric: str) -> "Table":
    """A row for each combination of sizes, with the errors of each method."""
    methods = dict.fromkeys(item.point["method"] for item in points)
    shown = [f"{name} {column}" for name in methods for column in ("fits", "train", "test", "95 %")]
    built = table(f"Relative {metric} error", "measurements", "teacher rank", "student dim", *shown)
    for place, items in itertools.groupby(points, _place):
        cells = [cell for item in items for cell in _cells(item, metric)]
        built.add_row(*map(str, place), *cells)
    return built


def _cells(item: PointSummary, metric: str) -> tuple[str, ...]:
    if metric not in item.metrics:
        return ("-",) * 4
    fits, train, test = (item.metrics[name] for name in ("fits", "train", metric))
    interval = "-" if test.low is None else f"{test.low:.2g} to {test.high:.2g}"
    count = f"{fits.mean * fits.count:.0f} of {fits.count}"
    return count, f"{train.mean:.2g}", f"{test.mean:.2g}", interval


def _place(item: PointSummary) -> tuple[int, ...]:
    return tuple(item.point[name] for name in ("measurements", "teacher_rank", "student_dim"))


def draw(points: Sequence[PointSummary], metric: str) -> "Figure":
    """A panel for each teacher and number of measurements: error over the student's dimension."""
    from matplotlib.figure import Figure

    amounts, ranks, dims = (sorted(set(sizes)) for sizes in zip(*map(_place, points), strict=True))
    height, width = 2.6 * len(amounts) + 0.7, 3.2 * len(ranks) + 0.6
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(amounts), len(ranks), sharex=True, sharey=True, squeeze=False)
    for row, column in itertools.product(range(len(amounts)), range(len(ranks))):
        here = [item for item in points if _place(item)[:2] == (amounts[row], ranks[column])]
        _draw_panel(panels[row][column], here)
        panels[row][column].set_title(f"rank {ranks[column]}, {amounts[row]} measurements")
    for axes in panels[-1]:
        axes.set(xticks=dims, xlabel="inner dimension of the student")
    for axes in panels[:, 0]:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"relative {metric} error")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _draw_panel(axes: "Axes", points: Sequence[PointSummary]) -> None:
    """Each seed as a dot, means as a line."""
    axes.set_yscale("log")
    axes.axhline(UNCHECKED, color="#888888", linestyle=":", label="a guess, not checked")
    axes.axhline(1, color="#888888", linestyle="--", linewidth=1, label="zeros")
    for color, (method, name) in zip(("C0", "C1"), METHODS.items(), strict=True):
        found = [item for item in points if item.point["method"] == method and item.values]
        dims = [item.point["student_dim"] for item in found]
        for dim, item in zip(dims, found, strict=True):
            errors = [*item.values.values()]
            axes.scatter([dim] * len(errors), errors, s=14, color=color, alpha=0.4, linewidths=0)
        means = [item.metrics["test"].mean for item in found]
        axes.plot(dims, means, "o-", color=color, label=name)


def run() -> int:
    command = parse(Command, sys.argv[1:])
    methods = [name for name in METHODS if getattr(command, name)] or [*METHODS]
    pairs = [*itertools.product(command.teacher_ranks, command.student_dims)]
    if max(command.student_dims) < min(command.teacher_ranks):
        raise ConfigError("every student is narrower than its teacher; use larger --student_dims")
    if narrow := [f"{dim} for rank {rank}" for rank, dim in pairs if dim < rank]:
        print(f"Left out, as narrower than the teacher: student dim {', '.join(narrow)}")
    points = [
        {"measurements": amount, "teacher_rank": rank, "student_dim": dim, "method": method}
        for amount, (rank, dim), method in itertools.product(command.measurements, pairs, methods)
        if dim >= rank
    ]
    fixed = {name: getattr(command, name) for name in ("size", "guesses", "tolerance")}
    with command.place.placed() as place:
        return sweep(
            partial(recover, **fixed),
            points,
            command.num_seeds,
            metric="test",
            listing=listing,
            draw=draw,
            **place,
        ).exit_code


if __name__ == "__main__":
    sys.exit(guarded(run))

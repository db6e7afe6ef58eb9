"""Seed sweeps: a training or a function runs with every seed at every point of a grid."""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, RenderableType

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.experiments import grid, results
from gpt2.experiments.grid import Point
from gpt2.experiments.pool.function_call import Call
from gpt2.experiments.pool.job import Event, Job
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler, worker_logs
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import StateTracker
from gpt2.experiments.results import ExperimentDescription, JobResult, ResultsStore
from gpt2.experiments.sweep import statistics
from gpt2.experiments.sweep.statistics import PointSummary
from gpt2.inspection import figures
from gpt2.train.report import Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAVE_EVERY = 50
"""results between two writes of results.json"""
MAX_NAME_LENGTH = 200
SAVE_INTERVAL_RATIO = 20
"""minimum time between two writes of results.json, in durations of a write"""
SEEDS_ONLY_BY_FLAGS = "the seeds of a sweep are set by --num_seeds and --first_seed only"
MakeTable = Callable[[Sequence[PointSummary], str], RenderableType]
"""makes the table of the points, for a metric"""
MakeFigure = Callable[[Sequence[PointSummary], str], "Figure"]
"""draws the points, for a metric"""


class SweepTarget(Protocol):
    """What a sweep runs at each point with each seed."""

    @property
    def name(self) -> str:
        """Its name in messages: `Sweep of NAME`."""
        ...

    def require(self, points: Sequence[Point]) -> None:
        """Raises ConfigError for points that it cannot run with."""
        ...

    def fixed(self, swept: Collection[str]) -> dict[str, Any]:
        """The values that results depend on, without those of the `swept` names."""
        ...

    def job(self, name: str, values: Point, folder: Path) -> Job:
        """The job of one seed of a point; it may write files to `folder`."""
        ...

    def prepare(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        """Called before the first job; raises UserError if the planned jobs cannot run."""
        ...

    def clear(self, folder: Path) -> None:
        """Called after a job has finished; may remove files from its `folder`."""
        ...


@dataclass(frozen=True)
class FunctionTarget:
    """A function that takes `seed` and the values of a point, and returns numbers."""

    call: Call

    @property
    def name(self) -> str:
        return self.call.target

    def require(self, points: Sequence[Point]) -> None:
        for names in {tuple(point) for point in points}:
            self.call.require(("seed", *names))

    def fixed(self, swept: Collection[str]) -> dict[str, Any]:
        fixed = {name: value for name, value in self.call.kwargs.items() if name not in swept}
        return {grid.free_key("target", fixed): self.call.target, **fixed}

    def job(self, name: str, values: Point, folder: Path) -> Job:
        kwargs = {**self.call.kwargs, **values}
        return Job(name, self.call.target, kwargs, own_process=False, wants_numbers=True)

    def prepare(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        pass

    def clear(self, folder: Path) -> None:
        pass


@dataclass(frozen=True)
class Sweep:
    """A target, the points and seeds that it runs with, and where results are stored."""

    target: SweepTarget
    points: Sequence[Point] = field(default_factory=lambda: [{}])
    seeds: range = range(10)
    metric: str = "value"
    """the number in the results that is compared"""
    folder: Path = Path("checkpoints/seeds")
    log_dir: Path = Path("logs")
    save_every_s: float = 1800.0
    listing: MakeTable = statistics.points_table
    draw: MakeFigure = statistics.draw

    def __post_init__(self) -> None:
        if not self.points or not self.seeds:
            raise ConfigError(
                "expected at least one point and one seed, got "
                f"{counted(len(self.points), 'point')} and {counted(len(self.seeds), 'seed')}"
            )
        if "seed" in self.points[0]:
            raise ConfigError(SEEDS_ONLY_BY_FLAGS)
        if any(set(point) != set(self.points[0]) for point in self.points):
            raise ConfigError("all points of a sweep must have the same names")
        self.target.require(self.points)
        self._require_names()

    def _require_names(self) -> None:
        """Raises ConfigError if two points would have the same name, or a name is too long."""
        named: dict[str, Point] = {}
        for point in self.points:
            name = grid.point_name(point)
            if len(name) > MAX_NAME_LENGTH:
                raise ConfigError(
                    f"grid: the name {name:.80}… of a point is longer than {MAX_NAME_LENGTH} "
                    "characters; use other values"
                )
            if named.get(name) == point:
                raise ConfigError(f"grid: duplicate point {name or 'without values'}")
            if name in named:
                raise ConfigError(f"grid: two points would have the name {name}; use other values")
            named[name] = point

    def description(self) -> ExperimentDescription:
        """The identity of this sweep; seeds and points may be added to it later."""
        fixed = self.target.fixed({"seed", *self.points[0]})
        fixed[grid.free_key("grid", fixed)] = " ".join(self.points[0]) or "no grid"
        return ExperimentDescription("seeds", fixed, total=len(self.points) * len(self.seeds))

    def planned(self) -> dict[str, Point]:
        """The values of each job by its name: the first seed of every point, then the second, …"""
        return {
            grid.job_name(point, seed): {**point, "seed": seed}
            for seed in self.seeds
            for point in self.points
        }

    def job(self, name: str, values: Point) -> Job:
        """The job of one seed of a point."""
        return self.target.job(name, values, self.folder / name)


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep."""

    exit_code: int
    """0; 1 if a job failed, 128 plus the signal's number if it was stopped"""
    records: Sequence[JobResult]
    """the result of each job that has ended, in this start or an earlier one"""
    points: Sequence[PointSummary]
    """the statistics of each point over its seeds"""


class SweepSource:
    """Gives the jobs of a sweep to the scheduler and stores their results."""

    def __init__(self, sweep: Sweep, store: ResultsStore) -> None:
        self._sweep, self._store = sweep, store
        self._planned = sweep.planned()
        self._waiting = iter(self.left())
        self._unsaved, self._saved_at, self._save_s = 0, time.monotonic(), 0.0

    def next(self) -> Job | None:
        name = next(self._waiting, None)
        return None if name is None else self._sweep.job(name, self._planned[name])

    def event(self, event: Event) -> Answer:
        if event.kind in ("finished", "pruned", "failed"):
            assert event.job is not None
            self._store.add(JobResult.from_event(event, self._planned[event.job.name]))
            self._unsaved += 1
            if event.kind == "finished":
                self._sweep.target.clear(self._sweep.folder / event.job.name)
        if self._is_save_due():
            self.save()
        return "go"

    def _is_save_due(self) -> bool:
        age_s = time.monotonic() - self._saved_at
        many = self._unsaved >= SAVE_EVERY and age_s > SAVE_INTERVAL_RATIO * self._save_s
        return many or (self._unsaved > 0 and age_s > self._sweep.save_every_s)

    def save(self) -> None:
        """Writes results.json with all results so far."""
        began = time.monotonic()
        points = [asdict(item) for item in self.summaries()]
        failed = [result.job for result in self.failures()]
        self._store.save(metric=self._sweep.metric, points=points, failures=failed)
        self._unsaved, self._saved_at = 0, time.monotonic()
        self._save_s = self._saved_at - began

    def left(self) -> list[str]:
        """The names of the jobs that still have to run."""
        return [name for name in self._planned if not self._store.is_done(name)]

    def results(self) -> list[JobResult]:
        """The results of the planned jobs that have ended, in the planned order."""
        known = self._store.results
        return [known[name] for name in self._planned if name in known]

    def failures(self) -> list[JobResult]:
        return [result for result in self.results() if result.state == "failed"]

    def summaries(self) -> list[PointSummary]:
        """The statistics of each point over its seeds."""
        return statistics.summarize(self._sweep.points, self.results(), self._sweep.metric)


def run_sweep(sweep: Sweep, engine: Engine, limits: Limits, out: Console) -> SweepResult:
    """Runs the jobs of the sweep that are not done yet, and shows the results of all."""
    sweep.target.prepare(sweep.planned(), sweep.folder, len(engine.slots))
    with results.opened(sweep.folder, sweep.description()) as store:
        source = SweepSource(sweep, store)
        total = sweep.description().total
        done = total - len(source.left())
        _print_plan(sweep, engine, done, out)
        tracker = StateTracker("seeds", total, engine.slots, before=done)
        log = sweep.log_dir / f"seeds_{time.strftime('%Y%m%d_%H%M%S')}.log"
        with showing_progress(tracker, sweep.folder, log=log, out=out) as on_event:
            log_of = worker_logs(sweep.log_dir)
            signal_number = Scheduler(engine, source, on_event, log_of=log_of, limits=limits).run()
        source.save()
        _print_summary(sweep, source, out)
        left = source.left()
        code = 0 if not left else 128 + signal_number if signal_number else 1
        if signal_number and left:
            jobs = counted(len(left), "job")
            out.print(f"Stopped: {jobs} left; run the same command to continue")
        return SweepResult(code, source.results(), source.summaries())


def _print_plan(sweep: Sweep, engine: Engine, done: int, out: Console) -> None:
    total = len(sweep.points) * len(sweep.seeds)
    points = f"{counted(len(sweep.points), 'point')} of a grid, " if [*sweep.points] != [{}] else ""
    first, last = sweep.seeds[0], sweep.seeds[-1]
    which = f"{first}" if first == last else f"{first} to {last}"
    seeds = f"{counted(len(sweep.seeds), 'seed')} ({which})"
    out.print(f"Sweep of {sweep.target.name}: {points}{seeds}, {counted(total, 'job')}")
    if done:
        out.print(f"  - {done} of them are done already, in {sweep.folder}")
    out.print(f"  - on {', '.join(slot.name for slot in engine.slots)}")
    out.print(f"  - results {sweep.folder}, logs {sweep.log_dir}")


def _print_summary(sweep: Sweep, source: SweepSource, out: Console) -> None:
    """Prints the table and the failures, and draws the picture."""
    summaries, ended = source.summaries(), source.results()
    files = f"Results: {sweep.folder / results.RESULTS_FILE}"
    if any(item.values for item in summaries):
        out.print(sweep.listing(summaries, sweep.metric))
        picture = sweep.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', sweep.metric)}.png"
        try:
            figures.write(lambda: sweep.draw(summaries, sweep.metric), picture)
            files += f", picture: {picture}"
        except ConfigError as error:
            files += f"; no picture: {error}"
    elif reason := statistics.missing_metric(ended, sweep.metric):
        out.print(reason)
    for result in source.failures():
        out.print(f"FAILED {result.job}: {result.reason}", style="red")
    if ended:
        out.print(files)

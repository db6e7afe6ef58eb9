"""Seed sweeps: every seed of every point of a grid, of a training or of any function."""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, RenderableType

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.experiments import grid as plan
from gpt2.experiments import results as ledgers
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
from gpt2.inspection import plot
from gpt2.train.report import Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAVE_EVERY = 50
LONGEST_NAME = 200
SELDOM = 20
"""times as long as a save takes, at least, lies between two: many results make it slow"""
SEEDS_APART = "the seeds of a sweep are given by --num_seeds and --first_seed alone"
Listing = Callable[[Sequence[PointSummary], str], RenderableType]
Drawing = Callable[[Sequence[PointSummary], str], "Figure"]
"""of what the seeds of each point say, and the metric"""


class Task(Protocol):
    """What runs at each point of a sweep, with each seed."""

    @property
    def name(self) -> str:
        """As in `Sweep of NAME`."""
        ...

    def require(self, points: Sequence[Point]) -> None:
        """Raises ConfigError for points that it cannot run."""
        ...

    def fixed(self, swept: Collection[str]) -> dict[str, Any]:
        """What decides over the results beside the values of the `swept` names."""
        ...

    def job(self, name: str, values: Point, folder: Path) -> Job:
        """One seed of a point; `folder` is there for what it keeps."""
        ...

    def prepare(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        """Before any of the planned jobs begins; raises UserError if they cannot run."""
        ...

    def clear(self, folder: Path) -> None:
        """After a job has finished: what is not wanted of its `folder` goes."""
        ...


@dataclass(frozen=True)
class Function:
    """A function that is called with `seed` and the values of a point, and returns numbers."""

    call: Call

    @property
    def name(self) -> str:
        return self.call.target

    def require(self, points: Sequence[Point]) -> None:
        for names in {tuple(point) for point in points}:
            self.call.require(("seed", *names))

    def fixed(self, swept: Collection[str]) -> dict[str, Any]:
        own = {name: value for name, value in self.call.kwargs.items() if name not in swept}
        return {plan.free_key("target", own): self.call.target, **own}

    def job(self, name: str, values: Point, folder: Path) -> Job:
        kwargs = {**self.call.kwargs, **values}
        return Job(name, self.call.target, kwargs, own_process=False, wants_numbers=True)

    def prepare(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        pass

    def clear(self, folder: Path) -> None:
        pass


@dataclass(frozen=True)
class Sweep:
    """Every seed of every point, of one task."""

    task: Task
    points: Sequence[Point] = field(default_factory=lambda: [{}])
    seeds: range = range(10)
    metric: str = "value"
    """which number of the results is compared"""
    folder: Path = Path("checkpoints/seeds")
    log_dir: Path = Path("logs")
    save_every_s: float = 1800.0
    listing: Listing = statistics.listing
    draw: Drawing = statistics.draw

    def __post_init__(self) -> None:
        if not self.points or not self.seeds:
            raise ConfigError("a sweep needs a point and a seed, at least")
        if "seed" in self.points[0]:
            raise ConfigError(SEEDS_APART)
        if any(set(point) != set(self.points[0]) for point in self.points):
            raise ConfigError("every point of a sweep must have a value for each of the same names")
        self.task.require(self.points)
        self._require_names()

    def _require_names(self) -> None:
        """Raises ConfigError if points cannot be told apart by the names of their jobs."""
        named: dict[str, Point] = {}
        for point in self.points:
            name = plan.point_name(point)
            if len(name) > LONGEST_NAME:
                raise ConfigError(
                    f"grid: a point would be called {name:.80}…, which is longer than "
                    f"{LONGEST_NAME} characters; use other values"
                )
            if named.get(name) == point:
                raise ConfigError(f"grid: the point {name or 'without values'} is there twice")
            if name in named:
                raise ConfigError(f"grid: two points would be called {name}; use other values")
            named[name] = point

    def description(self) -> ExperimentDescription:
        """What all jobs have in common; seeds and values may be added later."""
        fixed = self.task.fixed({"seed", *self.points[0]})
        fixed[plan.free_key("grid", fixed)] = " ".join(self.points[0]) or "no grid"
        return ExperimentDescription("seeds", fixed, total=len(self.points) * len(self.seeds))

    def planned(self) -> dict[str, Point]:
        """Point and seed of each job; every point has its first seed before one has a second."""
        return {
            plan.job_name(point, seed): {**point, "seed": seed}
            for seed in self.seeds
            for point in self.points
        }

    def job(self, name: str, values: Point) -> Job:
        """The job of one seed of a point."""
        return self.task.job(name, values, self.folder / name)


@dataclass(frozen=True)
class Swept:
    """What became of a sweep."""

    exit_code: int
    """0; 1 if a job failed, 128 and the signal's number if it was stopped"""
    records: Sequence[JobResult]
    """of each job that has ended, by this start or an earlier one"""
    points: Sequence[PointSummary]
    """what the seeds of each point say"""


class Seeds:
    """The source of a sweep's jobs; keeps their results."""

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
                self._sweep.task.clear(self._sweep.folder / event.job.name)
        if self._is_save_due():
            self.save()
        return "go"

    def _is_save_due(self) -> bool:
        age_s = time.monotonic() - self._saved_at
        many = self._unsaved >= SAVE_EVERY and age_s > SELDOM * self._save_s
        return many or (self._unsaved > 0 and age_s > self._sweep.save_every_s)

    def save(self) -> None:
        """Replaces results.json by what is known now."""
        began = time.monotonic()
        points = [asdict(item) for item in self.summaries()]
        failed = [record.job for record in self.failures()]
        self._store.save(metric=self._sweep.metric, points=points, failures=failed)
        self._unsaved, self._saved_at = 0, time.monotonic()
        self._save_s = self._saved_at - began

    def left(self) -> list[str]:
        """The jobs that are not done."""
        return [name for name in self._planned if not self._store.is_done(name)]

    def records(self) -> list[JobResult]:
        """What became of the jobs that were asked for, in their order."""
        known = self._store.results
        return [known[name] for name in self._planned if name in known]

    def failures(self) -> list[JobResult]:
        return [record for record in self.records() if record.state == "failed"]

    def summaries(self) -> list[PointSummary]:
        """What the seeds of each point say."""
        return statistics.summarise(self._sweep.points, self.records(), self._sweep.metric)


def run(sweep: Sweep, engine: Engine, limits: Limits, out: Console) -> Swept:
    """Runs what is not done yet of the sweep, and shows all of it."""
    sweep.task.prepare(sweep.planned(), sweep.folder, len(engine.slots))
    with ledgers.opened(sweep.folder, sweep.description()) as store:
        source = Seeds(sweep, store)
        total = sweep.description().total
        done = total - len(source.left())
        _introduce(sweep, engine, done, out)
        tracker = StateTracker("seeds", total, engine.slots, before=done)
        log = sweep.log_dir / f"seeds_{time.strftime('%Y%m%d_%H%M%S')}.log"
        with showing_progress(tracker, sweep.folder, log=log, out=out) as on_event:
            pool = Scheduler(
                engine, source, on_event, log_of=worker_logs(sweep.log_dir), limits=limits
            )
            number = pool.run()
        source.save()
        _conclude(sweep, source, out)
        left = source.left()
        code = 0 if not left else 128 + number if number else 1
        if number and left:
            out.print(f"Stopped: {counted(len(left), 'job')} left; the same command goes on")
        return Swept(code, source.records(), source.summaries())


def _introduce(sweep: Sweep, engine: Engine, done: int, out: Console) -> None:
    total = len(sweep.points) * len(sweep.seeds)
    grid = f"{counted(len(sweep.points), 'point')} of a grid, " if [*sweep.points] != [{}] else ""
    first, last = sweep.seeds[0], sweep.seeds[-1]
    which = f"{first}" if first == last else f"{first} to {last}"
    seeds = f"{counted(len(sweep.seeds), 'seed')} ({which})"
    out.print(f"Sweep of {sweep.task.name}: {grid}{seeds}, {counted(total, 'job')}")
    if done:
        out.print(f"  - {done} of them are done already, in {sweep.folder}")
    out.print(f"  - on {', '.join(slot.name for slot in engine.slots)}")
    out.print(f"  - results {sweep.folder}, logs {sweep.log_dir}")


def _conclude(sweep: Sweep, source: Seeds, out: Console) -> None:
    """The table, what failed, and the picture."""
    summaries, records = source.summaries(), source.records()
    results = f"Results: {sweep.folder / ledgers.RESULTS_FILE}"
    if any(item.values for item in summaries):
        out.print(sweep.listing(summaries, sweep.metric))
        picture = sweep.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', sweep.metric)}.png"
        try:
            plot.write(lambda: sweep.draw(summaries, sweep.metric), picture)
            results += f", picture: {picture}"
        except ConfigError as error:
            results += f"; no picture: {error}"
    elif lack := statistics.lack(records, sweep.metric):
        out.print(lack)
    for record in source.failures():
        out.print(f"FAILED {record.job}: {record.reason}", style="red")
    if records:
        out.print(results)

"""Seed sweeps: every seed of every point of a grid, of a training or of any function."""

import inspect
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt2 import config, estimate, machine, plot
from gpt2.config import MachineConfig, RunConfig
from gpt2.errors import ConfigError
from gpt2.experiments import ledger as ledgers
from gpt2.experiments import plan, summary, training, worker
from gpt2.experiments.board import Board
from gpt2.experiments.ledger import About, Ledger, Record
from gpt2.experiments.plan import Answer, Event, Job, Point
from gpt2.experiments.pool import Limits, Pool, worker_logs
from gpt2.experiments.process import Engine
from gpt2.experiments.view import watched
from gpt2.tables import counted

SAVE_EVERY = 50
LONGEST_NAME = 200
SELDOM = 20
"""times as long as a save takes, at least, lies between two: many results make it slow"""
KEPT = 3
"""checkpoints of a training in a sweep, at most: the newest two and the best"""


@dataclass(frozen=True)
class Sweep:
    """Every seed of every point, of one function."""

    run: RunConfig
    """the training, where there is no other target"""
    target: str | None = None
    """`module:function`, called with seed and the point's values"""
    points: list[Point] = field(default_factory=lambda: [{}])
    seeds: range = range(10)
    metric: str = "val_loss"
    """which number of the results is compared"""
    folder: Path = Path("checkpoints/seeds")
    log_dir: Path = Path("logs")
    save_every_s: float = 1800.0
    keep_checkpoints: bool = True
    ranks: int = 1
    """GPUs of each training, or processes on the CPU"""

    def __post_init__(self) -> None:
        if "seed" in self.points[0] or self.run.machine.seed != MachineConfig().seed:
            raise ConfigError(
                "the seeds of a sweep are given by --num_seeds and --first_seed alone"
            )
        if self.target is None:
            training.require_fresh_start(self.run)
            for point in self.points:
                config.overlay(self.run, point)  # raises for a field that is none, or a bad value
        else:
            if self.ranks > 1:
                raise ConfigError(
                    f"--ddp {self.ranks} is for trainings; leave it out with --target"
                )
            _require_call(self.target, self.points[0])
        self._require_names()

    def _require_names(self) -> None:
        """Raises ConfigError if points cannot be told apart by the names of their jobs."""
        names = [plan.point_name(point) for point in self.points]
        for name in names:
            if names.count(name) > 1 or len(name) > LONGEST_NAME:
                raise ConfigError(
                    f"--grid: a point would be called {name:.80}, which is not a name of its own "
                    f"of {LONGEST_NAME} characters at most; use other values"
                )

    def about(self) -> About:
        """What all jobs have in common; seeds and values may be added later."""
        fixed: dict[str, Any] = {"target": self.target or "training"}
        fixed["grid"] = " ".join(self.points[0]) or "no grid"
        if self.target is None:
            swept = {"seed", *self.points[0]}
            decisive = training.decisive(self.run)
            fixed |= {name: value for name, value in decisive.items() if name not in swept}
        return About("seeds", fixed, total=len(self.points) * len(self.seeds))

    def planned(self) -> dict[str, Point]:
        """Point and seed of each job; every point has its first seed before one has a second."""
        return {
            plan.job_name(point, seed): {**point, "seed": seed}
            for seed in self.seeds
            for point in self.points
        }

    def job(self, name: str, values: Point) -> Job:
        """The job of one seed of a point."""
        if self.target is not None:
            return Job(name, self.target, values, own_process=False)
        run_config = config.overlay(self.run, values)
        return training.job(name, run_config, self.folder / name, ranks=self.ranks, keep_last=2)


class Seeds:
    """The source of a sweep's jobs; keeps their results."""

    def __init__(self, sweep: Sweep, ledger: Ledger) -> None:
        self._sweep, self._ledger = sweep, ledger
        self._planned = sweep.planned()
        self._waiting = iter(self.left())
        self._unsaved, self._saved_at, self._save_s = 0, time.monotonic(), 0.0

    def next(self) -> Job | None:
        name = next(self._waiting, None)
        return None if name is None else self._sweep.job(name, self._planned[name])

    def event(self, event: Event) -> Answer:
        if event.kind in ("finished", "pruned", "failed"):
            assert event.job is not None
            self._ledger.add(Record.of(event, self._planned[event.job.name]))
            self._unsaved += 1
            if event.kind == "finished" and not self._sweep.keep_checkpoints:
                folder = self._sweep.folder / event.job.name
                # Gigabytes take long, and others wait for their answers.
                threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
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
        self._ledger.save(metric=self._sweep.metric, points=points, failures=failed)
        self._unsaved, self._saved_at = 0, time.monotonic()
        self._save_s = self._saved_at - began

    def left(self) -> list[str]:
        """The jobs that are not done."""
        return [name for name in self._planned if not self._ledger.is_done(name)]

    def records(self) -> list[Record]:
        """What became of the jobs that were asked for, in their order."""
        known = self._ledger.records
        return [known[name] for name in self._planned if name in known]

    def failures(self) -> list[Record]:
        return [record for record in self.records() if record.state == "failed"]

    def summaries(self) -> list[summary.PointSummary]:
        """What the seeds of each point say."""
        return summary.summarise(self._sweep.points, self.records(), self._sweep.metric)


def run(sweep: Sweep, engine: Engine, limits: Limits, out: Console) -> int:
    """Runs what is not done yet of the sweep; the exit code: 1 if a job failed, 128 and the
    signal's number if it was stopped."""
    if sweep.target is None:
        training.require_data(sweep.run, sweep.ranks)
        require_room(sweep, len(engine.slots))
    with ledgers.opened(sweep.folder, sweep.about()) as ledger:
        source = Seeds(sweep, ledger)
        total = sweep.about().total
        done = total - len(source.left())
        _introduce(sweep, engine, done, out)
        board = Board("seeds", total, engine.slots, before=done)
        log = sweep.log_dir / f"seeds_{time.strftime('%Y%m%d_%H%M%S')}.log"
        with watched(board, sweep.folder, log=log, out=out) as on_event:
            pool = Pool(engine, source, on_event, log_of=worker_logs(sweep.log_dir), limits=limits)
            number = pool.run()
        source.save()
        _conclude(sweep, source, out)
        left = source.left()
        if number and left:
            out.print(f"Stopped: {counted(len(left), 'job')} left; the same command goes on")
            return 128 + number
        return 1 if left else 0


def require_room(sweep: Sweep, at_once: int) -> None:
    """Raises ConfigError if the disk has no room for the checkpoints of the trainings that are to
    begin; what has begun has its room already."""
    needs = [
        KEPT * estimate.state_bytes(config.overlay(sweep.run, values).model)
        for name, values in sweep.planned().items()
        if not (sweep.folder / name).exists()
    ]
    if not sweep.keep_checkpoints:
        needs = sorted(needs)[-at_once:]
    _, free = machine.disk(sweep.folder)
    if sum(needs) > free:
        raise ConfigError(
            f"the checkpoints of {counted(len(needs), 'training')} may need "
            f"{sum(needs) / 1e9:,.0f} GB, {sweep.folder} has {free / 1e9:,.0f} GB free; use "
            "--no_keep_checkpoints (the results stay), or another disk with --checkpoint_dir"
        )


def _introduce(sweep: Sweep, engine: Engine, done: int, out: Console) -> None:
    total = len(sweep.points) * len(sweep.seeds)
    grid = f"{counted(len(sweep.points), 'point')} of a grid, " if sweep.points != [{}] else ""
    seeds = f"{counted(len(sweep.seeds), 'seed')} ({sweep.seeds[0]} to {sweep.seeds[-1]})"
    out.print(f"Sweep of {sweep.target or 'a training'}: {grid}{seeds}, {counted(total, 'job')}")
    if done:
        out.print(f"  - {done} of them are done already, in {sweep.folder}")
    out.print(f"  - on {plan.names(engine.slots, sweep.ranks)}")
    out.print(f"  - results {sweep.folder}, logs {sweep.log_dir}")


def _conclude(sweep: Sweep, source: Seeds, out: Console) -> None:
    """The table, what failed, and the picture."""
    summaries = source.summaries()
    if any(item.values for item in summaries):
        out.print(summary.listing(summaries, sweep.metric))
    elif known := sorted({name for item in summaries for name in item.metrics}):
        out.print(f"No result has {sweep.metric}; --metric may be one of {', '.join(known)}")
    for record in source.failures():
        out.print(f"FAILED {record.job}: {record.reason}", style="red")
    if any(item.values for item in summaries):
        picture = sweep.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', sweep.metric)}.png"
        try:
            plot.write(lambda: summary.draw(summaries, sweep.metric), picture)
        except ConfigError as error:
            out.print(f"WARNING: no picture: {error}")
        out.print(f"Results: {sweep.folder / ledgers.RESULTS}, picture: {picture}")


def _require_call(target: str, point: Point) -> None:
    """Raises ConfigError if the function cannot be called with a seed and a point."""
    names = inspect.signature(function := worker.find(target)).parameters
    report = {"report": None} if "report" in names else {}
    try:
        inspect.signature(function).bind(seed=0, **point, **report)
    except TypeError as error:
        given = ", ".join(("seed", *point))
        raise ConfigError(f"{target} cannot be called with {given}: {error}") from error

"""Seed sweeps: a function or a training runs with every seed at every point of a grid."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.base.validation import suggestion
from gpt2.config import flops, options
from gpt2.config.run import MachineConfig, RunConfig
from gpt2.experiments import grid
from gpt2.experiments.grid import Point
from gpt2.experiments.job_group import JobGroup, MakeJob, Records, Summary, Values
from gpt2.experiments.pool.function_call import Call
from gpt2.experiments.pool.job import Job
from gpt2.experiments.sweep import statistics
from gpt2.experiments.sweep.statistics import MakeFigure, MakeTable, PointSummary

MAX_NAME_LENGTH = 200
MAX_CHECKPOINTS = 3
"""checkpoints that a training in a sweep keeps at most: the newest two and the best"""
SEEDS_ONLY_BY_FLAGS = "the seeds of a sweep are set by --num_seeds and --first_seed only"


@dataclass(frozen=True)
class Sweep:
    """What runs with which seeds, and how the results are compared."""

    points: Sequence[Point]
    seeds: range
    metric: str | None
    """the number of the results that is compared; None is the only one they have, or `value`"""
    listing: MakeTable = statistics.points_table
    draw: MakeFigure = statistics.draw

    def __post_init__(self) -> None:
        if not self.points or not self.seeds:
            raise ConfigError("expected at least one point and one seed, got none")
        if "seed" in self.points[0]:
            raise ConfigError(SEEDS_ONLY_BY_FLAGS)
        if any(set(point) != set(self.points[0]) for point in self.points):
            raise ConfigError("all points of a sweep must have the same names")
        for name, count in Counter(map(grid.point_name, self.points)).items():
            if count > 1 or len(name) > MAX_NAME_LENGTH:
                raise ConfigError(
                    f"grid: {counted(count, 'point')} would have the name {name!r:.80}; expected "
                    f"different names of at most {MAX_NAME_LENGTH} characters, use other values"
                )

    def of_function(self, call: Call, **more: Any) -> JobGroup:
        """Calls a function with `seed` and the values of a point; it returns numbers. `more` are
        options of JobGroup."""
        call.require(("seed", *self.points[0]))

        def job(name: str, values: Values) -> Job:
            kwargs = {**call.kwargs, **values}
            return Job(name, call.target, kwargs, own_process=False, wants_numbers=True)

        return self._group(call.target, call.target, call.kwargs, job, **more)

    def of_training(
        self,
        run: RunConfig,
        folder: Path,
        ranks: int = 1,
        keep_checkpoints: bool = True,
        **more: Any,
    ) -> JobGroup:
        """Trains with the options of a point, on `ranks` GPUs, or processes on the CPU."""
        # Imports torch for seconds; the workers of a script with functions of its own import this.
        from gpt2.experiments.training import training_job

        training_job.require_fresh_start(run)
        if self.metric not in training_job.METRICS:
            near = suggestion(str(self.metric), training_job.METRICS)
            raise ConfigError(
                f"--metric {self.metric} is unknown{near}; expected "
                f"{', '.join(training_job.METRICS)}"
            )
        if run.machine.seed != MachineConfig().seed:
            raise ConfigError(SEEDS_ONLY_BY_FLAGS)
        for point in self.points:
            options.overlay(run, point)  # raises ConfigError for invalid names or values

        def job(name: str, values: Values) -> Job:
            # Points with different batch sizes validate on the same rows.
            rows = {"eval_rows": run.eval_rows} if "total_batch_size" in values else {}
            changed = options.overlay(run, {**rows, **values})
            return training_job.job(name, changed, folder / name, ranks=ranks, keep_last=2)

        what = "a training" if ranks == 1 else f"a training on {ranks} ranks"
        more |= {"folder": folder, "keep_folders": keep_checkpoints}
        group = self._group(what, "training", training_job.result_options(run), job, **more)
        if keep_checkpoints:
            _require_room(run, group)
        return group

    def _group(self, what: str, target: str, kwargs: Values, job: MakeJob, **more: Any) -> JobGroup:
        """The first seed of every point, then the second, and so on. Results depend on the target
        and its kwargs, as far as the points do not set these."""
        jobs = [{**point, "seed": seed} for seed in self.seeds for point in self.points]
        values = {grid.point_name(item): item for item in jobs}
        names = [*self.points[0]]
        fixed = {name: value for name, value in kwargs.items() if name not in (*names, "seed")}
        about = {"target": target, "grid": " ".join(names) or "no grid"}
        fixed |= {grid.free_key(name, fixed): value for name, value in about.items()}
        points = f"{counted(len(self.points), 'point')} of a grid, " if names else ""
        first, last = self.seeds[0], self.seeds[-1]
        which = f"{first}" if first == last else f"{first} to {last}"
        seeds = f"{counted(len(self.seeds), 'seed')} ({which})"
        return JobGroup(
            kind="seeds",
            log_name="seeds",
            heading=f"Sweep of {what}: {points}{seeds}, {counted(len(jobs), 'job')}",
            fixed=fixed,
            values=values,
            job=job,
            summarize=self._summarize,
            side_by_side=False,
            **more,
        )

    def summaries(self, records: Records) -> list[PointSummary]:
        """The statistics of each point over its seeds."""
        return statistics.summarize(self.points, records.values(), self._compared(records))

    def _compared(self, records: Records) -> str:
        """The name of the number that is compared."""
        return self.metric or statistics.default_metric(records.values())

    def _summarize(self, records: Records) -> Summary:
        summaries, metric = self.summaries(records), self._compared(records)
        failed = [name for name, item in records.items() if item.state == "failed"]
        points = [asdict(item) for item in summaries]
        content = {"metric": metric, "points": points, "failures": failed}
        if not any(item.values for item in summaries):
            reason = statistics.missing_metric(records.values(), metric)
            return Summary(lambda: reason, content=content, is_comparison=False)
        return Summary(
            lambda: self.listing(summaries, metric),
            {f"{grid.file_name(metric)}.png": lambda: self.draw(summaries, metric)},
            content,
        )


def _require_room(run: RunConfig, group: JobGroup) -> None:
    """Raises ConfigError if the disk has no room for the checkpoints of the missing trainings."""
    from gpt2.inspection import machine  # imports torch
    from gpt2.train import dataset

    missing = [item for name, item in group.values.items() if not (group.folder / name).exists()]
    need = 0
    for values in missing:
        training = dataset.with_vocab_size_if_known(options.overlay(run, values))
        need += MAX_CHECKPOINTS * flops.state_bytes(training.model, training.optim.optimizer)
    if need > (free := machine.disk(group.folder)[1]):
        raise ConfigError(
            f"the checkpoints of {counted(len(missing), 'training')} may need {need / 1e9:,.0f} "
            f"GB, {group.folder} has {free / 1e9:,.0f} GB free; use --no_keep_checkpoints (the "
            "results stay), or another disk with --checkpoint_dir"
        )

"""Runs your own functions as experiments: swept over a grid and seeds, or side by side.

`sweep` and `together` store every result as soon as it is there, show the progress, and end with a
table and a picture; the same command again runs only what is missing. The functions are defined at
the top of a module, take and return plain values (numbers, strings, lists and dicts of them), and
run in worker processes that import this module, and not the script that calls `sweep`, unless they
are defined there: such a script starts its work below `if __name__ == "__main__":`.

A function with a parameter `report` may call `report(step=…, total_steps=…, loss=…)`: the metrics
are shown, and the answer is "go", or "stop" after Ctrl+C. It then returns or raises Stopped, and
runs again with the next start. `Limits` has the timeouts and the number of retries.

`Pool` runs the jobs of any class with the methods of `Source`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from gpt2.base.errors import ConfigError, UserError
from gpt2.base.text import console, table
from gpt2.config.flops import duration
from gpt2.experiments import grid, job_group
from gpt2.experiments.grid import Point
from gpt2.experiments.job_group import JobGroup, JobGroupResult, Records, Summary
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.function_call import Call, plain
from gpt2.experiments.pool.job import Event, Job, JobSource, Slot, Stopped
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.pool.slots import of_machine
from gpt2.experiments.progress.listing import jobs_table
from gpt2.experiments.results import JobResult
from gpt2.experiments.sweep import statistics
from gpt2.experiments.sweep.statistics import MakeFigure, MakeTable, PointSummary, Statistics
from gpt2.experiments.sweep.sweep import Sweep
from gpt2.train.report import Answer, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Answer", "ConfigError", "Ended", "Engine", "Event", "Job", "Limits", "Point"]
__all__ += ["PointSummary", "Pool", "Record", "Records", "Report", "Slot", "Source", "Statistics"]
__all__ += ["Stopped", "Swept", "UserError", "duration", "of_machine", "sweep", "table", "together"]
Ended = JobGroupResult
Pool = Scheduler
Record = JobResult
Source = JobSource
LIMITS = Limits()
Function = Callable[..., Any] | str
"""a function at the top of a module, `functools.partial` of one with values by name, or
`module:function`"""


@dataclass(frozen=True)
class Swept:
    """The outcome of a sweep."""

    exit_code: int
    records: Sequence[JobResult]
    """these two as in JobGroupResult"""
    points: Sequence[PointSummary]
    """the statistics of each point over its seeds"""


def sweep(
    function: Function,
    points: Sequence[Point] | Mapping[str, Sequence[Any]],
    num_seeds: int = 10,
    *,
    folder: Path,
    metric: str | None = None,
    first_seed: int = 0,
    listing: MakeTable = statistics.points_table,
    draw: MakeFigure = statistics.draw,
    engine: Engine | None = None,
    limits: Limits = LIMITS,
    log_dir: Path = Path("logs"),
    save_every_s: float = 1800.0,
    out: Console | None = None,
) -> Swept:
    """Calls `function(seed=…, **point)` with every seed of every point, and compares `metric`.

    `points` is a grid, as {"width": [4, 8]}, or a list of points. The function returns numbers by
    name, or a single number, which is then called `value`; a number that is not finite is stored as
    None. By default, `metric` is the only number that the results have, or `value`. The worker
    processes are reused. Later calls may add seeds and points to `folder`; the values that a
    `partial` gives the function must stay the same. `listing` and `draw` make the table and the
    picture of the points; they are called if at least one result has the metric, and some points
    may have none. By default the sweep runs on all slots of this machine. results.json is written
    every `save_every_s` seconds, and every 50 results.

    Raises UserError, before anything runs, if the function cannot be called this way, and if
    `folder` holds another experiment or is in use by another process.
    """
    worker.require_not_importing()
    chosen = grid.points(points) if isinstance(points, Mapping) else points
    seeds = range(first_seed, first_seed + num_seeds)
    planned = Sweep([plain(point) for point in chosen], seeds, metric, listing, draw)
    group = planned.of_function(
        Call.of(function), folder=folder, log_dir=log_dir, save_every_s=save_every_s
    )
    ended = job_group.run(group, engine or Engine(of_machine()), limits, out or console())
    return Swept(ended.exit_code, [*ended.records.values()], planned.summaries(ended.records))


def together(
    functions: Mapping[str, Function],
    *,
    folder: Path,
    listing: Callable[[Records], RenderableType] | None = None,
    draw: Callable[[Records], "Figure"] | None = None,
    engine: Engine | None = None,
    limits: Limits = LIMITS,
    log_dir: Path = Path("logs"),
    log_name: str = "job",
    save_every_s: float = 1800.0,
    out: Console | None = None,
) -> JobGroupResult:
    """Calls each function once, each in its own process, and compares what they return.

    The first functions get a slot each; the next one waits for the last slot. By default there are
    two slots on this machine. Jobs are identified by their names: a finished job never runs again,
    and others may be added. `listing` makes the table and `draw` the picture `comparison.png` of
    all jobs that have ended; failed ones have no result. The logs are NAME_DATE_TIME.log of each
    function and `log_name`_DATE_TIME.log of the whole.

    Raises UserError, before anything runs, if a function cannot be called, and if `folder` holds
    results of other values or is in use by another process.
    """
    worker.require_not_importing()
    calls = {name: Call.of(function) for name, function in functions.items()}
    for name, call in calls.items():
        if not name or name != grid.file_name(name):
            raise ConfigError(f"{name!r} is no file name; use letters, digits and _.,=+-")
        call.require(())

    printed_to = out or console()

    def show(records: Records) -> RenderableType:
        return listing(records) if listing else jobs_table([*records.values()], printed_to.width)

    def summarize(records: Records) -> Summary:
        if draw is None or all(item.state == "failed" for item in records.values()):
            return Summary(lambda: show(records))
        return Summary(lambda: show(records), {"comparison.png": lambda: draw(records)})

    group = JobGroup(
        kind="jobs",
        log_name=log_name,
        heading=f"Side by side: {', '.join(calls)}",
        fixed={},
        values={
            name: {grid.free_key("target", call.kwargs): call.target, **call.kwargs}
            for name, call in calls.items()
        },
        job=lambda name, _: Job(name, calls[name].target, calls[name].kwargs),
        summarize=summarize,
        folder=folder,
        log_dir=log_dir,
        save_every_s=save_every_s,
    )
    engine = engine or Engine(of_machine(max_gpus=job_group.AT_ONCE))
    return job_group.run(group, engine, limits, printed_to)

"""Experiments of your own on the pool: functions swept over a grid and seeds, or run side by side.

`sweep` and `together` keep every result as soon as it is there, show what goes on, and end with a
table and a picture; the same command again runs only what is missing. Their functions stand at the
top of a module, take and return plain values (numbers, texts, lists and dicts of them), and run in
processes that import this module: a script starts its work below `if __name__ == "__main__":`.

A function with a parameter `report` may call `report(step=…, total_steps=…, loss=…)`, which is
shown, and answers "go", or "stop" after Ctrl+C: it then returns or raises Stopped, and runs again
another time. `Limits` say how long the others are waited for.

A class with the methods of `Source`, and `Pool`, take jobs from anywhere.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from gpt2.base.errors import ConfigError, UserError
from gpt2.base.text import console, figure, table
from gpt2.config.flops import duration
from gpt2.experiments import grid as plan
from gpt2.experiments import results as ledgers
from gpt2.experiments.compare import job_group
from gpt2.experiments.compare.job_group import Ended, Group, Say
from gpt2.experiments.grid import Point
from gpt2.experiments.pool.function_call import Call, plain
from gpt2.experiments.pool.job import Event, Job, JobSource, Slot, Stopped
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.pool.slots import of_machine
from gpt2.experiments.results import JobResult, ResultsStore
from gpt2.experiments.sweep import statistics
from gpt2.experiments.sweep import sweep as seeds
from gpt2.experiments.sweep.statistics import PointSummary, Statistics
from gpt2.experiments.sweep.sweep import Drawing, Listing, Swept
from gpt2.inspection import plot
from gpt2.train.report import Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Answer",
    "ConfigError",
    "Ended",
    "Engine",
    "Event",
    "Job",
    "Limits",
    "Point",
    "PointSummary",
    "Pool",
    "Record",
    "Records",
    "Report",
    "Slot",
    "Source",
    "Statistics",
    "Stopped",
    "Swept",
    "UserError",
    "duration",
    "of_machine",
    "sweep",
    "table",
    "together",
]

LIMITS = Limits()
# Public names that `docs/experiments.md` promises.
Pool = Scheduler
Record = JobResult
Source = JobSource
PICTURE = "comparison.png"
Function = Callable[..., Any] | str
"""a function at the top of a module, `functools.partial` of one with values by name, or
`module:function`"""
Records = Mapping[str, JobResult]
"""what became of each job that has ended, by its name"""
Report = Callable[..., Answer]
"""what a job gets as `report`"""


def sweep(
    function: Function,
    points: Sequence[Point] | Mapping[str, Sequence[Any]],
    num_seeds: int = 10,
    *,
    folder: Path,
    metric: str = "value",
    first_seed: int = 0,
    listing: Listing = statistics.listing,
    draw: Drawing = statistics.draw,
    engine: Engine | None = None,
    limits: Limits = LIMITS,
    log_dir: Path = Path("logs"),
    out: Console | None = None,
) -> Swept:
    """Calls `function(seed=…, **point)` with every seed of every point, and compares `metric`.

    `points` are a grid, as {"width": [4, 8]}, or a list of its points where not all combinations
    are wanted. The function returns numbers by name, or one, which is then called `value`; one that
    is not finite is kept as None. The processes that call it are reused. More seeds and points may
    be added to what `folder` holds; what a `partial` gives the function may not change. `listing`
    and `draw` make another table and picture of the points, and are called if at least one result
    has the metric; a point may have none. It runs on all slots of this machine, unless `engine` has
    others.

    Raises UserError, before anything runs, for a function that cannot be called so, and if `folder`
    holds another experiment or belongs to a process that lives.
    """
    grid = plan.points(points) if isinstance(points, Mapping) else points
    asked = seeds.Sweep(
        seeds.Function(Call.of(function)),
        [plain(point) for point in grid],
        range(first_seed, first_seed + num_seeds),
        metric,
        folder,
        log_dir,
        listing=listing,
        draw=draw,
    )
    return seeds.run(asked, engine or Engine(of_machine()), limits, out or console())


def results(records: Records) -> RenderableType:
    """The table of the numbers that jobs have returned."""
    found = {name: statistics.numbers(record.result) for name, record in records.items()}
    columns = list(dict.fromkeys(name for numbers in found.values() for name in numbers))
    built = table("Results", "job", "state", *columns, "time")
    for name, record in records.items():
        cells = [figure(found[name][key]) if key in found[name] else "-" for key in columns]
        built.add_row(name, record.state, *cells, duration(record.elapsed_s))
    return built


def together(
    functions: Mapping[str, Function],
    *,
    folder: Path,
    listing: Callable[[Records], RenderableType] = results,
    draw: Callable[[Records], "Figure"] | None = None,
    engine: Engine | None = None,
    limits: Limits = LIMITS,
    log_dir: Path = Path("logs"),
    out: Console | None = None,
) -> Ended:
    """Calls each function once, in a process of its own, and compares what they return.

    The first ones have a slot each, the next one follows on the last slot as soon as that is free;
    they are two of this machine, unless `engine` has others. Jobs are known by their names: what
    has finished never runs again, others may be added. `listing` and `draw` make the table, and the
    picture `comparison.png`, of all jobs that have ended; failed ones have no result.

    Raises UserError, before anything runs, for a function that cannot be called, and if `folder`
    holds results of other values or belongs to a process that lives.
    """
    for name in functions:
        if not re.fullmatch(r"[\w.,=+-]+", name, flags=re.ASCII):
            raise ConfigError(f"{name!r} cannot name a job's files; use letters, digits and _.,=+-")
    calls = {name: Call.of(function) for name, function in functions.items()}
    for call in calls.values():
        call.require(())
    group = Group(
        kind="jobs",
        heading=f"Side by side: {', '.join(calls)}",
        jobs=[Job(name, call.target, call.kwargs) for name, call in calls.items()],
        values={
            name: {plan.free_key("target", call.kwargs): call.target, **call.kwargs}
            for name, call in calls.items()
        },
        folder=folder,
        log_dir=log_dir,
    )

    def conclude(store: ResultsStore, say: Say) -> None:
        records = {name: store.results[name] for name in calls if name in store.results}
        if records:
            say(listing(records))
            store.save()
            say(f"Results: {folder / ledgers.RESULTS_FILE}{_picture(records)}")

    def _picture(records: Records) -> str:
        if draw is None or all(record.state == "failed" for record in records.values()):
            return ""
        try:
            plot.write(lambda: draw(records), folder / PICTURE)
        except ConfigError as error:
            return f"; no picture: {error}"
        return f", picture: {folder / PICTURE}"

    engine = engine or Engine(of_machine(max_gpus=job_group.AT_ONCE))
    return job_group.run(group, engine, limits, out or console(), conclude)

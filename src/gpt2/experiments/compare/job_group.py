"""Runs a group of named jobs side by side, each in its own process, and compares their results."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console, RenderableType

from gpt2.config.flops import duration
from gpt2.experiments import results
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import StateTracker
from gpt2.experiments.results import ExperimentDescription, JobResult, ResultsStore
from gpt2.train.report import Answer

AT_ONCE = 2
"""slots, unless the user chooses another number"""


@dataclass(frozen=True)
class JobGroup:
    """Jobs whose results are compared."""

    kind: str
    """as `gpt2 experiments list` shows it"""
    heading: str
    """the first line of the output"""
    jobs: Sequence[Job]
    values: Mapping[str, Mapping[str, Any]]
    """the values in which the jobs differ, by the job's name"""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """values that the results of all jobs depend on"""
    noun: str = "job"
    """what a job is called in messages, and in the name of the experiment's log"""
    folder: Path = Path("checkpoints/jobs")
    log_dir: Path = Path("logs")
    begun: str = field(default_factory=lambda: time.strftime("%Y%m%d_%H%M%S"))
    """the end of the names of the logs"""

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]

    def description(self) -> ExperimentDescription:
        """The identity of this experiment; jobs may be added to it later."""
        return ExperimentDescription(self.kind, self.fixed, total=len(self.jobs))

    def log(self, name: str) -> Path:
        """The log of the worker of a job; of the experiment if `name` is `noun`."""
        return self.log_dir / f"{name}_{self.begun}.log"

    def on_slots(self, names: Sequence[str], count: int) -> list[Job]:
        """The jobs of these names, each with the slot that it waits for, out of `count` slots."""
        chosen = [job for job in self.jobs if job.name in names]
        indices = slots.preferred_slots(len(chosen), count)
        return [replace(job, slot=index) for job, index in zip(chosen, indices, strict=True)]

    def require_same(self, store: ResultsStore) -> None:
        """Raises ConfigError if a job that has finished had other values."""
        rows = [
            f"{name}, {key}: {before.get(key)} before, {now.get(key)} now"
            for name, now in self.values.items()
            if store.is_done(name) and (before := store.results[name].values) != now
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if rows:
            raise results.another_experiment(self.folder, rows)


class JobGroupSource:
    """Gives the jobs to the scheduler and stores their results."""

    def __init__(
        self, jobs: Sequence[Job], values: Mapping[str, Mapping[str, Any]], store: ResultsStore
    ) -> None:
        self._jobs, self._values, self._store = iter(jobs), values, store
        self.busy_s = 0.0
        """summed over the slots"""

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def event(self, event: Event) -> Answer:
        if event.kind in ("finished", "pruned", "failed", "retried", "stopped"):
            self.busy_s += event.elapsed_s
        if event.kind in ("finished", "pruned", "failed"):
            assert event.job is not None
            self._store.add(JobResult.from_event(event, self._values[event.job.name]))
        return "go"


class LoggedConsole:
    """Prints to the console and, without colours, to the log of the experiment."""

    def __init__(self, out: Console, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8", buffering=1)
        plain = Console(file=self._log, width=160, highlight=False, markup=False)
        self._consoles = (out, plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._log.close()

    def print(self, text: RenderableType, style: str | None = None) -> None:
        for out in self._consoles:
            with contextlib.suppress(OSError):  # a full disk, or a closed terminal
                out.print(text, style=style, soft_wrap=isinstance(text, str))


@dataclass(frozen=True)
class JobGroupResult:
    """The outcome of a group of jobs."""

    exit_code: int
    """0; 1 if a job failed, 128 plus the signal's number if it was stopped"""
    records: Mapping[str, JobResult]
    """the result of each job that has ended, in this start or an earlier one"""


def run(
    group: JobGroup,
    engine: Engine,
    limits: Limits,
    out: Console,
    summarize: Callable[[ResultsStore, LoggedConsole], None],
) -> JobGroupResult:
    """Runs the jobs that have not finished yet, and then `summarize`, which shows and stores the
    comparison.

    The first jobs get a slot each; the next one waits for the last slot.
    """
    log = group.log(group.noun)
    with (
        results.opened(group.folder, group.description()) as store,
        LoggedConsole(out, log) as console,
    ):
        group.require_same(store)
        waiting = [name for name in group.names if not store.is_done(name)]
        _print_plan(group, waiting, engine.slots, console)
        source = JobGroupSource(group.on_slots(waiting, len(engine.slots)), group.values, store)
        began, signal_number = time.monotonic(), 0
        if waiting:
            total = len(group.jobs)
            tracker = StateTracker(group.kind, total, engine.slots, before=total - len(waiting))
            with showing_progress(tracker, group.folder, log=log, out=out) as on_event:
                signal_number = Scheduler(
                    engine,
                    source,
                    on_event,
                    log_of=lambda _, job: group.log(job.name),
                    limits=limits,
                ).run()
        took_s = time.monotonic() - began
        summarize(store, console)
        left = [name for name in group.names if not store.is_done(name)]
        if signal_number and left:
            names = ", ".join(left)
            console.print(f"Stopped: {names} left; run the same command to continue")
        else:
            if len(waiting) > 1 and len(engine.slots) > 1:
                shared = _are_shared(engine)
                console.print(saved_time(took_s, source.busy_s, shared, group.noun))
            for name in left:
                reason = store.results[name].reason if name in store.results else "no slot is left"
                console.print(f"FAILED {name}: {reason} ({group.log(name)})", style="red")
        code = 0 if not left else 128 + signal_number if signal_number else 1
        ended = {name: store.results[name] for name in group.names if name in store.results}
        return JobGroupResult(code, ended)


def saved_time(parallel_s: float, one_by_one_s: float, shared: bool, noun: str) -> str:
    """`In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)`.

    `shared`: the jobs shared cores or a GPU, of which a single job would have used all.
    """
    saved_s = round(one_by_one_s) - round(parallel_s)  # rounded as the two times are shown
    what = "nothing saved"
    if saved_s > 0:
        what = f"{duration(saved_s)} saved ({saved_s / one_by_one_s:.0%})".replace("%", " %")
    text = (
        f"In parallel {duration(parallel_s)}, one after another about {duration(one_by_one_s)} at "
        f"these speeds: {what}"
    )
    if shared:
        text += (
            f"\nThe {noun}s shared this machine's processors: a single one runs faster, so the "
            "real saving is smaller, or none"
        )
    return text


def _are_shared(engine: Engine) -> bool:
    """Whether the slots share GPUs or CPU cores, so that a single job would run faster."""
    gpus = {slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in engine.slots}
    return engine.is_fixed and (None in gpus or len(gpus) < len(engine.slots))


def _print_plan(
    group: JobGroup, waiting: Sequence[str], available: Sequence[Slot], console: LoggedConsole
) -> None:
    """Prints the heading, and where the `waiting` jobs run."""
    console.print(group.heading)
    if done := [name for name in group.names if name not in waiting]:
        console.print(f"  - finished already: {', '.join(done)}")
    used = available[: len(waiting)]  # the first ones, as `JobGroup.on_slots` assigns them
    where = ", ".join(slot.name for slot in used)
    if len(used) > 1:
        console.print(f"  - {len(used)} at a time, on {where}")
    elif len(waiting) == 1:
        console.print(f"  - on {where}")
    elif waiting:
        console.print(f"  - one after another, on {where}")
    console.print(f"  - results {group.folder}, logs {group.log('*')}")

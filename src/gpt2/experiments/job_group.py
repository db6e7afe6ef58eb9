"""Runs groups of jobs and compares their results: seed sweeps, models, functions side by side."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from gpt2.base import atomic_files
from gpt2.base.errors import ConfigError
from gpt2.base.text import counted, one_line
from gpt2.config.flops import duration
from gpt2.experiments import results
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.experiments.progress.live_view import showing_progress
from gpt2.experiments.progress.state import ExperimentState
from gpt2.experiments.results import ExperimentDescription, JobResult, ResultsStore
from gpt2.inspection import figures
from gpt2.train.report import Answer

logger = logging.getLogger(__name__)

AT_ONCE = 2
"""jobs that run side by side, unless the user chooses another number"""
SAVE_EVERY, SAVE_SHARE = 50, 5
"""results between two writes of results.json: so many, or 1 / SAVE_SHARE of all if that is more"""
Values = Mapping[str, Any]
MakeJob = Callable[[str, Values], Job]
"""makes a job from its name and values"""
Records = Mapping[str, JobResult]
"""the result of each job that has ended, by the job's name"""


@dataclass(frozen=True)
class Summary:
    """What is made of the results of a group."""

    table: Callable[[], RenderableType]
    files: Mapping[str, str | figures.Draw] = field(default_factory=dict)
    """texts, and functions that draw pictures, by the names of their files"""
    content: Mapping[str, Any] = field(default_factory=dict)
    """what results.json has besides the results"""
    is_comparison: bool = True
    """False if no result has what is compared"""


@dataclass(frozen=True, kw_only=True)
class JobGroup:
    """Jobs whose results are compared. More jobs may be added later."""

    kind: str
    """as `gpt2 experiments list` shows it"""
    heading: str
    fixed: Values
    """values that the results of all jobs depend on"""
    values: Mapping[str, Values]
    """the values in which the jobs differ, by the job's name"""
    job: MakeJob
    summarize: Callable[[Records], Summary]
    keep_folders: bool = True
    """whether the folder of a job stays when it has finished"""
    folder: Path
    log_dir: Path = Path("logs")
    log_name: str
    """the log of the experiment is `log_dir / log_name_DATE_TIME.log`"""
    side_by_side: bool = True
    """each job has its own log, and the first ones a slot; else each slot has a log"""
    save_every_s: float = 1800.0


class JobGroupSource:
    """Gives the missing jobs of a group to the scheduler and stores their results."""

    def __init__(self, group: JobGroup, store: ResultsStore, slot_count: int) -> None:
        self._group, self._store = group, store
        missing = self.missing()
        preferred = slots.preferred_slots(len(missing), slot_count)
        own_slots = preferred if group.side_by_side else [None] * len(missing)
        self._jobs = (
            replace(group.job(name, group.values[name]), slot=slot)
            for name, slot in zip(missing, own_slots, strict=True)
        )
        self._unsaved, self._saved_at = 0, time.monotonic()

    def missing(self) -> list[str]:
        """The names of the jobs that still have to run."""
        return [name for name in self._group.values if not self._store.is_done(name)]

    def records(self) -> dict[str, JobResult]:
        """The results of the group's jobs that have ended, in the group's order."""
        known = self._store.results
        return {name: known[name] for name in self._group.values if name in known}

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def event(self, event: Event) -> Answer:
        if event.job is not None and event.kind in ("finished", "failed"):
            name = event.job.name
            self._store.add(JobResult.from_event(event, self._group.values[name]))
            self._unsaved += 1
            if event.kind == "finished" and not self._group.keep_folders:
                # Removing gigabytes takes time, in which other jobs would wait for their answers.
                folder = self._group.folder / name
                threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
        is_old = time.monotonic() > self._saved_at + self._group.save_every_s
        many = max(SAVE_EVERY, len(self._store.results) // SAVE_SHARE)
        if self._unsaved >= many or (self._unsaved and is_old):
            self.save()
        return "go"

    def save(self) -> Summary:
        """Writes results.json with all results so far."""
        summary = self._group.summarize(self.records())
        self._store.save(**summary.content)
        self._unsaved, self._saved_at = 0, time.monotonic()
        return summary


@dataclass(frozen=True)
class JobGroupResult:
    """The outcome of a group of jobs."""

    exit_code: int
    """0; 1 if a job failed, or no result has what is compared; 128 plus the signal's number if it
    was stopped"""
    records: Records
    """the result of each job that has ended, in this start or an earlier one"""


def run(group: JobGroup, engine: Engine, limits: Limits, out: Console) -> JobGroupResult:
    """Runs the jobs that have not finished yet, and compares the results of all."""
    begun, total = time.strftime("%Y%m%d_%H%M%S"), len(group.values)

    def log_of(slot: Slot, job: Job) -> Path:
        name = job.name if group.side_by_side else f"worker_{slot.name}"
        return group.log_dir / f"{name}_{begun}.log"

    description = ExperimentDescription(group.kind, group.fixed, total)
    with results.opened(group.folder, description) as store:
        _require_same_values(group, store)
        source = JobGroupSource(group, store, len(engine.slots))
        waiting, began = source.missing(), time.monotonic()
        out.print(group.heading, soft_wrap=True)
        if done := total - len(waiting):
            out.print(f"  - {done} of them are done already")
        if used := [slot.name for slot in engine.slots[: len(waiting)]]:
            out.print(f"  - {len(used)} at a time, on {', '.join(used)}", soft_wrap=True)
        out.print(f"  - results {group.folder}, logs {group.log_dir}/*_{begun}.log", soft_wrap=True)
        log = group.log_dir / f"{group.log_name}_{begun}.log"
        begun_state = ExperimentState.at_start(group.kind, total, engine.slots, before=done)
        with showing_progress(begun_state, group.folder, log=log, out=out) as progress:
            scheduler = Scheduler(engine, source, progress.report, log_of=log_of, limits=limits)
            signal_number = scheduler.run()
        took_s = time.monotonic() - began
        summary, records, left = source.save(), source.records(), source.missing()
        if records:
            _show(group.folder, summary, records, out)
        if left and (signal_number or any(name not in records for name in left)):
            jobs = counted(len(left), "job")
            out.print(f"Stopped: {jobs} left; run the same command to continue")
        elif group.side_by_side and len(used) > 1:
            one_by_one_s = sum(records[name].elapsed_s for name in waiting)
            out.print(saved_time(took_s, one_by_one_s), soft_wrap=True)
        is_good = not left and summary.is_comparison
        code = 128 + signal_number if left and signal_number else 0 if is_good else 1
        return JobGroupResult(code, records)


def _require_same_values(group: JobGroup, store: ResultsStore) -> None:
    """Raises ConfigError if a job that has finished had other values."""
    rows = [
        f"{name}, {row}"
        for name, now in group.values.items()
        if store.is_done(name)
        for row in results.value_differences(store.results[name].values, now)
    ]
    if rows:
        raise results.another_experiment(group.folder, rows)


def _show(folder: Path, summary: Summary, records: Records, out: Console) -> None:
    """Writes the files, and prints the table and why jobs failed."""
    written = [f"{folder / results.RESULTS_FILE}"]
    for name, content in summary.files.items():
        try:
            if isinstance(content, str):
                atomic_files.write_text(folder / name, content)
            else:
                figures.write(content, folder / name)
            written.append(name)
        except (ConfigError, OSError) as error:
            logger.warning("cannot write %s: %s", name, error)
    out.print(summary.table())
    out.print(f"Results: {', '.join(written)}", soft_wrap=True)
    for item in records.values():
        if item.state == "failed":
            out.print(one_line(f"FAILED {item.job}: {item.reason}"), style="red", soft_wrap=True)


def saved_time(parallel_s: float, one_by_one_s: float) -> str:
    """`In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)`."""
    saved_s = max(0, round(one_by_one_s) - round(parallel_s))  # of the times as they are shown
    return (
        f"In parallel {duration(parallel_s)}, one after another about {duration(one_by_one_s)} at "
        f"these speeds: {duration(saved_s)} saved ({100 * saved_s / max(one_by_one_s, 1):.0f} %)\n"
        "Jobs that share processors run slower than alone: the real saving may be smaller, or none"
    )

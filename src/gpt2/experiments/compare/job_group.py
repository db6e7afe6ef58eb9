"""A few named jobs side by side, each in a process of its own: what `gpt2 models` does, whatever
the jobs are."""

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
"""slots at most, where nobody says how many"""
Say = Callable[[RenderableType], None]


@dataclass(frozen=True)
class Group:
    """Jobs that are compared with each other."""

    kind: str
    """as in `gpt2 experiments list`"""
    heading: str
    """the first line"""
    jobs: Sequence[Job]
    values: Mapping[str, Mapping[str, Any]]
    """what tells each job from the others, by its name"""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """what decides over the results of all jobs"""
    noun: str = "job"
    """what a job is; the owner's log is called after it"""
    folder: Path = Path("checkpoints/jobs")
    log_dir: Path = Path("logs")
    begun: str = field(default_factory=lambda: time.strftime("%Y%m%d_%H%M%S"))
    """which the names of the logs end with"""

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]

    def description(self) -> ExperimentDescription:
        """What all jobs have in common; more of them may be added later."""
        return ExperimentDescription(self.kind, self.fixed, total=len(self.jobs))

    def log(self, name: str) -> Path:
        """The log of a worker by its job, or that of the owner by `noun`."""
        return self.log_dir / f"{name}_{self.begun}.log"

    def placed(self, names: Sequence[str], count: int) -> list[Job]:
        """The jobs of these names, for `count` slots."""
        chosen = [job for job in self.jobs if job.name in names]
        places = slots.preferred_slots(len(chosen), count)
        return [replace(job, slot=place) for job, place in zip(chosen, places, strict=True)]

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


class Source:
    """The source of the jobs; keeps their results."""

    def __init__(
        self, jobs: Sequence[Job], values: Mapping[str, Mapping[str, Any]], store: ResultsStore
    ) -> None:
        self._jobs, self._values, self._store = iter(jobs), values, store
        self.busy_s = 0.0
        """of all slots together"""

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def event(self, event: Event) -> Answer:
        if event.kind in ("finished", "pruned", "failed", "retried", "stopped"):
            self.busy_s += event.elapsed_s
        if event.kind in ("finished", "pruned", "failed"):
            assert event.job is not None
            self._store.add(JobResult.from_event(event, self._values[event.job.name]))
        return "go"


class Diary:
    """What the owner says: on the console and, without colours, in its log."""

    def __init__(self, out: Console, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8", buffering=1)
        plain = Console(file=self._log, width=160, highlight=False, markup=False)
        self._consoles = (out, plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._log.close()

    def say(self, text: RenderableType, style: str | None = None) -> None:
        for console in self._consoles:
            with contextlib.suppress(OSError):  # a full disk, or a terminal that is gone
                console.print(text, style=style, soft_wrap=isinstance(text, str))


@dataclass(frozen=True)
class Ended:
    """What became of the jobs."""

    exit_code: int
    """0; 1 if a job failed, 128 and the signal's number if it was stopped"""
    records: Mapping[str, JobResult]
    """of each job that has ended, by this start or an earlier one"""


def run(
    group: Group,
    engine: Engine,
    limits: Limits,
    out: Console,
    conclude: Callable[[ResultsStore, Say], None],
) -> Ended:
    """Runs the jobs that have not finished yet: the first ones on a slot each, the next one on the
    last slot as soon as that is free. `conclude` shows and keeps what all say together."""
    own_log, places = group.log(group.noun), engine.slots
    with results.opened(group.folder, group.description()) as store, Diary(out, own_log) as diary:
        group.require_same(store)
        waiting = [name for name in group.names if not store.is_done(name)]
        _introduce(group, waiting, places, diary)
        source = Source(group.placed(waiting, len(places)), group.values, store)
        began, number = time.monotonic(), 0
        if waiting:
            total = len(group.jobs)
            tracker = StateTracker(group.kind, total, places, before=total - len(waiting))
            with showing_progress(tracker, group.folder, log=own_log, out=out) as on_event:
                number = Scheduler(
                    engine,
                    source,
                    on_event,
                    log_of=lambda _, job: group.log(job.name),
                    limits=limits,
                ).run()
        took_s = time.monotonic() - began
        conclude(store, diary.say)
        left = [name for name in group.names if not store.is_done(name)]
        if number and left:
            diary.say(f"Stopped: {', '.join(left)} left; the same command goes on")
        else:
            if len(waiting) > 1 and len(places) > 1:
                shared = _are_shared(engine)
                diary.say(saved_time(took_s, source.busy_s, shared, group.noun))
            for name in left:
                reason = store.results[name].reason if name in store.results else "no slot is left"
                diary.say(f"FAILED {name}: {reason} ({group.log(name)})", style="red")
        code = 0 if not left else 128 + number if number else 1
        records = {name: store.results[name] for name in group.names if name in store.results}
        return Ended(code, records)


def saved_time(parallel_s: float, one_by_one_s: float, shared: bool, noun: str) -> str:
    """`In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)`.

    `shared` says that the jobs shared cores or a GPU, which each would have had alone.
    """
    saved_s = round(one_by_one_s) - round(parallel_s)  # as both are shown
    what = "nothing saved"
    if saved_s > 0:
        what = f"{duration(saved_s)} saved ({saved_s / one_by_one_s:.0%})".replace("%", " %")
    text = (
        f"In parallel {duration(parallel_s)}, one after another about {duration(one_by_one_s)} at "
        f"these speeds: {what}"
    )
    if shared:
        text += (
            f"\nThe {noun}s shared this machine's processors: one alone is faster than that, so "
            "that less was saved, or nothing"
        )
    return text


def _are_shared(engine: Engine) -> bool:
    """Whether a job alone on this machine would have more than its slot gives it."""
    gpus = {slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in engine.slots}
    return engine.is_fixed and (None in gpus or len(gpus) < len(engine.slots))


def _introduce(group: Group, waiting: Sequence[str], places: Sequence[Slot], diary: Diary) -> None:
    diary.say(group.heading)
    if done := [name for name in group.names if name not in waiting]:
        diary.say(f"  - finished already: {', '.join(done)}")
    used = places[: len(waiting)]  # the first ones, as `Group.placed` gives them
    where = ", ".join(slot.name for slot in used)
    if len(used) > 1:
        diary.say(f"  - {len(used)} at a time, on {where}")
    elif len(waiting) == 1:
        diary.say(f"  - on {where}")
    elif waiting:
        diary.say(f"  - one after another, on {where}")
    diary.say(f"  - results {group.folder}, logs {group.log('*')}")

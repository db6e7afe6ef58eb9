"""Given jobs as a source, for tests of the pool, and what they look at."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits, Scheduler
from gpt2.train.report import Answer

SLOTS = [Slot(index, f"cpu{index}", {"SLOT": str(index)}) for index in range(2)]


class Given:
    """A source of given jobs that keeps its events."""

    def __init__(self, *jobs: Job, answer: Callable[[Event], Answer] = lambda _: "go") -> None:
        self.jobs = list(jobs)
        self.events: list[Event] = []
        self.shown: list[Event] = []
        """these, and those of the pool itself"""
        self.answer = answer

    def next(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def event(self, event: Event) -> Answer:
        self.events.append(event)
        return self.answer(event)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def results(self) -> dict[str, Any]:
        return {event.job.name: event.result for event in self.of("finished") if event.job}


def job(name: str, function: str, own_process: bool = False, **kwargs: Any) -> Job:
    return Job(name, f"experiments.jobs:{function}", kwargs, own_process)


def run(source: Given, tmp_path: Path, slots: list[Slot] = SLOTS, **limits: Any) -> int:
    pool = Scheduler(
        Engine(slots),
        source,
        source.shown.append,
        log_of=lambda slot, _: tmp_path / f"{slot.name}.log",
        limits=Limits(**limits),
    )
    return pool.run()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    """pytest's timeout ends it."""
    while not condition():
        time.sleep(0.02)

"""Events of trainings on two slots, and a state that follows them by a clock that tests set."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gpt2.experiments.pool.job import Event, EventKind, Job, Slot
from gpt2.experiments.progress.state import ExperimentState

SLOTS = [Slot(index, f"gpu{index}", {}) for index in range(2)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(name: str) -> Job:
    return Job(name, "module:function", {})


def event(kind: EventKind, slot: int, name: str = "a", at: float = 0.0, **facts: Any) -> Event:
    return Event(kind, SLOTS[slot], job(name), pid=7, elapsed_s=at, **facts)


def begun(total: int, before: int = 0, kind: str = "models") -> ExperimentState:
    """The state of an experiment that began when a Clock did."""
    return replace(ExperimentState.at_start(kind, total, SLOTS, before), began=Clock().now)


class Tracker:
    """The current state."""

    def __init__(self, total: int, before: int = 0, kind: str = "models") -> None:
        self.current, self.clock = begun(total, before, kind), Clock()

    def update(self, event: Event) -> None:
        self.current = self.current.after(event, self.clock())

    def end(self) -> None:
        self.current = self.current.at_end(self.clock())


def train(
    update: Callable[[Event], None], clock: Clock, slot: int, name: str, steps: range, total: int
) -> None:
    """A training that takes a second to start, and a second for each step."""
    clock.now = 1000.0
    update(event("started", slot, name))
    for seconds, step in enumerate(steps, 1):
        metrics = {"step": step, "total_steps": total, "loss": 3.5}
        update(event("reported", slot, name, at=seconds, metrics=metrics))
    clock.now = 1000.0 + len(steps)

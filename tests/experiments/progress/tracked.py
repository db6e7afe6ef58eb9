"""Events of trainings on two slots, and a tracker with a clock that tests set."""

from typing import Any

from gpt2.experiments.pool.job import Event, EventKind, Job, Slot
from gpt2.experiments.progress.state import StateTracker

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


def tracker_of(total: int, before: int = 0) -> tuple[StateTracker, Clock]:
    clock = Clock()
    return StateTracker("models", total, SLOTS, before=before, clock=clock), clock


def train(
    tracker: StateTracker, clock: Clock, slot: int, name: str, steps: range, total: int
) -> None:
    """A training that takes a second to start, and a second for each step."""
    clock.now = 1000.0
    tracker.update(event("started", slot, name))
    for seconds, step in enumerate(steps, 1):
        metrics = {"step": step, "total_steps": total, "loss": 3.5}
        tracker.update(event("reported", slot, name, at=seconds, metrics=metrics))
    clock.now = 1000.0 + len(steps)

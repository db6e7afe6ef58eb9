"""Learning rate as a function of the step, and when periodic work is due. Pure."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine decay from `peak` to `floor`, constant afterwards."""

    peak: float
    floor: float
    warmup_steps: int
    decay_steps: int


def lr_at(step: int, schedule: Schedule) -> float:
    """Learning rate of the update that follows `step` finished updates.

    The cosine is that of SGDR without restarts (Loshchilov & Hutter 2017, eq. 5); it starts where
    the warm-up ends and reaches `floor` at `decay_steps`.
    """
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / schedule.warmup_steps
    if step >= schedule.decay_steps:
        return schedule.floor
    progress = (step - schedule.warmup_steps) / (schedule.decay_steps - schedule.warmup_steps)
    return schedule.floor + 0.5 * (1 + math.cos(math.pi * progress)) * (
        schedule.peak - schedule.floor
    )


def is_due(step: int, every: int | None) -> bool:
    """Whether work that is done every so many steps falls on `step`; never at 0 or when off."""
    return every is not None and step > 0 and step % every == 0

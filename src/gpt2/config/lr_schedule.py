"""Learning rate as a function of the step, and when periodic work is due. Pure."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, decay to `floor`, then constant."""

    peak: float
    floor: float
    warmup_steps: int
    decay_steps: int
    """step at which the decay has ended"""
    shape: Shape = "cosine"
    cooldown: float = 0.2
    """wsd: the last share of `decay_steps`, in which the rate falls"""


def lr_at(step: int, schedule: Schedule) -> float:
    """Learning rate of the update that follows `step` finished updates.

    The cosine is that of SGDR without restarts (Loshchilov & Hutter 2017, eq. 5), from the end of
    the warm-up. `wsd` is warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395, section 4)
    with a linear decay (Hägele et al. 2024, arXiv:2405.18392, section 3).
    """
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / schedule.warmup_steps
    if step >= schedule.decay_steps:
        return schedule.floor
    begin = schedule.warmup_steps
    if schedule.shape == "wsd":
        begin = max(begin, schedule.decay_steps - round(schedule.cooldown * schedule.decay_steps))
    progress = max(0.0, (step - begin) / max(1, schedule.decay_steps - begin))
    left = 1 - progress if schedule.shape == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.floor + left * (schedule.peak - schedule.floor)


def warning(schedule: Schedule, total_steps: int) -> str | None:
    """What is wrong with the schedule of a run of `total_steps`; None if nothing is."""
    warmup, end = schedule.warmup_steps, max(schedule.warmup_steps, schedule.decay_steps)
    if total_steps < warmup:
        return (
            f"the learning rate never reaches its peak of {schedule.peak:.3g}: the warm-up takes "
            f"{warmup} steps, the run {total_steps}; use --warmup_steps {total_steps // 10}"
        )
    if end < total_steps and schedule.floor == 0:
        return (
            f"the learning rate is 0 from step {end} of {total_steps} on, where nothing is "
            "learned; omit --decay_steps, or use a --min_lr_ratio above 0"
        )
    last = lr_at(max(0, end - 1), schedule)
    is_at_peak = math.isclose(last, schedule.peak) and schedule.floor < schedule.peak
    if end < total_steps and is_at_peak:
        return (
            f"the learning rate drops from {last:.3g} to {schedule.floor:.3g} in one step, at step "
            f"{end}; use a larger --decay_steps or --cooldown, or a smaller --warmup_steps"
        )
    return None


def is_due(step: int, every: int | None) -> bool:
    """Whether `step` is a positive multiple of `every`; never if `every` is None (off)."""
    return every is not None and step > 0 and step % every == 0

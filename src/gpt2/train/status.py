"""`status.json`: what a run is doing, for people, scripts and `estimate_training_time.py`."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpt2.base import atomic_files, json_fields
from gpt2.base.json_fields import Timestamp
from gpt2.data import batch_ramp
from gpt2.data.batch_ramp import BatchRamp

NAME = "status.json"
BEAT_EVERY_S = 15
SILENCE_S = 900
"""a run on another machine whose status is older than this counts as dead"""
STALL_S, STALL_STEPS = 300, 10
"""a run hangs if its last sign of life is older than both: seconds, and times of a step"""
RunState = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Plan:
    """What the run will do, as far as a forecast needs to know."""

    run_name: str
    preset: str
    total_steps: int
    rows_per_step: int
    rows_per_epoch: int
    block_size: int
    checkpoint_interval: int | None
    world_size: int
    device: str
    log_file: str
    batch_ramp: tuple[str, ...] = ()

    @property
    def ramp(self) -> BatchRamp:
        """The rows of each step."""
        tokens = self.rows_per_step * self.block_size
        return batch_ramp.ramp_of(self.batch_ramp, tokens, self.block_size)


@dataclass(frozen=True)
class Status:
    """What the run does now."""

    plan: Plan
    state: RunState
    step: int
    reason: str | None = None
    host: str = ""
    pid: int = 0
    time: Timestamp = 0.0
    """when this was written: a running run writes it every few seconds"""
    switched_off: tuple[str, ...] = ()
    """measurements that failed too often in a row"""


def write(
    folder: Path,
    plan: Plan,
    state: RunState,
    step: int,
    reason: str | None = None,
    switched_off: tuple[str, ...] = (),
) -> None:
    """Replaces `status.json` in `folder`; raises OSError if the disk does not take it."""
    status = Status(
        plan,
        state,
        step,
        reason,
        socket.gethostname(),
        os.getpid(),
        time.time(),
        switched_off,
    )
    atomic_files.write_text(folder / NAME, json.dumps(asdict(status), indent=2) + "\n")


def is_stalled(silent_s: float, step_s: float | None) -> bool:
    """Whether a run hangs that has given no sign of life for `silent_s`.

    `step_s` is the time of its last step; None before the first one, which may wait for a compiler.
    """
    return silent_s > (SILENCE_S if step_s is None else max(STALL_S, STALL_STEPS * step_s))


class StatusFile:
    """Keeps `status.json` of a run current, so that a dead run is recognised by its age."""

    def __init__(
        self, folder: Path | None, plan: Plan, on_beat: Callable[[int], None] = lambda _step: None
    ) -> None:
        """`folder` is None on the ranks that do not write it, which are all but rank 0. Each beat
        calls `on_beat` with its step."""
        self._folder, self._plan, self._on_beat = folder, plan, on_beat
        self._written = 0.0
        self.switched_off: tuple[str, ...] = ()

    def write(self, state: RunState, step: int, reason: str | None = None) -> None:
        """Writes what the run does now, and why; a write that fails changes nothing."""
        self._written = time.monotonic()
        if self._folder is not None:
            with contextlib.suppress(OSError):  # saving a checkpoint reports a full disk
                write(self._folder, self._plan, state, step, reason, self.switched_off)

    def beat(self, step: int) -> bool:
        """Writes that the run is running if the last write is BEAT_EVERY_S ago; returns whether it
        was."""
        self._on_beat(step)
        if late := time.monotonic() - self._written > BEAT_EVERY_S:
            self.write("running", step)
        return late


def read(folder: Path) -> Status | None:
    """The status in `folder`, or None if there is none that can be read.

    Keys that this version does not know are ignored, with a warning.
    """
    path = folder / NAME
    try:
        return json_fields.from_json(Status, json_fields.read(path), path)
    except json_fields.UNREADABLE:
        return None

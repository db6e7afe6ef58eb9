"""`status.json`: what a run is doing, for people, scripts and `estimate_training_time.py`."""

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpt2.base import atomic_files

NAME = "status.json"
BEAT_EVERY_S = 15
SILENCE_S = 900
"""a run on another machine that was not heard of for this long is dead"""
RunState = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Plan:
    """What the run will do, as far as a forecast needs it."""

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


@dataclass(frozen=True)
class Status:
    """What the run does now."""

    plan: Plan
    state: RunState
    step: int
    reason: str | None = None
    host: str = ""
    pid: int = 0
    time: float = 0.0
    """seconds since 1970, when this was written: a running run writes it every few seconds"""


def write(folder: Path, plan: Plan, state: RunState, step: int, reason: str | None = None) -> None:
    status = Status(plan, state, step, reason, socket.gethostname(), os.getpid(), time.time())
    atomic_files.write_text(folder / NAME, json.dumps(asdict(status), indent=2) + "\n")


class Heartbeat:
    """Keeps the status of a run current, so that a dead run can be told from a living one."""

    def __init__(self, folder: Path | None, plan: Plan) -> None:
        """`folder` is None where it is not to be written, which is on all ranks but the first."""
        self._folder, self._plan = folder, plan
        self._written = 0.0

    def write(self, state: RunState, step: int, reason: str | None = None) -> None:
        self._written = time.monotonic()
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it informs; a full disk is for `save` to report
                write(self._folder, self._plan, state, step, reason)

    def beat(self, step: int) -> bool:
        """Writes that the run lives, if that is due; whether it was."""
        if late := time.monotonic() - self._written > BEAT_EVERY_S:
            self.write("running", step)
        return late


def read(folder: Path) -> Status | None:
    """The status in `folder`, or None if there is none that can be read."""
    try:
        values = json.loads((folder / NAME).read_text())
        return Status(plan=Plan(**values.pop("plan")), **values)
    except (OSError, ValueError, KeyError, TypeError):
        return None

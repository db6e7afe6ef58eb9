"""The current state of an experiment: it follows the events of the pool, and is in `state.json`."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gpt2.base import atomic_files, json_fields
from gpt2.base.json_fields import Timestamp
from gpt2.experiments.pool.job import Event, Slot
from gpt2.experiments.results import is_finite_number

FILE = "state.json"
KEPT_FAILURES = 20
"""the newest failures; results.jsonl has all"""


@dataclass(frozen=True)
class SlotState:
    """A slot and the job that runs on it."""

    slot: str
    in_service: bool = True
    reason: str = ""
    """why the slot is out of service"""
    job: str | None = None
    pid: int = 0
    attempt: int = 1
    began: Timestamp = 0.0
    """start of this attempt"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """the latest value of each metric"""
    first_step: float | None = None
    """the first step reported in this attempt; above 1 if it continues from a checkpoint"""
    first_s: float = 0.0
    """seconds from `began` to the report of `first_step`"""
    step_s: float = 0.0
    """seconds from `began` to the report of the latest step"""
    log: str = ""
    """the worker's log file"""

    def metric(self, name: str) -> float | None:
        """The latest value of this metric, or None if it is not a finite number."""
        value = self.metrics.get(name)
        return value if is_finite_number(value) else None

    @property
    def fraction(self) -> float:
        """The completed share of the job, from 0 to 1; 0 if the job does not report its steps."""
        return self._share(self.metric("step"))

    @property
    def jobs_per_s(self) -> float:
        """Speed of this attempt, as a share of the job per second; 0 if it is unknown."""
        gained = max(0.0, self.fraction - self._share(self.first_step))
        return gained / (self.step_s - self.first_s) if self.step_s > self.first_s else 0.0

    def left_s(self, now: float) -> float | None:
        """Estimated seconds until the job's last step; None if unknown."""
        if not self.jobs_per_s:
            return None
        since_report_s = now - self.began - self.step_s
        return max(0.0, (1 - self.fraction) / self.jobs_per_s - since_report_s)

    def _share(self, step: float | None) -> float:
        total = self.metric("total_steps")
        return min(1.0, max(0.0, step / total)) if step is not None and total else 0.0

    def after(self, event: Event, now: float) -> "SlotState":
        """The state after an event on this slot."""
        if event.kind == "slot_lost":
            return replace(self, in_service=False, reason=event.reason)
        if event.kind == "reported":
            changes: dict[str, Any] = {"metrics": {**self.metrics, **event.metrics}}
            if is_finite_number(step := event.metrics.get("step")):
                changes["step_s"] = event.elapsed_s
                if self.first_step is None:
                    changes |= {"first_step": step, "first_s": event.elapsed_s}
            return replace(self, **changes)
        if event.kind == "started" and event.job is not None:
            return replace(
                self.idle(),
                job=event.job.name,
                pid=event.pid,
                attempt=event.attempt,
                began=now - event.elapsed_s,
                log=event.log,
            )
        return self.idle()

    def idle(self) -> "SlotState":
        """The slot without a job."""
        return SlotState(self.slot, self.in_service, self.reason, log=self.log)


@dataclass(frozen=True)
class JobFailure:
    """Which job failed, where and why."""

    job: str
    slot: str
    reason: str


@dataclass(frozen=True)
class ExperimentState:
    """Counts, slots and recent failures of an experiment."""

    kind: str
    total: int
    slots: tuple[SlotState, ...]
    before: int = 0
    """jobs completed by earlier starts"""
    finished: int = 0
    pruned: int = 0
    failed: int = 0
    retried: int = 0
    """attempts that were lost and started again"""
    failures: tuple[JobFailure, ...] = ()
    """of jobs that have used up their attempts"""
    state: Literal["running", "stopping", "finished", "stopped", "dead"] = "running"
    """dead: its process was killed, as another one sees it"""
    reason: str = ""
    """what stopping means for the running jobs"""
    host: str = ""
    pid: int = 0
    began: Timestamp = 0.0
    """when this process started the experiment"""
    written: Timestamp = 0.0

    @classmethod
    def at_start(
        cls, kind: str, total: int, slots: Sequence[Slot], before: int = 0
    ) -> "ExperimentState":
        """That of an experiment which this process runs. `before` of the `total` jobs were
        completed by earlier starts."""
        idle, host = tuple(SlotState(slot.name) for slot in slots), socket.gethostname()
        return cls(kind, total, idle, before, host=host, pid=os.getpid(), began=time.time())

    def after(self, event: Event, now: float) -> "ExperimentState":
        """The state after an event of the pool."""
        if event.kind == "stopping":
            return replace(self, state="stopping", reason=event.reason)
        changes: dict[str, Any] = {
            "slots": tuple(
                slot.after(event, now) if slot.slot == event.slot.name else slot
                for slot in self.slots
            )
        }
        if event.kind in ("finished", "pruned", "failed", "retried"):
            changes[event.kind] = getattr(self, event.kind) + 1
        if event.kind == "failed" and event.job is not None:
            failure = JobFailure(event.job.name, event.slot.name, event.reason)
            changes["failures"] = (*self.failures, failure)[-KEPT_FAILURES:]
        return replace(self, **changes)

    def at_end(self, now: float) -> "ExperimentState":
        """The state when the pool has ended, and no job runs: finished or stopped."""
        is_whole = self.ended >= self.total
        idle = tuple(slot.idle() for slot in self.slots)
        return replace(self, state="finished" if is_whole else "stopped", slots=idle, written=now)

    def seen(self, is_held: bool) -> "ExperimentState":
        """What another process makes of it, given whether a process holds the folder."""
        if is_held:
            return replace(self, state="stopping" if self.state == "stopping" else "running")
        return replace(self, state="dead") if self.is_running else self

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return self.before + self.finished + self.pruned

    @property
    def ended(self) -> int:
        """Jobs that are done or have failed."""
        return self.done + self.failed

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "stopped")

    @property
    def is_running(self) -> bool:
        return self.state in ("running", "stopping")

    def as_of(self, now: float) -> float:
        """The time that it is shown for: `now`, or when it was last written."""
        return now if self.is_running else self.written

    @property
    def fraction(self) -> float:
        """The completed share of the experiment, from 0 to 1."""
        return (self.ended + sum(slot.fraction for slot in self.slots)) / max(1, self.total)

    def jobs_per_s(self, now: float) -> float:
        """Jobs per second since this start."""
        return (self.ended - self.before) / max(now - self.began, 1e-9)

    def left_s(self, now: float) -> float | None:
        """Estimated seconds until the last job ends, or None if unknown.

        Computed from the speeds of the running jobs if they report steps, else from the jobs that
        have ended since this start.
        """
        speed = sum(slot.jobs_per_s for slot in self.slots) or self.jobs_per_s(now)
        if not self.is_running or speed <= 0:
            return None
        return (1 - self.fraction) * self.total / speed


def as_json(state: ExperimentState) -> dict[str, Any]:
    """The content of `state.json`, where the slots are called `places`."""
    content = asdict(state)
    content["places"] = content.pop("slots")
    return content


def write(folder: Path, state: ExperimentState) -> None:
    """Writes `state.json`. A full disk does not end the experiment: the next write may succeed."""
    content = {**as_json(state), "written": time.time()}
    with contextlib.suppress(OSError):
        atomic_files.write_text(folder / FILE, json.dumps(content, indent=1, default=str) + "\n")


def read(folder: Path) -> ExperimentState | None:
    """The state in the folder's `state.json`, or None if there is none or it is damaged.

    Keys that this version does not know are left out, with a warning.
    """
    path = folder / FILE
    try:
        content = json_fields.read(path)
        content["slots"] = content.pop("places")
        return json_fields.from_json(ExperimentState, content, path)
    except json_fields.UNREADABLE:
        return None

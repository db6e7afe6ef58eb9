"""The present picture of an experiment, folded from what its pool tells; `state.json` holds it."""

import contextlib
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from gpt2.base import atomic_files
from gpt2.experiments.pool.job import Event, Slot

NAME = "state.json"
KEPT_FAILURES = 20
"""the newest ones; the results store has all"""
State = Literal["running", "stopping", "finished", "stopped"]


@dataclass(frozen=True)
class Place:
    """A slot, and what goes on there."""

    slot: str
    in_service: bool = True
    reason: str = ""
    """why it is not in service"""
    job: str | None = None
    pid: int = 0
    attempt: int = 1
    began: float = 0.0
    """when this attempt began; seconds since 1970, as all times here"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """the latest of each name"""
    first_step: float | None = None
    """the first one that was reported in this attempt: it may go on from a checkpoint"""
    first_s: float = 0.0
    """seconds from `began` to the report of that step"""
    step_s: float = 0.0
    """seconds from `began` to the report of the latest step"""
    log: str = ""
    """of the worker"""

    def number(self, name: str) -> float | None:
        """The latest metric of this name, if it is a finite number."""
        value = self.metrics.get(name)
        return value if is_number(value) else None

    @property
    def whole_s(self) -> float | None:
        """Seconds that all of the job takes, at the speed of this attempt, if that is known."""
        gained = self._share(self.number("step")) - self._share(self.first_step)
        return self.first_s + (self.step_s - self.first_s) / gained if gained > 0 else None

    @property
    def fraction(self) -> float:
        """How much of the job is done, from 0 to 1; 0 where nothing tells."""
        return self._share(self.number("step"))

    def left_s(self, now: float) -> float | None:
        """Seconds until the job's last step, if that is known."""
        if self.whole_s is None:
            return None
        since_report_s = now - self.began - self.step_s
        return max(0.0, (1 - self.fraction) * (self.whole_s - self.first_s) - since_report_s)

    def _share(self, step: float | None) -> float:
        total = self.number("total_steps")
        return min(1.0, max(0.0, step / total)) if step is not None and total else 0.0


@dataclass(frozen=True)
class Failure:
    """A job that has failed for good."""

    job: str
    slot: str
    reason: str


@dataclass(frozen=True)
class Picture:
    """How an experiment stands."""

    kind: str
    total: int
    places: tuple[Place, ...]
    before: int = 0
    """jobs that earlier starts have done"""
    finished: int = 0
    pruned: int = 0
    failed: int = 0
    retried: int = 0
    """attempts that were lost and begun again"""
    failures: tuple[Failure, ...] = ()
    state: State = "running"
    reason: str = ""
    """what a stop means for the jobs"""
    host: str = ""
    pid: int = 0
    began: float = 0.0
    """this start"""
    written: float = 0.0

    @property
    def done(self) -> int:
        """Jobs that need not run again."""
        return self.before + self.finished + self.pruned

    @property
    def ended(self) -> int:
        return self.done + self.failed

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "stopped")

    def jobs_per_s(self, now: float) -> float:
        """Of this start."""
        return (self.ended - self.before) / max(now - self.began, 1e-9)

    def left_s(self, now: float) -> float | None:
        """Seconds until the last job ends: by what the running jobs say of themselves, else by the
        jobs that have ended in this start; None if neither tells."""
        known = [left for place in self.places if (left := place.left_s(now)) is not None]
        if known:
            whole_s = statistics.mean(place.whole_s for place in self.places if place.whole_s)
            others = max(0, self.total - self.ended - len(known))
            serving = max(1, sum(place.in_service for place in self.places))
            return max(*known, (sum(known) + others * whole_s) / serving)
        speed = self.jobs_per_s(now)
        return None if speed <= 0 or self.is_over else max(0, self.total - self.ended) / speed


class Board:
    """Keeps the picture while the pool runs. Another thread may look at it at any time."""

    def __init__(
        self,
        kind: str,
        total: int,
        slots: Sequence[Slot],
        *,
        before: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`before` of the `total` jobs were done by earlier starts."""
        self.clock = clock
        self.picture = Picture(
            kind,
            total,
            tuple(Place(slot.name) for slot in slots),
            before,
            host=socket.gethostname(),
            pid=os.getpid(),
            began=clock(),
        )

    def take(self, event: Event) -> None:
        """Takes note of what has happened."""
        self.picture = folded(self.picture, event, self.clock())

    def expect(self, total: int) -> None:
        """There are more jobs than were known."""
        self.picture = replace(self.picture, total=total)

    def recount(self, done: int) -> None:
        """So many of the jobs are done in all: others have done some, too."""
        now = self.picture
        self.picture = replace(now, before=max(0, done - now.finished - now.pruned))

    def end(self) -> None:
        """The pool has ended: nobody works any more."""
        now = self.picture
        idle = tuple(_idle(place) for place in now.places)
        state: State = "finished" if now.ended >= now.total else "stopped"
        self.picture = replace(now, state=state, places=idle)


def folded(picture: Picture, event: Event, now: float) -> Picture:
    """The picture after the event."""
    if event.kind == "stopping":
        return replace(picture, state="stopping", reason=event.reason)
    places = tuple(
        _after(place, event, now) if place.slot == event.slot.name else place
        for place in picture.places
    )
    changes: dict[str, Any] = {"places": places}
    if event.kind in ("finished", "pruned", "failed", "retried"):
        changes[event.kind] = getattr(picture, event.kind) + 1
    if event.kind == "failed" and event.job is not None:
        failure = Failure(event.job.name, event.slot.name, event.reason)
        changes["failures"] = (*picture.failures, failure)[-KEPT_FAILURES:]
    return replace(picture, **changes)


def _after(place: Place, event: Event, now: float) -> Place:
    """The place after an event of its slot."""
    if event.kind == "slot_lost":
        return replace(place, in_service=False, reason=event.reason)
    if event.kind == "started" and event.job is not None:
        return replace(
            _idle(place),
            job=event.job.name,
            pid=event.pid,
            attempt=event.attempt,
            began=now - event.elapsed_s,
            log=event.log,
        )
    if event.kind == "reported":
        changes: dict[str, Any] = {"metrics": {**place.metrics, **event.metrics}}
        if is_number(step := event.metrics.get("step")):
            changes["step_s"] = event.elapsed_s
            if place.first_step is None:
                changes |= {"first_step": step, "first_s": event.elapsed_s}
        return replace(place, **changes)
    return _idle(place)


def _idle(place: Place) -> Place:
    return Place(place.slot, place.in_service, place.reason, log=place.log)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that can be shown and reckoned with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write(folder: Path, picture: Picture) -> None:
    """Puts the picture into the experiment's folder; a full disk ends nothing."""
    content = {**asdict(picture), "written": time.time()}
    with contextlib.suppress(OSError):
        atomic_files.write_text(folder / NAME, json.dumps(content, indent=1, default=str) + "\n")


def read(folder: Path) -> Picture | None:
    """The picture in the folder, or None if there is none that can be read."""
    try:
        values = json.loads((folder / NAME).read_text())
        values["places"] = tuple(Place(**item) for item in values["places"])
        values["failures"] = tuple(Failure(**item) for item in values["failures"])
        return Picture(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""What experiments are made of: jobs, slots and what happens to them; grids, seeds, models. Pure.

A job is a function's name and plain values; a slot is where one job at a time runs. A source gives
jobs and is told what became of them: an ask/tell interface.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gpt2.train.report import Answer


class Stopped(Exception):
    """Raised by a job that ends before its work is done, because it was asked to."""


class JobLost(Exception):
    """Raised by a job of several processes, one of which has died: it is to run again."""


@dataclass(frozen=True)
class Job:
    """One call of a function in a worker process."""

    name: str
    """names its files too; no other job of the experiment has it"""
    target: str
    """`module:function`; a parameter `report` of it gets the function that tells the owner"""
    kwargs: Mapping[str, Any]
    """plain values: what JSON can hold"""
    own_process: bool = True
    """a fresh process for this job alone; short jobs share one, which saves its start"""
    slot: int | None = None
    """the slot that it waits for; None is whichever is free first"""
    wants_numbers: bool = False
    """whether it has failed if what it returns has no number"""


@dataclass(frozen=True)
class Slot:
    """A place where one job at a time runs: a GPU or several, or a share of the CPU cores."""

    index: int
    name: str
    """gpu2, gpu0-1, cpu0"""
    environment: Mapping[str, str]
    """what its worker process sees beside the owner's environment"""


EventKind = Literal[
    "started",  # a worker has taken the job
    "reported",  # `metrics` of a running job
    "finished",  # `result` is what the function returned
    "pruned",  # the same, after `report` had answered "prune"
    "retried",  # it died, `reason` says how; it will run again
    "failed",  # for good: `reason`, and the `traceback` if it raised
    "stopped",  # before its end, because the owner ends; it is to be run again another time
    "slot_lost",  # the slot takes no more jobs; there is no job
    "waiting",  # nothing has happened for a while; told to the source alone, no job, any slot
    "stopping",  # the owner ends, and asks every job to: no job, and any slot
]


@dataclass(frozen=True)
class Event:
    """What happened to a job."""

    kind: EventKind
    slot: Slot
    job: Job | None = None
    pid: int = 0
    attempt: int = 1
    elapsed_s: float = 0.0
    """since this attempt began"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    reason: str = ""
    traceback: str = ""
    log: str = ""
    """file that the worker writes to"""
    host: str = ""
    """the machine that the worker runs on, if it is not the owner's"""


class JobSource(Protocol):
    """Where jobs come from: an experiment gives jobs, and learns what became of them."""

    def next(self) -> Job | None:
        """The next job, or None if there is none at present: asked again after each event."""
        ...

    def event(self, event: Event) -> Answer:
        """Takes note; the answer to what a job reported is handed to the job."""
        ...

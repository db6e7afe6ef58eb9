"""Jobs, slots, events, and where jobs come from: what the pool and its users share. Pure.

A job is a function's name and plain values. A slot is where one job at a time runs. A source gives
the scheduler jobs, and receives an event for everything that happens to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gpt2.train.report import Answer


class Stopped(Exception):
    """Raised by a job that ends before its work is done, as requested: it runs again later."""


@dataclass(frozen=True)
class Job:
    """One call of a function in a worker process."""

    name: str
    """unique in the experiment; the job's files are named after it"""
    target: str
    """`module:function`; its parameter `report`, if it has one, gets the function that reports to
    the owner"""
    kwargs: Mapping[str, Any]
    """plain values: what JSON can hold"""
    own_process: bool = True
    """whether it gets a new process; short jobs share one, which saves the start"""
    slot: int | None = None
    """index of the slot that it waits for; None takes the first free one"""
    wants_numbers: bool = False
    """whether a result without any number counts as a failure"""


@dataclass(frozen=True)
class Slot:
    """Where one job at a time runs: a GPU or several, or a share of the CPU cores."""

    index: int
    name: str
    """gpu2, gpu0-1, cpu0"""
    environment: Mapping[str, str]
    """variables of its worker process, in addition to the owner's"""


EventKind = Literal[
    "started",  # a worker has the job
    "reported",  # `metrics` of a running job
    "finished",  # `result` is what the function returned
    "pruned",  # the same, after `report` answered "prune"
    "retried",  # its worker was lost, for `reason`; the job will run again
    "failed",  # for good: `reason`, and the `traceback` if the function raised
    "stopped",  # before its end, because the owner ends; the same command runs it again
    "slot_lost",  # the slot gets no more jobs; no job
    "waiting",  # nothing has happened for a while; for the source alone, no job, any slot
    "stopping",  # the owner ends, and has requested every job to stop; no job, any slot
]


@dataclass(frozen=True)
class Event:
    """What happened to a job, or to the pool."""

    kind: EventKind
    slot: Slot
    job: Job | None = None
    pid: int = 0
    attempt: int = 1
    elapsed_s: float = 0.0
    """since this attempt started"""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    reason: str = ""
    traceback: str = ""
    log: str = ""
    """file that the worker writes to"""
    host: str = ""
    """the worker's machine; empty if it is the owner's"""


class JobSource(Protocol):
    """Where jobs come from. The scheduler calls both methods, in the owner's main thread."""

    def next(self) -> Job | None:
        """The next job, or None if there is none now: called again after each event. A worker
        without a job ends."""
        ...

    def event(self, event: Event) -> Answer:
        """Receives an event. The answer to "reported" is passed to the job; others are ignored."""
        ...

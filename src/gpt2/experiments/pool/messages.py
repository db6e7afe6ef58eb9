"""The messages between the processes of an experiment: frozen dataclasses, one line of JSON each.

Three links carry them:

    owner (scheduler) <-> worker               a socket pair: see `process` and `worker`
    worker <-> the ranks of its training       a Unix socket: see `training.ddp_host`, `ddp_rank`
    owner <-> guard on another machine         a Ray actor, which forwards: see `ray_engine`

A line is `{"message": "JobReported", "metrics": {"step": 3}}`. A field that this version does not
know is ignored with a warning, so that both ends may differ by a version.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from gpt2.base.json_fields import from_json
from gpt2.experiments.pool.job import Job
from gpt2.train.report import Answer


@dataclass(frozen=True)
class JobLoaded:
    """Worker to owner: the function is imported and runs now."""


@dataclass(frozen=True)
class JobReported:
    """Worker to owner, rank 0 to its host: what the job called `report` with. Wants a Reply."""

    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """The answer to JobReported."""

    answer: Answer


@dataclass(frozen=True)
class JobEnded:
    """Worker to owner: how the job ended."""

    state: Literal["finished", "pruned", "failed", "stopped", "lost"]
    """lost: one of the job's own processes died, and it is to run again"""
    result: Any = None
    """of a finished or pruned job"""
    reason: str = ""
    """of a failed or lost job"""
    traceback: str = ""
    """of a failed job; empty if a UserError explains the failure"""
    is_out_of_memory: bool = False
    is_device_error: bool = False
    """whether the GPU reported the error"""
    takes_no_more: bool = False
    """whether the process is unfit for another job"""


@dataclass(frozen=True)
class RankConnected:
    """Rank to host: the first message."""

    rank: int


@dataclass(frozen=True)
class RunTraining:
    """Host to rank: the keyword arguments of `training_job.run`."""

    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class StopTraining:
    """Host to rank: save and end."""


@dataclass(frozen=True)
class RankFinished:
    """Rank to host: the training has ended; rank 0 has its result."""

    result: Mapping[str, Any] | None
    """None if the training failed, and another rank sends RankFailed"""


@dataclass(frozen=True)
class RankFailed:
    """Rank to host: the training raised an exception."""

    error: str
    """name of its class"""
    text: str
    traceback: str


@dataclass(frozen=True)
class WorkerStarted:
    """Guard to owner: the worker runs."""

    pid: int
    host: str


@dataclass(frozen=True)
class SendSignal:
    """Owner to guard: send the worker a signal."""

    number: int


@dataclass(frozen=True)
class EndWhenIdle:
    """Owner to guard: let the worker end as soon as it has no job."""


@dataclass(frozen=True)
class Kill:
    """Owner to guard: kill the worker and what it started."""


Message = (
    Job
    | JobLoaded
    | JobReported
    | Reply
    | JobEnded
    | RankConnected
    | RunTraining
    | StopTraining
    | RankFinished
    | RankFailed
    | WorkerStarted
    | SendSignal
    | EndWhenIdle
    | Kill
)
"""a Job is a message, too: the owner sends it to the worker that is to run it"""
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """The message as a line. Raises TypeError for a value that JSON cannot hold."""
    values = {item.name: getattr(message, item.name) for item in fields(message)}
    return json.dumps({"message": type(message).__name__, **values}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line; raises ValueError if the line is not one."""
    values = json.loads(line)
    kind = KINDS.get(values.pop("message", "")) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"expected a message of {', '.join(KINDS)}, got {line[:200]!r}")
    try:
        return from_json(kind, values, "message of another version")
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"incomplete message {line[:200]!r}: {error}") from error


def json_ready(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy and torch values as Python's, paths as text, NaN and
    infinity as None. What is none of these stays as it is."""
    if isinstance(value, dict):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

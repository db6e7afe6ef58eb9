"""The messages between an owner and its worker: frozen dataclasses.

The owner sends Jobs and Replies. The worker sends, for each job, JobPhase twice, any number of
JobReported, each of which gets a Reply, and one JobEnded. The last message, WorkerEnded, is from
the engine. What a job reports and returns are plain values, as JSON has them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2.train.report import Answer

Phase = Literal["waiting", "loading", "running"]


@dataclass(frozen=True)
class JobPhase:
    """Where the job is: its worker waits for a machine, imports the function, or runs it."""

    phase: Phase


@dataclass(frozen=True)
class JobReported:
    """What the job called `report` with. Wants a Reply."""

    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """The answer to JobReported."""

    answer: Answer


@dataclass(frozen=True)
class JobEnded:
    """How the job ended."""

    state: Literal["finished", "pruned", "failed", "stopped", "lost"]
    """lost: the memory was full, or one of the job's own processes died; it is to run again"""
    result: Any = None
    """of a finished or pruned job"""
    reason: str = ""
    """of a failed or lost job"""
    traceback: str = ""
    """of a failed or lost job; empty if a UserError explains the failure"""
    is_device_error: bool = False
    """whether the GPU reported the error"""
    takes_no_more: bool = False
    """whether the process ends now: it is unfit for another job, or was for one only"""


@dataclass(frozen=True)
class WorkerEnded:
    """The worker has ended, and with it the job that it may have had."""

    reason: str
    lost: Literal["worker", "slot", "engine"] = "worker"
    """what cannot be used any more"""


Message = JobPhase | JobReported | JobEnded | WorkerEnded
"""what a scheduler receives"""


class EndedAs(Exception):
    """Raised by a job that consists of several processes: how one of them ended."""

    def __init__(self, ended: JobEnded) -> None:
        super().__init__(ended.reason)
        self.ended = ended


def json_ready(value: Any) -> Any:
    """`value` as JSON has it: NumPy and torch values as Python's, paths as text, tuples as lists,
    NaN and infinity as None. Raises TypeError for what JSON cannot hold."""
    return json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")

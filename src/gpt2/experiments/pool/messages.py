"""The messages between an owner and its worker: frozen dataclasses.

The owner sends Jobs and Replies. The worker sends, for each job, JobPhase twice, any number of
JobReported, each of which gets a Reply, and one JobEnded. The last message, WorkerEnded, is from
the engine. What a job reports and returns are plain values, as JSON has them.
"""

import json
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeGuard

from gpt2.base.validation import is_finite
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
    lost: Literal["worker", "slot", "engine", "script"] = "worker"
    """what cannot be used any more; a script is to be mended"""


Message = JobPhase | JobReported | JobEnded | WorkerEnded
"""what a scheduler receives"""


class EndedAs(Exception):
    """Raised by a job that consists of several processes: how one of them ended."""

    def __init__(self, ended: JobEnded) -> None:
        super().__init__(ended.reason)
        self.ended = ended


def json_ready(value: Any, *, strict: bool = False) -> Any:
    """`value` as JSON has it: NumPy and torch values as Python's, paths as text, tuples as lists,
    and NaN, infinity and what is beyond the range of floats as None.

    Raises TypeError for what JSON cannot hold. If `strict`, integers stay exact, and ValueError is
    raised in place of None.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if is_number(value):
        is_whole = isinstance(value, numbers.Integral)
        if not is_finite(value) and not (strict and is_whole):
            if strict:
                raise ValueError("a number is NaN, infinite or beyond the range of floats")
            return None
        number = int(value) if is_whole else float(value)
        if strict:
            json.dumps(number)  # ValueError for too many digits
        return number
    if isinstance(value, Mapping):
        items = value.items()
        return {_key(key): json_ready(item, strict=strict) for key, item in items}
    if isinstance(value, list | tuple):
        return [json_ready(item, strict=strict) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return json_ready(value.tolist(), strict=strict)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one real number, of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool)


def _key(key: Any) -> str:
    plain = json_ready(key)
    if isinstance(plain, list | dict):
        raise TypeError(f"keys of type {type(key).__name__} are not JSON serializable")
    return plain if isinstance(plain, str) else json.dumps(plain)

"""What a task of `gpt2 evaluate` measures. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MeasuredValue:
    """One row of the table."""

    task: str
    about: Mapping[str, str]
    """settings of the task"""
    metric: str
    value: float
    error: float
    """standard error"""
    count: str
    gpt2: float | None = None
    """the published value of GPT-2 124M"""


Measure = Callable[[], list[MeasuredValue]]
"""measures the model; what it reads from disk was read before"""

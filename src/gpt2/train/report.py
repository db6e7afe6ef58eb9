"""How a caller steers a training: it answers each report of metrics with what to do. Pure."""

from collections.abc import Callable
from typing import Literal

Answer = Literal["go", "prune", "stop"]
Report = Callable[..., Answer]
"""called with metrics by name (step, loss, val_loss …)"""


def always_go(**_metrics: float) -> Answer:
    """The report of a training that is not steered."""
    return "go"

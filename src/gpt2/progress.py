"""How far a run is, and how it ended."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: Literal["finished", "stopped", "pruned"]
    step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    hellaswag: float | None
    exit_code: int


@dataclass
class Progress:
    """What changes while a run trains, beside weights and optimiser; kept in every checkpoint."""

    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    hellaswag: float | None = None
    """acc_norm, when it was last measured"""
    validated_step: int | None = None
    """the step that `val_loss` belongs to"""
    judged_step: int | None = None
    """the step whose validation, HellaSwag and samples are all done"""
    bad_steps: int = 0
    """updates left out so far, because loss or gradient was no finite number"""
    bad_in_a_row: int = 0
    left_out: tuple[int, int] | None = None
    """the portions of data that are never trained on: the first one and how many"""

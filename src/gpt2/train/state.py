"""How far a run is, and how it ended."""

from dataclasses import dataclass
from typing import Literal

End = Literal["finished", "stopped", "pruned"]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: End
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

    def result(self, state: End, exit_code: int = 0) -> Result:
        """That of a run which ends here."""
        return Result(
            state,
            self.step,
            self.train_loss,
            self.val_loss,
            self.best_val_loss,
            self.hellaswag,
            exit_code,
        )

"""The state of a run beside weights and optimiser, and its result. Pure."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpt2.data.batch_ramp import BatchRamp

End = Literal["finished", "stopped", "pruned"]
# Keys of checkpoints that earlier versions wrote.
FORMER_NAMES = {"judged_step": "evaluated_step"}


@dataclass(frozen=True)
class Update:
    """What one update of the weights was like."""

    loss: float
    """mean over the global batch, before the update, nats per token"""
    grad_norm: float
    """L2 norm of all gradients, before clipping"""
    applied: bool
    """whether the weights changed: not if loss or norm is NaN or infinite, or a skipped spike"""
    is_spike: bool
    """whether loss or norm is far above those of the updates before"""
    loss_scale: float | None
    """by which the loss was scaled; None unless the run computes in float16"""
    elapsed_s: float
    rank_s: list[float]
    """seconds that each rank computed before it waited for the other ranks' gradients"""
    rank_gpu: list[dict[str, float]]
    """what each rank used of its GPU, as far as it is known"""
    corpus_losses: tuple[float | None, ...] = ()
    """of a mixture, as `loss`, over the rows of each corpus; None without any"""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    state: End
    step: int
    train_loss: float | None
    val_loss: float | None
    """at `step`; None if it was not measured there"""
    bits_per_byte: float | None
    """as `val_loss`; also None if an earlier version measured that"""
    best_val_loss: float | None
    hellaswag: float | None
    """acc_norm, when it was last measured"""
    exit_code: int
    tokens: int
    """of all updates"""


@dataclass
class TrainState:
    """What changes while a run trains; every checkpoint holds it, under the key `progress`."""

    step: int = 0
    """finished updates"""
    train_loss: float | None = None
    val_loss: float | None = None
    """at `validated_step`"""
    bits_per_byte: float | None = None
    """beside `val_loss`; None if that is of an earlier version, or its rows have no text"""
    best_val_loss: float | None = None
    hellaswag: float | None = None
    """acc_norm, when it was last measured"""
    validated_step: int | None = None
    scored_step: int | None = None
    """the step that `hellaswag` belongs to"""
    evaluated_step: int | None = None
    """the step at which everything that was due is measured"""
    bad_steps: int = 0
    """updates skipped so far, because loss or gradient was NaN, infinite or a skipped spike"""
    bad_in_a_row: int = 0
    spikes: int = 0
    """spikes so far, skipped or not"""
    overflows: int = 0
    """updates skipped so far because the loss was scaled too much; none of them is a bad one"""
    left_out: tuple[int, int] | None = None
    """the sampler's steps that are never trained on, as (first, count)"""
    plain_head: bool = False
    """whether an earlier version began the run with --no_fast: without the head's single pass"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint holds, also one of an earlier version."""
        named = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
        return cls(**{name: named[name] for name in cls.__dataclass_fields__ if name in named})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add_validation(self, loss: float, bits_per_byte: float | None) -> None:
        """Records the validation loss of this step."""
        self.val_loss, self.bits_per_byte, self.validated_step = loss, bits_per_byte, self.step
        if math.isfinite(loss):
            best = self.best_val_loss
            self.best_val_loss = loss if best is None else min(loss, best)

    def drop_validation(self) -> None:
        """Drops the losses on other validation rows than those from here on. If this is the last
        step, it is validated again; at any other, nothing is measured a second time."""
        self.val_loss = self.bits_per_byte = self.best_val_loss = self.validated_step = None

    def add_hellaswag(self, acc_norm: float) -> None:
        """Records the HellaSwag score of this step."""
        self.hellaswag, self.scored_step = acc_norm, self.step

    def data_step(self, step: int) -> int:
        """The step of the sampler on which the update after `step` finished updates trains.

        The two differ after a divergence, once data is skipped.
        """
        if self.left_out is None or step < self.left_out[0]:
            return step
        return step + self.left_out[1]

    def step_that_reads(self, data_step: int) -> int:
        """The number of finished updates at which, at the earliest, `data_step` or what follows it
        is trained on: the inverse of `data_step`."""
        if self.left_out is None or data_step < self.left_out[0]:
            return data_step
        return max(self.left_out[0], data_step - self.left_out[1])

    def rows_until(self, step: int, ramp: BatchRamp) -> int:
        """Rows that the first `step` updates train on."""
        rows = ramp.rows_before(self.data_step(step))
        if self.left_out is None or step < self.left_out[0]:
            return rows
        first, count = self.left_out
        return rows - (ramp.rows_before(first + count) - ramp.rows_before(first))

    def result(self, state: End, tokens: int, exit_code: int = 0) -> RunResult:
        """The result of a run that ends at this step, after `tokens`."""
        is_validated = self.validated_step == self.step
        return RunResult(
            state,
            self.step,
            self.train_loss,
            self.val_loss if is_validated else None,
            self.bits_per_byte if is_validated else None,
            self.best_val_loss,
            self.hellaswag,
            exit_code,
            tokens,
        )

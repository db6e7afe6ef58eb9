"""How many rows each step reads: the batch of a run may grow by phases. Pure.

`--batch_ramp 200:131072 600:262144` is 131,072 tokens in the first 200 steps, 262,144 in the next
400, and `total_batch_size` from then on. Steps are those of the sampler: if data is left out after
a divergence, phases end so many updates earlier. They are absolute, so a phase stays where it is if
the run becomes longer.
"""

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gpt2.base.errors import ConfigError
from gpt2.base.validation import LARGEST, nearest_multiples, require

PHASE = re.compile(r"([1-9][0-9]{0,12}):([1-9][0-9]{0,12})")


@dataclass(frozen=True)
class RampPhase:
    """Rows of a step, over all ranks, up to `until_step`: the first step of what follows."""

    until_step: int
    rows_per_step: int


@dataclass(frozen=True)
class BatchRamp:
    """The rows of each step, over all ranks: those of the phases, which ascend, then
    `rows_per_step`. Without phases, all steps have as many."""

    rows_per_step: int
    phases: tuple[RampPhase, ...] = ()

    def rows_of(self, step: int) -> int:
        """Rows of a step."""
        return self._part_of_step(step).rows_per_step

    def rows_before(self, step: int) -> int:
        """Rows of the steps 0 to `step - 1`."""
        part = self._part_of_step(step)
        return part.first_row + (step - part.first_step) * part.rows_per_step

    def step_of(self, row: int) -> int:
        """The step that reads a row; rows count from 0, over all steps."""
        part = self._parts[bisect.bisect_right(self._parts, row, key=lambda p: p.first_row) - 1]
        return part.first_step + (row - part.first_row) // part.rows_per_step

    def steps_for(self, rows: int) -> int:
        """The number of steps after which at least so many rows are read."""
        return self.step_of(rows - 1) + 1 if rows > 0 else 0

    def _part_of_step(self, step: int) -> "_Part":
        return self._parts[bisect.bisect_right(self._parts, step, key=lambda p: p.first_step) - 1]

    @cached_property
    def _parts(self) -> list["_Part"]:
        """The phases, and what follows them, in order."""
        parts, first_step, first_row = [], 0, 0
        for phase in self.phases:
            parts.append(_Part(first_step, first_row, phase.rows_per_step))
            first_row += (phase.until_step - first_step) * phase.rows_per_step
            first_step = phase.until_step
        return [*parts, _Part(first_step, first_row, self.rows_per_step)]


@dataclass(frozen=True)
class _Part:
    """Steps with the same number of rows."""

    first_step: int
    first_row: int
    rows_per_step: int


def ramp_of(settings: Sequence[str], total_batch_size: int, block_size: int) -> BatchRamp:
    """The ramp that --batch_ramp describes: a text STEP:TOKENS for each phase.

    Raises ConfigError if the steps or the tokens do not ascend, up to `total_batch_size`, or if a
    step has no whole number of rows of `block_size`.
    """
    phases = [_phase(text) for text in settings]
    for (before, fewer), (until, tokens) in itertools.pairwise([(0, 0), *phases]):
        require(
            before < until <= LARGEST and fewer < tokens < total_batch_size,
            f"--batch_ramp: {until}:{tokens} does not ascend; expected STEP:TOKENS with a step "
            f"after {before}, {LARGEST} at most, and more than {fewer} tokens, less than "
            f"total_batch_size={total_batch_size}",
        )
        require(
            tokens % block_size == 0,
            f"--batch_ramp: {tokens} tokens are not a multiple of block_size={block_size}; "
            f"nearest: {nearest_multiples(tokens, block_size)}",
        )
    return BatchRamp(
        total_batch_size // block_size,
        tuple(RampPhase(until, tokens // block_size) for until, tokens in phases),
    )


def _phase(text: str) -> tuple[int, int]:
    found = PHASE.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--batch_ramp: expected STEP:TOKENS, got {text!r:.80}; use for example "
            "--batch_ramp 200:131072 600:262144, or no value for no ramp"
        )
    return int(found[1]), int(found[2])

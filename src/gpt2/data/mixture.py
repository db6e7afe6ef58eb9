"""Which corpus each row of a run comes from: a pure function of (weights, seed, row). Pure.

The rows of a run are counted from 0. A phase begins at a row and is divided into blocks of 1,000
rows. At the end of each block, the rows of every corpus since the beginning of the phase differ by
less than one from its share of all of them: the shares are rounded by largest remainders, and what
rounding adds or takes is made up in the next block. Within a block, a random permutation says which
row comes from which corpus. Each corpus is read in the order of its own rows.
"""

import bisect
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePath

import numpy as np

from gpt2.data import permutation
from gpt2.data.permutation import Indices

BLOCK_ROWS = 1000
STREAM = (1 << 63) - 1
"""of random numbers; shards have the numbers of theirs"""


def corpus_name(root: str) -> str:
    """The last component of a folder or URL without a wildcard, as a name of a corpus."""
    components = [part for part in PurePath(root).parts if not set(part) & set("*?[")]
    return re.sub(r"\W+", "_", components[-1]).strip("_") if components else ""


@dataclass(frozen=True)
class Phase:
    """From `first_row` on, `weights[i]` of `sum(weights)` rows come from corpus i."""

    first_row: int
    weights: tuple[int, ...]

    @cached_property
    def block_rows(self) -> int:
        """1,000; if a corpus has less than one row of them, as many times ten as it needs. With
        less, the number of its rows in a block could be negative."""
        rows, smallest = BLOCK_ROWS, min(filter(None, self.weights))
        while rows * smallest < sum(self.weights):
            rows *= 10
        return rows

    def rows_before(self, block: int) -> tuple[int, ...]:
        """Rows of each corpus in the blocks 0 to `block - 1` of the phase."""
        rows, total = block * self.block_rows, sum(self.weights)
        exact = [divmod(rows * weight, total) for weight in self.weights]
        missing = rows - sum(whole for whole, _ in exact)
        by_remainder = sorted(range(len(exact)), key=lambda corpus: (-exact[corpus][1], corpus))
        rounded_up = set(by_remainder[:missing])
        return tuple(whole + (corpus in rounded_up) for corpus, (whole, _) in enumerate(exact))


@dataclass(frozen=True)
class Mixture:
    """The corpora of all rows. The first phase begins at row 0, each other one after the one before
    it."""

    phases: tuple[Phase, ...]
    seed: int
    corpus_seeds: tuple[int, ...] = ()
    """by which each corpus is shuffled; that of the run, if there are none"""

    def at(self, rows: Indices) -> tuple[Indices, Indices]:
        """The corpus of each of `rows`, and its position in the sequence of that corpus' rows.

        Both have the shape of `rows`.
        """
        corpora, positions = np.empty_like(rows), np.empty_like(rows)
        starts = np.array([phase.first_row for phase in self.phases])
        phases = np.searchsorted(starts, rows, side="right") - 1
        lengths = np.array([phase.block_rows for phase in self.phases])
        blocks, offsets = np.divmod(rows - starts[phases], lengths[phases])
        for number, block in sorted(set(zip(phases.tolist(), blocks.tolist(), strict=True))):
            here = (phases == number) & (blocks == block)
            of_block, before = self._block(number, block)
            corpora[here] = of_block[offsets[here]]
            positions[here] = before[offsets[here]]
        return corpora, positions

    def rows_before(self, row: int) -> tuple[int, ...]:
        """Rows of each corpus before `row`."""
        number = bisect.bisect_right(self.phases, row, key=lambda phase: phase.first_row) - 1
        return self._rows_before(number, row - self.phases[number].first_row)

    def row_of(self, corpus: int, position: int) -> int | None:
        """The row at which a position in a corpus is read; None if it is never read.

        The inverse of `at`.
        """
        for number in range(len(self.phases) - 1, -1, -1):
            before = self._before_phase[number][corpus]
            if before <= position:
                break
        phase, wanted = self.phases[number], position - before
        if not phase.weights[corpus]:
            return None
        # Its share of the blocks before is at most one row away from what it was rounded to.
        guess = (wanted + 1) * sum(phase.weights) // (phase.weights[corpus] * phase.block_rows) + 2
        blocks = range(guess + 1)
        block = bisect.bisect_right(blocks, wanted, key=lambda n: phase.rows_before(n)[corpus]) - 1
        of_block, before_row = self._block(number, block)
        (offset,) = np.flatnonzero((of_block == corpus) & (before_row == position))
        return phase.first_row + block * phase.block_rows + int(offset)

    @cached_property
    def _before_phase(self) -> list[tuple[int, ...]]:
        """Rows of each corpus before each phase."""
        found = [(0,) * len(self.phases[0].weights)]
        for number in range(1, len(self.phases)):
            rows = self.phases[number].first_row - self.phases[number - 1].first_row
            found.append(self._rows_before(number - 1, rows, found[-1]))
        return found

    def _rows_before(
        self, number: int, rows: int, before_phase: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """Rows of each corpus before the row `rows` of a phase."""
        phase = self.phases[number]
        begin = self._before_phase[number] if before_phase is None else before_phase
        block, rest = divmod(rows, phase.block_rows)
        in_rest = np.bincount(
            _corpora_of_block(phase, block, self.seed)[:rest], minlength=len(begin)
        )
        return tuple(map(sum, zip(begin, phase.rows_before(block), in_rest.tolist(), strict=True)))

    def _block(self, number: int, block: int) -> tuple[Indices, Indices]:
        """The corpora and positions of all rows of a block."""
        phase = self.phases[number]
        corpora = _corpora_of_block(phase, block, self.seed)
        positions = np.empty_like(corpora)
        before = zip(self._before_phase[number], phase.rows_before(block), strict=True)
        for corpus, counts in enumerate(before):
            here = corpora == corpus
            positions[here] = sum(counts) + np.arange(np.count_nonzero(here))
        return corpora, positions


@lru_cache(maxsize=64)  # a step reads the same few blocks as the one before it
def _corpora_of_block(phase: Phase, block: int, seed: int) -> Indices:
    """The corpus of each row of a block."""
    counts = np.subtract(phase.rows_before(block + 1), phase.rows_before(block))
    in_order = np.repeat(np.arange(len(counts)), counts)
    first_row = phase.first_row + block * phase.block_rows
    return permutation.generator(seed, first_row, STREAM).permutation(in_order)

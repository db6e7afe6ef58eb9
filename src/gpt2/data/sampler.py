"""Which rows a step trains on: a pure function of (shard sizes, mixture, seed, step). Pure.

A row is `block_size` inputs with their targets. An epoch of a corpus lists the rows of all its
shards, shard after shard or in a permutation of all; the lists of epochs 0, 1, 2, … follow each
other without end. The rows of a run are those of its corpus, or, of several, what `mixture` takes
from each of them. Each step reads the next ones, as many as `batch_ramp` says, so the step number
alone determines the position.

Rows are arrays (R, 2) of int64: shard index, row index within the shard. The shards of several
corpora have consecutive indices, corpus after corpus.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpt2.data import permutation
from gpt2.data.batch_ramp import BatchRamp, RampPhase
from gpt2.data.mixture import Mixture
from gpt2.data.permutation import Indices

Rows = npt.NDArray[np.int64]
Shuffle = Literal["shards", "rows", "global", "none"]
MOST_ROWS = 2**62
"""positions of rows are 64-bit integers"""
PERMUTED_AT_ONCE = 4096
"""rows; for a few of them, `permuted` takes almost as long"""


@dataclass(frozen=True)
class CorpusRows:
    """The endless sequence of the rows of one corpus.

    `rows_per_shard` is in name order. `shuffle` is what is permuted: nothing (`none`), the shards
    in every epoch but epoch 0 (`shards`), in every epoch also the rows within each shard (`rows`),
    or in every epoch all rows of all shards (`global`).
    """

    rows_per_shard: tuple[int, ...]
    seed: int
    shuffle: Shuffle = "shards"

    @cached_property
    def rows_per_epoch(self) -> int:
        return sum(self.rows_per_shard)

    def shards_of(self, epoch: int) -> Indices:
        """Shard indices in the order that `epoch` reads them; name order in epoch 0."""
        count = len(self.rows_per_shard)
        if epoch == 0 or self.shuffle in ("global", "none"):
            return np.arange(count, dtype=np.int64)
        return permutation.generator(self.seed, epoch).permutation(count)

    def at(self, positions: Indices) -> Rows:
        """The rows at `positions` of the sequence."""
        epochs, offsets = np.divmod(positions, self.rows_per_epoch)
        rows = np.empty((len(positions), 2), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = self._locate(epoch, offsets[epochs == epoch])
        return rows

    def shard_after(self, position: int) -> int:
        """The shard that is read after the one that holds the row at `position`."""
        epoch, offset = divmod(position, self.rows_per_epoch)
        ends = np.cumsum(np.asarray(self.rows_per_shard)[self.shards_of(epoch)])
        end = int(ends[np.searchsorted(ends, offset, side="right")])
        return int(self.at(np.array([epoch * self.rows_per_epoch + end]))[0, 0])

    def first_position_in(self, shard: int) -> int:
        """The first position that may be a row of `shard`; all of them are read in epoch 0."""
        return 0 if self.shuffle == "global" else sum(self.rows_per_shard[:shard])

    def _locate(self, epoch: int, offsets: Indices) -> Rows:
        if self.shuffle == "global":
            offsets = self._permuted(epoch, offsets)
        rows = _rows_at(np.asarray(self.rows_per_shard), self.shards_of(epoch), offsets)
        if self.shuffle == "rows":
            for shard in np.unique(rows[:, 0]).tolist():
                here = rows[:, 0] == shard
                count = self.rows_per_shard[shard]
                rows[here, 1] = _row_permutation(self.seed, epoch, shard, count)[rows[here, 1]]
        return rows

    def _permuted(self, epoch: int, offsets: Indices) -> Indices:
        """Where the permutation of all rows of an epoch takes `offsets`."""
        blocks, numbers = np.divmod(offsets, PERMUTED_AT_ONCE)
        places = np.empty_like(offsets)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            of_block = _permuted_block(self.seed, epoch, self.rows_per_epoch, block)
            places[here] = of_block[numbers[here]]
        return places


@dataclass(frozen=True)
class Sampler:
    """The rows of a run, divided into steps.

    `rows_per_shard` is in name order, corpus after corpus; `rows_per_step` counts the rows of one
    step over all ranks, after the phases of a ramp. With a `mixture`, `shards_per_corpus` says how
    many shards each corpus has.
    """

    rows_per_shard: tuple[int, ...]
    rows_per_step: int
    seed: int
    shuffle: Shuffle = "shards"
    mixture: Mixture | None = None
    shards_per_corpus: tuple[int, ...] = ()
    ramp_phases: tuple[RampPhase, ...] = ()

    @cached_property
    def ramp(self) -> BatchRamp:
        return BatchRamp(self.rows_per_step, self.ramp_phases)

    @cached_property
    def corpora(self) -> tuple[CorpusRows, ...]:
        ranges = list(itertools.pairwise(self.first_shards))
        seeds = (self.mixture and self.mixture.corpus_seeds) or (self.seed,) * len(ranges)
        return tuple(
            CorpusRows(self.rows_per_shard[first:end], seed, self.shuffle)
            for (first, end), seed in zip(ranges, seeds, strict=True)
        )

    @cached_property
    def first_shards(self) -> tuple[int, ...]:
        """The first shard of each corpus, then the number of all shards."""
        counts = self.shards_per_corpus or (len(self.rows_per_shard),)
        return (0, *itertools.accumulate(counts))

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows of all corpora."""
        return sum(self.rows_per_shard)

    def epoch_at(self, step: int) -> int:
        """The epoch of the first row of `step`."""
        return self.ramp.rows_before(step) // self.rows_per_epoch

    def epochs_of(self, step: int) -> range:
        """The epochs that the rows of `step` belong to."""
        last_row = self.ramp.rows_before(step + 1) - 1
        return range(self.epoch_at(step), last_row // self.rows_per_epoch + 1)

    def first_step_of(self, epoch: int) -> int:
        """The first step whose first row belongs to `epoch`."""
        return self.ramp.steps_for(epoch * self.rows_per_epoch)

    def corpus_epochs(self, steps: int) -> list[float]:
        """How often the first `steps` steps read each corpus of a mixture."""
        assert self.mixture is not None
        rows = self.mixture.rows_before(self.ramp.rows_before(steps))
        return [
            count / corpus.rows_per_epoch for count, corpus in zip(rows, self.corpora, strict=True)
        ]

    def corpus_of(self, shards: Indices) -> Indices:
        """The corpus of each of `shards`."""
        return np.searchsorted(self.first_shards, shards, side="right") - 1

    def first_step_with(self, shard: int) -> int | None:
        """The first step that may read rows of a shard; None if no step does."""
        corpus = int(self.corpus_of(np.array(shard)))
        position = self.corpora[corpus].first_position_in(shard - self.first_shards[corpus])
        row = self.mixture.row_of(corpus, position) if self.mixture else position
        return None if row is None else self.ramp.step_of(row)

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows that `rank` reads in `step`; steps count from 0."""
        mine = share(self.ramp.rows_of(step), rank, world_size)
        first = self.ramp.rows_before(step)
        numbers = np.arange(first + mine.start, first + mine.stop, dtype=np.int64)
        if self.mixture is None:
            return self.corpora[0].at(numbers)
        rows = np.empty((len(numbers), 2), dtype=np.int64)
        corpora, positions = self.mixture.at(numbers)
        for corpus in np.unique(corpora).tolist():
            here = corpora == corpus
            rows[here] = self.corpora[corpus].at(positions[here])
            rows[here, 0] += self.first_shards[corpus]
        return rows

    def shards_after(self, step: int) -> list[int]:
        """For each corpus, the shard that is read after the one of its last row up to `step`; none
        if all shards are read all the time."""
        if self.shuffle == "global":
            return []
        read = self.ramp.rows_before(step + 1)
        counts = self.mixture.rows_before(read) if self.mixture else (read,)
        return [
            first + corpus.shard_after(count - 1)
            for first, corpus, count in zip(self.first_shards, self.corpora, counts, strict=False)
            if count
        ]


def share(count: int, rank: int, world_size: int) -> range:
    """The contiguous share of `rank` in `count` items; sizes of shares differ by at most one."""
    small, larger_ranks = divmod(count, world_size)
    start = rank * small + min(rank, larger_ranks)
    return range(start, start + small + (rank < larger_ranks))


def micro_batches(rows: Rows, mini_batch_size: int) -> Iterator[Rows]:
    """`rows` in micro-batches of at most `mini_batch_size` rows."""
    for start in range(0, len(rows), mini_batch_size):
        yield rows[start : start + mini_batch_size]


def spread(rows_per_shard: tuple[int, ...], count: int) -> Rows:
    """`count` rows, evenly spaced over the whole split; all rows if there are fewer."""
    total = sum(rows_per_shard)
    count = min(count, total)
    offsets = np.arange(count, dtype=np.int64) * total // max(count, 1)
    shards = np.arange(len(rows_per_shard), dtype=np.int64)
    return _rows_at(np.asarray(rows_per_shard), shards, offsets)


def _rows_at(
    rows_per_shard: npt.NDArray[np.int64],
    shards: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> Rows:
    """The (shard, row) at `offsets` in the list of the rows of `shards`, in this order."""
    ends = np.cumsum(rows_per_shard[shards])
    slots = np.searchsorted(ends, offsets, side="right")
    rows = offsets - (ends - rows_per_shard[shards])[slots]
    return np.stack([shards[slots], rows], axis=1)


@lru_cache(maxsize=32)  # consecutive steps read rows of the same few blocks of each corpus
def _permuted_block(seed: int, epoch: int, count: int, block: int) -> Indices:
    """Where the permutation of an epoch takes the rows of a block."""
    first = block * PERMUTED_AT_ONCE
    indices = np.arange(first, min(first + PERMUTED_AT_ONCE, count), dtype=np.int64)
    return permutation.permuted(indices, count, permutation.generator(seed, epoch))


@lru_cache(maxsize=32)  # consecutive steps read the same few shards of each corpus
def _row_permutation(seed: int, epoch: int, shard: int, count: int) -> npt.NDArray[np.int64]:
    return permutation.generator(seed, epoch, stream=shard + 1).permutation(count)

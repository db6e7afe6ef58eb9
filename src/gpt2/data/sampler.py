"""Which rows a step trains on: a pure function of (shard sizes, seed, step). Pure.

A row is `block_size` inputs with their targets. An epoch lists the rows of all shards of a split,
shard after shard; the lists of epochs 0, 1, 2, … follow each other without end. Step N reads rows
N * rows_per_step to (N + 1) * rows_per_step - 1 of that sequence, so the step number alone
determines the position.

Rows are arrays (R, 2) of int64: shard index, row index within the shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Shuffle = Literal["shards", "rows", "none"]


@dataclass(frozen=True)
class Sampler:
    """The endless sequence of training rows, divided into steps.

    `rows_per_shard` is in name order; `rows_per_step` counts the rows of one step over all ranks.
    `shuffle` is what is permuted: nothing (`none`), the shards in every epoch but epoch 0
    (`shards`), or also the rows within each shard in every epoch (`rows`).
    """

    rows_per_shard: tuple[int, ...]
    rows_per_step: int
    seed: int
    shuffle: Shuffle = "shards"

    @cached_property
    def rows_per_epoch(self) -> int:
        return sum(self.rows_per_shard)

    def epoch_at(self, step: int) -> int:
        """The epoch of the first row of `step`."""
        return step * self.rows_per_step // self.rows_per_epoch

    def epochs_of(self, step: int) -> range:
        """The epochs that the rows of `step` belong to."""
        last_row = (step + 1) * self.rows_per_step - 1
        return range(self.epoch_at(step), last_row // self.rows_per_epoch + 1)

    def first_step_of(self, epoch: int) -> int:
        """The first step whose first row belongs to `epoch`."""
        return -(-epoch * self.rows_per_epoch // self.rows_per_step)

    def first_step_with(self, shard: int) -> int:
        """The first step that reads rows of a shard (all of them are read in epoch 0)."""
        return sum(self.rows_per_shard[:shard]) // self.rows_per_step

    def shards_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Shard indices in the order that `epoch` reads them; name order in epoch 0."""
        count = len(self.rows_per_shard)
        if epoch == 0 or self.shuffle == "none":
            return np.arange(count, dtype=np.int64)
        return _generator(self.seed, epoch).permutation(count)

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows that `rank` reads in `step`; steps count from 0."""
        mine = share(self.rows_per_step, rank, world_size)
        first = step * self.rows_per_step
        positions = np.arange(first + mine.start, first + mine.stop, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.rows_per_epoch)
        parts = [self._locate(int(epoch), offsets[epochs == epoch]) for epoch in np.unique(epochs)]
        return np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.int64)

    def shard_after(self, step: int) -> int:
        """The shard that is read after the one that holds the last row of `step`."""
        epoch, offset = divmod((step + 1) * self.rows_per_step - 1, self.rows_per_epoch)
        shards = self.shards_of(epoch)
        ends = np.cumsum(np.asarray(self.rows_per_shard)[shards])
        end = int(ends[np.searchsorted(ends, offset, side="right")])
        following, offset = divmod(epoch * self.rows_per_epoch + end, self.rows_per_epoch)
        return int(self._locate(following, np.array([offset]))[0, 0])

    def _locate(self, epoch: int, offsets: npt.NDArray[np.int64]) -> Rows:
        rows = _rows_at(np.asarray(self.rows_per_shard), self.shards_of(epoch), offsets)
        if self.shuffle == "rows":
            for shard in np.unique(rows[:, 0]).tolist():
                here = rows[:, 0] == shard
                count = self.rows_per_shard[shard]
                rows[here, 1] = _row_permutation(self.seed, epoch, shard, count)[rows[here, 1]]
        return rows


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


@lru_cache(maxsize=4)  # consecutive steps read the same few shards
def _row_permutation(seed: int, epoch: int, shard: int, count: int) -> npt.NDArray[np.int64]:
    return _generator(seed, epoch, stream=shard + 1).permutation(count)


def _generator(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    """An independent stream for each epoch's shards (stream 0) and for the rows of each shard."""
    counter = [0, 0, 0, stream]  # the highest word: streams never overlap
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=counter))

"""The batches of a run, read ahead by a background thread."""

import contextlib
import queue
import threading
from collections.abc import Iterable
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2.data.sampler import Rows, Sampler, micro_batches

MicroBatch = tuple[Tensor, ...]
"""inputs and targets, each (B, T) int64 on the CPU; of a mixture also the number of the corpus of
each row, (B)"""
STEPS_AHEAD = 2


class RowSource(Protocol):
    """What rows are read from: inputs and targets, each (B, T) int64. Raises DataError."""

    def read(
        self, rows: Rows, stop: threading.Event | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
    def prefetch(self, shard: int) -> None: ...


class Loader:
    """One rank's micro-batches, step after step.

    They lie in pinned memory if `pin_memory`. `next_step` raises the errors of the background
    thread.
    """

    def __init__(
        self,
        dataset: RowSource,
        sampler: Sampler,
        steps: Iterable[int],
        *,
        rank: int = 0,
        world_size: int = 1,
        mini_batch_size: int,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._sampler = dataset, sampler
        self._rank, self._world_size = rank, world_size
        self._mini_batch_size, self._pin_memory = mini_batch_size, pin_memory
        self._ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(STEPS_AHEAD)
        self._next: list[MicroBatch] | BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(steps,), name="loader", daemon=True
        )
        self._thread.start()

    def is_ready(self, within_s: float) -> bool:
        """Waits up to `within_s` seconds for the next step; returns whether it is there."""
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self._ready.get(timeout=within_s)
        return self._next is not None

    def is_behind(self) -> bool:
        """Whether nothing is read ahead."""
        return self._ready.empty() and self._next is None

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step."""
        item = self._ready.get() if self._next is None else self._next
        self._next = None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the background thread and drops what it has read ahead."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, steps: Iterable[int]) -> None:
        try:
            for step in steps:
                rows = self._sampler.rows(step, self._rank, self._world_size)
                parts = micro_batches(rows, self._mini_batch_size)
                if not self._put([self._micro_batch(part) for part in parts]):
                    return
                for shard in self._sampler.shards_after(step):
                    self._dataset.prefetch(shard)
        except BaseException as error:  # raised by next_step
            self._put(error)

    def _put(self, item: list[MicroBatch] | BaseException) -> bool:
        """Puts `item` into the queue; returns False if the loader is closed first."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _micro_batch(self, rows: Rows) -> MicroBatch:
        inputs, targets = self._dataset.read(rows, stop=self._closed)
        parts = [inputs, targets]
        if self._sampler.mixture is not None:
            parts.append(self._sampler.corpus_of(rows[:, 0]))
        return tuple(map(self._tensor, parts))

    def _tensor(self, array: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self._pin_memory else tensor

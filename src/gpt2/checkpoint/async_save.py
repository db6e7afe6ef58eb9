"""Saving without a pause: the state is copied to memory of the host, a thread writes the copy."""

import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.utils._pytree import tree_leaves, tree_map

from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import random_state, store
from gpt2.checkpoint.metadata import CheckpointState, TrainingMetadata
from gpt2.config.run import CheckpointConfig
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)

Write = Callable[[CheckpointState], Path]
ALIGNMENT = 64  # bytes: a cache line


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls the same methods."""

    def __init__(
        self,
        world: World,
        settings: CheckpointConfig,
        resumed_from: Path | None,
        resumed_step: int | None,
        link: Path | None = None,
    ) -> None:
        """`link`, beside the folder of checkpoints, is kept pointing at the newest of them."""
        self._world, self._settings = world, settings
        self._resumed_from, self._link = resumed_from, link
        self._point()  # it may dangle: what was damaged has another name now
        self._writer = BackgroundWriter()
        self.goes_on_from(resumed_step)

    def goes_on_from(self, step: int | None) -> None:
        """There is a checkpoint of this step already."""
        self._begun_step = step
        """of the newest checkpoint, though it may be on its way to the disk; on every rank"""
        self._step_on_disk = step
        """known to rank 0"""

    def begin(self, training: TrainingMetadata, state: Callable[[], CheckpointState]) -> None:
        """Returns when the state is copied; `report` tells later how the writing went."""
        if self._begun_step == training.step:
            return
        self._begun_step = training.step
        self._world.run_on_rank0(self._wait_for_former)
        rng = self._world.gather_objects(random_state.rng_state(self._world.device))
        if self._world.is_rank0:
            self._writer.begin(
                {**state(), "rng": rng}, lambda copied: self._write(copied, training)
            )

    def finish(self, training: TrainingMetadata, state: Callable[[], CheckpointState]) -> None:
        """Returns when a checkpoint of this step is on the disk; CheckpointError if it is not."""
        self.wait()
        if self._world.run_on_rank0(lambda: self._step_on_disk == training.step):
            return
        rng = self._world.gather_objects(random_state.rng_state(self._world.device))
        path = self._world.run_on_rank0(lambda: self._write({**state(), "rng": rng}, training))
        self._begun_step = training.step
        logger.info("Saved checkpoint: %s", path)

    def report(self) -> None:
        """Says how the writes ended that did since the last call."""
        for outcome in self._writer.outcomes():
            if isinstance(outcome, CheckpointError):
                logger.warning("training continues without this checkpoint: %s", outcome)
            else:
                logger.info("Saved checkpoint: %s", outcome)

    def wait(self) -> None:
        """Until nothing is being written."""
        self._writer.wait()
        self.report()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._writer.is_busy

    def _wait_for_former(self) -> None:
        if self.is_busy:
            logger.info("Waiting: the previous checkpoint is still being written")
            self.wait()

    def _write(self, state: CheckpointState, training: TrainingMetadata) -> Path:
        path = store.save(
            self._settings.checkpoint_dir,
            state,
            training,
            keep_last=self._settings.keep_last,
            resumed_from=self._resumed_from,
        )
        self._step_on_disk = training.step
        self._point()
        return path

    def _point(self) -> None:
        if self._link is not None and self._world.is_rank0:
            with contextlib.suppress(
                OSError
            ):  # it points at an older one; the next save tries anew
                store.point_at_newest(self._link, self._settings.checkpoint_dir)


class HostCopy:
    """Memory for one copy of a state, allocated once: pinned where the state lies on a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, state: CheckpointState) -> CheckpointState:
        """`state` with every tensor in memory that the next call overwrites.

        Tensors that are the same stay so, so that a file of it is no larger.
        """
        tensors = {_place(leaf): leaf for leaf in tree_leaves(state) if _is_full(leaf)}
        size = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # never two at once
            self._memory = _pinned(size) if on_gpu else torch.empty(size, dtype=torch.uint8)
        copies, start = {}, 0
        for place, tensor in tensors.items():
            # Its own storage, or a file would hold all of the memory for each of them.
            flat = torch.frombuffer(
                self._memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start
            )
            copies[place] = flat.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
            start += _aligned(tensor.nbytes)
        if on_gpu:
            torch.cuda.synchronize()
        copied: CheckpointState = tree_map(
            lambda leaf: copies[_place(leaf)] if _is_full(leaf) else leaf, state
        )
        return copied


def _is_full(leaf: object) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What tensors have in common that are the same."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pinned(size: int) -> torch.Tensor:
    """Memory that a GPU writes to directly; ordinary memory if the system has no more of it.

    torch's own pinned memory would be rounded up to a power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cudart.cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
        weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr())
    else:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # takes the error, which the next kernel would raise
    return memory


class BackgroundWriter:
    """Writes one state at a time on a thread of its own, and remembers how that ended."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._ended: queue.SimpleQueue[Path | BaseException] = queue.SimpleQueue()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: CheckpointState, write: Write) -> None:
        """Returns when the state is copied; waits for the former write to end before that."""
        self.wait()
        copied = self._copy.of(state)
        self._thread = threading.Thread(target=self._run, args=(write, copied), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> Iterator[Path | CheckpointError]:
        """What the writes that ended since the last call did, or how they failed."""
        while not self._ended.empty():
            outcome = self._ended.get()
            if isinstance(outcome, BaseException) and not isinstance(outcome, CheckpointError):
                raise outcome
            yield outcome

    def _run(self, write: Write, state: CheckpointState) -> None:
        try:
            self._ended.put(write(state))
        except BaseException as error:
            self._ended.put(error)

"""Saving while training continues: the state is copied to host memory, a thread writes the copy."""

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
from gpt2.checkpoint import measurements, random_state, store
from gpt2.checkpoint.metadata import CheckpointState, TrainingMetadata
from gpt2.config.lr_schedule import is_due
from gpt2.config.run import CheckpointConfig
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)

Write = Callable[[CheckpointState], Path]
ALIGNMENT = 64  # bytes of a cache line


class Saver:
    """Saves the checkpoints of a run; every rank has one and calls the same methods."""

    def __init__(
        self,
        world: World,
        settings: CheckpointConfig,
        resumed_from: Path | None,
        resumed_step: int | None,
        link: Path | None = None,
    ) -> None:
        """`resumed_from` is a checkpoint that is never removed. `resumed_step` is the step of the
        checkpoint in the run's own folder that it resumes from. `link` is a symlink beside the
        folder of checkpoints that always points at the newest of them."""
        self._world, self._settings = world, settings
        self._resumed_from, self._link = resumed_from, link
        self._repair_links()
        self._writer = BackgroundWriter()
        self._lock = threading.Lock()
        self._is_writing = False
        self._measured: dict[str, Any] = {}
        """what is to be added to the metadata of the checkpoint that is being written"""
        self.assume_saved(resumed_step)

    def assume_saved(self, step: int | None) -> None:
        """Treats `step` as that of the newest checkpoint, as after a resume; None for none."""
        self._last_step = step
        """of the newest checkpoint, which may still be being written; the same on every rank"""
        self._step_on_disk = step
        """of the newest complete checkpoint; known to rank 0 only"""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of `step` is due: every `checkpoint_interval` steps."""
        return is_due(step, self._settings.checkpoint_interval)

    def save_in_background(
        self, training: TrainingMetadata, state: Callable[[], CheckpointState]
    ) -> None:
        """Returns once the state is copied to host memory; a thread writes the copy.

        Every rank calls `state`, in which the ranks may gather what they share. Does nothing if a
        checkpoint of this step exists or is being written. `log_outcomes` logs the result.
        """
        if self._last_step == training.step:
            return
        self._last_step = training.step
        self._world.run_on_rank0(self._wait_for_previous)
        whole = self._gathered(state)
        if self._world.is_rank0:
            self._is_writing = True
            self._writer.start(whole, lambda copied: self._write(copied, training))

    def save_now(self, training: TrainingMetadata, state: Callable[[], CheckpointState]) -> None:
        """Returns once a checkpoint of this step is on the disk; raises CheckpointError if it
        cannot be written."""
        self.wait()
        if self._world.run_on_rank0(lambda: self._step_on_disk == training.step):
            return
        whole = self._gathered(state)
        path = self._world.run_on_rank0(lambda: self._write(whole, training))
        self._last_step = training.step
        logger.info("Saved checkpoint: %s", path)

    def _gathered(self, state: Callable[[], CheckpointState]) -> CheckpointState:
        """What a checkpoint holds, with the random states of all ranks; it is complete on rank 0.
        Every rank calls it."""
        rng = self._world.gather_objects(random_state.rng_state(self._world.device))
        return {**state(), "rng": rng}

    def add_measured(self, step: int, **measured: Any) -> None:
        """Adds what was measured at `step` to the metadata of its checkpoint, if there is one (see
        `measurements.add`): at once, or by the writing thread when the checkpoint is on the disk.
        """
        if not self._world.is_rank0 or step != self._last_step:
            return
        with self._lock:
            if self._is_writing:
                self._measured |= measured
            elif step == self._step_on_disk:  # not if its save failed
                self._write_measured(step, measured)

    def _write_measured(self, step: int, measured: dict[str, Any]) -> None:
        path = self._settings.checkpoint_dir / store.file_name(step)
        try:
            measurements.add(path, **measured)
        except (OSError, CheckpointError) as error:
            logger.warning("cannot add %s to the metadata of %s: %s", measured, path, error)

    def log_outcomes(self) -> None:
        """Logs the result of each background save that ended since the last call."""
        for outcome in self._writer.outcomes():
            if isinstance(outcome, CheckpointError):
                logger.warning("training continues without this checkpoint: %s", outcome)
            else:
                logger.info("Saved checkpoint: %s", outcome)

    def wait(self) -> None:
        """Waits until nothing is being written, and logs the outcomes."""
        self._writer.wait()
        self.log_outcomes()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.is_busy

    def _wait_for_previous(self) -> None:
        if self.is_busy:
            logger.info("Waiting: the previous checkpoint is still being written")
            self.wait()

    def _write(self, state: CheckpointState, training: TrainingMetadata) -> Path:
        try:
            path = store.save(
                self._settings.checkpoint_dir,
                state,
                training,
                keep_last=self._settings.keep_last,
                resumed_from=self._resumed_from,
            )
            self._step_on_disk = training.step
        finally:
            with self._lock:
                self._is_writing = False
                measured, self._measured = self._measured, {}
                if measured and self._step_on_disk == training.step:
                    self._write_measured(training.step, measured)
        self._update_link()
        return path

    def _repair_links(self) -> None:
        """A kill may come between a save and its links, and a damaged checkpoint is renamed."""
        folder = self._settings.checkpoint_dir
        if self._world.is_rank0:
            with contextlib.suppress(OSError, CheckpointError):  # the next save tries again
                store.update_links(folder, store.list_checkpoints(folder))
        self._update_link()

    def _update_link(self) -> None:
        if self._link is not None and self._world.is_rank0:
            # If it fails, the link keeps its target, and the next save tries again.
            with contextlib.suppress(OSError, CheckpointError):
                store.point_at_newest(self._link, self._settings.checkpoint_dir)


class HostCopy:
    """Host memory for one copy of a state, allocated once; pinned if the state is on a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, state: CheckpointState) -> CheckpointState:
        """`state` with every tensor in host memory, which the next call overwrites.

        Tensors that share memory share it in the copy, so that a file of it is no larger.
        """
        tensors = {_identity(leaf): leaf for leaf in tree_leaves(state) if _is_full(leaf)}
        size = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # frees it before the next allocation
            self._memory = _pinned(size) if on_gpu else torch.empty(size, dtype=torch.uint8)
        copies, start = {}, 0
        for identity, tensor in tensors.items():
            # A storage of its own: torch.save writes the whole storage of every tensor.
            flat = torch.frombuffer(
                self._memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start
            )
            copies[identity] = flat.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)
            start += _aligned(tensor.nbytes)
        if on_gpu:
            torch.cuda.synchronize()
        copied: CheckpointState = tree_map(
            lambda leaf: copies[_identity(leaf)] if _is_full(leaf) else leaf, state
        )
        return copied


def _is_full(leaf: object) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same view of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pinned(size: int) -> torch.Tensor:
    """Pinned memory, which a GPU writes to directly; pageable memory if it cannot be pinned.

    torch's own pinned allocations are rounded up to a power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    cudart: Any = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
        weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr())
    else:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # clears the error, which the next kernel would raise
    return memory


class BackgroundWriter:
    """Writes one state at a time in a thread, and keeps the outcome of each write."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Path | BaseException] = queue.SimpleQueue()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, state: CheckpointState, write: Write) -> None:
        """Waits for the previous write, copies the state, and returns while a thread writes it."""
        self.wait()
        copied = self._copy.copy(state)
        self._thread = threading.Thread(target=self._run, args=(write, copied), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> Iterator[Path | CheckpointError]:
        """The path, or the CheckpointError, of each write that ended since the last call.

        Any other error of a write is raised here.
        """
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if isinstance(outcome, BaseException) and not isinstance(outcome, CheckpointError):
                raise outcome
            yield outcome

    def _run(self, write: Write, state: CheckpointState) -> None:
        try:
            self._outcomes.put(write(state))
        except BaseException as error:
            self._outcomes.put(error)

"""Saving without a pause: the state is copied to memory of the host, a thread writes the copy."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpt2 import checkpoint
from gpt2.checkpoint import Facts, State
from gpt2.config import CheckpointConfig
from gpt2.distributed import World
from gpt2.errors import CheckpointError

Write = Callable[[State], Path]


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls the same methods."""

    def __init__(
        self,
        world: World,
        settings: CheckpointConfig,
        say: Callable[[str], None],
        resumed_from: Path | None,
        resumed_step: int | None,
    ) -> None:
        self._world, self._settings, self._say = world, settings, say
        self._resumed_from = resumed_from
        self._writer = BackgroundWriter()
        self.goes_on_from(resumed_step)

    def goes_on_from(self, step: int | None) -> None:
        """There is a checkpoint of this step already."""
        self._begun_step = step
        """of the newest checkpoint, though it may be on its way to the disk; on every rank"""
        self._step_on_disk = step
        """known to rank 0"""

    def begin(self, facts: Facts, state: Callable[[], State]) -> None:
        """Returns when the state is copied; `report` tells later how the writing went."""
        if self._begun_step == facts.step:
            return
        self._begun_step = facts.step
        rng = self._world.gather_objects(checkpoint.rng_state(self._world.device))
        if self._world.is_main:
            if self._writer.is_busy:
                self._say("Waiting: the former checkpoint is still being written")
            self._writer.begin({**state(), "rng": rng}, lambda copied: self._write(copied, facts))

    def finish(self, facts: Facts, state: Callable[[], State]) -> None:
        """Returns when a checkpoint of this step is on the disk; CheckpointError if it is not."""
        self.wait()
        if self._world.on_main(lambda: self._step_on_disk == facts.step):
            return
        rng = self._world.gather_objects(checkpoint.rng_state(self._world.device))
        path = self._world.on_main(lambda: self._write({**state(), "rng": rng}, facts))
        self._begun_step = facts.step
        self._say(f"Saved checkpoint: {path}")

    def report(self) -> None:
        """Says how the writes ended that did since the last call."""
        for outcome in self._writer.outcomes():
            if isinstance(outcome, CheckpointError):
                self._say(f"WARNING: training goes on without this checkpoint: {outcome}")
            else:
                self._say(f"Saved checkpoint: {outcome}")

    def wait(self) -> None:
        """Until nothing is being written."""
        self._writer.wait()
        self.report()

    def _write(self, state: State, facts: Facts) -> Path:
        path = checkpoint.save(
            self._settings.checkpoint_dir,
            state,
            facts,
            keep_last=self._settings.keep_last,
            resumed_from=self._resumed_from,
        )
        self._step_on_disk = facts.step
        return path


class HostCopy:
    """Buffers for one copy of a state, allocated once: pinned where the state lies on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, state: State) -> State:
        """`state` with every tensor in a buffer that the next call overwrites.

        Tensors that share their memory share a buffer, so that a file of it is no larger.
        """
        shared: dict[tuple[Any, ...], torch.Tensor] = {}
        copied: State = self._copy(state, (), shared)
        if any(key[0] == "cuda" for key in shared):
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...], shared: dict[tuple[Any, ...], Any]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), path, shared)
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key), shared) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(
                self._copy(item, (*path, number), shared) for number, item in enumerate(value)
            )
        return value

    def _copy_tensor(
        self, tensor: torch.Tensor, path: tuple[Any, ...], shared: dict[tuple[Any, ...], Any]
    ) -> torch.Tensor:
        memory = (tensor.device.type, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and memory in shared:
            same: torch.Tensor = shared[memory]
            return same
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
            )
            self._buffers[path] = buffer
        shared[memory] = buffer.copy_(tensor, non_blocking=True)
        return buffer


class BackgroundWriter:
    """Writes one state at a time on a thread of its own, and remembers how that ended."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._ended: queue.SimpleQueue[Path | BaseException] = queue.SimpleQueue()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: State, write: Write) -> None:
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

    def _run(self, write: Write, state: State) -> None:
        try:
            self._ended.put(write(state))
        except BaseException as error:
            self._ended.put(error)

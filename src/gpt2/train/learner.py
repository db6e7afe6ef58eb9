"""What learns: the model, its optimiser and one update of both, the same on every rank.

Shapes: B rows, T time.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2 import model
from gpt2.base.errors import TrainingError, is_out_of_memory
from gpt2.checkpoint import metadata, random_state
from gpt2.config.run import RunConfig
from gpt2.data import sampler
from gpt2.data.loader import MicroBatch
from gpt2.distributed import device
from gpt2.distributed.device import Moment
from gpt2.distributed.world import World
from gpt2.model.base import LanguageModel
from gpt2.optim import build
from gpt2.train.compile_cache import compiled


@dataclass(frozen=True)
class Update:
    """What one update of the weights was like."""

    loss: float
    """mean over the global batch, before the update"""
    grad_norm: float
    applied: bool
    """whether the weights changed: not if loss or gradient is no finite number"""
    elapsed_s: float
    rank_s: list[float]
    """seconds that each rank worked before it waited for the others"""


class Underway:
    """An update that the device may still be at."""

    def __init__(self, world: World, numbers: Tensor, begun: Moment, worked: Moment) -> None:
        """`numbers` are loss and gradient norm, (2). They are copied as soon as they are there, not
        behind what is queued later. `worked` is when this rank begins to wait for the others."""
        self._world, self._begun, self._worked = world, begun, worked
        self._numbers = world.to_host(numbers)
        self._done = Moment(world.device)

    def result(self) -> Update:
        """Waits for it. To be asked for by all ranks at the same time, and in order."""
        self._done.wait()
        loss, grad_norm = self._numbers.tolist()
        return Update(
            loss,
            grad_norm,
            applied=math.isfinite(loss) and math.isfinite(grad_norm),
            elapsed_s=self._done.since(self._begun),
            rank_s=self._world.gather(self._worked.since(self._begun)),
        )


class Learner:
    """A model, its optimiser and the random streams of this rank."""

    def __init__(
        self, run_config: RunConfig, world: World, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Weights are drawn from the seed, the same on every rank, unless some are given."""
        self.config, self.world = run_config, world
        self.dtype = _autocast_dtype(run_config, world)
        self.autocast = torch.autocast(
            world.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16
        )
        machine = run_config.machine
        torch.manual_seed(machine.seed)
        self.model: LanguageModel = model.build(run_config.model).to(world.device)
        if weights is not None:
            self.model.load_state_dict(weights)
            weights.clear()  # a copy on the host must not stay for ten days
        self.optimizer = build.build(self.model, run_config.optim)
        on_cuda = world.device.type == "cuda"
        is_compiled = machine.compile == "on" or (machine.compile == "auto" and on_cuda)
        self.model.fast_head = machine.fast and not on_cuda and not is_compiled
        self.local_net: nn.Module = self.model
        if is_compiled:
            self.local_net = compiled(self.model)
        self.mini_batch_size = run_config.data.mini_batch_size
        if run_config.data.auto_mini_batch:
            self._fit_mini_batch()
        self.net = self.local_net
        if world.size > 1:
            # No static_graph: after no_sync it exchanges nothing (pytorch pull request 187732).
            self.net = DistributedDataParallel(
                self.local_net,
                device_ids=[world.device] if on_cuda else None,
                gradient_as_bucket_view=True,
            )
            self._settle_buckets(is_compiled)
        _seed_streams(machine.seed, world.rank)

    def learn(self, micros: Sequence[MicroBatch], learning_rate: float) -> Update:
        """One update on this rank's share of a step, given in micro-batches of (B, T) each.

        Raises TrainingError if a micro-batch does not fit into the memory.
        """
        return self.begin(micros, learning_rate).result()

    def begin(self, micros: Sequence[MicroBatch], learning_rate: float) -> Underway:
        """The same, but does not wait until the device has done it."""
        rows, block_size = micros[0][0].shape
        with _memory_for(rows, block_size):
            return self._begin(micros, learning_rate)

    @property
    def runs_ahead(self) -> bool:
        """Whether the next update may be begun while the device is at this one."""
        return self.world.queues_work and not self.optimizer.waits

    def _begin(self, micros: Sequence[MicroBatch], learning_rate: float) -> Underway:
        world, batch_tokens = self.world, self.config.data.total_batch_size
        begun = worked = Moment(world.device)
        build.set_learning_rate(self.optimizer, learning_rate)
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        for number, micro in enumerate(micros, 1):
            tokens_BT, targets_BT = world.to_device(*micro)
            with self._gradient_sync(last := number == len(micros)):
                with self.autocast:
                    loss = self.net(tokens_BT, targets_BT)
                if last:
                    worked = Moment(world.device)
                # DDP averages over ranks; the loss is the mean over the global batch.
                (loss * (world.size / batch_tokens)).backward()
            loss_sum += loss.detach()
        norm = build.gradient_norm(self.model)
        # Sums over all ranks, so that all ranks decide alike.
        numbers = torch.stack([world.all_reduce_sum(loss_sum) / batch_tokens, norm.double()])
        is_good = numbers.isfinite().all()
        self.optimizer.update(norm, self.config.optim.grad_clip, is_good)
        self.optimizer.zero_grad(set_to_none=True)
        return Underway(world, numbers, begun, worked)

    def state(self) -> metadata.CheckpointState:
        """What a checkpoint keeps of it, beside the random streams."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: metadata.CheckpointState, step: int) -> None:
        """Weights, optimiser and random streams as they were at the checkpoint of `step`."""
        self.model.load_state_dict(state.pop("model"))  # popped, for the same reason
        self.optimizer.load_state_dict(_unmapped(state.pop("optimizer")))
        build.set_options(self.optimizer, self.config.optim)
        streams = state["rng"]
        if len(streams) == self.world.size:
            random_state.set_rng_state(streams[self.world.rank], self.world.device)
        else:
            _seed_streams(self.config.machine.seed, self.world.rank, step)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once per step, with its last micro-batch."""
        if last or not isinstance(self.net, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.net.no_sync()

    def _fit_mini_batch(self) -> None:
        """Halves `mini_batch_size` until every rank has the memory for one micro-batch."""
        while not self._fits(self.mini_batch_size):
            if self.mini_batch_size == 1:
                raise TrainingError(
                    f"a single row of block_size={self.config.model.block_size} does not fit into "
                    "the memory; use a smaller --block_size or --preset"
                )
            self.mini_batch_size //= 2
            torch.compiler.reset()  # or a second size would be compiled as one of any size

    def _fits(self, rows: int) -> bool:
        """Whether a micro-batch fits beside all that training keeps, on every rank."""
        rows = min(rows, -(-self.config.rows_per_step // self.world.size))
        shape = (rows, self.config.model.block_size)
        tokens_BT = torch.zeros(shape, dtype=torch.long, device=self.world.device)
        failed = False
        try:
            # As much as the optimiser will keep: two moments of every weight.
            moments = [torch.empty_like(part) for part in self.model.parameters() for _ in range(2)]
            with self.autocast:
                loss = self.local_net(tokens_BT, tokens_BT.clone())
            loss.backward()
            del moments, loss
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        return not self.world.all_reduce_max(failed)

    def _settle_buckets(self, is_compiled: bool) -> None:
        """One backward whose gradients are thrown away.

        After its first backward, DDP lays its buckets out anew, which changes the order in which
        three and more ranks' gradients are added. Without this, the first step after a resume
        would differ in the last bit from the same step of a run that was never stopped.
        """
        share = len(sampler.share(self.config.rows_per_step, self.world.rank, self.world.size))
        rows = min(self.mini_batch_size, share) if is_compiled else 1  # for the real shape
        shape = (rows, self.config.model.block_size)
        tokens_BT = torch.zeros(shape, dtype=torch.long, device=self.world.device)
        with _memory_for(*shape):
            with self.autocast:
                loss = self.net(tokens_BT, tokens_BT.clone())  # aliases would compile another graph
            loss.backward()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _memory_for(rows: int, block_size: int) -> Iterator[None]:
    """Turns the end of the memory into what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        way_out = "use a smaller --block_size or --preset"
        if rows > 1:
            smaller = 1 << ((rows - 1).bit_length() - 1)
            way_out = f"use --mini_batch_size {smaller} (the total batch stays), "
            way_out += "or --auto_mini_batch"
        raise TrainingError(
            f"{rows} rows of block_size={block_size} at once do not fit into the memory; {way_out}"
        ) from error


def _unmapped(state: Any) -> Any:
    """An optimiser's state in memory: on the CPU it would be used where it lies, in the file."""
    if isinstance(state, dict):
        return {name: _unmapped(part) for name, part in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def _autocast_dtype(run_config: RunConfig, world: World) -> torch.dtype:
    wanted = run_config.machine.dtype
    fast = wanted == "auto" and device.has_fast_bfloat16(world.device)
    return torch.bfloat16 if wanted == "bfloat16" or fast else torch.float32


def _seed_streams(seed: int, rank: int, step: int = 0) -> None:
    """Random streams that belong to (seed, rank), and to the step where they begin anew."""
    words = np.random.SeedSequence([seed, rank, step]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))

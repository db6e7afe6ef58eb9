"""This rank's replica of what is trained: model, optimiser and random streams.

Shapes: B rows, T time.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2 import model
from gpt2.base.errors import TrainingError, is_out_of_memory
from gpt2.base.text import counted
from gpt2.base.validation import require
from gpt2.checkpoint import random_state
from gpt2.checkpoint.metadata import CheckpointState
from gpt2.config.memory import Computation
from gpt2.config.run import RunConfig
from gpt2.data import sampler
from gpt2.distributed import gradient_exchange, precision
from gpt2.distributed.world import World
from gpt2.model.base import LanguageModel
from gpt2.optim.build import build_optimizer, set_options
from gpt2.optim.loss_scale import LossScale
from gpt2.optim.sharded import largest_share
from gpt2.optim.spikes import SpikeDetector
from gpt2.train import compile_cache, memory_snapshot, micro_batch
from gpt2.train.micro_batch import FittedRows


class Replica:
    """The model, its optimiser and the random streams of this rank.

    `model` is the plain module, `local_net` the same as it computes on this rank (compiled or not),
    and `net` the one to train: wrapped by DDP where there are several ranks.
    """

    def __init__(
        self,
        run_config: RunConfig,
        world: World,
        weights: dict[str, torch.Tensor] | None = None,
        plain_head: bool = False,
        fitted_rows: FittedRows | None = None,
        corpus_count: int = 0,
    ) -> None:
        """Weights are drawn from the seed, the same on every rank, unless some are given.
        `plain_head` is as in `TrainState`, `fitted_rows` that of the checkpoint, `corpus_count`
        that of a mixture."""
        self.config, self.world, self.corpus_count = run_config, world, corpus_count
        self.dtype = precision.autocast_dtype(run_config.machine.dtype, world)
        self.autocast = precision.autocast(self.dtype, world.device)
        machine = run_config.machine
        torch.manual_seed(machine.seed)
        self.model: LanguageModel = model.build(run_config.model).to(world.device)
        if weights is not None:
            self.model.load_state_dict(weights)
            weights.clear()  # the copy on the host is not needed for the days that follow
        self.optimizer = build_optimizer(self.model, run_config.optim)
        self.spikes = SpikeDetector(world.device)
        self.loss_scale = LossScale(self.dtype, world.device)
        on_cuda = world.device.type == "cuda"
        is_compiled = compile_cache.is_used(machine.compile, world.device)
        self.model.plain_head = plain_head and not on_cuda
        self._set_residual_dtype()
        self.net: nn.Module = compile_cache.compiled(self.model) if is_compiled else self.model
        self.local_net = self.net
        if world.size > 1:
            # Before anything is compiled: torch divides a graph into parts, between which gradients
            # are exchanged, only if it compiles inside DDP's forward pass.
            # No static_graph: after no_sync it exchanges nothing (pytorch pull request 187732).
            self.net = DistributedDataParallel(
                self.local_net,
                device_ids=[world.device] if on_cuda else None,
                gradient_as_bucket_view=True,
            )
            if machine.grad_dtype == "bfloat16":
                self.net.register_comm_hook(dist.group.WORLD, gradient_exchange.in_bfloat16)
        self.mini_batch_size = micro_batch.given(run_config)
        self.fitted_rows: FittedRows | None = None
        if micro_batch.is_to_be_fitted(run_config, world):
            how = Computation(
                self.dtype is not torch.float32,
                is_compiled,
                world.size,
                run_config.optim.shard_optimizer,
                run_config.optim.optimizer,
                machine.residual_dtype == "bfloat16",
            )
            self.fitted_rows = micro_batch.fitted(
                run_config, world, how, self._try_micro_batch, fitted_rows
            )
            self.mini_batch_size = self.fitted_rows.rows
        if world.size > 1:
            self._settle_buckets(is_compiled)
        _seed_streams(machine.seed, world.rank)

    def _set_residual_dtype(self) -> None:
        """Raises ConfigError for a residual stream in bfloat16 beside products of another type."""
        if self.config.machine.residual_dtype == "float32":
            return
        used = str(self.dtype).removeprefix("torch.")
        require(
            self.dtype is torch.bfloat16,
            f"residual_dtype=bfloat16 needs matrix products in bfloat16, got {used}; "
            "use --dtype bfloat16, or a new run with --residual_dtype float32",
        )
        self.model.residual_dtype = torch.bfloat16

    def losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Any, Tensor | None]:
        """The loss in nats, summed, and with several corpora also that of each row, (B), without
        gradients."""
        with self.autocast:
            if not self.corpus_count:
                return self.net(tokens_BT, targets_BT), None
            loss, losses_B = self.net(tokens_BT, targets_BT, by_row=True)
        return loss, losses_B

    def exchanging_gradients(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP exchanges the gradients of a step once, during its last micro-batch's backward."""
        if is_last or not isinstance(self.net, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.net.no_sync()

    @contextlib.contextmanager
    def out_of_memory_explained(self, rows: int, block_size: int) -> Iterator[None]:
        """Turns an out-of-memory error into a TrainingError that says what to do."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            snapshot = memory_snapshot.write(self.config.watch, self.world)
            verb, remedy = "does", "use a smaller --block_size or --preset"
            if rows > 1:
                smaller = 1 << ((rows - 1).bit_length() - 1)
                verb = "do"
                remedy = f"use --mini_batch_size {smaller} (the total batch stays), "
                remedy += "or --auto_mini_batch"
            if snapshot is not None:
                remedy += f"; what holds it is in {snapshot} (https://pytorch.org/memory_viz)"
            raise TrainingError(
                f"{counted(rows, 'row')} of block_size={block_size} at once {verb} not fit into "
                f"the memory; {remedy}"
            ) from error

    def state_dict(self) -> CheckpointState:
        """What a checkpoint keeps of it, beside the random streams."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "spikes": self.spikes.state_dict(),
            "fitted_rows": self.fitted_rows and asdict(self.fitted_rows),
            "loss_scale": self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: CheckpointState, step: int) -> None:
        """Takes weights, optimiser and random streams out of the checkpoint of `step`.

        With another number of ranks than the checkpoint's, the streams begin anew from
        (seed, rank, step).
        """
        self.model.load_state_dict(state.pop("model"))  # popped: the copy on the host is not needed
        self.optimizer.load_state_dict(_copied(state.pop("optimizer")))
        set_options(self.optimizer, self.config.optim)
        if spikes := state.pop("spikes", None):  # earlier versions have none
            self.spikes.load_state_dict(spikes)
        self.loss_scale.load_state_dict(state.pop("loss_scale", {}))
        streams = state["rng"]
        if len(streams) == self.world.size:
            random_state.set_rng_state(streams[self.world.rank], self.world.device)
        else:
            _seed_streams(self.config.machine.seed, self.world.rank, step)

    def _try_micro_batch(self, rows: int) -> None:
        """One forward and backward pass of `rows` rows beside everything that training keeps; its
        gradients are thrown away. Raises an out-of-memory error if there is too little memory."""
        tokens_BT = self._zeros(min(rows, -(-self.config.rows_per_step // self.world.size)))
        # As much as AdamW will keep, two moments of each of its weights; Muon has its own already.
        sizes = [
            part.numel()
            for group in self.optimizer.param_groups
            if "betas" in group
            for part in group["params"]
        ]
        ranks = self.world.size if self.config.optim.shard_optimizer else 1
        moments = torch.empty(2 * largest_share(sizes, ranks), device=self.world.device)
        try:
            # Nothing is exchanged: a rank without enough memory would leave the others waiting.
            with self.exchanging_gradients(is_last=False):
                loss, _ = self.losses(tokens_BT, tokens_BT.clone())  # an alias is another graph
                loss.backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        del moments

    def _settle_buckets(self, is_compiled: bool) -> None:
        """One backward whose gradients are thrown away, and the forward pass after it.

        In the forward pass after its first backward, DDP lays its buckets out anew, which changes
        the order in which three and more ranks' gradients are added. Without this, the first step
        after a resume would differ in the last bit from the same step of a run that was never
        stopped. The layout is a collective, too: in a step, ranks with fewer micro-batches than
        others would come to it at another time.
        """
        share = len(sampler.share(self.config.rows_per_step, self.world.rank, self.world.size))
        rows = min(self.mini_batch_size, share) if is_compiled else 1  # for the real shape
        tokens_BT = self._zeros(rows)
        with self.out_of_memory_explained(*tokens_BT.shape):
            loss, _ = self.losses(tokens_BT, tokens_BT.clone())
            loss.backward()
            with self.exchanging_gradients(is_last=False):
                self.losses(tokens_BT, tokens_BT.clone())
        self.optimizer.zero_grad(set_to_none=True)

    def _zeros(self, rows: int) -> torch.Tensor:
        """Tokens of (rows, T), all 0, on the device."""
        shape = (rows, self.config.model.block_size)
        return torch.zeros(shape, dtype=torch.long, device=self.world.device)


def _copied(state: Any) -> Any:
    """An optimiser's state in memory of its own: tensors of a checkpoint are mapped from the file,
    and torch would keep using them there."""
    if isinstance(state, dict):
        return {name: _copied(part) for name, part in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def _seed_streams(seed: int, rank: int, step: int = 0) -> None:
    """Seeds the random streams of this process from (seed, rank, step)."""
    words = np.random.SeedSequence([seed, rank, step]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))

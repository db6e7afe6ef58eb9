"""How many rows a rank computes at once: chosen for the GPU's memory, and tried before training."""

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt2.base.errors import TrainingError, is_out_of_memory
from gpt2.config import memory
from gpt2.config.memory import Computation
from gpt2.config.run import RunConfig
from gpt2.distributed import device
from gpt2.distributed.world import World

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""in the largest bucket of float32 gradients that DDP exchanges by default"""


@dataclass(frozen=True)
class FittedRows:
    """A number of rows that was found to fit, and for what; checkpoints hold it. A run that is
    resumed with all else the same keeps the number, and computes the same bits."""

    rows: int
    requested: int | str
    """the value of --mini_batch_size"""
    memory_bytes: int
    """of the smallest GPU; 0 on CPUs"""
    rows_per_rank: int
    """largest share of a step"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "FittedRows | None":
        """What a checkpoint holds; those of earlier versions, and of given numbers, have none."""
        return cls(**values) if values else None


def is_to_be_fitted(run_config: RunConfig, world: World) -> bool:
    """Whether the number of rows depends on the memory: not if it is given, or on CPUs, unless
    --auto_mini_batch says so."""
    data, known = run_config.data, device.memory(world.device)
    return data.auto_mini_batch or (data.mini_batch_size == "auto" and known is not None)


def given(run_config: RunConfig) -> int:
    """The number of rows that does not depend on the memory."""
    rows = run_config.data.mini_batch_size
    return memory.ROWS_ON_CPU[run_config.preset] if rows == "auto" else rows


def fitted(
    run_config: RunConfig,
    world: World,
    how: Computation,
    run_micro_batch: Callable[[int], None],
    kept: FittedRows | None = None,
) -> FittedRows:
    """The rows that fit, the same number on every rank; every rank calls it.

    It is that of the checkpoint, `kept`, if that is for the same memory and share of a step; else
    what `memory` estimates, or the given number. It is halved until `run_micro_batch(rows)`, a pass
    of that many rows, fits into the memory of every rank.
    """
    # NCCL has its buffers from its first collective on; a large one goes the way of gradients.
    world.all_reduce_sum(torch.zeros(BUCKET_ELEMENTS, device=world.device))
    known = device.memory(world.device)
    total_bytes, free_bytes = (
        int(min(of_ranks))
        for of_ranks in zip(*world.gather([*known] if known else [0, 0]), strict=True)
    )
    share = -(-run_config.rows_per_step // world.size)
    own = FittedRows(0, run_config.data.mini_batch_size, total_bytes, share)
    if kept is not None and replace(kept, rows=0) == own:
        rows = kept.rows
    elif own.requested == "auto" and total_bytes:
        rows = max(1, memory.automatic_rows(run_config, free_bytes, how))
    else:
        rows = given(run_config)
    block_size = run_config.model.block_size
    return replace(own, rows=largest_that_fits(rows, run_micro_batch, world, block_size))


def largest_that_fits(
    rows: int, run_micro_batch: Callable[[int], None], world: World, block_size: int
) -> int:
    """`rows`, halved until `run_micro_batch(rows)` fits into the memory of every rank.

    `run_micro_batch` exchanges nothing: a rank that runs out of memory would leave the others
    waiting. Raises TrainingError if a single row does not fit.
    """
    while not _fits(rows, run_micro_batch, world):
        if rows == 1:
            raise TrainingError(
                f"a single row of block_size={block_size} does not fit into the memory; "
                "use a smaller --block_size or --preset"
            )
        rows //= 2
        if "torch._dynamo" in sys.modules:  # else this would import it, which takes seconds
            torch.compiler.reset()  # the graph of the rows that do not fit is not needed
    return rows


def _fits(rows: int, run_micro_batch: Callable[[int], None], world: World) -> bool:
    """Whether `run_micro_batch(rows)` fits into the memory of every rank. Frees what it took."""
    failed = False
    try:
        run_micro_batch(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    # Only here: inside `except`, the traceback keeps the tensors of the failed pass alive.
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not world.all_reduce_max(failed)

"""How many rows a rank computes at once: tried before training, with all that training keeps."""

import gc
from collections.abc import Callable

import torch

from gpt2.base.errors import TrainingError, is_out_of_memory
from gpt2.distributed.world import World

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""of the largest bucket in which DDP exchanges float32 gradients by default"""


def largest_that_fits(
    rows: int, run_micro_batch: Callable[[int], None], world: World, block_size: int
) -> int:
    """`rows`, halved until `run_micro_batch(rows)` has the memory on every rank.

    Every rank calls it, and `run_micro_batch` exchanges nothing: a rank that runs out of memory
    would leave the others waiting. Raises TrainingError if a single row does not fit.
    """
    # NCCL has its buffers from its first collective on, a large one with its usual algorithm.
    world.all_reduce_sum(torch.zeros(BUCKET_ELEMENTS, device=world.device))
    while not _fits(rows, run_micro_batch, world):
        if rows == 1:
            raise TrainingError(
                f"a single row of block_size={block_size} does not fit into the memory; "
                "use a smaller --block_size or --preset"
            )
        rows //= 2
        torch.compiler.reset()  # the graph of the rows that do not fit is not needed
    return rows


def _fits(rows: int, run_micro_batch: Callable[[int], None], world: World) -> bool:
    """Whether `run_micro_batch(rows)` has the memory on every rank. Frees all that it took."""
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

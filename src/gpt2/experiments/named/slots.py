"""The slots of named experiments: one per GPU, or shares of the CPU cores without a GPU."""

import os
from collections.abc import Sequence

from gpt2.distributed import visible_gpus
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Slot


def of_machine(
    gpus: Sequence[str] | None = None, max_gpus: int | None = None, shares: int | None = None
) -> list[Slot]:
    """The slots of these GPUs, `max_gpus` at most; the default is those that CUDA_VISIBLE_DEVICES
    shows, or that the machine has without it. Without GPUs, `shares` of the cores: by default two,
    or one for `max_gpus` 1."""
    shown = visible_gpus.ids() if gpus is None else gpus
    if shown is None:
        import torch  # takes seconds to import

        shown = visible_gpus.ids_of(torch.cuda.device_count())
    used = shown[:max_gpus]
    count = len(used) or shares or min(slots.CPU_SHARES, max_gpus or slots.CPU_SHARES)
    threads = slots.threads(len(os.sched_getaffinity(0)) / count)
    return slots.of_gpus(used, count, threads) if used else slots.of_cores(count, threads)

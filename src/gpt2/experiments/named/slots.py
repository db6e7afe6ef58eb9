"""The slots of named experiments: one per GPU, or shares of the CPU cores without a GPU."""

import os
from collections.abc import Sequence
from dataclasses import replace

from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Slot


def of(gpus: Sequence[str], shares: int) -> list[Slot]:
    """A slot for each of these values of CUDA_VISIBLE_DEVICES; without any, `shares` of the cores,
    which see no GPU."""
    threads = slots.threads(len(os.sched_getaffinity(0)) / (len(gpus) or shares))
    if gpus:
        return slots.of_gpus(gpus, len(gpus), threads)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    shared = slots.of_cores(shares, threads)
    return [replace(slot, environment={**slot.environment, **hidden}) for slot in shared]


def of_machine() -> list[Slot]:
    """The slots of the GPUs that CUDA_VISIBLE_DEVICES shows, or that the machine has without it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch  # takes seconds to import

        visible = ",".join(str(index) for index in range(torch.cuda.device_count()))
    return of(valid_ids(visible)[0], slots.CPU_SHARES)


def valid_ids(text: str) -> tuple[list[str], bool]:
    """The ids of a list such as 0,2 that CUDA would show, which are those before the first invalid
    one, such as -1; and whether the list has ids and all are valid."""
    items = ["".join(item.split()) for item in text.removesuffix(",").split(",")]
    invalid = (index for index, item in enumerate(items) if not item or item.startswith("-"))
    end = next(invalid, len(items))
    return items[:end], end == len(items)

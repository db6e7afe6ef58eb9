"""The slots of named experiments: one per GPU, or shares of the CPU cores.

A slot's name is the `gpu_id` that a training on it has: 2, or cpu.
"""

import os
from collections.abc import Sequence

from gpt2.config import experiment_name
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.pool.slots import CPU_SHARES


def of_gpus(gpus: Sequence[str]) -> list[Slot]:
    """A slot for each of these values of CUDA_VISIBLE_DEVICES."""
    return [
        Slot(index, experiment_name.first_visible(gpu), {"CUDA_VISIBLE_DEVICES": gpu})
        for index, gpu in enumerate(gpus)
    ]


def of_cores(count: int) -> list[Slot]:
    """`count` slots, each with its share of the cores and without a GPU."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    return [Slot(index, experiment_name.CPU, environment) for index in range(count)]


def of_machine() -> list[Slot]:
    """A slot for each GPU that CUDA_VISIBLE_DEVICES shows, or that the machine has without it; two
    shares of the cores if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch  # takes seconds to import

        visible = ",".join(str(index) for index in range(torch.cuda.device_count()))
    gpus, _ = valid_ids(visible)
    return of_gpus(gpus) if gpus else of_cores(CPU_SHARES)


def valid_ids(text: str) -> tuple[list[str], bool]:
    """The ids of a list such as 0,2 that CUDA would show, which are those before the first invalid
    one, such as -1; and whether the list has ids and all are valid."""
    items = ["".join(item.split()) for item in text.removesuffix(",").split(",")]
    invalid = (index for index, item in enumerate(items) if not item or item.startswith("-"))
    end = next(invalid, len(items))
    return items[:end], end == len(items)

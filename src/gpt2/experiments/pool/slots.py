"""The slots of this machine: GPUs, groups of GPUs, or shares of the CPU cores."""

import logging
import math
import os
import re
from collections.abc import Sequence

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.base.validation import suggestion
from gpt2.config import gpu_list
from gpt2.distributed import visible_gpus
from gpt2.experiments.pool.job import Slot

logger = logging.getLogger(__name__)

CPU_SHARES = 2
"""slots of a machine without GPUs"""


def of_machine(
    count: int | None = None,
    gpus: Sequence[str] | None = None,
    device: str = "auto",
    max_gpus: int | None = None,
    ddp: int = 1,
) -> list[Slot]:
    """The slots of this machine: `count` of them, each with `ddp` GPUs.

    `gpus` (physical ids) limits the GPUs to these, in this order; `max_gpus` to the first ones.
    Without `count`, every group of `ddp` GPUs is a slot; without GPUs there are two slots, which
    share the cores. More slots than groups share the groups in turn. Raises ConfigError for a GPU
    that does not exist, for fewer GPUs than `ddp`, and if CUDA_VISIBLE_DEVICES is invalid.
    """
    visible_gpus.ids()  # in CUDA's own spelling, before CUDA reads them
    available = [] if device == "cpu" else _available()
    chosen = available if gpus is None else [_found(gpu, available) for gpu in gpus]
    if device == "cuda" and not chosen:
        reason = "--gpus chooses none" if available else "torch sees no GPU"
        raise ConfigError(f"device=cuda, but {reason}; use --device cpu")
    groups = _groups(chosen[:max_gpus], ddp)
    count = count or len(groups) or min(CPU_SHARES, max_gpus or CPU_SHARES)
    own_threads = threads(len(os.sched_getaffinity(0)) / (count * ddp))
    return of_gpus(groups, count, own_threads) if groups else of_cores(count, own_threads)


def _available() -> list[str]:
    import torch  # takes seconds to import; `device_count` creates no context on a GPU

    return visible_gpus.ids_of(torch.cuda.device_count())


def _found(gpu: str, available: Sequence[str]) -> str:
    """The GPU as one of those that are available, where its UUID may be shortened."""
    if (found := gpu_list.find(gpu, available)) is not None:
        return found
    if available and gpu_list.is_uuid(gpu) and visible_gpus.ids() is None:
        return gpu  # of one that torch knows by its index
    there = f"available: {', '.join(available)}" if available else "torch sees no GPU"
    raise ConfigError(f"--gpus: no GPU {gpu}{suggestion(gpu, available)}; {there}")


def _groups(gpus: Sequence[str], ddp: int) -> list[str]:
    """The GPUs of each slot, as a value of CUDA_VISIBLE_DEVICES."""
    if 0 < len(gpus) < ddp:
        raise ConfigError(
            f"--ddp {ddp}: each training needs {counted(ddp, 'GPU')}, got "
            f"{counted(len(gpus), 'GPU')} ({', '.join(gpus)}); use --ddp {len(gpus)} or more GPUs"
        )
    used = len(gpus) - len(gpus) % ddp
    if left := gpus[used:]:
        which = f"GPU {left[0]} is" if len(left) == 1 else f"GPUs {', '.join(left)} are"
        logger.warning("%s left over: --ddp %d takes %d at a time", which, ddp, ddp)
    return [",".join(gpus[first : first + ddp]) for first in range(0, used, ddp)]


def of_gpus(groups: Sequence[str], count: int, threads: str) -> list[Slot]:
    """`count` slots on these groups of GPUs in turn."""
    slots, names = [], list[str]()
    for index in range(count):
        group = groups[index % len(groups)]
        short = "-".join(re.sub(r"[^\w-]", "_", gpu)[:12].lower() for gpu in group.split(","))
        name = f"{'' if short.startswith(('gpu', 'mig')) else 'gpu'}{short}"
        names.append(name)
        name += f"_{names.count(name)}" if names.count(name) > 1 else ""
        slots.append(Slot(index, name, {gpu_list.VARIABLE: group, "OMP_NUM_THREADS": threads}))
    return slots


def of_cores(count: int, threads: str) -> list[Slot]:
    """`count` slots that share the cores, and see no GPU."""
    environment = {gpu_list.VARIABLE: "", "OMP_NUM_THREADS": threads}
    return [Slot(index, f"cpu{index}", environment) for index in range(count)]


def threads(cores: float) -> str:
    """OMP_NUM_THREADS of a process with this share of the cores, unless the user has set it."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, int(cores)))


def fair_share(capacities: Sequence[float], count: int) -> float:
    """The largest share such that `count` shares fit into machines of these capacities, where no
    share is divided between machines; 0 without capacity."""
    shares = {capacity / parts for capacity in capacities for parts in range(1, count + 1)} - {0}

    def fits(share: float) -> bool:
        return sum(int(capacity / share + 1e-9) for capacity in capacities) >= count

    return math.floor(max(filter(fits, shares), default=0.0) * 1e4) / 1e4  # as exact as Ray's


def preferred_slots(jobs: int, slots: int) -> list[int | None]:
    """The slot that each of `jobs` jobs waits for: the first ones have one each, the next one gets
    the last slot as soon as that is free, and those after it (None) any slot."""
    preferred: list[int | None] = [*range(slots), slots - 1]
    return [*preferred, *[None] * jobs][:jobs]

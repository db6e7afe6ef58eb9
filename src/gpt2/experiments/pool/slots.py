"""The slots of this machine: one for each GPU or group of GPUs, or shares of the CPU cores."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.base.validation import suggestion
from gpt2.experiments.pool.job import Slot

CPU_SHARES = 2


def of_machine(
    count: int | None = None,
    gpus: Sequence[str] | None = None,
    device: str = "auto",
    max_gpus: int | None = None,
    ddp: int = 1,
    say: Callable[[str], None] = print,
) -> list[Slot]:
    """`count` slots, by default one for each `ddp` GPUs that this process sees, or of `gpus`
    (physical ids), of these the first `max_gpus`; and without a GPU two.

    More slots than there are groups of GPUs share these in turn. `say` is told which GPUs are left
    over, and if ranks share CPU cores. Raises ConfigError for a GPU that is not there, and if there
    are less than `ddp`.
    """
    visible = [] if device == "cpu" else _visible_gpus(os.environ)
    if gpus is not None:
        if missing := [gpu for gpu in gpus if gpu not in visible]:
            there = f"there are {', '.join(visible)}" if visible else "this machine shows none"
            raise ConfigError(
                f"--gpus: no GPU {missing[0]}{suggestion(missing[0], visible)}; {there}"
            )
        visible = list(gpus)
    elif device == "cuda" and not visible:
        raise ConfigError("device=cuda, but torch sees no GPU; use --device cpu")
    visible = visible[:max_gpus]
    cores = len(os.sched_getaffinity(0))
    if visible:
        groups = _groups(visible, ddp, say)
        count = count or len(groups)
        return of_gpus(groups, count, _threads(cores, count * ddp))
    count = count or min(CPU_SHARES, max_gpus or CPU_SHARES)
    if ddp > 1 and count * ddp > cores:
        say(f"{counted(cores, 'core')} for {count} × --ddp {ddp}: ranks share cores")
    return of_cores(count, _threads(cores, count * ddp))


def _groups(gpus: Sequence[str], ddp: int, say: Callable[[str], None]) -> list[str]:
    """The GPUs of each slot, as CUDA_VISIBLE_DEVICES has them."""
    if len(gpus) < ddp:
        raise ConfigError(
            f"--ddp {ddp}: each training needs {counted(ddp, 'GPU')}, and there "
            f"{'is' if len(gpus) == 1 else 'are'} {counted(len(gpus), 'GPU')} ({', '.join(gpus)}); "
            f"use --ddp {len(gpus)}, or more GPUs"
        )
    used = len(gpus) - len(gpus) % ddp
    if left := gpus[used:]:
        which = f"GPU {left[0]} is" if len(left) == 1 else f"GPUs {', '.join(left)} are"
        say(f"{which} left over: --ddp {ddp} takes {ddp} at a time")
    return [",".join(gpus[first : first + ddp]) for first in range(0, used, ddp)]


def of_gpus(gpus: Sequence[str], count: int, threads: str) -> list[Slot]:
    """`count` slots on these GPUs, one after another, by their entry in CUDA_VISIBLE_DEVICES; of a
    slot with several, the entries with commas."""
    slots, names = [], list[str]()
    for index in range(count):
        gpu = gpus[index % len(gpus)]
        short = "-".join(re.sub(r"[^\w-]", "_", item)[:12].lower() for item in gpu.split(","))
        name = f"{'' if short.startswith(('gpu', 'mig')) else 'gpu'}{short}"
        names.append(name)
        name += f"_{names.count(name)}" if names.count(name) > 1 else ""
        slots.append(Slot(index, name, {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads}))
    return slots


def of_cores(count: int, threads: str) -> list[Slot]:
    """`count` slots that share the cores."""
    return [Slot(index, f"cpu{index}", {"OMP_NUM_THREADS": threads}) for index in range(count)]


def fair_share(capacities: Sequence[float], count: int) -> float:
    """The largest share of which `count` fit into machines of these capacities, each within one."""
    shares = {capacity / parts for capacity in capacities for parts in range(1, count + 1)}
    fitting = (
        share
        for share in shares
        if share > 0 and sum(int(capacity / share + 1e-9) for capacity in capacities) >= count
    )
    return rounded(max(fitting, default=0.0))


def rounded(share: float) -> float:
    """Ray counts in ten thousandths."""
    return math.floor(share * 1e4) / 1e4


def _threads(cores: int, processes: int) -> str:
    """Threads of each process that trains: its share of the cores, unless the user has said how
    many."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // processes))


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    import torch  # seconds to import; and asking it makes no context on a GPU

    count = torch.cuda.device_count()
    listed = [item.strip() for item in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return [item for item in listed if item][:count] or [str(index) for index in range(count)]


def model_slots(models: int, slots: int) -> list[int | None]:
    """The slot that each of `models` trainings waits for: the first ones have one each, the next
    one gets the last slot as soon as that is free, and those behind it whichever is."""
    places: list[int | None] = [*range(slots), slots - 1]
    return [*places, *[None] * models][:models]

"""How much of a GPU a rank uses."""

import contextlib
import math
from typing import NamedTuple

import torch


class GpuUsage(NamedTuple):
    """What a rank uses of its GPU. NaN is unknown, as everything is on a CPU."""

    memory_gb: float = math.nan
    peak_memory_gb: float = math.nan
    """the most since the process began, or the job in a worker of a pool"""
    utilisation_percent: float = math.nan
    """share of the time in which the GPU computes; NVIDIA's library measures it"""

    def known(self) -> dict[str, float]:
        """The figures that are known, by name."""
        return {name: value for name, value in self._asdict().items() if not math.isnan(value)}


def measure(device: torch.device) -> GpuUsage:
    """The usage of `device` now. The host does not wait for the device."""
    if device.type != "cuda":
        return GpuUsage()
    usage = GpuUsage(
        memory_gb=torch.cuda.memory_allocated(device) / 1e9,
        peak_memory_gb=torch.cuda.max_memory_allocated(device) / 1e9,
    )
    with contextlib.suppress(Exception):  # the library is missing, or refuses (MIG, WSL)
        usage = usage._replace(utilisation_percent=float(torch.cuda.utilization(device)))
    return usage

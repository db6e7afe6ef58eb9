"""The device that a rank computes on: its choice, its set-up, its timing, its speed."""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import time
from typing import Any, NamedTuple

import torch

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.config import experiment_name, peak_rates
from gpt2.distributed import precision, visible_gpus
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)
THREADS = "GPT2_THREADS_OF_A_RANK"
"""environment variable with the number of CPU threads of each rank"""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""with which a user configures torch's allocator for GPUs; the others are former names"""
EXPANDABLE_SEGMENTS = "expandable_segments:True"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def gpu_id(wanted: str) -> str:
    """The id of the GPU that this process uses by default, or `cpu`.

    `wanted` is the value of --device: auto, cpu or cuda. Raises ConfigError if
    CUDA_VISIBLE_DEVICES is invalid.
    """
    shown = visible_gpus.ids()
    if shown is not None:
        return experiment_name.first_gpu(shown)
    if wanted == "cpu" or not torch.cuda.is_available():
        return experiment_name.CPU
    return str(torch.cuda.current_device())


class DeviceTimestamp:
    """The time at which the device reaches this point of its queue. The host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        self._time_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: "DeviceTimestamp") -> float:
        """Seconds from `earlier` to this moment; the device must have passed both, as it has when a
        later result was read on the host."""
        if self._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time_s - earlier._time_s


def peak_flops(world: World, dtype: torch.dtype) -> float:
    """FLOP/s of all ranks' devices together, for matrix products of `dtype`: from the data sheets,
    or measured where these do not say."""
    own = _known_flops(world.device, dtype) or measured_flops(world.device, dtype)
    return sum(of_rank for [of_rank] in world.gather([own]))


def _known_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The maker's figure; None for a device that is not listed, for a part of one, and for float32,
    whose rate depends on settings."""
    if device.type != "cuda" or dtype is torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    known = peak_rates.of(name)
    if known is None:
        logger.info("MFU is the share of a measured rate: that of %s is not listed", name)
    return known


@functools.cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products, measured in less than a second, once in a process."""
    side, repeats = (8192, 8) if device.type == "cuda" else (1024, 3)
    if precision.is_emulated(dtype, precision.fast_dtype(device), device):
        side //= 4  # emulated products take many times as long, at every size
    # Random numbers: a GPU needs less power to multiply equal ones, and raises its clock.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, generator=generator, device=device).to(dtype)
    float((matrix @ matrix)[0, 0])  # warm-up; reading an element waits for the device
    started = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * side**3 / (time.perf_counter() - started)


def choose(wanted: str, local_rank: int, local_size: int, gpu: str | None) -> torch.device:
    """The device of a rank. `wanted` is the value of --device, `gpu` that of --gpu_id.

    Raises ConfigError if the two contradict each other, the device does not exist, the machine has
    more ranks than GPUs, or CUDA_VISIBLE_DEVICES is invalid.
    """
    visible_gpus.ids()  # in CUDA's own spelling, before CUDA reads them
    if gpu == experiment_name.CPU:
        if wanted == "cuda":
            raise ConfigError("device=cuda and gpu_id=cpu contradict each other; give one of them")
        wanted = "cpu"
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use --device cpu")
    gpus = torch.cuda.device_count()
    if local_size > gpus:
        raise ConfigError(
            f"{local_size} ranks on a machine with {counted(gpus, 'GPU')}; "
            f"use --nproc_per_node={gpus}, or --device cpu"
        )
    if gpu is not None and local_size == 1:
        return torch.device("cuda", experiment_name.gpu_index(gpu, visible_gpus.ids_of(gpus)))
    return torch.device("cuda", local_rank)


def threads_per_rank(local_size: int) -> int:
    """CPU threads of each of `local_size` ranks on a machine.

    The value of THREADS; else of OMP_NUM_THREADS, unless that is 1, which torchrun sets by default;
    else an equal share of the cores.
    """
    given = os.environ.get(THREADS) or os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and (THREADS in os.environ or int(given) > 1):
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def keep_freed_memory() -> None:
    """Makes glibc keep freed buffers. By default it returns them to the kernel, which has to map
    and clear them again for every large tensor. Other C libraries have no such option."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def use_expandable_segments() -> None:
    """Makes torch's allocator for GPUs grow its segments, so that the free memory between them is
    not lost to large tensors. To be called before CUDA is first used.

    A setting of the user stays. The variable alone is not enough: torch may have read it when
    it was imported, and torch 2.9 ignores its new name (pytorch issue 183387).
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    os.environ[ALLOCATOR_VARIABLES[0]] = EXPANDABLE_SEGMENTS
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (configure or torch.cuda.memory._set_allocator_settings)(EXPANDABLE_SEGMENTS)


class DeviceMemory(NamedTuple):
    """The memory of a GPU, in bytes."""

    total: int
    free: int
    """what this process has or can have: beside other processes, and within
    `torch.cuda.set_per_process_memory_fraction`"""


def memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    own = free + torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return DeviceMemory(total, min(own, int(share * total)))


def recover(device: torch.device) -> None:
    """Frees cached memory after a failed computation. Raises the error of CUDA if the device cannot
    compute any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)


def make_deterministic() -> None:
    """Makes torch choose algorithms that give the same bits every time, on CUDA too.

    Inductor reads its variables when it is imported, and cuBLAS its own when it is first used.
    Where Inductor is imported already, its settings are changed, too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without these, Inductor times several kernels and takes the fastest: they add in other orders.
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    os.environ["TORCHINDUCTOR_DYNAMIC_SCALE_RBLOCK"] = "0"
    if settings := sys.modules.get("torch._inductor.config"):
        for name, value in {"deterministic": True, "dynamic_scale_rblock": False}.items():
            if hasattr(settings, name):  # torch 2.9 does not have all of them
                setattr(settings, name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

"""The number types that a device computes with, and whether the installed torch has kernels for it.

What a GPU can do follows from its compute capability: (7, 0) is Volta (V100), (7, 5) Turing (T4),
(8, 0) and newer Ampere, Hopper, Blackwell (https://developer.nvidia.com/cuda-gpus).
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

import torch

from gpt2.base.errors import ConfigError
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)
Capability = tuple[int, int]
VOLTA, TURING, AMPERE, BLACKWELL = (7, 0), (7, 5), (8, 0), (10, 0)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""values of --dtype; a GPU that multiplies one of them also multiplies those before it"""


def fast_dtype(device: torch.device) -> torch.dtype:
    """The best number type for training whose matrices the device multiplies in hardware.

    bfloat16 has the range of float32. float16 has not, so its gradients have to be scaled; it is
    chosen only on GPUs.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= AMPERE:
            return torch.bfloat16
        return torch.float16 if capability >= VOLTA else torch.float32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    is_fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if is_fast else torch.float32


def autocast_dtype(wanted: str, world: World) -> torch.dtype:
    """The type of matrix products, the same on all ranks; `wanted` is the value of --dtype.

    With `auto` it is the best that the hardware of every rank multiplies. Every rank calls it.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    dtypes = list(DTYPES.values())
    own = dtypes.index(fast_dtype(world.device))
    ranks = [int(of_rank) for [of_rank] in world.gather([own])]
    lowest, best = min(ranks), max(ranks)
    if lowest < best:
        names, slow = list(DTYPES), [str(rank) for rank, item in enumerate(ranks) if item < best]
        logger.warning(
            "all ranks compute in %s, because the hardware of %s %s does not multiply %s; train on "
            "devices of one kind, or choose one with --dtype",
            names[lowest],
            "rank" if len(slow) == 1 else "ranks",
            ", ".join(slow),
            names[best],
        )
    return dtypes[lowest]


def is_emulated(dtype: torch.dtype, fast: torch.dtype, device: torch.device) -> bool:
    """Whether torch emulates products of `dtype` on a device with this `fast_dtype`, which takes
    many times as long."""
    if dtype is torch.float16 and device.type == "cuda":
        return fast is torch.float32
    return dtype not in (fast, torch.float32)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast with matrix products of `dtype`; for float32 it is off."""
    is_on = dtype is not torch.float32
    return torch.autocast(device.type, dtype=dtype if is_on else torch.bfloat16, enabled=is_on)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile makes a GPU faster: Triton has code for Volta and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= VOLTA


def set_tf32(is_on: bool, device: torch.device) -> None:
    """Sets whether a GPU rounds the factors of float32 matrix products to TF32, which has the
    10-bit mantissa of float16: on Ampere and newer, that is many times as fast. Does nothing on
    other devices."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE:
        _set_matmul_precision("high" if is_on else "highest")


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within the context, float32 matrix products are computed in full precision."""
    if device.type != "cuda":
        yield
        return
    before = _matmul_precision()
    _set_matmul_precision("highest")
    try:
        yield
    finally:
        _set_matmul_precision(before)


# torch 2.9 has a new setting, torch.backends.cuda.matmul.fp32_precision. These functions set both;
# with the new one alone, torch raises where torch.compile reads the former. Some versions warn that
# they are deprecated.
def _set_matmul_precision(precision: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.set_float32_matmul_precision(precision)


def _matmul_precision() -> str:
    with warnings.catch_warnings(action="ignore"):
        return torch.get_float32_matmul_precision()


def require_kernels(device: torch.device) -> None:
    """Raises ConfigError if the installed torch has no kernels for a GPU."""
    if device.type != "cuda" or torch.version.cuda is None:  # torch for AMD names GPUs differently
        return
    remedy = kernels_missing(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    if remedy is not None:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"torch {torch.__version__} has no kernels for {name}; {remedy}, or use --device cpu"
        )


def kernels_missing(capability: Capability, architectures: Sequence[str]) -> str | None:
    """What to do if none of the architectures that torch was built for, as
    `torch.cuda.get_arch_list()` names them, runs on a GPU of this capability; None if one does.

    An empty list means that nothing is known, and gives None.
    """
    if not architectures or any(_runs_on(capability, name) for name in architectures):
        return None
    if capability < TURING:
        return (
            "install torch for CUDA 12.6, the last that has them: "
            "pip install torch --index-url https://download.pytorch.org/whl/cu126"
        )
    if capability >= BLACKWELL:
        return "install torch for CUDA 12.8 or newer, as on pytorch.org"
    return "install torch from pytorch.org"


def _runs_on(capability: Capability, architecture: str) -> bool:
    """Whether code for `sm_86` or `compute_90` runs on a GPU (CUDA C++ programming guide, 5.1).

    Machine code (sm) runs on the same major version from its own minor version on; PTX (compute) is
    translated for any newer GPU. With the suffix `a`, both run on one capability alone, and with
    `f` on those of one major version.
    """
    kind, _, version = architecture.partition("_")
    digits = version.rstrip("af")
    built_for = (int(digits[:-1]), int(digits[-1]))
    if version.endswith("a"):
        return capability == built_for
    if kind == "compute" and not version.endswith("f"):
        return capability >= built_for
    return capability[0] == built_for[0] and capability >= built_for

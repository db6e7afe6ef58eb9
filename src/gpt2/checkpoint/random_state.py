"""The states of the random-number generators of a process."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from gpt2.checkpoint.metadata import CheckpointState


def rng_state(device: torch.device) -> CheckpointState:
    """The random-number states of this process: Python, NumPy, torch CPU and its CUDA device."""
    numpy_state = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: CheckpointState, device: torch.device) -> None:
    """Restores what `rng_state` took; a CUDA state is left out where there is no CUDA."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu().to(torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu().to(torch.uint8), device)


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Restores the random-number states of this process after the block, however it ends."""
    before = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)

"""What holds the memory of a GPU when it runs out (--memory_snapshot)."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2.config.run import WatchConfig
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)
KEPT_EVENTS = 100_000
"""allocations and their ends, a few KB of host memory each; those of some steps"""


@contextlib.contextmanager
def recording(config: WatchConfig, device: torch.device) -> Iterator[None]:
    """Records where memory is allocated while the block runs, if the user requests that."""
    is_on = config.memory_snapshot and device.type == "cuda"
    if config.memory_snapshot and not is_on:
        logger.warning("--memory_snapshot is for CUDA: on a CPU it writes nothing")
    if is_on:
        torch.cuda.memory._record_memory_history(max_entries=KEPT_EVENTS)
    try:
        yield
    finally:
        if is_on:
            torch.cuda.memory._record_memory_history(enabled=None)


def write(config: WatchConfig, world: World) -> Path | None:
    """Writes what this rank has recorded, and returns the file; None if it records nothing, or
    cannot write."""
    if not config.memory_snapshot or world.device.type != "cuda":
        return None
    path = config.log_dir / f"out_of_memory_rank{world.rank}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:  # a full disk; a device that is lost
        logger.warning("cannot write %s: %s", path, error)
        return None
    return path

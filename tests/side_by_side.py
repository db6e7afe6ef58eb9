"""A job for `test_parallel_gpus` and `test_multi_gpu`: workers import it."""

import os
import time
from pathlib import Path
from typing import Any


def meets(report: Any, seed: int, folder: str = ".") -> dict[str, float]:
    """Waits until another job runs at the same time, and multiplies matrices on the slot's GPU.

    Jobs meet in pairs: 0 and 1, 2 and 3. Returns the sum of the products' entries, 4096, and the
    number of GPUs that the slot sees.
    """
    Path(folder, f"{seed}_{os.getpid()}").touch()
    while not list(Path(folder).glob(f"{seed ^ 1}_*")):
        if report(waits_for=seed ^ 1) != "go":
            break
        time.sleep(0.01)
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return {"value": 4096.0, "gpus": 0}
    import torch  # takes seconds to import; on a CPU slot there is nothing to try

    square = torch.full((256, 256), 1 / 64, device="cuda")
    return {"value": (square @ square).sum().item(), "gpus": torch.cuda.device_count()}

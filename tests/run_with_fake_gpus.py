"""A script that trains on CPUs while each rank measures a GPU that is made up: `DATA_ROOT OUT`,
then values of options as `name=value`.

Rank r holds 10 + r GB, at most 40 + r GB. The last rank's utilisation is unknown, as without
NVIDIA's library; that of the others changes with every step.
"""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

from gpt2.config import options
from gpt2.config.run import MachineConfig
from gpt2.distributed import rendezvous
from gpt2.distributed.gpu_usage import GpuUsage
from gpt2.distributed.signals import StopRequest
from gpt2.train import setup, trainer
from gpt2.train.notices import Notices
from gpt2.train.report import always_go
from support import small_config


def main(data_root: str, out: str, *values: str) -> None:
    changes = dict(value.split("=") for value in values)
    numbers = {name: int(value) if value.isdigit() else value for name, value in changes.items()}
    run_config = small_config(Path(data_root), Path(out), use_tensorboard=True)
    run_config = options.overlay(run_config, numbers)
    steps = itertools.count()
    with rendezvous.join(MachineConfig(device="cpu")) as world:

        def measure() -> GpuUsage:
            load = 90 + world.rank + 5 * math.sin(next(steps) / 3)
            is_known = world.rank < world.size - 1
            return GpuUsage(10 + world.rank, 40 + world.rank, load if is_known else math.nan)

        fake = replace(world, measure_gpu=measure)
        notices = Notices()
        with setup.claimed_folder(run_config, fake, notices):
            run = setup.build(run_config, "run", fake, always_go, StopRequest(), None, notices)
            trainer.train(run)
            run.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

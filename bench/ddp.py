"""Two ranks with a core each against one rank with both, on the CPU: python bench/ddp.py

The `small` shape of train.py in micro-batches of 8 rows, with the same global batch: each of two
ranks accumulates so many of them, the single one twice as many. The two take turns. A step is our
whole update, the exchange of gradients included.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from turns import Contender, Timed, ratio, serve, take_turns

from gpt2.config import options as options_module
from gpt2.config import presets
from gpt2.config import run as run_module
from gpt2.distributed import rendezvous
from gpt2.distributed.world import World
from gpt2.train import trainer
from gpt2.train.replica import Replica
from train import LEARNING_RATE, SHAPES

RANKS = 2


def timed(accumulation: int, world: World) -> Timed:
    """Updates of this rank; all ranks take as many as rank 0."""
    shape = SHAPES["small"]
    rows, length = shape["mini_batch_size"], shape["block_size"]
    values = {"total_batch_size": RANKS * accumulation * rows * length, "device": "cpu"}
    replica = Replica(options_module.overlay(presets.preset("gpt2-124m"), shape | values), world)
    torch.manual_seed(world.rank)
    count = RANKS * accumulation // world.size
    drawn = torch.randint(50257, (count, rows, length + 1))
    tokens = values["total_batch_size"]
    micros = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in drawn]

    def run(steps: int) -> list[float]:
        times = []
        for _ in range(world.all_reduce_max(steps)):
            started = time.perf_counter()
            trainer.train_step(replica, micros, tokens, LEARNING_RATE)
            times.append(time.perf_counter() - started)
        return times

    return run


def serve_rank(accumulation: int) -> None:
    with rendezvous.join(run_module.MachineConfig(device="cpu")) as world:
        if world.is_rank0:
            serve(lambda: timed(accumulation, world))
            world.all_reduce_max(0)  # that was all
        else:
            run = timed(accumulation, world)
            while run(0):
                pass


def compare(accumulation: int, rounds: int, steps: int) -> None:
    own = [__file__, "--serve", str(accumulation)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    two = Contender.start("two ranks", [sys.executable, *torchrun, *own])
    one = Contender.start("one rank", [sys.executable, *own])
    for contender in (two, one):
        contender.run(1)
    for _ in take_turns([two, one], rounds, steps):
        pass
    for contender in (two, one):
        contender.end()
    seconds = [statistics.median(contender.rounds) for contender in (two, one)]
    print(
        f"accumulation {accumulation}: two ranks {seconds[0]:.2f} s, one rank {seconds[1]:.2f} s, "
        f"speed of two ranks to that of one {ratio(two.rounds, one.rounds)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accumulations", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="divided by the accumulation")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_rank(options.serve)
        return
    if len(os.sched_getaffinity(0)) != RANKS:
        raise SystemExit(f"needs {RANKS} cores: taskset --cpu-list 0,1 python {__file__}")
    for accumulation in options.accumulations:
        compare(accumulation, options.rounds, max(1, options.steps // accumulation))


if __name__ == "__main__":
    main()

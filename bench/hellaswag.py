"""How fast HellaSwag is: python bench/hellaswag.py TASKS.jsonl.gz [--tasks 100] [--lm_eval]

GPT-2 124M with random weights in float32; tasks from all over the file, their texts as the harness
has them. In one process, in turn: packed rows, as `gpt2 evaluate` computes them; a plain loop, one
task at a time, its four endings as a padded batch, as replications of GPT-2 do it; and, with
--lm_eval, lm-evaluation-harness 0.4 on the same weights, one ending at a time and eight at once.

With --bfloat16 and a trained --model, instead: how many choices bfloat16 changes.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import plain
import torch

from gpt2.config import run
from gpt2.distributed import rendezvous
from gpt2.distributed.world import World
from gpt2.evaluation import choices, hellaswag
from gpt2.evaluation.hellaswag import Choice, Task
from gpt2.model.gpt2 import GPT2


def packed_losses(net: GPT2, tasks: list[Task], world: World, bfloat16: bool) -> list[list[float]]:
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16)
    losses = choices.ending_losses(net, [task.question for task in tasks], world, autocast)
    assert losses is not None
    return losses


def choose(tasks: list[Task], losses: list[list[float]]) -> list[Choice]:
    return [hellaswag.choose(task, row) for task, row in zip(tasks, losses, strict=True)]


def their_losses(theirs: Any, asked: list[Any]) -> list[list[float]]:
    found = theirs.loglikelihood(asked, disable_tqdm=True)
    return [[-likelihood for likelihood, _ in found[at : at + 4]] for at in range(0, len(found), 4)]


def compare_speed(net: GPT2, path: Path, world: World, rounds: int, with_lm_eval: bool) -> None:
    """Prints tasks/s of each way, and how many times as fast packed rows are; also by CPU time,
    which depends less on what else the machine does."""
    tasks = hellaswag.load(path, style="harness")
    ways: dict[str, Callable[[], list[list[float]]]] = {
        "packed": lambda: packed_losses(net, tasks, world, bfloat16=False),
        "plain loop": lambda: [plain.ending_losses(net, task.question) for task in tasks],
    }
    if with_lm_eval:
        harness.prepare(net, path, path.parent)
        asked = harness.requests(path.parent)
        for size in (1, 8):
            theirs = harness.load(path.parent, world.device, size)
            ways[f"lm_eval by {size}"] = functools.partial(their_losses, theirs, asked)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        chosen = {}
        for name, way in ways.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = way()
            costs[name].append(time.process_time() - cpu_started)
            rates[name].append(len(tasks) / (time.perf_counter() - started))
            chosen[name] = choose(tasks, losses)
        assert chosen["packed"] == chosen["plain loop"]
        shown = ", ".join(f"{name} {rate[-1]:.2f}" for name, rate in rates.items())
        print(f"  tasks/s: {shown}", flush=True)
    print("All choices of packed rows and of the plain loop are the same")
    ours = rates.pop("packed")
    print(f"packed: {statistics.median(ours):.2f} tasks/s")
    for name, theirs in rates.items():
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        print(
            f"  {statistics.median(ours) / statistics.median(theirs):.2f} times {name} "
            f"({min(ratios):.2f} to {max(ratios):.2f} in single rounds); by CPU time "
            f"{statistics.median(costs[name]) / statistics.median(costs['packed']):.2f}"
        )


def compare_bfloat16(net: GPT2, path: Path, world: World) -> None:
    """Prints how many choices are the same in bfloat16."""
    tasks = hellaswag.load(path, style="harness")
    full, half = (choose(tasks, packed_losses(net, tasks, world, kind)) for kind in (False, True))
    pairs = list(zip(full, half, strict=True))
    by_sum = sum(one.by_sum == other.by_sum for one, other in pairs) / len(pairs)
    by_mean = sum(one.by_mean == other.by_mean for one, other in pairs) / len(pairs)
    print(f"bfloat16 chooses as float32 does in {by_sum:.2%} by sum, {by_mean:.2%} by mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="gpt2-124m", help="checkpoint, exported folder, preset")
    parser.add_argument("--lm_eval", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    machine = run.MachineConfig()
    with TemporaryDirectory() as root, rendezvous.join(machine) as world:
        path = harness.spread(arguments.path, arguments.tasks, Path(root))
        net = harness.load_model(arguments.model).to(world.device)
        print(f"{arguments.tasks} tasks, {arguments.model}, {world.device}", end=", ")
        print(f"{len(os.sched_getaffinity(0))} cores", flush=True)
        if arguments.bfloat16:
            compare_bfloat16(net, path, world)
        else:
            compare_speed(net, path, world, arguments.rounds, arguments.lm_eval)


if __name__ == "__main__":
    main()

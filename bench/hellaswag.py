"""How fast HellaSwag is: python bench/hellaswag.py TASKS.jsonl.gz [--tasks 100] [--lm_eval]

GPT-2 124M with random weights in float32, the first tasks of the file. Side by side in one process,
in turn: packed rows, as `gpt2 evaluate` computes them; a plain loop, one task at a time, its four
endings as a padded batch; and, with --lm_eval, lm-evaluation-harness 0.4 on the same weights.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2 import config, distributed, model, tokenizer
from gpt2.evaluation import choices, hellaswag
from gpt2.evaluation.hellaswag import Task
from gpt2.model.gpt2 import GPT2

ROUNDS = 3


@torch.no_grad()
def plain_losses(net: GPT2, task: Task) -> list[float]:
    """One task: four rows of text and ending, padded, and the logits of all their tokens."""
    endings = task.question.endings
    rows = [(*task.question.context, *ending) for ending in endings]
    longest, begin = max(map(len, rows)), len(task.question.context) - 1
    tokens_BT = torch.tensor([(*row, *[0] * (longest - len(row))) for row in rows])
    logits_BTV = net.logits(tokens_BT[:, :-1])[..., : tokenizer.VOCAB_SIZE]
    losses_BT = F.cross_entropy(
        logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    return [
        float(losses_T[begin : begin + len(ending)].sum())
        for losses_T, ending in zip(losses_BT, endings, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--lm_eval", action="store_true")
    arguments = parser.parse_args()
    tasks = hellaswag.load(arguments.path, arguments.tasks)
    torch.manual_seed(0)
    net = model.build(config.preset("gpt2-124m").model).eval()
    alone = distributed.World(0, 1, torch.device("cpu"))
    full = torch.autocast("cpu", enabled=False)
    questions = [task.question for task in tasks]
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: choices.ending_losses(net, questions, alone, full),
        "plain loop": lambda: [plain_losses(net, task) for task in tasks],
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            rates[name].append(len(tasks) / (time.perf_counter() - started))
    print(f"{len(tasks)} tasks, {len(os.sched_getaffinity(0))} cores, {ROUNDS} rounds")
    for name, of_way in rates.items():
        shown = ", ".join(f"{rate:.2f}" for rate in of_way)
        print(f"{name:<12} {statistics.median(of_way):.2f} tasks/s ({shown})")
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    print(f"packed / plain loop: {statistics.median(ratios):.2f}")
    chosen = {
        name: [hellaswag.choose(task, row) for task, row in zip(tasks, losses, strict=True)]
        for name, losses in results.items()
    }
    assert chosen["packed"] == chosen["plain loop"]
    print("All choices are the same")


if __name__ == "__main__":
    main()

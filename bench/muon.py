"""The update of Muon beside that of torch's: `python bench/muon.py`

The hidden matrices of the demo, with random gradients, in turns on one and on all cores; and how
many operators each runs.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2 import model
from gpt2.config import presets
from gpt2.optim.muon import Muon

ROUNDS = 15


def elapsed_ms(update: Callable[[], object]) -> float:
    started = time.perf_counter()
    update()
    return (time.perf_counter() - started) * 1000


class Counter(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not func.is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def operators(update: Callable[[], object]) -> int:
    with Counter() as counter:
        update()
    return counter.operators


def main() -> None:
    net = model.build(presets.preset("demo").with_vocab_size(128).model)
    updates: dict[str, Callable[[], object]] = {}
    for kind in ("ours", "torch's"):
        weights = [nn.Parameter(part.detach().clone()) for part in net.hidden_matrices()]
        for part in weights:
            part.grad = torch.randn_like(part)
        options = {"lr": 0.02, "weight_decay": 0.1}
        one = (
            Muon(weights, **options)
            if kind == "ours"
            else torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **options)
        )
        updates[kind] = one.step
    counts = [operators(update) for update in updates.values()]
    print(f"{counts[0]} operators, torch's {counts[1]}")
    for threads in (1, len(os.sched_getaffinity(0))):
        torch.set_num_threads(threads)
        for update in updates.values():
            update()
        found = [[elapsed_ms(update) for update in updates.values()] for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(times) for times in zip(*found, strict=True))
        ratios = [one / other for one, other in found]
        print(
            f"{threads} threads: {ours:.1f} ms, torch's {theirs:.1f} ms; ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()

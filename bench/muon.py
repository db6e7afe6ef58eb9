"""The update of Muon beside that of torch's: `python bench/muon.py`

The hidden matrices of the demo, with random gradients, in turns on one and on all cores.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gpt2 import model
from gpt2.config import presets
from gpt2.optim.muon import Muon

ROUNDS = 15


def elapsed_ms(update: Callable[[], object]) -> float:
    started = time.perf_counter()
    update()
    return (time.perf_counter() - started) * 1000


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

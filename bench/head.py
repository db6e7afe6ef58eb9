"""Ways to the loss of the head and its gradients: python bench/head.py

For the two shapes of train.py, in turn: torch's plain operations, these compiled, torch's
`linear_cross_entropy` (2.13) as it comes and in chunks, and `gpt2.model.cross_entropy`, which
training uses. And the three matrix products alone, which none of them can do without. Then the
memory that each takes beside its inputs, by the number of tokens, in a process of its own. This is
for the CPU; `gpu_check.py --parts head` compares the same ways on a GPU, with Liger's kernel.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import peak_gb, ratio

from gpt2.config import run
from gpt2.distributed import rendezvous
from gpt2.model.cross_entropy import summed_cross_entropy
from train import SHAPES

VOCABULARY = 50304
BOUND = "matrix products alone"
"""what no way to the loss can do without"""
TOKENS = (1024, 4096)
"""of the memory's table"""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Way = Callable[[Tensor, Tensor, Tensor], object]
"""takes features, weights and targets, and makes the gradients of the first two"""


def plain(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features_ND, weight_VD), targets_N, reduction="sum")


@torch.no_grad()
def products(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> object:
    """Logits and two gradients, were there nothing to compute between them."""
    logits_NV = features_ND @ weight_VD.T
    return logits_NV @ weight_VD, logits_NV.T @ features_ND


def with_gradients(loss_of: Loss) -> Way:
    return lambda *tensors: loss_of(*tensors).backward()


def liger() -> Loss | None:
    """Liger's kernel, where its package is installed; it needs CUDA."""
    if not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, reduction="sum")


def ways(compiled: bool = True) -> dict[str, Way]:
    losses: dict[str, Loss] = {"ours": summed_cross_entropy, "plain": plain}
    if compiled:
        losses["ours, compiled"] = torch.compile(summed_cross_entropy, dynamic=False)
        losses["plain, compiled"] = torch.compile(plain, dynamic=False)
    if (kernel := liger()) is not None:
        losses["Liger"] = kernel
    if linear := getattr(F, "linear_cross_entropy", None):
        chunks = torch.nn.LinearCrossEntropyOptions()
        losses["linear_cross_entropy"] = partial(linear, reduction="sum")
        losses["the same, in chunks"] = partial(linear, reduction="sum", options=chunks)
    found = {name: with_gradients(loss_of) for name, loss_of in losses.items()}
    return found | {BOUND: products}


def milliseconds(way: Way, features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> float:
    features_ND.grad = weight_VD.grad = None
    started = time.perf_counter()
    way(features_ND, weight_VD, targets_N)
    return 1000 * (time.perf_counter() - started)


def drawn(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights and targets."""
    features_ND = torch.randn(tokens, width).requires_grad_()
    weight_VD = (0.02 * torch.randn(VOCABULARY, width)).requires_grad_()
    return features_ND, weight_VD, torch.randint(VOCABULARY, (tokens,))


def compare_speed(rounds: int) -> None:
    for name, shape in SHAPES.items():
        tokens = shape["mini_batch_size"] * shape["block_size"]
        inputs, known = drawn(tokens, shape["n_embd"]), ways()
        times: dict[str, list[float]] = {label: [] for label in known}
        for _ in range(rounds + 1):
            for label, way in known.items():
                times[label].append(milliseconds(way, *inputs))
        print(f"{name}: {tokens} tokens of {shape['n_embd']}")
        for label, (_, *measured) in times.items():  # the first ones compile
            print(
                f"  {label:22} {statistics.median(measured):6.0f} ms, "
                f"ours is {ratio(times['ours'][1:], measured)} times as fast",
                flush=True,
            )


def print_memory(label: str) -> None:
    """GB above those of the inputs, at each number of tokens; the gradients are among them."""
    for tokens in TOKENS:
        way, inputs = ways()[label], drawn(tokens, SHAPES["124m"]["n_embd"])
        way(*inputs)  # compiles, which takes memory, too
        inputs[0].grad = inputs[1].grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_gb()
        way(*inputs)
        print(f"{peak_gb() - before:8.2f}", end="")


def compare_memory() -> None:
    print("GB beside the inputs, 124m:", *(f"{tokens:,} tokens" for tokens in TOKENS))
    for label in ways():
        command = [sys.executable, __file__, "--memory", label]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"  {label:22}{found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory(options.memory)
        return
    with rendezvous.join(run.MachineConfig(device="cpu")):  # sets malloc
        compare_speed(options.rounds)
    compare_memory()


if __name__ == "__main__":
    main()

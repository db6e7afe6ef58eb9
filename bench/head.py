"""Ways to the loss of the head and its gradients: python bench/head.py

For the two shapes of train.py, in turn: torch's plain operations, these compiled, torch's
`linear_cross_entropy` (2.13) as it comes and in chunks, and `gpt2.model.cross_entropy`, which
training uses. And the three matrix products alone, which none of them can do without. This is for
the CPU; `gpu_check.py --parts head` compares the same ways on a GPU, with Liger's kernel.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import ratio

from gpt2.config import run
from gpt2.distributed import rendezvous
from gpt2.model.cross_entropy import summed_cross_entropy
from train import SHAPES

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Way = Callable[[Tensor, Tensor, Tensor], object]
"""takes features, weights and targets, and makes the gradients of the first two"""


def plain(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features_ND, weight_VD), targets_N, reduction="sum")


@torch.no_grad()
def products(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """Logits and two gradients, were there nothing to compute between them."""
    logits_NV = features_ND @ weight_VD.T
    features_ND.grad, weight_VD.grad = logits_NV @ weight_VD, logits_NV.T @ features_ND


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
        losses["ours, compiled"] = torch.compile(summed_cross_entropy)
        losses["plain, compiled"] = torch.compile(plain)
    if (kernel := liger()) is not None:
        losses["Liger"] = kernel
    if linear := getattr(F, "linear_cross_entropy", None):
        chunks = torch.nn.LinearCrossEntropyOptions()
        losses["linear_cross_entropy"] = partial(linear, reduction="sum")
        losses["the same, in chunks"] = partial(linear, reduction="sum", options=chunks)
    found = {name: with_gradients(loss_of) for name, loss_of in losses.items()}
    return found | {"matrix products alone": products}


def milliseconds(way: Way, features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> float:
    features_ND.grad = weight_VD.grad = None
    started = time.perf_counter()
    way(features_ND, weight_VD, targets_N)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with rendezvous.join(run.MachineConfig(device="cpu")):  # sets malloc
        for name, shape in SHAPES.items():
            tokens, vocabulary = shape["mini_batch_size"] * shape["block_size"], 50304
            features_ND = torch.randn(tokens, shape["n_embd"]).requires_grad_()
            weight_VD = (0.02 * torch.randn(vocabulary, shape["n_embd"])).requires_grad_()
            inputs = features_ND, weight_VD, torch.randint(vocabulary, (tokens,))
            known = ways()
            times: dict[str, list[float]] = {label: [] for label in known}
            for _ in range(options.rounds + 1):
                for label, way in known.items():
                    times[label].append(milliseconds(way, *inputs))
            print(f"{name}: {tokens} tokens of {shape['n_embd']}")
            for label, (_, *rounds) in times.items():  # the first ones compile
                print(
                    f"  {label:22} {statistics.median(rounds):6.0f} ms, "
                    f"ours is {ratio(times['ours'][1:], rounds)} times as fast",
                    flush=True,
                )


if __name__ == "__main__":
    main()

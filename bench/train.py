"""Our training step against what a user would take instead: `python bench/train.py` (make bench).

The same model, batch and tokens: (i) a plain loop with torch.compile and autocast in the manner of
nanoGPT, (ii) transformers' GPT-2, compiled, in that loop, (iii) transformers.Trainer. Each as
shipped (AdamW and malloc as they come), and tuned (fused AdamW, and our setting of malloc), and all
in the type that is fastest on this machine: bfloat16, or float32 where the hardware has no products
of bfloat16. Each has a process of its own; they take turns. A step is all of it: forward, backward,
clipping, update, and the loss read.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import plain
import torch
from torch import Tensor
from turns import Contender, Timed, ratio, serve, take_turns

from gpt2.config import flops as estimate
from gpt2.config import options as options_module
from gpt2.config import presets
from gpt2.config.run import RunConfig
from gpt2.distributed import device as device_module
from gpt2.distributed import precision, rendezvous
from gpt2.optim.build import gradient_norm
from gpt2.train import trainer
from gpt2.train.replica import Replica

SHAPES: dict[str, dict[str, int]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "mini_batch_size": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "mini_batch_size": 4},
}
ON_A_GPU = {"block_size": 1024, "mini_batch_size": 64}
LEARNING_RATE = 6e-4
RIVALS = ("plain", "transformers", "trainer")
CONTENDERS = ("ours", *(f"{name}:{how}" for name in RIVALS for how in ("tuned", "shipped")))


def run_config(shape: str, device: torch.device) -> RunConfig:
    """Our run: everything in one micro-batch, no dropout, which GPT-2 has not either."""
    values: dict[str, object] = dict(SHAPES[shape])
    if device.type == "cuda" and shape == "124m":
        values |= ON_A_GPU
    rows, length = values["mini_batch_size"], values["block_size"]
    values["total_batch_size"] = rows * length  # type: ignore[operator]
    return options_module.overlay(presets.preset("gpt2-124m"), values | {"device": device.type})


def fastest_dtype(device: torch.device) -> torch.dtype:
    fast = precision.fast_dtype(device)
    return torch.bfloat16 if fast is torch.bfloat16 else torch.float32


def tokens_of(run: RunConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (run.rows_per_step, run.model.block_size + 1)
    return torch.randint(50257, shape, generator=generator)


def timed(step: Callable[[Tensor, Tensor], object], inputs_BT: Tensor, targets_BT: Tensor) -> Timed:
    def run(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            step(inputs_BT, targets_BT)
            times.append(time.perf_counter() - started)
        return times

    return run


def prepare(name: str, shape: str, folder: str) -> Timed:
    """What times the steps of a contender, which is ready to begin."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run_config(shape, device)
    rows_BT = tokens_of(run)
    shifted = rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()
    which, _, how = name.partition(":")
    dtype = fastest_dtype(device)
    fused = which == "plain" and device.type == "cuda"  # there nanoGPT does it
    if how != "shipped":
        fused = True
        with rendezvous.join(run.machine) as world:  # sets malloc
            if which == "ours":
                replica = Replica(run, world)
                tokens = run.data.total_batch_size
                return timed(
                    lambda *batch: trainer.train_step(replica, [batch], tokens, LEARNING_RATE),
                    *shifted,
                )
    torch.manual_seed(0)
    if which == "trainer":
        theirs = plain.trainer(run.model, device, dtype, fused, folder)
        return lambda steps: theirs(rows_BT[:, :-1], steps)
    build = plain.plain if which == "plain" else plain.transformers_loop
    return timed(build(run.model, device, dtype, fused), *shifted)


def breakdown(shape: str, steps: int) -> dict[str, float]:
    """Milliseconds of the parts of our step: medians, each part waited for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run_config(shape, device)
    rows_BT = tokens_of(run).to(device)
    inputs_BT, targets_BT = rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()
    parts: dict[str, list[float]] = {}

    def lap(name: str, since: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts.setdefault(name, []).append(1000 * (now - since))
        return now

    with rendezvous.join(run.machine) as world:
        replica = Replica(run, world)
        model, positions_T = replica.model, torch.arange(run.model.block_size, device=device)
        for _ in range(steps + 1):
            at = time.perf_counter()
            with replica.autocast:
                features_BTD = model.features(inputs_BT, positions_T, None)
                at = lap("forward", at)
                loss = model.loss(features_BTD, targets_BT)
            at = lap("head and loss", at)
            (loss / targets_BT.numel()).backward()
            at = lap("backward", at)
            norm = gradient_norm(model)
            at = lap("norm", at)
            replica.optimizer.clip_and_step(norm, 1.0, norm.isfinite())
            replica.optimizer.zero_grad(set_to_none=True)
            lap("update and clipping", at)
    return {name: statistics.median(times[1:]) for name, times in parts.items()}


def compare(shape: str, names: list[str], rounds: int, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, dtype = run_config(shape, device), fastest_dtype(device)
    contenders = []
    for name in names:
        command = [sys.executable, __file__, "--serve", name, "--shapes", shape]
        contenders.append(contender := Contender.start(name, command))
        contender.run(3)  # compiles; one after another, as compilers take all cores
    rates = []
    for _ in take_turns(contenders, rounds, steps):
        rates += [device_module.measured_flops(device, dtype) for _ in range(5)]
    for contender in contenders:
        contender.end()
    ours = next(contender for contender in contenders if contender.name == "ours")
    tokens, peak = run.data.total_batch_size, statistics.median(rates)
    flops = estimate.flops_per_token(run.model) * tokens
    print(f"\n{shape}: {run.data.mini_batch_size} x {run.model.block_size} tokens, {device.type}")
    print(f"matrix products of {dtype}: {peak / 1e9:,.0f} GFLOP/s")
    for contender in contenders:
        seconds = statistics.median(contender.rounds)
        print(
            f"{contender.name:22} {1000 * seconds:8.0f} ms  {tokens / seconds:9,.0f} tokens/s  "
            f"MFU {100 * flops / seconds / peak:3.0f} %  {contender.peak_gb:5.2f} GB  "
            f"ours is {ratio(ours.rounds, contender.rounds)} times as fast",
            flush=True,
        )
    parts = breakdown(shape, steps)
    print("ours: " + ", ".join(f"{name} {value:.0f} ms" for name, value in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for shape in options.shapes:
        if options.serve:
            with tempfile.TemporaryDirectory() as folder:
                serve(partial(prepare, options.serve, shape, folder))
        else:
            compare(shape, options.contenders, options.rounds, options.steps)


if __name__ == "__main__":
    main()

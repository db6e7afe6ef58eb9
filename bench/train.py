"""Our training step against what a user would take instead: `python bench/train.py` (make bench).

The same model, batch and tokens: (i) a plain loop with torch.compile and autocast in the manner of
nanoGPT, (ii) transformers' GPT-2, compiled, in that loop, (iii) transformers.Trainer. Each as
shipped (bfloat16, AdamW as it comes, malloc as it comes), and tuned: the type that is fastest on
this machine, fused AdamW, and our setting of malloc. Each has a process of its own; they take
turns, so that a noisy machine is noisy for all. A step is all of it: forward, backward, clipping,
update, and the loss read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plain
import torch
from torch import Tensor

from gpt2 import config, distributed, estimate, optim
from gpt2.config import RunConfig
from gpt2.learner import Learner

Timed = Callable[[int], list[float]]
"""seconds of each of so many steps"""
SHAPES: dict[str, dict[str, int]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "mini_batch_size": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "mini_batch_size": 4},
}
ON_A_GPU = {"block_size": 1024, "mini_batch_size": 64}
RIVALS = ("plain", "transformers", "trainer")
CONTENDERS = ("ours", *(f"{name}:{how}" for name in RIVALS for how in ("tuned", "shipped")))


def run_config(shape: str, device: torch.device) -> RunConfig:
    """Our run: everything in one micro-batch, no dropout, which GPT-2 has not either."""
    values: dict[str, object] = dict(SHAPES[shape])
    if device.type == "cuda" and shape == "124m":
        values |= ON_A_GPU
    rows, length = values["mini_batch_size"], values["block_size"]
    values["total_batch_size"] = rows * length  # type: ignore[operator]
    return config.overlay(config.preset("gpt2-124m"), values | {"device": device.type})


def tokens_of(run: RunConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (run.data.mini_batch_size, run.model.block_size + 1)
    return torch.randint(50257, shape, generator=generator)


def timed(step: Callable[[Tensor, Tensor], object], rows_BT: Tensor) -> Timed:
    inputs_BT, targets_BT = rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()

    def run(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            step(inputs_BT, targets_BT)
            times.append(time.perf_counter() - started)
        return times

    return run


def contender(name: str, shape: str, folder: str) -> Timed:
    """What times the steps of a contender, which is ready to begin."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run_config(shape, device)
    rows_BT = tokens_of(run)
    which, _, how = name.partition(":")
    if which != "ours" and how == "shipped":
        dtype, fused = torch.bfloat16, which == "plain"  # nanoGPT fuses its AdamW on a GPU
        fused = fused and device.type == "cuda"
    else:
        with distributed.join(run.machine) as world:  # sets malloc
            learner = Learner(run, world)
        if which == "ours":
            return timed(lambda *batch: learner.learn([batch], 6e-4), rows_BT)
        dtype, fused = learner.dtype, True
        del learner
    torch.manual_seed(0)
    if which == "trainer":
        theirs = plain.trainer(run.model, device, dtype, fused, folder)
        return lambda steps: theirs(rows_BT[:, :-1], steps)
    build = plain.plain if which == "plain" else plain.transformers_loop
    return timed(build(run.model, device, dtype, fused), rows_BT)


def serve(name: str, shape: str) -> None:
    """The process of a contender: a number of steps comes in, seconds and peak memory go out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Trainer talks
    with tempfile.TemporaryDirectory() as folder:
        steps = contender(name, shape, folder)
        for line in sys.stdin:
            times = steps(int(line))
            answers.write(json.dumps({"times": times, "peak_gb": peak_gb()}) + "\n")


def peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


@dataclass
class Rival:
    """A contender's process, and what it has said."""

    name: str
    process: subprocess.Popen[str]
    rounds: list[float]
    """median seconds of a step in each round"""
    peak_gb: float = 0.0

    @classmethod
    def start(cls, name: str, shape: str) -> "Rival":
        command = [sys.executable, __file__, "--serve", name, "--shapes", shape]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return cls(name, process, [])

    def run(self, steps: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} has failed; python {__file__} --serve {self.name}")
        answer = json.loads(line)
        self.peak_gb = answer["peak_gb"]
        return statistics.median(answer["times"])


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

    with distributed.join(run.machine) as world:
        learner = Learner(run, world)
        model, positions_T = learner.model, torch.arange(run.model.block_size, device=device)
        for _ in range(steps + 1):
            at = time.perf_counter()
            with learner.autocast:
                features_BTD = model.features(inputs_BT, positions_T, None)
                at = lap("forward", at)
                loss = model.loss(features_BTD, targets_BT)
            at = lap("head and loss", at)
            (loss / targets_BT.numel()).backward()
            at = lap("backward", at)
            float(optim.clip(model, 1.0))
            at = lap("clip", at)
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)
            lap("optimizer", at)
    return {name: statistics.median(times[1:]) for name, times in parts.items()}


def compare(shape: str, contenders: list[str], rounds: int, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run_config(shape, device)
    fast = distributed.has_fast_bfloat16(device)
    dtype = torch.bfloat16 if fast else torch.float32
    batch_tokens = run.data.total_batch_size
    rivals = []
    for name in contenders:
        rivals.append(rival := Rival.start(name, shape))
        rival.run(3)  # compiles; one after another, as compilers take all cores
    rates = []
    for _ in range(rounds):
        for rival in rivals:
            rival.rounds.append(rival.run(steps))
        rates.append(distributed.measured_flops(device, dtype))
    for rival in rivals:
        rival.process.communicate()
    ours = next(rival for rival in rivals if rival.name == "ours")
    flops = estimate.flops_per_token(run.model) * batch_tokens
    peak = statistics.median(rates)
    print(f"\n{shape}: {run.data.mini_batch_size} x {run.model.block_size} tokens, {device.type}")
    print(f"matrix products of {dtype}: {peak / 1e9:,.0f} GFLOP/s")
    for rival in rivals:
        seconds = statistics.median(rival.rounds)
        ratios = [theirs / mine for theirs, mine in zip(rival.rounds, ours.rounds, strict=True)]
        print(
            f"{rival.name:22} {1000 * seconds:8.0f} ms  {batch_tokens / seconds:9,.0f} tokens/s  "
            f"MFU {100 * flops / seconds / peak:3.0f} %  {rival.peak_gb:5.2f} GB  "
            f"ours is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
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
            serve(options.serve, shape)
        else:
            compare(shape, options.contenders, options.rounds, options.steps)


if __name__ == "__main__":
    main()

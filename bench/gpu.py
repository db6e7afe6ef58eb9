"""What a GPU makes of our trainer, beside a plain loop: python bench/gpu.py

On a bare machine with CUDA, torch 2.9 or later and numpy; no network. GPT-2 124M in bfloat16, on
random tokens or on a folder of shards. Training: our step and that of `plain.py`, compiled and not,
by batch size, in turn. Then what `gpu_parts.py` says. Progress goes to stderr, the tables of
docs/benchmarks.md to stdout. --smoke tries all of it with a tiny model, on the CPU too.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor


@contextlib.contextmanager
def tokenizer_or_none() -> Iterator[None]:
    """An empty module for tiktoken where that is not installed: gpt2 imports it, but no text is
    read here. It goes again, so that nobody else takes it for tiktoken."""
    if importlib.util.find_spec("tiktoken"):
        yield
        return
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
    sys.modules["tiktoken"].Encoding = object  # type: ignore[attr-defined]
    yield
    del sys.modules["tiktoken"]


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a clone, not installed
with tokenizer_or_none():
    import plain
    from gpu_parts import (
        Effort,
        Part,
        attention_kernels,
        free,
        is_flash,
        measurements,
        parts_table,
        table,
        wait,
    )
    from turns import spread

    from gpt2.base.errors import TrainingError, is_out_of_memory
    from gpt2.config import flops as estimate
    from gpt2.config import options as options_module
    from gpt2.config import presets
    from gpt2.config import run as run_module
    from gpt2.config.run import RunConfig
    from gpt2.data import tokenizer
    from gpt2.data.loader import MicroBatch
    from gpt2.data.remote import Storage
    from gpt2.data.sampler import Sampler
    from gpt2.data.shards import TokenDataset, load_index
    from gpt2.distributed import device as device_module
    from gpt2.distributed import rendezvous
    from gpt2.distributed.world import World
    from gpt2.train import trainer
    from gpt2.train.replica import Replica

T = TypeVar("T")
Step = Callable[[Tensor, Tensor], object]
LEARNING_RATE = 6e-4
BATCHES = 4
"""different ones, taken in turn"""
TARGET_MFU, TARGET_RATIO = 0.50, 1.2
"""on an H200: of the measured matrix rate, and of the plain compiled loop at its best batch"""


@dataclass(frozen=True)
class Size:
    """What is measured, and how much of it."""

    shape: dict[str, int]
    """that of GPT-2 124M, but for this"""
    batches: tuple[int, ...]
    effort: Effort


FULL = Size({}, (8, 16, 32, 64), Effort(rounds=5, steps=20, tasks=500, new_tokens=512))
SMOKE = Size(
    {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 192},
    (2,),
    Effort(rounds=2, steps=2, tasks=6, new_tokens=12),
)


@dataclass
class Training:
    """The steps of one contender at one batch size."""

    by: str
    batch: int
    compiled: bool
    tokens_per_s: list[float] = field(default_factory=list)
    """in each round; empty if the batch does not fit into the memory"""
    peak_gb: float | None = None

    @property
    def rate(self) -> float:
        return statistics.median(self.tokens_per_s)


Pair = tuple[Training, Training]
"""ours, and the plain loop's"""


@dataclass
class Findings:
    """All that was measured."""

    device: str
    torch: str
    block_size: int
    flops_per_token: float
    matrix_flops: list[float] = field(default_factory=list)
    """FLOP/s of matrix products, between the rounds of all trainings"""
    training: list[Pair] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    attention: dict[str, list[str]] = field(default_factory=dict)


def batches_of(run: RunConfig, data_dir: Path | None, device: torch.device) -> list[MicroBatch]:
    """Inputs and targets, (B, T) each, on the host, pinned for a GPU."""
    rows, length = run.data.mini_batch_size, run.model.block_size
    if data_dir is None:
        generator = torch.Generator().manual_seed(0)
        shape = (BATCHES, rows, length + 1)
        drawn = torch.randint(tokenizer.VOCAB_SIZE, shape, generator=generator)
        pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in drawn]
    else:
        shards = TokenDataset(load_index(Storage(str(data_dir))), "train", length)
        line = Sampler(shards.rows_per_shard, rows, seed=0)
        read = [shards.read(line.rows(step)) for step in range(BATCHES)]
        pairs = [(torch.tensor(inputs), torch.tensor(targets)) for inputs, targets in read]
    if device.type == "cuda":
        return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in pairs]
    return pairs


def run_of(size: Size, batch: int, device: torch.device) -> RunConfig:
    preset = presets.preset("gpt2-124m")
    length = size.shape.get("block_size", preset.model.block_size)
    rest = {
        "mini_batch_size": batch,
        "total_batch_size": batch * length,
        "device": device.type,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
    }
    return options_module.overlay(preset, {**size.shape, **rest})


def our_step(run: RunConfig, world: World, compiled: bool) -> Step:
    """One update as the training loop does it."""
    replica = Replica(options_module.overlay(run, {"compile": "on" if compiled else "off"}), world)

    def step(inputs: Tensor, targets: Tensor) -> None:
        trainer.train_step(replica, [(inputs, targets)], LEARNING_RATE)

    return step


def plain_step(run: RunConfig, world: World, compiled: bool) -> Step:
    dtype = getattr(torch, run.machine.dtype)
    return plain.plain(run.model, world.device, dtype, fused=True, compiled=compiled)


def if_it_fits(work: Callable[[], T]) -> T | None:
    """What the work gives; None if the memory did not suffice."""
    try:
        return work()
    except (RuntimeError, TrainingError) as error:
        cause = error.__cause__ if isinstance(error, TrainingError) else error
        if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
            return None
        raise


def start(
    result: Training, build: Callable[[], Step], batches: list[MicroBatch], device: torch.device
) -> Step:
    """The step of a contender, compiled; its peak memory is kept."""
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = build()
    step(*batches[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # compiling may have needed more
        step(*batches[1])
        result.peak_gb = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    return step


def step_seconds(step: Step, batches: list[MicroBatch], steps: int, device: torch.device) -> float:
    """Of so many steps without a pause, after one that gets the memory."""
    free(device)
    step(*batches[0])
    wait(device)
    started = time.perf_counter()
    for number in range(steps):
        step(*batches[number % len(batches)])
    wait(device)
    return (time.perf_counter() - started) / steps


def train(
    size: Size, batch: int, compiled: bool, world: World, data_dir: Path | None
) -> tuple[Pair, list[float]]:
    """Our steps and those of the plain loop in turn; and FLOP/s of matrix products meanwhile."""
    run, device = run_of(size, batch, world.device), world.device
    batches = batches_of(run, data_dir, device)
    torch.compiler.reset()  # or a second size would be compiled as one of any size
    steps: dict[str, Step] = {}
    pair = Training("ours", batch, compiled), Training("plain", batch, compiled)
    for result, build in zip(pair, (our_step, plain_step), strict=True):
        built = partial(build, run, world, compiled)
        if step := if_it_fits(partial(start, result, built, batches, device)):
            steps[result.by] = step
    rates = []
    for _ in range(size.effort.rounds):
        for result in (each for each in pair if each.by in steps):
            measure = partial(step_seconds, steps[result.by], batches, size.effort.steps, device)
            if (seconds := if_it_fits(measure)) is None:
                del steps[result.by]
                result.tokens_per_s.clear()
            else:
                result.tokens_per_s.append(run.data.total_batch_size / seconds)
        free(device)
        rates.append(device_module.measured_flops(device, getattr(torch, run.machine.dtype)))
    return pair, rates


def training_table(pairs: list[Pair], flops_per_token: float, peak: float) -> str:
    """GB is the peak of the memory."""
    rows = []
    for pair in pairs:
        row = [str(pair[0].batch), "on" if pair[0].compiled else "off"]
        for each in pair:
            row += ["does not fit", "", ""]
            if each.tokens_per_s:
                mfu = f"{100 * each.rate * flops_per_token / peak:.0f} %"
                memory = "needs CUDA" if each.peak_gb is None else f"{each.peak_gb:.1f}"
                row[-3:] = [f"{each.rate:,.0f}", mfu, memory]
        rounds = zip(*(each.tokens_per_s for each in pair), strict=False)
        ratios = [ours / theirs for ours, theirs in rounds]
        rows.append([*row, spread(ratios) if ratios else ""])
    columns = ["ours tok/s", "MFU", "GB", "plain tok/s", "MFU", "GB"]
    return table(["rows", "compile", *columns, "ours is faster"], rows)


def attention(size: Size, batch: int, world: World, data_dir: Path | None) -> dict[str, list[str]]:
    """Names of the kernels that ran for attention in a step of ours, compiled and not."""
    run, found = run_of(size, batch, world.device), {}
    tokens = batches_of(run, data_dir, world.device)[0]
    for compiled in (True, False):
        torch.compiler.reset()
        free(world.device)
        step = our_step(run, world, compiled)
        step(*tokens)
        names = attention_kernels(lambda step=step: step(*tokens), world.device)
        found["compiled" if compiled else "not compiled"] = names
    return found


def best(pairs: list[Pair], by: str) -> Training | None:
    """The fastest batch of a contender, compiled; None if none fits."""
    compiled = [each for pair in pairs for each in pair if each.by == by and each.compiled]
    fitting = [each for each in compiled if each.tokens_per_s]
    return max(fitting, key=lambda each: each.rate, default=None)


def targets(pairs: list[Pair], flops_per_token: float, peak: float) -> str:
    ours, theirs = best(pairs, "ours"), best(pairs, "plain")
    if ours is None or theirs is None:
        return "compiled, not one batch fits of both: no targets to compare with"
    mfu = ours.rate * flops_per_token / peak
    return (
        f"compiled, best batches: ours ({ours.batch} rows) has an MFU of {mfu:.1%}, and "
        f"{ours.rate / theirs.rate:.2f} times\nthe rate of the plain loop ({theirs.batch} rows); "
        f"wanted of an H200: {TARGET_MFU:.0%}, {TARGET_RATIO} times"
    )


def bench(size: Size, data_dir: Path | None, world: World) -> Iterator[Findings]:
    """Measures and prints; yields what is known whenever that is more."""
    device, cases = world.device, list(itertools.product(size.batches, (True, False)))
    run = run_of(size, size.batches[0], device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    flops = estimate.flops_per_token(run.model)
    found = Findings(name, torch.__version__, run.model.block_size, flops)
    for number, (rows, compiled) in enumerate(cases, 1):
        say(f"training, {number} of {len(cases)}: {rows} rows")
        pair, rates = train(size, rows, compiled, world, data_dir)
        for each in pair:
            rate = f"{each.rate:,.0f} tokens/s" if each.tokens_per_s else "does not fit"
            say(f"  {each.by}, {'compiled' if compiled else 'not compiled'}: {rate}")
        found.training.append(pair)
        found.matrix_flops += rates
        yield found
    peak = statistics.median(found.matrix_flops)
    tera = [
        f"{rate / 1e12:,.3g}" for rate in (peak, min(found.matrix_flops), max(found.matrix_flops))
    ]
    print(f"{name}, torch {found.torch}; rows of {found.block_size} tokens; the measured")
    print(
        f"{run.machine.dtype} rate is {tera[0]} TFLOP/s ({tera[1]} to {tera[2]}): MFU is of that\n"
    )
    print(training_table(found.training, flops, peak), end="\n\n")
    print(targets(found.training, flops, peak), flush=True)
    if fastest := best(found.training, "ours"):
        for part in beside_training(fastest, size, data_dir, world):
            found.parts.append(part)
            yield found
        clock = "CUDA events" if device.type == "cuda" else "the clock; events need CUDA"
        print(f"\nhead and update: {fastest.batch} rows, by {clock}\n")
        print(parts_table(found.parts), end="\n\n", flush=True)
        # Last, as what the profiler leaves behind could slow what follows.
        found.attention = attention(size, min(size.batches), world, data_dir)
        for how, names in found.attention.items():
            print(f"flash attention, {how}: {is_flash(names, device)}")
            print(*(f"  {name:.90}" for name in names), sep="\n")
        yield found


def beside_training(
    fastest: Training, size: Size, data_dir: Path | None, world: World
) -> Iterator[Part]:
    """What fits into the memory of it."""
    run = options_module.overlay(run_of(size, fastest.batch, world.device), {"compile": "on"})
    batch = batches_of(run, data_dir, world.device)[0]
    torch.compiler.reset()
    free(world.device)
    for measure in measurements(run, batch, world, size.effort):
        if part := if_it_fits(measure):
            say(part.name)
            yield part
        else:
            say("does not fit")
        free(world.device)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", nargs="+", type=int, help="rows at once")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="in a round")
    parser.add_argument("--data_dir", type=Path, help="a folder of shards; else random tokens")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on whatever there is")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --smoke tries the code without one")
    size = SMOKE if options.smoke else FULL
    rounds, steps = options.rounds or size.effort.rounds, options.steps or size.effort.steps
    effort = replace(size.effort, rounds=rounds, steps=steps)
    size = replace(size, batches=options.batches or size.batches, effort=effort)
    with rendezvous.join(run_module.MachineConfig()) as world:
        for found in bench(size, options.data_dir, world):
            if options.json is not None:  # whatever comes next, this is kept
                options.json.write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()

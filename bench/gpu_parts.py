"""What a run does beside its training step, and parts of the step: what `gpu.py` measures after it.

Ours and what it is compared to take turns; not a bench by itself.
"""

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import generate
import numpy as np
import plain
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from turns import spread

from gpt2 import model
from gpt2.checkpoint import metadata
from gpt2.checkpoint.async_save import Saver
from gpt2.config.run import CheckpointConfig, RunConfig
from gpt2.data import tokenizer
from gpt2.data.loader import MicroBatch
from gpt2.distributed.device import DeviceTimestamp
from gpt2.distributed.world import World
from gpt2.evaluation import choices
from gpt2.evaluation.choices import Question
from gpt2.optim.build import gradient_norm
from gpt2.train.replica import Replica


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    steps: int
    """in a round"""
    tasks: int
    """of HellaSwag"""
    new_tokens: int


@dataclass
class Part:
    """Something else, ours and what it is compared to, in each round."""

    name: str
    unit: str
    ours: list[float]
    theirs: list[float]

    def ratios(self) -> list[float]:
        """How many times as fast ours is."""
        rates = "/s" in self.unit
        pairs = zip(self.ours, self.theirs, strict=True)
        return [mine / other if rates else other / mine for mine, other in pairs]


def measurements(
    run: RunConfig, batch: MicroBatch, world: World, effort: Effort
) -> Iterator[Callable[[], Part]]:
    """What measures each of them; head and update for this batch."""
    replica = Replica(run, world)
    net = plain.GPT2(run.model).to(world.device)
    yield partial(head, replica, net, batch, effort)
    yield partial(optimizer, replica, net, effort)
    del net
    yield partial(hellaswag, replica, effort)
    yield partial(generation, run, effort, world.device)
    yield partial(checkpoints, replica, effort.rounds)


def in_turn(
    name: str, unit: str, rounds: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> Part:
    """Both ways, round after round; before that once, as the first calls are slow."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return Part(name, unit, [mine for mine, _ in pairs], [other for _, other in pairs])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Gives back what nobody uses any more, so that the other contender can have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """By events of the device: the median of several calls."""
    moments = []
    for _ in range(repeats):
        before = DeviceTimestamp(device)
        work()
        moments.append((before, DeviceTimestamp(device)))
    wait(device)
    return 1000 * statistics.median(after.since(before) for before, after in moments)


def head(replica: Replica, net: plain.GPT2, batch: MicroBatch, effort: Effort) -> Part:
    """Logits, loss and their gradients, compiled, of the same features."""
    tokens_BT, targets_BT = replica.world.to_device(*batch)
    positions_T = torch.arange(tokens_BT.size(1), device=tokens_BT.device)
    with torch.no_grad(), replica.autocast:
        features_BTD = replica.model.features(tokens_BT, positions_T, None)
    features_BTD.requires_grad_()

    def plain_loss(features_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = net.head(features_BTD)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def both_ways(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        with replica.autocast:
            loss = loss_of(features_BTD, targets_BT)
        (loss / targets_BT.numel()).backward()
        for part in (features_BTD, net.tokens.weight, replica.model.token_embedding.weight):
            part.grad = None

    ours, theirs = (
        partial(device_ms, partial(both_ways, torch.compile(way)), effort.steps, tokens_BT.device)
        for way in (replica.model.loss, plain_loss)
    )
    return in_turn("head and loss, both ways", "ms", effort.rounds, ours, theirs)


def optimizer(replica: Replica, net: plain.GPT2, effort: Effort) -> Part:
    """The update alone, clipping included."""
    device, adamw = replica.world.device, plain.adamw(net, fused=True)
    for part in (*replica.model.parameters(), *net.parameters()):
        part.grad = torch.full_like(part, 1e-3)

    def our_update() -> None:
        norm = gradient_norm(replica.model)
        replica.optimizer.clip_and_step(norm, 1.0, norm.isfinite())

    def plain_update() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()

    ours, theirs = (
        partial(device_ms, update, effort.steps, device) for update in (our_update, plain_update)
    )
    return in_turn("clipping and update", "ms", effort.rounds, ours, theirs)


def questions(count: int) -> list[Question]:
    """Random tokens, of lengths like HellaSwag's: padded rows have 2.5 times the tokens of packed
    ones, the real ones 2.33."""
    draw = np.random.default_rng(0)
    asked = []
    for _ in range(count):
        lengths = (draw.integers(16, 130), *draw.integers(6, 46, size=4))
        context, *endings = (
            tuple(draw.integers(0, tokenizer.VOCAB_SIZE, length).tolist()) for length in lengths
        )
        asked.append(Question(context, tuple(endings)))
    return asked


def hellaswag(replica: Replica, effort: Effort) -> Part:
    """Packed rows, and one task at a time in padded ones."""
    asked = questions(effort.tasks)

    def rate(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()  # losses come back as numbers: nothing is left to wait for
        return len(asked) / (time.perf_counter() - started)

    def padded() -> None:
        with replica.autocast:
            for question in asked:
                plain.ending_losses(replica.model, question)

    packed = partial(choices.ending_losses, replica.model, asked, replica.world, replica.autocast)
    ours, theirs = partial(rate, packed), partial(rate, padded)
    return in_turn("HellaSwag; padded, one by one", "tasks/s", effort.rounds, ours, theirs)


def generation(run: RunConfig, effort: Effort, device: torch.device) -> Part:
    """With the key-value cache and without it, in float32, as `gpt2 generate` computes."""
    torch.manual_seed(0)
    net = model.build(run.model).to(device).eval()
    generate.round_of(net, tokens=8, every=4)
    rounds = [generate.round_of(net, effort.new_tokens, every=4) for _ in range(effort.rounds)]
    cached, uncached = (list(column) for column in zip(*rounds, strict=True))
    return Part("generation; without cache", "tokens/s", cached, uncached)


def checkpoints(replica: Replica, rounds: int) -> Part:
    """Seconds for which training waits: for our copy, after the first; for torch.save."""
    device, numbers = replica.world.device, itertools.count(1)
    with tempfile.TemporaryDirectory(dir=".") as root:
        settings = CheckpointConfig(checkpoint_dir=Path(root), keep_last=2)
        saver = Saver(replica.world, settings, None, None)

        def begin() -> float:
            training = metadata.TrainingMetadata(next(numbers), 0, 0, 3.0, None, 1, "bench", "0")
            wait(device)
            started = time.perf_counter()
            saver.save_in_background(training, replica.state_dict)
            elapsed_s = time.perf_counter() - started
            saver.wait()
            return elapsed_s

        def save() -> float:
            wait(device)
            started = time.perf_counter()
            torch.save(replica.state_dict(), Path(root) / "plain")
            return time.perf_counter() - started

        part = in_turn("checkpoint; torch.save", "s", rounds, begin, save)
    return part


def attention_kernels(work: Callable[[], object], device: torch.device) -> list[str]:
    """Names of what the device runs for attention (on the CPU: of torch's operations)."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        work()
        wait(device)
    names = {event.key for event in seen.key_averages()}
    marks = ("flash", "fmha", "sdpa")
    return sorted(name for name in names if any(mark in name.lower() for mark in marks))


def is_flash(names: list[str], device: torch.device) -> str:
    if device.type != "cuda":
        return "needs CUDA"
    if not names:
        return "not known, no kernel of attention was seen"
    return "yes" if any("flash" in name.lower() for name in names) else "no"


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def parts_table(parts: list[Part]) -> str:
    rows = []
    for part in parts:
        medians = [statistics.median(side) for side in (part.ours, part.theirs)]
        shown = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in medians]
        rows.append([part.name, part.unit, *shown, spread(part.ratios())])
    return table(["what", "", "ours", "the other", "ours is faster"], rows)

"""Pieces of a step by themselves, and what a run does beside its steps: parts of `gpu_check.py`.

Not a bench by itself. Shapes: N tokens, D width, V vocabulary.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import gpu_machine
import gpu_step
import head
import numpy as np
import plain
import torch
import torch.nn.functional as F
from gpu_check import Setting
from gpu_report import Recorder
from gpu_speed import LEARNING_RATE
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt2.base.errors import is_out_of_memory
from gpt2.checkpoint import metadata, store
from gpt2.checkpoint.async_save import Saver
from gpt2.config import flops, presets
from gpt2.config.run import CheckpointConfig
from gpt2.data import tokenizer
from gpt2.evaluation import choices, hellaswag
from gpt2.evaluation.choices import Question
from gpt2.inference import generate
from gpt2.model.layers import window_mask
from gpt2.optim.build import gradient_norm
from gpt2.train import trainer
from gpt2.train.replica import Replica

MAX_SHARE = 0.03
"""of the time of a default run, for validation, HellaSwag and samples"""
MEASURED = ("HellaSwag", "validation", "samples")
TASKS_OF_HELLASWAG = 10_042


def evaluation(record: Recorder, setting: Setting) -> None:
    """What a default run does every 250 steps beside training, and its share of the time."""
    rows = gpu_machine.largest_rows(setting)
    run = gpu_machine.run_config(setting, rows, data_root=gpu_step.made_up(setting))
    defaults = presets.preset("gpt2-124m")
    spent_s: dict[str, float] = {}
    kind, asked = tasks(6 if setting.is_smoke else 1000)
    with gpu_machine.joined(run) as world:
        replica, batch = Replica(run, world), gpu_machine.batch_of(run)
        tokens = run.data.total_batch_size
        step_s = [
            gpu_step.seconds(lambda: trainer.train_step(replica, [batch], tokens, 0.0))
            for _ in range(6)
        ]
        training_s = statistics.median(step_s[1:]) * defaults.rows_per_step / rows * 250
        with record.attempt("HellaSwag"):
            spent_s["HellaSwag"] = hellaswag_passes(record, kind, asked, replica)
        evaluator = gpu_step.evaluator_of(setting, replica, eval_rows=4 * rows)
        with record.attempt("validation"):
            validate = partial(evaluator.validation_losses, 0, lambda: 0, False)
            passes = [gpu_step.seconds(validate) for _ in range(2)]
            spent_s["validation"] = passes[1] / (4 * rows) * defaults.eval_rows
            rates = [4 * rows * run.model.block_size / passed for passed in passes]
            record.add("validation", f"{rates[0]:,.0f}, then {rates[1]:,.0f} tokens/s")
        with record.attempt("samples"):
            sample = partial(evaluator.samples, 1, is_last=True)
            passes = [gpu_step.seconds(sample) for _ in range(2)]
            spent_s["samples"] = passes[1]
            record.add("samples", f"{passes[0]:.2f} s, then {passes[1]:.2f} s")
    if missing := [name for name in MEASURED if name not in spent_s]:
        record.add("share of a default run", f"not known without {' and '.join(missing)}")
        return
    share = sum(spent_s.values()) / (training_s + sum(spent_s.values()))
    on_cuda = torch.cuda.is_available()
    by_flops = flops_shares(asked)
    record.add(
        "share of a default run",
        f"{share:.1%}",
        f"at most {MAX_SHARE:.0%}" if on_cuda else "",
        share <= MAX_SHARE if on_cuda else None,
        details=[
            f"250 steps take {training_s:.1f} s",
            *(
                f"{name} {value:.1f} s, {value / training_s:.2%} of that; "
                f"by FLOPs {by_flops[name]:.2%}"
                for name, value in spent_s.items()
            ),
        ],
        spent_s=spent_s,
    )


def flops_shares(asked: list[Question]) -> dict[str, float]:
    """FLOPs of what a default run does beside training, as shares of those of the steps between.

    A forward pass has a third of a step's. Of HellaSwag's tasks, which are like `asked`, each text
    counts once, and logits only where an ending is predicted."""
    run = presets.preset("gpt2-124m").with_vocab_size(head.VOCABULARY)
    model, settings, sampling = run.model, run.evaluation, generate.IN_TRAINING
    forward, of_logits = flops.flops_per_token(model) / 3, 2 * model.embedding_rows * model.n_embd
    of_attention = 4 * model.n_layer * model.n_embd  # for each token that a token sees
    of_blocks = forward - of_logits - of_attention * model.block_size
    inner = statistics.mean(sum(map(len, each.endings)) - len(each.endings) for each in asked)
    tokens = inner + statistics.mean(len(each.context) for each in asked)
    task = tokens * (of_blocks + of_attention * tokens) + (inner + 1) * of_logits
    spent = {
        "HellaSwag": (TASKS_OF_HELLASWAG * task, settings.hellaswag_interval),
        "validation": (run.eval_rows * model.block_size * forward, settings.eval_interval),
        "samples": (
            sampling.num_samples * sampling.max_new_tokens * forward,
            settings.sample_interval,
        ),
    }
    step = 3 * forward * run.data.total_batch_size
    return {
        name: count / (step * (interval or math.inf)) for name, (count, interval) in spent.items()
    }


def tasks(count: int) -> tuple[str, list[Question]]:
    """About so many tasks of HellaSwag, evenly from the file, as its first ones are short; made-up
    ones if there is none. And which."""
    if hellaswag.find(None) is None:
        return "made-up", questions(count)
    every = hellaswag.load(None)
    return "real", [task.question for task in every[:: max(1, len(every) // count)]]


def hellaswag_passes(record: Recorder, kind: str, asked: list[Question], replica: Replica) -> float:
    """Seconds of a pass over all tasks, by the second one here; beside one task at a time."""
    few = max(2, len(asked) // 10)
    some = asked[:: len(asked) // few][:few]

    def packed() -> None:
        assert choices.ending_losses(replica.model, asked, replica.world, replica.autocast)

    def padded() -> None:
        with replica.autocast:
            for question in some:
                plain.ending_losses(replica.model, question)

    passes = [len(asked) / gpu_step.seconds(packed) for _ in range(2)]
    one_by_one = [few / gpu_step.seconds(padded) for _ in range(2)]
    found = f"{passes[0]:,.0f}, then {passes[1]:,.0f} tasks/s"
    record.add(f"HellaSwag, {kind} tasks", found, tasks_per_s=passes)
    on_cuda = torch.cuda.is_available()
    record.add(
        "the same, one padded task at a time",
        f"{one_by_one[0]:,.0f}, then {one_by_one[1]:,.0f} tasks/s",
        "slower" if on_cuda else "",
        one_by_one[1] < passes[1] if on_cuda else None,
    )
    return TASKS_OF_HELLASWAG / passes[1]


def questions(count: int) -> list[Question]:
    """Random tokens; texts and endings are on average as long as HellaSwag's."""
    draw = np.random.default_rng(0)
    asked = []
    for _ in range(count):
        lengths = (draw.integers(15, 77), *draw.integers(6, 53, size=4))
        context, *endings = (
            tuple(draw.integers(0, tokenizer.VOCAB_SIZE, length).tolist()) for length in lengths
        )
        asked.append(Question(context, tuple(endings)))
    return asked


def heads(record: Recorder, setting: Setting) -> None:
    """Ways to the loss of the head and its gradients, by time and memory. Training uses ours."""
    sizes = (16, 32) if setting.is_smoke else (16 * 1024, 64 * 1024)
    width = 32 if setting.is_smoke else 768
    ours = "ours, compiled" if gpu_machine.compiles(setting) else "ours"
    run, memory, times = gpu_machine.run_config(setting, 2), {}, {}
    ways = head.ways(compiled=gpu_machine.compiles(setting))
    if setting.is_smoke:
        ways.pop("the same, in chunks", None)  # minutes on a CPU
    for name, tokens in itertools.product(ways, sizes):
        with record.attempt(item := f"{name}, {tokens:,} tokens"), gpu_machine.joined(run):
            inputs = head_inputs(tokens, width, run.model.embedding_rows)
            work = in_autocast(ways[name], inputs)
            try:
                milliseconds = gpu_machine.device_ms(work, repeats=2 if setting.is_smoke else 5)
                memory[name, tokens] = gpu_machine.peak_gb(work)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                record.add(item, "does not fit into the memory")
            else:
                times[name, tokens] = statistics.median(milliseconds)
                size = gpu_machine.shown_gb(memory[name, tokens])
                found = f"{times[name, tokens]:.1f} ms, {size}"
                record.add(item, found, milliseconds=milliseconds)
            del inputs, work
        gpu_machine.free()
    small, large = (memory.get((ours, tokens)) for tokens in sizes)
    if small is not None and large is not None:
        gradient_gb = (sizes[1] - sizes[0]) * width * 2 / gpu_machine.GB
        record.add(
            "memory of ours grows by",
            f"{large - small:.2f} GB",
            f"about {gradient_gb:.2f} GB, the gradient of the features",
            large - small < 3 * gradient_gb,
        )
    largest = {name: time for (name, tokens), time in times.items() if tokens == sizes[1]}
    rivals = [time for name, time in largest.items() if name not in (ours, head.BOUND)]
    if torch.cuda.is_available() and ours in largest and rivals:
        slower = largest[ours] / min(rivals)
        record.add(
            "ours to the fastest other",
            f"{slower:.2f} times its time",
            "at most 1.05",
            slower <= 1.05,
        )


def head_inputs(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), weight (V, D) and targets (N)."""
    device = gpu_machine.own_device()
    features_ND = torch.randn(tokens, width, device=device, dtype=gpu_machine.own_dtype())
    weight_VD = 0.02 * torch.randn(vocabulary, width, device=device)
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    return features_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


def in_autocast(
    way: Callable[..., object], inputs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], None]:
    dtype = gpu_machine.own_dtype()

    def work() -> None:
        inputs[0].grad = inputs[1].grad = None
        with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not torch.float32):
            way(*inputs)

    return work


def windows(record: Recorder, setting: Setting) -> None:
    """Attention of a block, forward and backward: to the whole context, and to a quarter of it,
    with the mask of `--sliding_window` and by FlexAttention, which the package does not use."""
    rows, heads, length, width = (1, 2, 64, 16) if setting.is_smoke else (16, 12, 1024, 64)
    window, device = length // 4, gpu_machine.own_device()
    torch.manual_seed(0)
    shape, dtype = (3, rows, heads, length, width), torch.bfloat16
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    mask = window_mask(torch.arange(length, device=device), None, window)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "whole context": partial(F.scaled_dot_product_attention, is_causal=True),
        "window, mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
    }
    if gpu_machine.compiles(setting) and device.type == "cuda":  # no backward on CPUs
        blocks = create_block_mask(
            lambda _b, _h, t, s: (t >= s) & (t - s < window),
            None,
            None,
            length,
            length,
            str(device),
        )
        ways["window, FlexAttention"] = partial(torch.compile(flex_attention), block_mask=blocks)
    gradients: dict[str, Tensor] = {}
    for name, way in ways.items():
        with record.attempt(name):

            def attend(way: Callable[[Tensor, Tensor, Tensor], Tensor] = way) -> Tensor:
                (gradient,) = torch.autograd.grad(way(*qkv).square().sum(), qkv)
                return gradient

            gradients[name] = attend()
            times = gpu_machine.device_ms(attend, repeats=2 if setting.is_smoke else 20)
            record.add(name, f"{statistics.median(times):.2f} ms", milliseconds=times)
    if "window, FlexAttention" in gradients:
        ours, theirs = gradients["window, mask"].float(), gradients["window, FlexAttention"].float()
        apart = float((ours - theirs).norm() / ours.norm())
        record.add("gradients of the two apart", f"{apart:.1e}", "at most 0.02", apart <= 0.02)
    else:
        record.add("window, FlexAttention", "needs CUDA and torch.compile")


def optimizers(record: Recorder, setting: Setting) -> None:
    """The update alone, clipping included; and torch's fused AdamW with torch's clipping."""
    repeats, found = 2 if setting.is_smoke else 20, {}
    for name in ("adamw", "muon"):
        run = gpu_machine.run_config(setting, 2, compile="off", optimizer=name)
        with record.attempt(name), gpu_machine.joined(run) as world:
            replica = Replica(run, world)
            set_gradients(replica.model)

            def update(replica: Replica = replica) -> None:
                norm = gradient_norm(replica.model)
                replica.optimizer.clip_and_step(norm, 1.0, norm.isfinite())

            found[name] = gpu_machine.device_ms(update, repeats)
            extra = gpu_machine.shown_gb(gpu_machine.peak_gb(update))
            middle = statistics.median(found[name])
            record.add(
                f"{name}, update", f"{middle:.2f} ms, more memory: {extra}", update_ms=found[name]
            )
            del replica, update
        gpu_machine.free()
    net = plain.GPT2(gpu_machine.run_config(setting, 2).model).to(gpu_machine.own_device())
    adamw = plain.adamw(net, fused=True)
    set_gradients(net)

    def plain_update() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()

    theirs = statistics.median(gpu_machine.device_ms(plain_update, repeats))
    on_cuda = torch.cuda.is_available() and "adamw" in found
    record.add(
        "torch's fused AdamW and clipping",
        f"{theirs:.2f} ms",
        "not faster than ours" if on_cuda else "",
        theirs >= 0.95 * statistics.median(found["adamw"]) if on_cuda else None,
    )


def set_gradients(net: torch.nn.Module) -> None:
    for part in net.parameters():
        part.grad = torch.full_like(part, 1e-3)


def checkpoint(record: Recorder, setting: Setting) -> None:
    """How long a save holds training up, beside torch.save; and whether what is loaded is equal."""
    run = gpu_machine.run_config(setting, 2, compile="off")
    folder = setting.folder / "checkpoint"
    folder.mkdir()
    with gpu_machine.joined(run) as world:
        replica = Replica(run, world)
        batch = gpu_machine.batch_of(run)
        trainer.train_step(replica, [batch], run.data.total_batch_size, LEARNING_RATE)
        saver = Saver(world, CheckpointConfig(checkpoint_dir=folder, keep_last=2), None, None)
        blocked, written = zip(*(saves(saver, replica, 2 if setting.is_smoke else 4)), strict=True)
        started = time.perf_counter()
        torch.save(replica.state_dict(), folder / "plain")
        plain_s = time.perf_counter() - started
        size_gb = (folder / "plain").stat().st_size / gpu_machine.GB
        record.add(
            "a save blocks for",
            f"{blocked[0]:.3f} s, then {statistics.median(blocked[1:]):.3f} s",
            f"less than torch.save, {plain_s:.3f} s" if torch.cuda.is_available() else "",
            statistics.median(blocked[1:]) < plain_s if torch.cuda.is_available() else None,
        )
        record.add("written after", f"{statistics.median(written):.2f} s, {size_gb:.2f} GB")
        load(record, folder, replica, size_gb)


def saves(saver: Saver, replica: Replica, count: int) -> Iterable[tuple[float, float]]:
    """Seconds for which each save blocks, and seconds after which it is on the disk."""
    for number in itertools.islice(itertools.count(1), count):
        training = metadata.TrainingMetadata(number, 0, 0, 3.0, None, 1, "bench", "0")
        gpu_machine.wait()
        started = time.perf_counter()
        saver.save_in_background(training, replica.state_dict)
        blocked_s = time.perf_counter() - started
        saver.wait()
        yield blocked_s, time.perf_counter() - started


def load(record: Recorder, folder: Path, replica: Replica, size_gb: float) -> None:
    """The newest checkpoint, into another replica."""
    newest = store.find(folder, "latest")
    assert newest is not None
    other = Replica(replica.config, replica.world)
    started = time.perf_counter()
    state = store.load(newest)
    loaded_s = time.perf_counter() - started
    other.load_state_dict(state, step=1)
    gpu_machine.wait()
    whole_s = time.perf_counter() - started
    record.add("verified and loaded", f"{loaded_s:.2f} s; on the device after {whole_s:.2f} s")
    rate = size_gb / whole_s
    pairs = zip(replica.model.parameters(), other.model.parameters(), strict=True)
    is_equal = all(torch.equal(one, another) for one, another in pairs)
    record.add("weights after loading", "equal" if is_equal else "DIFFERENT", "equal", is_equal)
    record.add("rate of loading", f"{rate:.2f} GB/s")

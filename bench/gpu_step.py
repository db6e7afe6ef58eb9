"""What happens within a training step: a part of `gpu_check.py`, not a bench by itself."""

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import gpu_machine
import torch
from gpu_check import Setting
from gpu_report import Recorder
from gpu_speed import LEARNING_RATE
from torch.profiler import ProfilerActivity, profile

from gpt2.config import options
from gpt2.data import training_data
from gpt2.data.loader import MicroBatch
from gpt2.distributed.gpu_usage import GpuUsage
from gpt2.train import trainer
from gpt2.train.evaluator import Evaluator
from gpt2.train.replica import Replica

MAX_GRAPHS = 4
KINDS = {
    "compiled by Inductor": ("triton_",),  # named after all that it fuses
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm"),
    "optimiser and norm": ("multi_tensor", "foreach", "adam"),
    "copies": ("memcpy", "memset", "copy_"),
}
"""words in the names of kernels; the first kind with a word in the name counts"""


class TransferHook:
    """Stands where a world measures its GPU, which a training step does right before its transfer
    to the host: from there on, the host may wait."""

    def __init__(self) -> None:
        self.reached_at = 0.0

    def __call__(self) -> GpuUsage:
        self.reached_at = time.perf_counter()
        allow_waits()
        return GpuUsage()


def allow_waits() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def step(record: Recorder, setting: Setting) -> None:
    """All about one compiled step of 64 rows, or of what fits, in one process."""
    rows = gpu_machine.largest_rows(setting)
    run = gpu_machine.run_config(setting, rows, compile="on", data_root=made_up(setting))
    if not gpu_machine.compiles(setting):  # the same graphs, without Inductor
        torch.compile = partial(torch.compile, backend="aot_eager")
    with gpu_machine.joined(run) as world:
        hook = TransferHook()
        replica = Replica(run, replace(world, measure_gpu=hook))
        batch = gpu_machine.batch_of(run)

        def one_step() -> None:
            trainer.train_step(replica, [batch], run.data.total_batch_size, LEARNING_RATE)

        for _ in range(3):
            one_step()
        gpu_machine.wait()
        with record.attempt("host time of a step"):
            step_s = host_time(record, one_step, hook, repeats=2 if setting.is_smoke else 10)
        with record.attempt("waits before the transfer"):
            waits(record, replica, batch)
        with record.attempt("graphs"):
            graphs(record, setting, replica, batch, one_step)
        with record.attempt("kernels"):
            kernels(record, one_step, step_s)


def made_up(setting: Setting) -> str:
    return str(gpu_machine.made_up_data(setting))


def host_time(
    record: Recorder, one_step: Callable[[], None], hook: TransferHook, repeats: int
) -> float:
    """Seconds of a step. The host must be ready before the device is, or the device waits."""
    host_ms, step_ms = [], []
    for _ in range(repeats):
        gpu_machine.wait()
        started = time.perf_counter()
        one_step()
        step_ms.append(1000 * (time.perf_counter() - started))
        host_ms.append(1000 * (hook.reached_at - started))
    host, whole = statistics.median(host_ms), statistics.median(step_ms)
    on_cuda = torch.cuda.is_available()
    record.add(
        "host time of a step",
        f"{host:.1f} of {whole:.1f} ms",
        "less than half of the step" if on_cuda else "",
        host < whole / 2 if on_cuda else None,
        host_ms=host_ms,
        step_ms=step_ms,
    )
    return whole / 1000


def waits(record: Recorder, replica: Replica, batch: MicroBatch) -> None:
    """Whether the host waits for the device in a step of two micro-batches, up to its transfer."""
    predicted = "none"
    if not torch.cuda.is_available():
        record.add("waits before the transfer", "needs CUDA", predicted)
        return
    tokens = 2 * replica.config.data.total_batch_size
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(replica, [batch, batch], tokens, LEARNING_RATE)
    except RuntimeError as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in where]
        found = f"one: {str(error).splitlines()[0]}"
        record.add("waits before the transfer", found, predicted, is_ok=False, details=ours)
    else:
        record.add("waits before the transfer", "none", predicted, is_ok=True)
    finally:
        allow_waits()
        replica.optimizer.zero_grad(set_to_none=True)


def graphs(
    record: Recorder,
    setting: Setting,
    replica: Replica,
    batch: MicroBatch,
    one_step: Callable[[], None],
) -> None:
    """What is compiled up to here and by a validation with an odd last batch, and whether a step is
    as fast after it."""
    from torch._dynamo.utils import counters, get_compilation_metrics  # compiled already

    repeats = 2 if setting.is_smoke else 10
    before = [seconds(one_step) for _ in range(repeats)]
    odd = 2 * replica.mini_batch_size + 1  # rows: two batches, and one of a single row
    evaluator = evaluator_of(setting, replica, eval_rows=odd)
    assert evaluator.validation_losses(0, lambda: 0, False) is not None
    one_step()
    after = [seconds(one_step) for _ in range(repeats)]
    compiled = counters["stats"]["unique_graphs"]
    record.add(
        "graphs, validation included",
        str(compiled),
        f"at most {MAX_GRAPHS}",
        compiled <= MAX_GRAPHS,
    )
    breaks = {str(reason): count for reason, count in counters["graph_break"].items()}
    record.add("graph breaks", str(len(breaks)), "0", not breaks, details=list(breaks))
    reasons = [getattr(each, "recompile_reason", None) for each in get_compilation_metrics()]
    listed = [reason.splitlines()[0] for reason in reasons if reason]
    record.add("recompilations", str(len(listed)), details=listed)
    ratio = statistics.median(after) / statistics.median(before)
    on_cuda = torch.cuda.is_available()
    record.add(
        "step after validation",
        f"{ratio:.2f} times the time before",
        "at most 1.05" if on_cuda else "",
        ratio <= 1.05 if on_cuda else None,
        before_s=before,
        after_s=after,
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    gpu_machine.wait()
    return time.perf_counter() - started


def kernels(record: Recorder, one_step: Callable[[], None], step_s: float) -> None:
    """Names of what attention runs, and where the device's time goes."""
    on_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        one_step()
        gpu_machine.wait()
    events = [event for event in seen.key_averages() if not event.is_user_annotation]
    times_ms = {
        event.key: (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1000
        for event in events
        if not on_cuda or event.device_type.name == "CUDA"
    }
    names = sorted(name for name in times_ms if kind_of(name) == "attention")
    is_flash = any("flash" in name.lower() for name in names)
    found = "flash" if is_flash else "another kernel" if names else "no kernel was recognised"
    record.add("attention", found, "flash", is_flash, details=names)
    total_ms = sum(times_ms.values()) or 1.0
    shares: dict[str, float] = {}
    for name, spent_ms in times_ms.items():
        kind = kind_of(name)
        shares[kind] = shares.get(kind, 0.0) + spent_ms / total_ms
    for kind, share in sorted(shares.items(), key=lambda each: -each[1]):
        record.add(f"device time: {kind}", f"{share:.1%}")
    longest = sorted(times_ms.items(), key=lambda each: -each[1])[:12]
    record.add(
        "device busy",
        f"{total_ms / 1000 / step_s:.0%} of a step" if on_cuda else "needs CUDA",
        "at least 97%" if on_cuda else "",
        total_ms / 1000 >= 0.97 * step_s if on_cuda else None,
        details=[f"{spent_ms:8.2f} ms  {name:.100}" for name, spent_ms in longest],
        times_ms=times_ms,
    )


def kind_of(kernel: str) -> str:
    """A kind in KINDS, or `other`."""
    name = kernel.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(map(name.__contains__, words))), "other"
    )


def evaluator_of(setting: Setting, replica: Replica, **changes: object) -> Evaluator:
    """Without HellaSwag, whose tasks are made up here."""
    given = {"hellaswag_interval": None, "sample_interval": 1, **changes}
    config = options.overlay(replica.config, given)
    data = training_data.load({training_data.UNNAMED: made_up(setting)})
    return Evaluator(config, replica.world, replica, data)

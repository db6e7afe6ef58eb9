"""Our training step beside a plain compiled loop: a part of `gpu_check.py`, not a bench by itself.

Both have a process of their own, compile at the same time, and take turns.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_machine
import plain
import torch
from gpu_check import Setting
from gpu_report import Recorder
from torch import Tensor
from turns import Contender, Timed, serve, spread

from gpt2.config import flops, memory
from gpt2.config.run import RunConfig
from gpt2.train import trainer
from gpt2.train.replica import Replica
from train import timed

LEARNING_RATE = 6e-4
WANTED_MFU, WANTED_RATIO = 0.55, 1.25
"""on an H200: of the measured matrix rate, and of the plain compiled loop"""
NAMES = ("ours", "plain")
MOST_ROWS = 64


def started(name: str, rows: int, setting: Setting) -> Contender:
    """A contender that has begun its first step, for which it compiles."""
    command = [sys.executable, __file__, name, str(rows), str(setting.folder)]
    if setting.is_smoke:
        command.append("--smoke")
    contender = Contender.start(name, command, quiet=False)
    contender.begin(1)
    return contender


def speed(record: Recorder, setting: Setting, rows: int) -> None:
    """Each contender that fails, as for lack of memory, is a finding."""
    rows = rows_for_both(record, setting, 2 if setting.is_smoke else rows)
    if not rows:
        return
    rounds, steps = (2, 2) if setting.is_smoke else (5, 10)
    contenders = {name: started(name, rows, setting) for name in NAMES}
    for name, contender in list(contenders.items()):
        try:
            first_s = contender.finish()
        except SystemExit as error:
            record.add(f"{name}, first step", str(error), "works", is_ok=False)
            del contenders[name]
        else:
            record.add(f"{name}, first step", f"{first_s:.1f} s", first_s=first_s)
    rates: list[float] = []
    for _ in range(rounds):
        for contender in contenders.values():
            contender.rounds.append(contender.run(steps))
        rates.append(gpu_machine.matrix_flops())
    for contender in contenders.values():
        contender.end()
    record_rates(record, setting, rows, contenders, rates)


def rows_for_both(record: Recorder, setting: Setting, rows: int) -> int:
    """As many rows as the memory is enough for, of both contenders. If these are fewer, that is a
    finding, and only the part with MOST_ROWS goes on with them: for the others it returns 0."""
    if not torch.cuda.is_available():
        return rows
    run, found = gpu_machine.run_config(setting, rows), rows
    free_bytes, _ = torch.cuda.mem_get_info()
    # The plain loop takes more than ours.
    while found and 2.5 * memory.step_bytes(run.model, found, gpu_machine.how(run)) > free_bytes:
        found //= 2
    if found == rows:
        return rows
    is_left_out = rows < MOST_ROWS or not found
    what = "left out" if is_left_out else f"with {found} rows"
    record.add("both at once", f"{what}: more do not fit into {free_bytes / gpu_machine.GB:.0f} GB")
    return 0 if is_left_out else found


def record_rates(
    record: Recorder,
    setting: Setting,
    rows: int,
    contenders: dict[str, Contender],
    matrix_rates: list[float],
) -> None:
    run = gpu_machine.run_config(setting, rows)
    tokens, per_token = run.data.total_batch_size, flops.flops_per_token(run.model)
    matrix_rate = statistics.median(matrix_rates)
    record.add("matrix rate between them", f"{matrix_rate / 1e12:,.3g} TFLOP/s", rates=matrix_rates)
    is_judged = rows == MOST_ROWS and "H200" in gpu_machine.device_name()
    for name, contender in contenders.items():
        seconds = statistics.median(contender.rounds)
        mfu = per_token * tokens / seconds / matrix_rate
        record.add(f"{name}, tokens/s", f"{tokens / seconds:,.0f}", rounds_s=contender.rounds)
        wanted = name == "ours" and is_judged
        record.add(
            f"{name}, MFU of that rate",
            f"{mfu:.1%}",
            f"at least {WANTED_MFU:.0%}" if wanted else "",
            mfu >= WANTED_MFU if wanted else None,
        )
        record_memory(record, run, name, contender.peak_gb)
    if len(contenders) == len(NAMES):
        pairs = zip(contenders["ours"].rounds, contenders["plain"].rounds, strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        record.add(
            "ours is faster, times",
            spread(ratios),
            f"at least {WANTED_RATIO}" if is_judged else "",
            statistics.median(ratios) >= WANTED_RATIO if is_judged else None,
            ratios=ratios,
        )


def record_memory(record: Recorder, run: RunConfig, name: str, peak_gb: float) -> None:
    """Of the steps, without what compiling took; ours beside the formula."""
    if not torch.cuda.is_available():
        record.add(f"{name}, peak memory", "needs CUDA")
        return
    how = gpu_machine.how(run)
    expected_gb = memory.step_bytes(run.model, run.rows_per_step, how) / gpu_machine.GB
    is_ours = name == "ours"
    record.add(
        f"{name}, peak memory",
        gpu_machine.shown_gb(peak_gb),
        f"{expected_gb:.2f} GB, within 10 %" if is_ours else "",
        abs(peak_gb / expected_gb - 1) <= 0.1 if is_ours else None,
        peak_gb=peak_gb,
    )


def compile_ahead(record: Recorder, setting: Setting, *sizes: int) -> None:
    """Fills the cache of compiled kernels, so that later parts begin at once."""
    if not gpu_machine.compiles(setting):
        record.add("compiled ahead", "nothing is compiled in a smoke test, or without a compiler")
        return
    sizes = tuple(rows for rows in sizes if rows_for_both(record, setting, rows))
    contenders = [started(name, rows, setting) for rows in sizes for name in NAMES]
    names = [f"{name}, {rows} rows" for rows in sizes for name in NAMES]
    for name, contender in zip(names, contenders, strict=True):
        try:
            record.add(f"{name}, first step", f"{contender.finish():.1f} s")
        except SystemExit as error:
            record.add(f"{name}, first step", str(error), "works", is_ok=False)
        else:
            contender.end()


def prepare(name: str, rows: int, setting: Setting) -> Timed:
    """What times the steps of a contender; its peak memory is that of the steps timed last."""
    run, device = gpu_machine.run_config(setting, rows), gpu_machine.own_device()
    inputs_BT, targets_BT = gpu_machine.batch_of(run)
    step: Callable[[Tensor, Tensor], object]
    if name == "ours":
        with gpu_machine.joined(run) as world:
            replica = Replica(run, world)
        tokens = run.data.total_batch_size
        step = lambda *batch: trainer.train_step(replica, [batch], tokens, LEARNING_RATE)  # noqa: E731
    else:
        is_compiled = gpu_machine.compiles(setting)
        step = plain.plain(
            run.model, device, gpu_machine.own_dtype(), fused=True, compiled=is_compiled
        )
    times = timed(step, inputs_BT, targets_BT)

    def steps_alone(steps: int) -> list[float]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return times(steps)

    return steps_alone


def main() -> None:
    parser = argparse.ArgumentParser(description="A contender, started by `speed`.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("rows", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    setting = Setting(options.smoke, options.folder)
    serve(lambda: prepare(options.name, options.rows, setting))


if __name__ == "__main__":
    main()

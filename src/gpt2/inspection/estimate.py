"""How long a run will take: `gpt2 estimate`."""

import statistics
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2.base import addresses
from gpt2.base.errors import DataError
from gpt2.base.text import counted, one_line, table
from gpt2.config import flops, memory, peak_rates
from gpt2.config.flops import duration
from gpt2.config.run import RunConfig
from gpt2.data.sampler import Sampler
from gpt2.inspection.run_status import Run
from gpt2.metrics import log_reader, records

# Without a run and without data, these are assumed.
ASSUMED_GPU, ASSUMED_MFU = "A100", 0.4
ASSUMED_FLOPS = peak_rates.PEAK_FLOPS["A100-SXM4-40GB"]
ASSUMED_TOKENS, ASSUMED_SHARDS = 9_900_000_000, 99
DEVICE_COUNTS = (1, 2, 4, 8)
SHOWN_EPOCHS = 10


@dataclass(frozen=True)
class Forecast:
    """How far a run is and how fast it goes."""

    sampler: Sampler
    step: int
    total_steps: int
    row_s: float
    """seconds per row of a step"""
    tokens_per_s: float
    devices: int
    checkpoint_interval: int | None

    @property
    def left_s(self) -> float:
        return self.seconds_until(self.total_steps)

    @property
    def whole_s(self) -> float:
        return self.sampler.ramp.rows_before(self.total_steps) * self.row_s

    def seconds_until(self, step: int) -> float:
        """Seconds from now to `step`."""
        ramp = self.sampler.ramp
        return (ramp.rows_before(step) - ramp.rows_before(self.step)) * self.row_s


def print_run_forecast(run: Run, out: Console) -> None:
    """Prints progress, speed, time left, milestones, and the time on other numbers of devices."""
    current, plan = run.status, run.status.plan
    steps = log_reader.read_steps(Path(plan.log_file), plan.run_name)
    step = max(current.step, steps[-1].step if steps else 0)
    devices = f"{plan.world_size} × {plan.device}"
    age = duration(time.time() - current.time)
    reason = f" ({current.reason})" if current.reason else ""
    words = f"Run {plan.run_name} on {devices}: {run.state}{reason}, status written {age} ago"
    out.print(one_line(words))
    ramp = plan.ramp
    rows = ramp.rows_before(step)
    out.print(
        f"Progress: step {step:,} of {plan.total_steps:,} ({step / plan.total_steps:.1%}), "
        f"epoch {rows / plan.rows_per_epoch:.2f}, {rows * plan.block_size:,} tokens"
    )
    recent = steps[-records.RECENT_STEPS :]
    if not recent:
        out.print("No step is logged yet; run this again when the log has its first steps")
        return
    step_s = statistics.median(item.elapsed_s for item in recent)
    forecast = Forecast(
        sampler=Sampler(
            (plan.rows_per_epoch,), plan.rows_per_step, seed=0, ramp_phases=ramp.phases
        ),
        step=step,
        total_steps=plan.total_steps,
        row_s=statistics.median(item.elapsed_s / ramp.rows_of(item.step - 1) for item in recent),
        tokens_per_s=statistics.median(item.tokens_per_s for item in recent),
        devices=plan.world_size,
        checkpoint_interval=plan.checkpoint_interval,
    )
    out.print(
        f"Recent: {step_s:.2f} s per step, {forecast.tokens_per_s:,.0f} tokens/s "
        f"(median of {counted(len(recent), 'step')}; validation and saving not included)"
    )
    _print_forecast(forecast, "GPU" if plan.device == "cuda" else "CPU", "this run", out)


def print_assumed_forecast(
    config: RunConfig, tokens_per_s: float | None, gpus: int, out: Console
) -> None:
    """Prints the forecast of a run that has not begun, and what it assumes."""
    from gpt2.train import dataset  # imports torch

    try:
        data = dataset.find(config)
        config = dataset.with_vocab_size(config, data)
        tokens, shards = data.tokens("train"), data.shard_count("train")
        source = f"the data in {' '.join(addresses.public(config.data.data_root))}"
    except DataError:
        tokens, shards = ASSUMED_TOKENS, ASSUMED_SHARDS
        source = "99 shards of 100 M tokens, as FineWeb-Edu sample-10BT gives"
    if tokens_per_s is None:
        tokens_per_s = ASSUMED_MFU * ASSUMED_FLOPS * gpus / flops.flops_per_token(config.model)
        speed = (
            f"{tokens_per_s:,.0f} tokens/s: {gpus} × {ASSUMED_GPU} at {ASSUMED_MFU:.0%} MFU, "
            "whatever GPUs this machine has;\n"
            f"         --gpus N is for N {ASSUMED_GPU}s, --tokens_per_sec N for the speed of other "
            "GPUs, as a run logs it"
        )
    else:
        speed = f"{tokens_per_s:,.0f} tokens/s on {counted(gpus, 'GPU')}, as given"
    rows = (tokens // shards - 1) // config.model.block_size
    sampler = config.sampler({"": (rows,) * shards})
    out.print(f"An estimate for --preset {config.preset}. Assumed:")
    out.print(f"  data   {tokens:,} training tokens: {source}")
    out.print(f"  speed  {speed}")
    forecast = Forecast(
        sampler=sampler,
        step=0,
        total_steps=config.total_steps(sampler.rows_per_epoch),
        row_s=config.model.block_size / tokens_per_s,
        tokens_per_s=tokens_per_s,
        devices=gpus,
        checkpoint_interval=config.checkpoint.checkpoint_interval,
    )
    _print_forecast(forecast, "GPU", "assumed", out)
    out.print(_cards(config, gpus))


def _print_forecast(forecast: Forecast, device: str, own: str, out: Console) -> None:
    """`own` says what the forecast's own number of devices is."""
    if forecast.step >= forecast.total_steps:
        out.print("The run is complete.")
    else:
        out.print(f"Left: {duration(forecast.left_s)}, finish {_date(forecast.left_s)}")
        out.print(_milestones(forecast))
    out.print(_scaling(forecast, device, own))


def _milestones(forecast: Forecast) -> Table:
    listing = table("Milestones", "step", "what", "in", "date")
    for step, what in _milestone_rows(forecast):
        left_s = forecast.seconds_until(step)
        listing.add_row(f"{step:,}", what, duration(left_s), _date(left_s))
    return listing


def _milestone_rows(forecast: Forecast) -> list[tuple[int, str]]:
    sampler, step_now, end = forecast.sampler, forecast.step, forecast.total_steps
    rows = []
    every = forecast.checkpoint_interval
    if every and (due := (step_now // every + 1) * every) < end:
        rows.append((due, "next checkpoint"))
    epochs = range(sampler.epoch_at(step_now) + 1, sampler.epoch_at(end - 1) + 1)
    rows += [
        (sampler.first_step_of(epoch), f"epoch {epoch} begins") for epoch in epochs[:SHOWN_EPOCHS]
    ]
    if hidden := epochs[SHOWN_EPOCHS:]:
        last = sampler.first_step_of(hidden[-1])
        rows.append((last, f"… the last of {hidden[-1] - hidden[0] + 1} further epochs"))
    return [*sorted(rows), (end, "end of the run")]


def _scaling(forecast: Forecast, device: str, own: str) -> Table:
    listing = table(
        f"On other numbers of {device}s (estimate: linear from {forecast.devices})",
        f"{device}s",
        "tokens/s",
        "whole run",
        "left",
        "finish",
    )
    for count in DEVICE_COUNTS:
        factor = forecast.devices / count
        left_s = max(0.0, forecast.left_s) * factor
        listing.add_row(
            f"{count}{f' ({own})' if count == forecast.devices else ''}",
            f"{forecast.tokens_per_s / factor:,.0f}",
            duration(forecast.whole_s * factor),
            duration(left_s),
            _date(left_s) if left_s else "-",
        )
    return listing


def _cards(config: RunConfig, gpus: int) -> Table:
    """What fits into GPUs of several sizes."""
    where = "the GPU" if gpus == 1 else f"each of {gpus} GPUs"
    listing = table(
        f"Memory of {where} (estimate; a run tries it before it trains)",
        *("memory", "rows at once", "micro-batches a step", "used"),
    )
    how = memory.computation(config, gpus)
    for size in memory.CARDS_GB:
        if rows := memory.rows_on_card(config, size, gpus):
            used = memory.step_bytes(config.model, rows, how) + memory.overhead_bytes(gpus)
            steps = config.grad_accum_steps(gpus, rows)
            listing.add_row(f"{size} GB", str(rows), str(steps), f"{used / 1e9:.1f} GB")
        else:
            listing.add_row(f"{size} GB", "does not fit", "-", "-")
    return listing


def _date(left_s: float) -> str:
    try:
        return f"{datetime.now() + timedelta(seconds=left_s):%a %Y-%m-%d %H:%M}"
    except OverflowError:
        return "after the year 9999"

"""The state of an experiment as text: a progress bar with a row for each slot, or one line."""

from collections.abc import Sequence, Set

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2.base.text import counted, fitted, four_digits, one_line, shortened
from gpt2.config.flops import duration
from gpt2.experiments.progress.state import ExperimentState, SlotState, is_finite_number

BAR_CELLS, BAR_STEP = 40, 8
"""longest bar, and the step by which it is shortened so that it does not change with every digit"""
COLUMNS = ("slot", "job", "step", "loss", "tokens/s", "left", "reported", "val loss", "for")
"""columns of the slot table; on a narrow terminal the last ones are left out first"""
STANDARD_METRICS = ("step", "total_steps", "loss", "tokens_per_s", "val_loss")
MAX_OTHER_METRICS = 3
"""metrics of other names shown per slot"""


def summary(state: ExperimentState, now: float) -> str:
    """`20 of 100 done, 1 failed | 3.2 jobs/s | 25s left`."""
    counts = [f"{state.done:,} of {state.total:,} done", *_exceptional_counts(state)]
    parts = [", ".join(counts)]
    if speed := state.jobs_per_s(now):
        parts.append(_speed(speed))
    if state.is_over:
        parts.append(duration(now - state.began))
    elif (left := state.left_s(now)) is not None:
        parts.append(f"{duration(left)} left")
    return " | ".join(parts)


def slot_line(slot: SlotState, now: float) -> str:
    """`gpu0 lr=0.001,seed=3: step 1,200 of 5,000 | loss 3.4451 | 55,120 tokens/s | 1h 05m left`."""
    step, total = slot.metric("step"), slot.metric("total_steps")
    parts = []
    if step is not None:
        parts.append(f"step {step:,.0f}" + (f" of {total:,.0f}" if total else ""))
    for name in ("loss", "val_loss"):
        if (value := slot.metric(name)) is not None:
            parts.append(f"{name} {value:.4f}")
    if (speed := slot.metric("tokens_per_s")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    parts += [others] if (others := _other_metrics(slot)) else []
    left = slot.left_s(now)
    parts.append(f"{duration(now - slot.began)}{attempt_suffix(slot.attempt)}")
    parts += [f"{duration(left)} left"] if left is not None else []
    return f"{slot.slot} {one_line(slot.job or 'idle')}: {' | '.join(parts)}"


def attempt_suffix(number: int) -> str:
    """` (attempt 2)`, or nothing for the first attempt."""
    return f" (attempt {number})" if number > 1 else ""


def render(state: ExperimentState, now: float, width: int, columns: Set[str]) -> RenderableType:
    """The live view for a terminal of this width, with these columns in the slot table."""
    parts: list[RenderableType] = [_header(state, now, width)]
    if not state.is_over:
        parts.append(slots_table(state, now, width, columns))
    elif left := state.total - state.ended:
        words = f" Stopped: {left:,} of {counted(state.total, 'job')} are left to run"
        parts.append(Text(words, style="yellow"))
    if state.state == "stopping":
        parts.append(Text(f" Stopping: {state.reason}", style="yellow"))
    return Group(*parts)


def columns_of(state: ExperimentState, now: float) -> set[str]:
    """The columns for which at least one slot has a value."""
    return {name for slot in state.slots for name in _cells(slot, now)}


def slots_table(state: ExperimentState, now: float, width: int, columns: Set[str]) -> Table:
    """A row for each slot."""
    rows = [_cells(slot, now) for slot in state.slots]
    names = [name for name in COLUMNS if name in columns or name in ("slot", "job")]
    cells = [[row.get(name, Text()) for name in names] for row in rows]
    return fitted("", names, cells, width, elastic="job", least=16)


def _header(state: ExperimentState, now: float, width: int) -> Table:
    """One line: kind, progress bar, counts, time."""
    running = sum(slot.fraction for slot in state.slots)
    texts = [
        Text(f"{state.done:,}/{state.total:,}", style="bold"),
        *(
            Text(words, style="bold red" if words.endswith("failed") else "yellow")
            for words in _exceptional_counts(state)
        ),
    ]
    speed, left = state.jobs_per_s(now), state.left_s(now)
    texts += [Text(_speed(speed), style="cyan")] if speed and not state.is_over else []
    texts.append(Text(duration(now - state.began), style="dim"))
    texts += [Text(f"{duration(left)} left", style="green")] if left is not None else []
    kind = Text(shortened(one_line(state.kind), 20), style="bold")
    taken = kind.cell_len + 3 + sum(text.cell_len + 2 for text in texts)
    while len(texts) > 1 and taken + BAR_STEP > width:
        taken -= texts.pop(-2 if len(texts) > 2 else -1).cell_len + 2
    line = Table.grid(padding=(0, 2, 0, 0))
    bar_cells = min(BAR_CELLS, max(1, (width - taken) // BAR_STEP) * BAR_STEP)
    bar = ProgressBar(total=max(state.total, 1), completed=state.ended + running, width=bar_cells)
    for _ in range(len(texts) + 2):
        line.add_column(no_wrap=True)
    line.add_row(Text(" ") + kind, bar, *texts)
    return line


def _exceptional_counts(state: ExperimentState) -> list[str]:
    counts = {
        "pruned": state.pruned,
        "retried": state.retried,
        "failed": state.failed,
    }
    return [f"{count:,} {word}" for word, count in counts.items() if count]


def _cells(slot: SlotState, now: float) -> dict[str, Text]:
    """The cells of a slot by column; columns without a value are missing."""
    cells = {"slot": Text(slot.slot, style="" if slot.in_service else "red")}
    if slot.job is None:
        words = "waits" if slot.in_service else f"out of service: {slot.reason}"
        style = "dim" if slot.in_service else "red"
        return cells | {"job": Text(one_line(words), style=style)}
    cells["job"] = Text(one_line(slot.job) + attempt_suffix(slot.attempt))
    cells["for"] = Text(duration(now - slot.began), style="dim")
    step, total = slot.metric("step"), slot.metric("total_steps")
    if step is not None:
        cells["step"] = Text(f"{step:,.0f}" + (f"/{total:,.0f}" if total else ""))
    for column, name in (("loss", "loss"), ("val loss", "val_loss")):
        if (value := slot.metric(name)) is not None:
            cells[column] = Text(f"{value:.4f}")
    if (speed := slot.metric("tokens_per_s")) is not None:
        cells["tokens/s"] = Text(f"{speed:,.0f}", style="cyan")
    if (left := slot.left_s(now)) is not None:
        cells["left"] = Text(duration(left), style="green")
    if others := _other_metrics(slot):
        cells["reported"] = Text(others)
    return cells


def _other_metrics(slot: SlotState) -> str:
    """The first few reported metrics that have no column of their own."""
    numbers = {
        one_line(name): value
        for name, value in slot.metrics.items()
        if name not in STANDARD_METRICS and is_finite_number(value)
    }
    shown = [*numbers.items()][:MAX_OTHER_METRICS]
    return "  ".join(f"{name} {four_digits(value)}" for name, value in shown)


def _speed(jobs_per_s: float) -> str:
    """`3.2 jobs/s`, `21.3 jobs/h`: the first unit in which the number is at least 1."""
    units: Sequence[tuple[str, float]] = (("s", 1), ("min", 60), ("h", 3600), ("day", 86400))
    unit, seconds = next((item for item in units if jobs_per_s * item[1] >= 1), units[-1])
    value = jobs_per_s * seconds
    return f"{value:,.0f} jobs/{unit}" if value >= 100 else f"{value:.1f} jobs/{unit}"

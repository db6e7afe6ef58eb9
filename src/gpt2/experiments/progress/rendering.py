"""The state and the events of an experiment as text: the live view, or lines."""

from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from gpt2.base.text import counted, four_digits, one_line, shortened
from gpt2.config.flops import duration
from gpt2.experiments.pool.job import Event
from gpt2.experiments.progress.state import ExperimentState, SlotState

FIRST_METRICS = {
    "loss": "loss {:.4f}",
    "val_loss": "val_loss {:.4f}",
    "tokens_per_s": "{:,.0f} tokens/s",
}
MAX_METRICS = 6
"""shown per slot"""
BAR_CELLS = 10


def first_line(state: ExperimentState) -> str:
    """`seeds: 25 jobs, 10 done before, on gpu0, gpu1; process 4711 on host`."""
    jobs = f"{counted(state.total, 'job')}, {state.before:,} done before"
    slots = ", ".join(slot.slot for slot in state.slots)
    return f"{one_line(state.kind)}: {jobs}, on {slots}; process {state.pid} on {state.host}"


def event_line(event: Event) -> str:
    """The line about an event; empty if it has none. Jobs that share a process have one only if
    something goes wrong."""
    slot, reason, attempt = event.slot.name, one_line(event.reason), attempt_suffix(event.attempt)
    name = one_line(event.job.name) if event.job else ""
    has_process = event.job is not None and event.job.own_process
    match event.kind:
        case "stopping":
            return f"stopping: {reason}"
        case "slot_lost":
            return f"{slot} is out of service: {reason}"
        case "failed":
            return f"failed: {name} on {slot}{attempt}: {reason}"
        case "retried":
            return f"lost: {name} on {slot}{attempt}: {reason}; it runs again"
        case "stopped":
            return f"{slot} stopped {name}{': ' if reason else ''}{reason}"
        case "started" if has_process:
            where = f" on {event.host}" if event.host else ""
            return f"{slot} begins {name}{attempt}: process {event.pid}{where}, log {event.log}"
        case "finished" | "pruned" if has_process:
            return f"{slot} {event.kind} {name} after {duration(event.elapsed_s)}"
    return ""


def attempt_suffix(number: int) -> str:
    """` (attempt 2)`, or nothing for the first attempt."""
    return f" (attempt {number})" if number > 1 else ""


def summary(state: ExperimentState, now: float) -> str:
    """`20 of 100 done, 1 failed | 3.2 jobs/s | 25s left`."""
    now = state.as_of(now)
    last = _left(state.left_s(now)) if state.is_running else duration(now - state.began)
    return _joined(_counts(state), _speed(state.jobs_per_s(now)), last)


def slot_line(slot: SlotState, now: float) -> str:
    """`gpu0 lr=0.001,seed=3: step 1,200 of 5,000 | loss 3.4451 | 55,120 tokens/s | 1h 05m left`."""
    elapsed = duration(now - slot.began) + attempt_suffix(slot.attempt)
    parts = _joined(_steps(slot), *_metrics(slot), elapsed, _left(slot.left_s(now)))
    return f"{slot.slot} {one_line(slot.job or 'idle')}: {parts}"


def view(state: ExperimentState, now: float, width: int) -> RenderableType:
    """The live view in `width` cells: a line for the whole experiment and, while it runs, for each
    of its slots."""
    now = state.as_of(now)
    tasks = Progress(
        TextColumn("{task.description}", markup=False),
        _FieldColumn("what", Column(no_wrap=True)),
        BarColumn(BAR_CELLS),
        TaskProgressColumn("{task.percentage:.0f} %", markup=False, justify="right"),
        TextColumn("{task.fields[time]}", markup=False, justify="right", style="green"),
        _FieldColumn("details", Column()),  # it gives way where the terminal is narrow
    )
    most = max(1, width // 3)
    tasks.add_task(
        shortened(one_line(state.kind), 20),
        completed=round(100 * state.fraction),
        what=cut(shortened(_counts(state), most), "bold red" if state.failed else "bold"),
        time=_left(state.left_s(now)) or duration(now - state.began),
        details=cut(_speed(state.jobs_per_s(now))),
    )
    for slot in () if state.is_over else state.slots:
        what, style = "waits", "dim"
        if not slot.in_service:
            what, style = f"out of service: {one_line(slot.reason)}", "red"
        elif slot.job:
            what, style = one_line(slot.job) + attempt_suffix(slot.attempt), ""
        tasks.add_task(
            slot.slot,
            total=None if slot.job and slot.metric("step") is None else 100,
            completed=round(100 * slot.fraction),
            what=cut(shortened(what, most), style),
            time=_left(slot.left_s(now)) or (duration(now - slot.began) if slot.job else ""),
            details=cut(_joined(*_metrics(slot), _steps(slot))),
        )
    parts: list[RenderableType] = [tasks]
    if state.state == "stopping":
        parts.insert(0, Text(f"Stopping: {state.reason}", "yellow"))
    if state.state == "stopped":
        left = f"{state.total - state.ended:,} of {counted(state.total, 'job')} left"
        parts.insert(0, Text(f"Stopped: {left}", "yellow"))
    return Constrain(Group(*parts), width)


def _counts(state: ExperimentState) -> str:
    counts = {"pruned": state.pruned, "retried": state.retried, "failed": state.failed}
    exceptions = [f", {count:,} {word}" for word, count in counts.items() if count]
    return f"{state.done:,} of {state.total:,} done{''.join(exceptions)}"


def _steps(slot: SlotState) -> str:
    step, total = slot.metric("step"), slot.metric("total_steps")
    if step is None:
        return ""
    return f"step {step:,.0f}" + (f" of {total:,.0f}" if total else "")


def _metrics(slot: SlotState) -> list[str]:
    """What the job reports beside its steps."""
    names = dict.fromkeys((*FIRST_METRICS, *slot.metrics))
    shown = [
        FIRST_METRICS[name].format(value)
        if name in FIRST_METRICS
        else f"{name} {four_digits(value)}"
        for name in names
        if name not in ("step", "total_steps") and (value := slot.metric(name)) is not None
    ]
    return [one_line(text) for text in shown[:MAX_METRICS]]


def _joined(*parts: str) -> str:
    return " | ".join(part for part in parts if part)


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"{duration(left_s)} left"


def _speed(jobs_per_s: float) -> str:
    """`3.2 jobs/s`, `21.3 jobs/h`: the first unit in which the number is at least 1."""
    if not jobs_per_s:
        return ""
    units = {"s": 1, "min": 60, "h": 3600, "day": 86400}
    unit = next((unit for unit, seconds in units.items() if jobs_per_s * seconds >= 1), "day")
    value = jobs_per_s * units[unit]
    return f"{value:,.0f} jobs/{unit}" if value >= 100 else f"{value:.1f} jobs/{unit}"


def cut(text: str, style: str = "") -> Text:
    """A text on one line, cut at its end where it does not fit."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


class _FieldColumn(ProgressColumn):
    """Shows a text of each task in its own style."""

    def __init__(self, field: str, column: Column) -> None:
        super().__init__(column)
        self._field = field

    def render(self, task: Task) -> Any:
        return task.fields[self._field]

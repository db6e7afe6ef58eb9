"""How the picture of an experiment looks: a bar and a line for each slot, or a line of text."""

from collections.abc import Sequence, Set

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2.base.text import counted, figure, fitted, one_line, shortened
from gpt2.config.flops import duration
from gpt2.experiments.progress.state import Picture, Place, is_number

BAR_CELLS, BAR_STEP = 40, 8
"""the longest bar, and what it is shortened by: it must not change with every digit beside it"""
COLUMNS = ("slot", "job", "step", "loss", "tokens/s", "left", "reported", "val loss", "for")
"""the last ones are left out first"""
OWN_COLUMNS = ("step", "total_steps", "loss", "tokens_per_s", "val_loss")
SHOWN_OTHERS = 3


def summary(picture: Picture, now: float) -> str:
    """`20 of 100 done, 1 failed | 3.2 jobs/s | 25s left`."""
    counts = [f"{picture.done:,} of {picture.total:,} done", *_exceptions(picture)]
    parts = [", ".join(counts)]
    if speed := picture.jobs_per_s(now):
        parts.append(_speed(speed))
    if picture.is_over:
        parts.append(duration(now - picture.began))
    elif (left := picture.left_s(now)) is not None:
        parts.append(f"{duration(left)} left")
    return " | ".join(parts)


def place_line(place: Place, now: float) -> str:
    """`gpu0 lr=0.001,seed=3: step 1,200 of 5,000 | loss 3.4451 | 55,120 tokens/s | 1h 05m left`."""
    step, total = place.number("step"), place.number("total_steps")
    parts = []
    if step is not None:
        parts.append(f"step {step:,.0f}" + (f" of {total:,.0f}" if total else ""))
    for name in ("loss", "val_loss"):
        if (value := place.number(name)) is not None:
            parts.append(f"{name} {value:.4f}")
    if (speed := place.number("tokens_per_s")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    parts += [others] if (others := _others(place)) else []
    left = place.left_s(now)
    parts.append(f"{duration(now - place.began)}{attempt(place.attempt)}")
    parts += [f"{duration(left)} left"] if left is not None else []
    return f"{place.slot} {one_line(place.job or 'idle')}: {' | '.join(parts)}"


def attempt(number: int) -> str:
    """` (attempt 2)` where it is not the first."""
    return f" (attempt {number})" if number > 1 else ""


def drawn(picture: Picture, now: float, width: int, columns: Set[str]) -> RenderableType:
    """The picture as a terminal of this width shows it, with these columns for the slots."""
    parts: list[RenderableType] = [_header(picture, now, width)]
    if not picture.is_over:
        parts.append(places_table(picture, now, width, columns))
    elif left := picture.total - picture.ended:
        words = f" Stopped: {left:,} of {counted(picture.total, 'job')} are left to run"
        parts.append(Text(words, style="yellow"))
    if picture.state == "stopping":
        parts.append(Text(f" Stopping: {picture.reason}", style="yellow"))
    return Group(*parts)


def columns_of(picture: Picture, now: float) -> set[str]:
    """The columns that a job has something to say for."""
    return {name for place in picture.places for name in _cells(place, now)}


def places_table(picture: Picture, now: float, width: int, columns: Set[str]) -> Table:
    """A line for each slot."""
    rows = [_cells(place, now) for place in picture.places]
    names = [name for name in COLUMNS if name in columns or name in ("slot", "job")]
    cells = [[row.get(name, Text()) for name in names] for row in rows]
    return fitted("", names, cells, width, elastic="job", least=16)


def _header(picture: Picture, now: float, width: int) -> Table:
    """One line: kind, bar, counts, time."""
    running = sum(place.fraction for place in picture.places)
    facts = [
        Text(f"{picture.done:,}/{picture.total:,}", style="bold"),
        *(
            Text(words, style="bold red" if words.endswith("failed") else "yellow")
            for words in _exceptions(picture)
        ),
    ]
    speed, left = picture.jobs_per_s(now), picture.left_s(now)
    facts += [Text(_speed(speed), style="cyan")] if speed and not picture.is_over else []
    facts.append(Text(duration(now - picture.began), style="dim"))
    facts += [Text(f"{duration(left)} left", style="green")] if left is not None else []
    kind = Text(shortened(one_line(picture.kind), 20), style="bold")
    taken = kind.cell_len + 3 + sum(fact.cell_len + 2 for fact in facts)
    while len(facts) > 1 and taken + BAR_STEP > width:
        taken -= facts.pop(-2 if len(facts) > 2 else -1).cell_len + 2
    line = Table.grid(padding=(0, 2, 0, 0))
    bar_cells = min(BAR_CELLS, max(1, (width - taken) // BAR_STEP) * BAR_STEP)
    bar = ProgressBar(
        total=max(picture.total, 1), completed=picture.ended + running, width=bar_cells
    )
    for _ in range(len(facts) + 2):
        line.add_column(no_wrap=True)
    line.add_row(Text(" ") + kind, bar, *facts)
    return line


def _exceptions(picture: Picture) -> list[str]:
    counts = {
        "pruned": picture.pruned,
        "retried": picture.retried,
        "failed": picture.failed,
    }
    return [f"{count:,} {word}" for word, count in counts.items() if count]


def _cells(place: Place, now: float) -> dict[str, Text]:
    """What there is to say of a place, by column."""
    cells = {"slot": Text(place.slot, style="" if place.in_service else "red")}
    if place.job is None:
        words = "waits" if place.in_service else f"out of service: {place.reason}"
        style = "dim" if place.in_service else "red"
        return cells | {"job": Text(one_line(words), style=style)}
    cells["job"] = Text(one_line(place.job) + attempt(place.attempt))
    cells["for"] = Text(duration(now - place.began), style="dim")
    step, total = place.number("step"), place.number("total_steps")
    if step is not None:
        cells["step"] = Text(f"{step:,.0f}" + (f"/{total:,.0f}" if total else ""))
    for column, name in (("loss", "loss"), ("val loss", "val_loss")):
        if (value := place.number(name)) is not None:
            cells[column] = Text(f"{value:.4f}")
    if (speed := place.number("tokens_per_s")) is not None:
        cells["tokens/s"] = Text(f"{speed:,.0f}", style="cyan")
    if (left := place.left_s(now)) is not None:
        cells["left"] = Text(duration(left), style="green")
    if others := _others(place):
        cells["reported"] = Text(others)
    return cells


def _others(place: Place) -> str:
    """What a job of another kind than ours reports of itself."""
    numbers = {
        one_line(name): value
        for name, value in place.metrics.items()
        if name not in OWN_COLUMNS and is_number(value)
    }
    return "  ".join(f"{name} {figure(value)}" for name, value in [*numbers.items()][:SHOWN_OTHERS])


def _speed(jobs_per_s: float) -> str:
    """In the unit that gives a number which can be read."""
    units: Sequence[tuple[str, float]] = (("s", 1), ("min", 60), ("h", 3600), ("day", 86400))
    unit, seconds = next((item for item in units if jobs_per_s * item[1] >= 1), units[-1])
    value = jobs_per_s * seconds
    return f"{value:,.0f} jobs/{unit}" if value >= 100 else f"{value:.1f} jobs/{unit}"

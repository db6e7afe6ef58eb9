"""Tables and numbers as terminals and text files show them."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gpt2.base import addresses
from gpt2.base.control_characters import visible

COLUMNS_OF_FILES = {"what", "path", "file", "folder", "split", "line"}
COLUMNS_OF_JOBS = {"slot", "job", "model", "kind", "state", "reported"}
LEFT_ALIGNED = COLUMNS_OF_FILES | COLUMNS_OF_JOBS
"""columns that hold text; all others hold numbers and are aligned to the right"""
BETWEEN_COLUMNS = 3
LONGEST_REASON = 300
"""characters of why a run or a job ended; a traceback has its own place"""


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 shard, 1,200 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def four_digits(value: float) -> str:
    """A number with about four significant digits: 19,073, 3.4451, 0.00012."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


class PlainConsole(Console):
    """Prints texts as they are, as paths and reasons may hold [brackets] and :colons:, but without
    passwords in addresses, and with control characters as `visible` shows them."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, width=width)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The parts of the output; rich's own control codes are parts of their own."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)

    def render_str(self, text: str, **more: Any) -> Text:
        return super().render_str(addresses.without_secrets(text), **more)

    def on_broken_pipe(self) -> None:
        """Rich would exit with 1, which is a code that commands use for something else."""
        raise BrokenPipeError


def console() -> Console:
    """A console; its tables are up to 160 columns wide where the output is a file."""
    plain = PlainConsole()
    return plain if plain.is_terminal else PlainConsole(width=160)


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of this package; text is aligned left, numbers right."""
    built = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        built.add_column(
            column, justify="left" if column in LEFT_ALIGNED else "right", no_wrap=True
        )
    return built


def fitted(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    elastic: str,
    least: int = 20,
) -> Table:
    """A table that fits into `width` cells.

    Texts in the column `elastic` are shortened in the middle. If less than `least` cells would be
    left for them, columns are dropped from the last one on.
    """
    at = columns.index(elastic)
    cells = [
        [cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in row] for row in rows
    ]
    widths = [
        max([cell_len(column), *(row[index].cell_len for row in cells)])
        for index, column in enumerate(columns)
    ]
    count, room = len(columns) + 1, 0
    while room < min(least, widths[at]) and count > at + 1:
        count -= 1
        room = width - sum(widths[:count]) + widths[at] - BETWEEN_COLUMNS * count - 1
    built = table(title, *columns[:count])
    for row in cells:
        row[at] = Text(shortened(row[at].plain, max(1, room)), style=row[at].style)
        built.add_row(*row[:count])
    return built


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which would move a terminal's cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def brief(reason: str, whole: object) -> str:
    """`reason` as one line of LONGEST_REASON characters at most; where it is cut, it says that
    `whole`, a file or another place, has all of it."""
    line = one_line(reason)
    if len(line) <= LONGEST_REASON:
        return line
    place = f"… (whole in {shortened(str(whole), LONGEST_REASON // 2)})"
    return line[: LONGEST_REASON - len(place)] + place


def shortened(text: str, width: int) -> str:
    """`text` without its middle if it is wider than `width` cells: names differ at the ends."""
    if cell_len(text) <= width:
        return text
    end = max(0, (width - 1) // 2)
    start = max(0, width - 1 - end)
    tail = text[len(text) - end :]
    while cell_len(tail) > end:
        tail = tail[1:]
    return f"{set_cell_size(text, start).rstrip()}…{tail}" if width > 0 else ""

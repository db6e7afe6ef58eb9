"""How our tables and numbers look on a terminal and in a file."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

OF_FILES = {"what", "path", "file", "folder", "split"}
OF_JOBS = {"slot", "job", "model", "kind", "state", "reported"}
WORDS = OF_FILES | OF_JOBS
"""columns that hold words"""
BETWEEN_COLUMNS = 3


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 shard, 1,200 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def figure(value: float) -> str:
    """A number of any size: 19,073, 3.4451, 55,120, 0.00012."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def console() -> Console:
    """A console whose tables are not squeezed into 80 columns where the output is a file."""
    plain = Console(highlight=False, markup=False)  # paths and reasons may hold [brackets]
    return plain if plain.is_terminal else Console(highlight=False, markup=False, width=160)


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of all of ours; words stand left, numbers right."""
    built = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        built.add_column(column, justify="left" if column in WORDS else "right", no_wrap=True)
    return built


def fitted(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    elastic: str,
    least: int = 20,
) -> Table:
    """A table of what fits into `width` cells: the columns from the first on, and of the `elastic`
    one's texts, where they are too long, beginning and end; it has `least` cells or what it needs.
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
    """`text` without line breaks and what else would move a terminal's cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shortened(text: str, width: int) -> str:
    """Beginning and end of `text` if it needs more than `width` cells: names differ there."""
    if cell_len(text) <= width:
        return text
    end = max(0, (width - 1) // 2)
    start = max(0, width - 1 - end)
    tail = text[len(text) - end :]
    while cell_len(tail) > end:
        tail = tail[1:]
    return f"{set_cell_size(text, start).rstrip()}…{tail}" if width > 0 else ""

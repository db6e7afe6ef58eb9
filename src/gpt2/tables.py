"""How our tables and numbers look on a terminal and in a file."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 shard, 1,200 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def console() -> Console:
    """A console whose tables are not squeezed into 80 columns where the output is a file."""
    plain = Console(highlight=False, markup=False)  # paths and reasons may hold [brackets]
    return plain if plain.is_terminal else Console(highlight=False, markup=False, width=160)


def table(title: str, *columns: str) -> Table:
    """An empty table in the style of all of ours; words stand left, numbers right."""
    built = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        words = column in ("what", "path", "file", "split", "model")
        built.add_column(column, justify="left" if words else "right", no_wrap=True)
    return built

"""`gpt2 plot`: the curves of runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt2.base import validation
from gpt2.base.text import console
from gpt2.cli.parse import guarded, parse


@dataclass(frozen=True)
class PlotCommand:
    """Draw losses, HellaSwag, learning rate and tokens/s of runs, from their logs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN …]")] = (
        Path("logs/log.txt"),
    )
    """logs, or folders with logs/log.txt, such as the --out_dir of a run, or experiments"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curves.png")
    """the picture: .png, .svg or .pdf"""
    last: int | None = None
    """only the last so many runs of each log; default is all"""

    def __post_init__(self) -> None:
        validation.require_at_least(self, 1, "last")


def plot_main() -> int:
    """`gpt2 plot`."""

    def body() -> int:
        command = parse(PlotCommand, sys.argv[1:])
        from gpt2.inspection import plot

        runs = plot.read(command.runs, command.last)
        plot.save(runs, command.out)
        out = console()
        for run in runs:
            out.print(plot.summary(run), soft_wrap=True)
        out.print(f"Drawn: {command.out}", soft_wrap=True)
        return 0

    return guarded(body)

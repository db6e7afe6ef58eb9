"""`gpt2 plot`: the curves of runs as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gpt2.base import validation
from gpt2.base.text import console
from gpt2.cli.parse import CommandOptions, run_command
from gpt2.inspection import plot


@dataclass(frozen=True)
class PlotCommand(CommandOptions):
    """Draw loss, HellaSwag accuracy, learning rate and tokens/s of runs, from their logs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN …]")] = (
        Path("logs/log.txt"),
    )
    """logs, folders with logs/log.txt, such as the --out_dir of a run, the checkpoint folder of a
    run, the folder of an experiment, or an --experiment_name"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder with the runs of an --experiment_name"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curves.png")
    """file of the picture: .png, .svg or .pdf"""
    last: int | None = None
    """only the last N runs of each log; default is all. Runs that are found by their checkpoint
    folder or an --experiment_name are all drawn"""

    def __post_init__(self) -> None:
        validation.require_within(self, 1, validation.LARGEST, "last")


def plot_main() -> int:
    """`gpt2 plot`."""
    return run_command(PlotCommand, _run)


def _run(command: PlotCommand) -> int:
    runs = plot.read(command.runs, command.last, command.checkpoint_dir)
    plot.save(runs, command.out)
    out = console()
    for run in runs:
        out.print(plot.summary(run), soft_wrap=True)
    out.print(f"Drawn: {command.out}", soft_wrap=True)
    return 0

"""`gpt2 data order`: the rows of a step of a run, also of a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.base import log, validation
from gpt2.base.text import console
from gpt2.cli import train
from gpt2.cli.parse import CommandOptions, guarded
from gpt2.config.run import RunConfig


@dataclass(frozen=True)
class OrderCommand(CommandOptions):
    """Show which rows a run trains on in a step. It takes the options of the run; with --resume,
    those of its checkpoint."""

    run: RunConfig
    step: int = 0
    """after how many updates; the log of the run calls the next one STEP + 1"""
    json: bool = False
    """print every row as a JSON object with corpus, shard and row, in the order of the ranks"""
    config: Path | None = None
    """TOML file with options, by name or in a table per part"""
    out_dir: Path | None = None
    """where checkpoints, runs and logs of the run are"""

    def __post_init__(self) -> None:
        validation.require_within(self, 0, validation.LARGEST, "step")


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""

    def body() -> int:
        command = train.parse_before_resume(OrderCommand, arguments)
        log.setup(command.log_level)

        def configure(stored: Mapping[str, Any] | None) -> RunConfig:
            return train.parse_run(OrderCommand, arguments, stored=stored).run

        # They import torch: see `gpt2.cli.parse`.
        from gpt2.inspection import order
        from gpt2.train import experiment_folder

        rows = order.rows_of(experiment_folder.resolve(command.run), configure, command.step)
        if command.json:
            print(order.as_json(rows))
        else:
            order.print_rows(rows, command.step, console())
        return 0

    return guarded(body)

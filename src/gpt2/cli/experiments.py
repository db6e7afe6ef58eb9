"""`gpt2 experiments`: lists the experiments on disk, shows one, and runs named ones."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import LARGEST, require_within, suggestion
from gpt2.cli import experiments_run, main
from gpt2.cli.parse import CommandOptions, guarded, run_command, show_text

USAGE = """usage: gpt2 experiments ACTION [OPTIONS]

  list [DIR]   list every experiment and training in a folder
  show DIR     show the state, the results and the failures of an experiment
  run NAME …   train several named experiments side by side

`gpt2 experiments ACTION --help` lists its options"""


@dataclass(frozen=True)
class ListCommand(CommandOptions):
    """List every experiment and training in a folder with its state and progress."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = Path(
        "checkpoints"
    )
    """folder to search; default is checkpoints"""
    checkpoint_dir: Path | None = None
    """the same as DIR, as other commands name it"""
    json: bool = False
    """print one JSON object per experiment, one per line"""


@dataclass(frozen=True)
class ShowCommand(CommandOptions):
    """Show an experiment: its state, slots, jobs and their results, and why jobs failed."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """the folder of the experiment"""
    failed: bool = False
    """show only failed jobs, with their tracebacks"""
    last: int | None = 40
    """show only the N jobs that ended last; None shows all"""
    json: bool = False
    """print everything as one JSON object"""

    def __post_init__(self) -> None:
        require_within(self, 1, LARGEST, "last")


def experiments_main() -> int:
    """`gpt2 experiments …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return show_text(USAGE)
    sys.argv[0] += f" {name}"
    if name == "list":
        return run_command(ListCommand, _list, rest)
    if name == "show":
        return run_command(ShowCommand, _show, rest)
    if name == "run":
        return guarded(lambda: experiments_run.run_experiments(rest))
    return guarded(lambda: _refuse(name))


def _refuse(name: str) -> NoReturn:
    if name in main.COMMANDS:
        raise ConfigError(f"unknown action {name}; did you mean gpt2 {name}?")
    known = suggestion(name, ["list", "show", "run"]) or "; expected list, show or run"
    raise ConfigError(f"unknown action {name}{known}")


def _list(command: ListCommand) -> int:
    from gpt2.experiments.progress import listing

    folder = command.folder
    if command.checkpoint_dir is not None:
        if folder not in (ListCommand.folder, command.checkpoint_dir):
            raise ConfigError(f"use either {folder} or --checkpoint_dir {command.checkpoint_dir}")
        folder = command.checkpoint_dir
    if folder != ListCommand.folder and not folder.is_dir():
        raise ConfigError(f"no folder {folder}; the default is {ListCommand.folder}")
    if command.json:
        for item in listing.below(folder):
            print(json.dumps(listing.summary_json(item)))
    else:
        listing.print_list(folder, console())
    return 0


def _show(command: ShowCommand) -> int:
    from gpt2.experiments import results
    from gpt2.experiments.progress import listing
    from gpt2.inspection import run_status
    from gpt2.train import status

    is_experiment = (command.folder / results.EXPERIMENT_FILE).exists()
    if not is_experiment and (training := status.read(command.folder)):
        run_status.print_state(run_status.Run(command.folder, training), console())
        return 0
    item = listing.read(command.folder)
    if command.json:
        print(json.dumps(listing.full_json(item)))
    elif command.failed:
        listing.print_failures(item, console(), command.last)
    else:
        listing.print_experiment(item, console(), command.last)
    return 0

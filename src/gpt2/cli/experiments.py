"""`gpt2 experiments`: lists experiments on disk and shows them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import require_at_least, suggestion
from gpt2.cli.parse import guarded, parse

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ListCommand:
    """Every experiment and training in a folder: its state, and how far it is."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[DIR]")] = Path(
        "checkpoints"
    )
    """where to look; default is checkpoints"""
    json: bool = False
    """for scripts: one JSON text per experiment and line"""


@dataclass(frozen=True)
class ShowCommand:
    """An experiment: its state, slots, jobs and their results, and why some have failed."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """the folder of the experiment"""
    failed: bool = False
    """only the jobs that have failed, with their tracebacks"""
    last: int | None = 40
    """only so many jobs, those that ended last; None is all"""
    json: bool = False
    """for scripts: everything as one JSON text"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "last")


def experiments_main() -> int:
    """`gpt2 experiments …`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(
            "usage: gpt2 experiments ACTION [OPTIONS]\n\n"
            "  list [DIR]   every experiment and training in a folder\n"
            "  show DIR     what an experiment has done, does, and where it has failed\n\n"
            "`gpt2 experiments ACTION --help` lists its options"
        )
        return 0
    sys.argv[0] += f" {name}"

    def body() -> int:
        if name not in ACTIONS:
            known = suggestion(name, list(ACTIONS)) or "; there are list and show"
            raise ConfigError(f"unknown action {name}{known}")
        return ACTIONS[name](rest)

    return guarded(body)


def _list(arguments: Sequence[str]) -> int:
    command = parse(ListCommand, arguments)
    if command.folder != ListCommand.folder and not command.folder.is_dir():
        raise ConfigError(
            f"there is no folder {command.folder}; the default is {ListCommand.folder}"
        )
    from gpt2.experiments.progress import listing

    if command.json:
        for item in listing.below(command.folder):
            print(json.dumps(listing.summary_json(item)))
    else:
        listing.print_list(command.folder, console())
    return 0


def _show(arguments: Sequence[str]) -> int:
    command = parse(ShowCommand, arguments)
    from gpt2.experiments.progress import listing
    from gpt2.inspection import runs
    from gpt2.train import status

    item = listing.find(command.folder)
    if item is None and (training := status.read(command.folder)):
        runs.print_state(runs.Run(command.folder, training), console())
        return 0
    item = item or listing.require(command.folder)
    if command.json:
        print(json.dumps(listing.full_json(item)))
    elif command.failed:
        listing.print_failures(item, console(), command.last)
    else:
        listing.print_experiment(item, console(), command.last)
    return 0


ACTIONS = {"list": _list, "show": _show}

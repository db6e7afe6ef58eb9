"""What the `gpt2` command does with many trainings: `seeds`, `models`, `experiments`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from gpt2 import cli, config
from gpt2.cli_parse import guarded, parse, parse_known
from gpt2.config import RunConfig, require_at_least
from gpt2.errors import ConfigError
from gpt2.limits import suggestion
from gpt2.tables import console

T = TypeVar("T")


@dataclass(frozen=True)
class SeedsCommand:
    """Train with every seed of every point of a grid, on all GPUs at once; or call any function so.

    All options of `gpt2 train` work too, but --checkpoint_interval and --checkpoint_dir, which are
    the sweep's; those of its trainings: a --config file, and folders of their own. The same command
    goes on with a sweep that was stopped.
    """

    num_seeds: int = 10
    """seeds of each point"""
    first_seed: int = 0
    """the first of them; the others follow it"""
    grid: tuple[str, ...] = ()
    """points: learning_rate=1e-3,3e-4 n_layer=2,4 are four; default is one, as the options say"""
    target: str | None = None
    """module:function to call with seed and the values of a point, instead of a training"""
    metric: str | None = None
    """which result is compared: default is val_loss, of a function `value`, what it returns"""
    max_gpus: int | None = None
    """GPUs at most, each with a worker process; default is all"""
    slots: int | None = None
    """worker processes; default is one per GPU, and without GPUs 2, which share the cores"""
    checkpoint_dir: Path = Path("checkpoints/seeds")
    """folder of the results, and of the checkpoints of each training"""
    checkpoint_interval: float = 1800.0
    """seconds after which results.json is written, if 50 results do not come before"""
    keep_checkpoints: bool = True
    """keep those of finished trainings, not only their results"""
    log_dir: Path = Path("logs")
    """folder of the sweep's log and of those of its workers"""
    retries: int = 1
    """more attempts for a job whose process died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging"""
    grace: float = 60.0
    """seconds for saving after Ctrl+C"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_seeds", "max_gpus", "slots")
        require_at_least(self, 0, "first_seed", "checkpoint_interval")


def seeds_main() -> int:
    """`gpt2 seeds` and `src/main_multi_gpu.py`."""

    def body() -> int:
        command, run_config = parse_beside_run(SeedsCommand, sys.argv[1:])
        from gpt2.experiments import plan, seeds, slots
        from gpt2.experiments.pool import Limits

        sys.path.insert(0, os.getcwd())  # where --target is looked for
        grid = plan.parse_grid(command.grid)
        of_function = "value" if command.target else "val_loss"
        sweep = seeds.Sweep(
            run=run_config,
            target=command.target,
            points=plan.points(grid),
            seeds=range(command.first_seed, command.first_seed + command.num_seeds),
            metric=command.metric or of_function,
            folder=command.checkpoint_dir,
            save_every_s=command.checkpoint_interval,
            keep_checkpoints=command.keep_checkpoints,
        )
        found = slots.of_machine(command.slots, device=run_config.machine.device)
        limits = Limits(command.retries, command.job_timeout, command.grace)
        chosen = found[: command.max_gpus]
        return seeds.run(sweep, chosen, limits, command.log_dir, console())

    return guarded(body)


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, RunConfig]:
    """The command, and the training that the other arguments say; the command's flags come first,
    where both have one of the same name."""
    command, others = parse_known(kind, arguments)
    return command, cli.parse_train(others).run


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
        config.require_at_least(self, 1, "last")


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
    from gpt2.experiments import listing

    if command.json:
        for item in listing.below(command.folder):
            print(json.dumps(listing.brief_facts(item)))
    else:
        listing.print_list(command.folder, console())
    return 0


def _show(arguments: Sequence[str]) -> int:
    command = parse(ShowCommand, arguments)
    from gpt2 import monitor, status
    from gpt2.experiments import listing

    if said := listing.find(command.folder) is None and status.read(command.folder):
        monitor.print_state(monitor.Run(command.folder, said), console())
        return 0
    item = listing.require(command.folder)
    if command.json:
        print(json.dumps(listing.facts(item)))
    elif command.failed:
        listing.print_failures(item, console(), command.last)
    else:
        listing.print_experiment(item, console(), command.last)
    return 0


ACTIONS = {"list": _list, "show": _show}

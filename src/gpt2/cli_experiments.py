"""What the `gpt2` command does with many trainings: `seeds`, `models`, `experiments`."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from gpt2 import cli_train
from gpt2.cli_parse import guarded, parse, parse_known
from gpt2.config import MachineConfig, require_at_least
from gpt2.errors import ConfigError
from gpt2.limits import suggestion
from gpt2.tables import console

if TYPE_CHECKING:
    from gpt2.experiments.pool import Limits
    from gpt2.experiments.process import Engine

T = TypeVar("T")
FOR_FUNCTIONS = ("device", "out_dir", "list_checkpoints")
"""options of `gpt2 train` that a function has a use for, too"""


@dataclass(frozen=True)
class PoolOptions:
    """Where jobs run, and what they may cost."""

    gpus: str | None = None
    """physical GPUs to use, as in 1,2"""
    slots: int | None = None
    """jobs at a time; default is one per GPU (or --ddp GPUs), and without GPUs 2, which share the
    cores"""
    ddp: int = 1
    """GPUs of each training, which torchrun starts; without GPUs, processes that share its cores"""
    retries: int = 1
    """more attempts for a job whose process died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging; a training reports each step,
    and every 15 s while it validates: more than it takes to compile and to save"""
    grace: float = 60.0
    """seconds for saving after Ctrl+C"""
    engine: Literal["local", "ray"] = "local"
    """local is this machine; ray is a Ray cluster, all of whose machines see the same files"""
    ray_address: str | None = None
    """the cluster's, as in 10.0.0.1:6379; default is RAY_ADDRESS, else the cluster of this
    machine, else a new one of it alone"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "slots", "ddp")
        require_at_least(self, 0, "retries")
        for name, value in (("job_timeout", self.job_timeout), ("grace", self.grace)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be more than 0")
        if self.ray_address is not None and self.engine != "ray":
            raise ConfigError(f"--ray_address {self.ray_address} needs --engine ray")
        if self.gpus is not None and self.engine == "ray":
            raise ConfigError(
                f"--gpus {self.gpus}: on a cluster Ray chooses the GPUs; --slots says how many "
                "jobs run at a time"
            )

    def limits(self) -> "Limits":
        from gpt2.experiments.pool import Limits

        return Limits(self.retries, self.job_timeout, self.grace)

    @contextmanager
    def opened(
        self, folder: Path, device: str, count: int | None = None, max_gpus: int | None = None
    ) -> Iterator["Engine"]:
        """Where the jobs of the experiment in `folder` run, while the block does: on `count` slots,
        by default what the options say, and on `max_gpus` at most."""
        count = count or self.slots
        if self.engine == "ray":
            if importlib.util.find_spec("ray") is None:
                raise ConfigError("--engine ray needs Ray; first: pip install 'ray>=2.60,<3'")
            from gpt2.experiments import cluster

            with cluster.joined(
                self.ray_address, folder, count, device, max_gpus, self.ddp
            ) as engine:
                yield engine
        else:
            from gpt2.experiments.process import Engine
            from gpt2.experiments.slots import of_machine

            gpus = listed("gpus", self.gpus)
            yield Engine(of_machine(count, gpus, device, max_gpus, self.ddp))


@dataclass(frozen=True)
class SeedsCommand:
    """Train with every seed of every point of a grid, on all GPUs at once; or call any function so.

    All options of `gpt2 train` work too, but for --checkpoint_interval, which is the sweep's here;
    that of its trainings may stand in a --config file. The same command goes on with a sweep that
    was stopped. Exit code: 1 if a job failed.
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
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, and of a folder for each training; default is checkpoints/seeds"""
    checkpoint_interval: float = 1800.0
    """seconds after which results.json is written, if 50 results do not come before"""
    keep_checkpoints: bool = True
    """keep those of finished trainings, not only their results"""
    log_dir: Path | None = None
    """folder of seeds_DATE_TIME.log and of the workers' logs; default is logs"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_seeds", "max_gpus")
        require_at_least(self, 0, "first_seed", "checkpoint_interval")


def seeds_main() -> int:
    """`gpt2 seeds` and `src/main_multi_gpu.py`."""

    def body() -> int:
        command, train = parse_beside_run(SeedsCommand, sys.argv[1:])
        folder = command.checkpoint_dir or folder_of(train, "seeds")
        if train.list_checkpoints:
            return list_checkpoints(folder)
        from gpt2.experiments import plan, seeds
        from gpt2.experiments.calls import Call
        from gpt2.experiments.seeds_training import Training

        if train.run.machine.seed != MachineConfig().seed:
            raise ConfigError(seeds.SEEDS_APART)
        pool, device = command.pool, train.run.machine.device
        task: seeds.Task = Training(train.run, command.keep_checkpoints, pool.ddp)
        if command.target is not None:
            if flag := _of_a_training(sys.argv[1:]):
                raise ConfigError(f"{flag} is for trainings; leave it out with --target")
            sys.path.insert(0, os.getcwd())  # where it is looked for
            task = seeds.Function(Call.of(command.target))
        sweep = seeds.Sweep(
            task,
            points=plan.points(plan.parse_grid(command.grid)),
            seeds=range(command.first_seed, command.first_seed + command.num_seeds),
            metric=command.metric or ("value" if command.target else "val_loss"),
            folder=folder,
            log_dir=command.log_dir or train.run.watch.log_dir,
            save_every_s=command.checkpoint_interval,
        )
        with pool.opened(folder, device, max_gpus=command.max_gpus) as engine:
            return seeds.run(sweep, engine, pool.limits(), console()).exit_code

    return guarded(body)


def _of_a_training(arguments: Sequence[str]) -> str | None:
    """The first flag of `gpt2 seeds` that means nothing to a function."""
    command, others = parse_known(SeedsCommand, arguments)
    if command.pool.ddp > 1:
        return f"--ddp {command.pool.ddp}"
    if not command.keep_checkpoints:
        return "--no_keep_checkpoints"
    flags = (item.partition("=")[0].replace("-", "_") for item in others if item[:2] == "--")
    names = (flag.removeprefix("__") for flag in flags)
    return next((f"--{name}" for name in names if name not in FOR_FUNCTIONS), None)


@dataclass(frozen=True)
class ModelsCommand:
    """Train several models on the same data and token budget, and compare them.

    Two at the same time, each on a GPU; the third follows on the second GPU as soon as that is
    free. Without GPUs, shares of the CPU cores take their place. All options of `gpt2 train` work
    too, for all of the models. The same command goes on with what was stopped. Exit code: 1 if a
    model failed.
    """

    models: str | None = None
    """which, as in gpt2,mlp; default is all: gpt2, modern, mlp"""
    parallel: bool = True
    """--no_parallel trains them one after another, on the first GPU"""
    pool: PoolOptions = PoolOptions()
    checkpoint_dir: Path | None = None
    """folder of the results, and of a folder for each model; default is checkpoints/models"""
    log_dir: Path | None = None
    """folder of training_DATE_TIME.log and of each model's MODEL_DATE_TIME.log; default is logs"""


def models_main() -> int:
    """`gpt2 models` and `src/train_models.py`."""

    def body() -> int:
        command, train = parse_beside_run(ModelsCommand, sys.argv[1:])
        folder = command.checkpoint_dir or folder_of(train, "models")
        if train.list_checkpoints:
            return list_checkpoints(folder)
        from gpt2.experiments import models

        names = listed("models", command.models) or list(models.MODELS)
        for name in names:
            if name not in models.MODELS:
                raise ConfigError(
                    f"--models: there is no {name}{suggestion(name, models.MODELS)}; there "
                    f"are {', '.join(models.MODELS)}"
                )
        asked = models.Comparison(
            train.run,
            {name: models.MODELS[name] for name in models.MODELS if name in names},
            folder,
            command.log_dir or train.run.watch.log_dir,
            ranks=command.pool.ddp,
        )
        pool, device = command.pool, train.run.machine.device
        room = models.at_once(
            len(asked.models), pool.slots, pool.gpus is not None, command.parallel, pool.ddp
        )
        with pool.opened(folder, device, *room) as engine:
            return models.run(asked, engine, pool.limits(), console())

    return guarded(body)


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, cli_train.TrainCommand]:
    """The command, and the training that the other arguments say; the command's flags come first,
    where both have one of the same name."""
    command, others = parse_known(kind, arguments)
    return command, cli_train.parse_train(others)


def folder_of(train: cli_train.TrainCommand, name: str) -> Path:
    """Where an experiment is kept, unless its own flag says otherwise."""
    return (train.out_dir or Path()) / "checkpoints" / name


def list_checkpoints(folder: Path) -> int:
    from gpt2 import monitor

    monitor.print_checkpoints(folder, console())
    return 0


def listed(flag: str, text: str | None) -> list[str] | None:
    """`1,2` as a list; None stays None."""
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    if "" in items or len(set(items)) < len(items):
        raise ConfigError(f"--{flag} {text}: needed are different names, as in a,b")
    return items


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

    item = listing.find(command.folder)
    if item is None and (training := status.read(command.folder)):
        monitor.print_state(monitor.Run(command.folder, training), console())
        return 0
    item = item or listing.require(command.folder)
    if command.json:
        print(json.dumps(listing.facts(item)))
    elif command.failed:
        listing.print_failures(item, console(), command.last)
    else:
        listing.print_experiment(item, console(), command.last)
    return 0


ACTIONS = {"list": _list, "show": _show}

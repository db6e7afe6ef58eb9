"""What the `gpt2` command does with many trainings: `seeds`, `models`, `experiments`."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import require_at_least
from gpt2.cli import train as cli_train
from gpt2.cli.parse import parse_known

if TYPE_CHECKING:
    from gpt2.experiments.pool.process import Engine
    from gpt2.experiments.pool.scheduler import Limits


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
        from gpt2.experiments.pool.scheduler import Limits

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
            from gpt2.experiments.pool import ray_engine

            with ray_engine.connected(
                self.ray_address, folder, count, device, max_gpus, self.ddp
            ) as engine:
                yield engine
        else:
            from gpt2.experiments.pool.process import Engine
            from gpt2.experiments.pool.slots import of_machine

            gpus = listed("gpus", self.gpus)
            yield Engine(of_machine(count, gpus, device, max_gpus, self.ddp))


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, cli_train.TrainCommand]:
    """The command, and the training that the other arguments say; the command's flags come first,
    where both have one of the same name."""
    command, others = parse_known(kind, arguments)
    return command, cli_train.parse_train(others)


def folder_of(train: cli_train.TrainCommand, name: str) -> Path:
    """Where an experiment is kept, unless its own flag says otherwise."""
    return (train.out_dir or Path()) / "checkpoints" / name


def list_checkpoints(folder: Path) -> int:
    from gpt2.inspection import checkpoints

    checkpoints.print_checkpoints(folder, console())
    return 0


def listed(flag: str, text: str | None) -> list[str] | None:
    """`1,2` as a list; None stays None."""
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    if "" in items or len(set(items)) < len(items):
        raise ConfigError(f"--{flag} {text}: needed are different names, as in a,b")
    return items

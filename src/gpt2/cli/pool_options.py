"""Flags for running many jobs: shared by `seeds`, `models`, `search` and the examples."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gpt2.base.errors import ConfigError
from gpt2.base.text import console
from gpt2.base.validation import MOST_PROCESSES, require_positive, require_within
from gpt2.cli.parse import parse_known
from gpt2.cli.train import TrainCommand, parse_train
from gpt2.config import gpu_list
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Limits
from gpt2.experiments.pool.slots import of_machine

T = TypeVar("T")


@dataclass(frozen=True)
class PoolOptions:
    """Where jobs run, and their limits."""

    gpus: str | None = None
    """physical GPUs to use, for example 0,2-3 or GPU-8f3a51c2, or none; default is all that
    CUDA_VISIBLE_DEVICES shows"""
    max_gpus: int | None = None
    """largest number of GPUs to use, the first ones; default is all"""
    slots: int | None = None
    """jobs that run at the same time; default is one per GPU, or group of GPUs;
    without GPUs it is 2, which share the cores"""
    parallel: bool = True
    """--no_parallel runs the jobs one after another, on the first GPU"""
    retries: int = 1
    """further attempts at a job whose process died, hung or ran out of memory"""
    job_timeout: float | None = None
    """seconds without a report after which a job counts as hanging; default is never;
    trainings report every step, and every 15 s of validation: allow for compiling and saving"""
    grace: float = 60.0
    """seconds that jobs have for saving after Ctrl+C"""
    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: a Ray cluster whose machines share a file system"""
    ray_address: str | None = None
    """address of the cluster, for example 10.0.0.1:6379;
    default is RAY_ADDRESS, else the cluster that runs on this machine, else a new one"""

    def __post_init__(self) -> None:
        require_within(self, 1, MOST_PROCESSES, "max_gpus", "slots")
        require_within(self, 0, 10**6, "retries")
        require_positive(self, 10**8, "job_timeout", "grace")
        if self.slots is not None and not self.parallel:
            raise ConfigError(f"use either --slots {self.slots} or --no_parallel")
        if self.ray_address is not None and self.engine != "ray":
            raise ConfigError(f"--ray_address {self.ray_address} needs --engine ray")
        if self.gpus is not None and self.engine == "ray":
            raise ConfigError(
                f"--gpus {self.gpus}: Ray chooses the GPUs of a cluster; use --slots N for the "
                "number of jobs that run at the same time"
            )
        _ = self.gpu_ids  # raises ConfigError

    @property
    def gpu_ids(self) -> list[str] | None:
        """The GPUs of --gpus; None is all."""
        return None if self.gpus is None else gpu_list.parse(self.gpus, "--gpus")

    def limits(self) -> Limits:
        return Limits(self.retries, self.job_timeout, self.grace)

    @contextmanager
    def opened(
        self, folder: Path, device: str = "auto", *, at_once: int | None = None, ddp: int = 1
    ) -> Iterator[Engine]:
        """The engine that runs the jobs of the experiment in `folder` while the block runs.

        `at_once` is the number of slots if the options do not choose one; each has `ddp` GPUs.
        """
        count, max_gpus = self.room(at_once, ddp)
        if self.engine == "ray":
            if importlib.util.find_spec("ray") is None:
                raise ConfigError("--engine ray needs Ray; first: pip install 'ray>=2.60,<3'")
            from gpt2.experiments.pool import ray_engine  # imports ray, which is optional

            with ray_engine.connected(
                self.ray_address, folder, count, device, max_gpus, ddp
            ) as engine:
                yield engine
        else:
            yield Engine(of_machine(count, self.gpu_ids, device, max_gpus, ddp))

    def room(self, at_once: int | None, ddp: int) -> tuple[int | None, int | None]:
        """The number of slots and the largest number of GPUs; None is no limit."""
        if not self.parallel or at_once == 1:
            return 1, None
        if at_once is None or self.slots or self.gpus is not None or self.max_gpus:
            return self.slots, self.max_gpus
        return None, at_once * ddp


@dataclass(frozen=True)
class TrainingPoolOptions(PoolOptions):
    """Where trainings run, and their limits."""

    ddp: int = 1
    """GPUs, and thus ranks, of each training; without GPUs, processes that share its cores"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, 1, MOST_PROCESSES, "ddp")


@dataclass(frozen=True)
class ScriptOptions(PoolOptions):
    """Where jobs run, their limits, and their files."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder of the results"""
    checkpoint_interval: float = 1800.0
    """seconds between two writes of results.json, which also follow every 50 results"""
    log_dir: Path = Path("logs")
    """folder of the logs"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, 0, 10**8, "checkpoint_interval")

    @contextmanager
    def placed(self, at_once: int | None = None) -> Iterator[dict[str, Any]]:
        """The parameters of `gpt2.experiments.api.sweep` and `together` that these options set.

        `at_once` is the number of slots if the options do not choose one.
        """
        with self.opened(self.checkpoint_dir, at_once=at_once) as engine:
            yield {
                "folder": self.checkpoint_dir,
                "engine": engine,
                "limits": self.limits(),
                "log_dir": self.log_dir,
                "save_every_s": self.checkpoint_interval,
            }


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, TrainCommand, list[str]]:
    """The command, the training that the other arguments describe, and these other arguments.

    A flag that both have belongs to the command.
    """
    command, others = parse_known(kind, arguments)
    return command, parse_train(others), others


def default_folder(train: TrainCommand, name: str) -> Path:
    """The folder of an experiment without --checkpoint_dir."""
    return (train.out_dir or Path()) / "checkpoints" / name


def list_checkpoints(folder: Path) -> int:
    """Prints the table of checkpoints in `folder`; returns the exit code 0."""
    # It imports torch: see `gpt2.cli.parse`.
    from gpt2.inspection import checkpoints

    checkpoints.print_checkpoints(folder, console())
    return 0

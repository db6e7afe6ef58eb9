"""Which sinks a run has, and where they keep its records."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.config.run import RunConfig
from gpt2.metrics import log_reader
from gpt2.metrics.console import Console
from gpt2.metrics.jsonl import RECORDS_NAME, JsonLines
from gpt2.metrics.log_file import LOG_NAME, LogFile
from gpt2.metrics.records import EventRecord, Sink, events_to
from gpt2.metrics.tensorboard import TensorBoard
from gpt2.metrics.wandb import WandB


@dataclass(frozen=True)
class RunStart:
    """What a sink is opened with."""

    config: RunConfig
    name: str
    """of the run"""
    step: int
    """where this process goes on"""
    references: dict[str, float]
    """values of constant curves, by name"""

    @property
    def log_dir(self) -> Path:
        return self.config.watch.log_dir


def log_file(run_config: RunConfig) -> Path:
    """The run's `log.txt`; its `metrics.jsonl` lies beside it."""
    return run_config.watch.log_dir / LOG_NAME


def require_folders(run_config: RunConfig) -> None:
    """Makes the folders of the sinks; raises ConfigError, naming the flag, if it cannot."""
    folders = {"log_dir": run_config.watch.log_dir}
    if run_config.watch.use_tensorboard or run_config.experiment.use_wandb:
        folders["runs_dir"] = run_config.watch.runs_dir
    for flag, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make {folder}: {error.strerror}; choose another folder with --{flag} or "
                "--out_dir"
            ) from error


def open_sinks(
    run_config: RunConfig, run_name: str, step: int, references: dict[str, float]
) -> list[Sink]:
    """The sinks of a run that goes on from `step`; `references` are constant curves by name.

    A message that is logged meanwhile goes to the sinks that are open by then. Raises ConfigError
    if one cannot be opened; the others are closed then.
    """
    start = RunStart(run_config, run_name, step, references)
    sinks: list[Sink] = []

    def write(event: EventRecord) -> None:
        for sink in sinks:
            sink.write(event)

    with contextlib.ExitStack() as opened, events_to(write):
        for open_sink in SINKS.values():
            try:
                sink = open_sink(start)
            except OSError as error:
                raise ConfigError(
                    f"cannot write {error.filename}: {error.strerror}; choose another folder with "
                    "--log_dir, --runs_dir or --out_dir"
                ) from error
            if sink is not None:
                opened.callback(sink.close)
                sinks.append(sink)
        opened.pop_all()
    return sinks


def _json_lines(start: RunStart) -> Sink:
    about = {
        "preset": start.config.preset,
        "seed": start.config.machine.seed,
        "tokens_per_step": start.config.data.total_batch_size,
    }
    return JsonLines(start.log_dir / RECORDS_NAME, start.name, start.step, about)


def _tensorboard(start: RunStart) -> Sink | None:
    if not start.config.watch.use_tensorboard:
        return None
    folder, hparams = start.config.watch.runs_dir / start.name, start.config.to_dict()
    return TensorBoard(folder, hparams, start.step, start.references)


def _wandb(start: RunStart) -> Sink | None:
    settings, runs_dir = start.config.experiment, start.config.watch.runs_dir
    if not settings.use_wandb:
        return None
    # Reading a long log takes seconds.
    logged_step = log_reader.furthest_step(log_file(start.config), start.name)
    return WandB(settings, runs_dir, start.name, start.config.to_dict(), logged_step)


SINKS: dict[str, Callable[[RunStart], Sink | None]] = {
    "console": lambda _: Console(),
    "log": lambda start: LogFile(start.log_dir / LOG_NAME, start.name, start.step),
    "records": _json_lines,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
"""opens the sinks, in this order; None is a sink that is off. A new sink is a file in
`gpt2.metrics` and an entry here"""


def places(run_config: RunConfig, run_name: str) -> list[str]:
    """What lies where, as `log logs/log.txt`."""
    watch, found = run_config.watch, [f"log {log_file(run_config)}"]
    if watch.use_tensorboard:
        found.append(f"TensorBoard {watch.runs_dir / run_name}")
    if run_config.experiment.use_wandb:
        found.append(f"W&B {watch.runs_dir / 'wandb'}")
    return found

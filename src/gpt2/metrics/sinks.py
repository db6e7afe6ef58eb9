"""Which sinks a run has, and where they keep its records."""

import contextlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpt2.base import addresses
from gpt2.base.errors import ConfigError
from gpt2.base.validation import require
from gpt2.config.run import RunConfig
from gpt2.metrics import log_reader, wandb
from gpt2.metrics.console import Console
from gpt2.metrics.jsonl import RECORDS_NAME, JsonLines
from gpt2.metrics.log_file import LOG_NAME, LogFile
from gpt2.metrics.records import EventRecord, Sink, events_to
from gpt2.metrics.tensorboard import TensorBoard
from gpt2.metrics.wandb import WandB

logger = logging.getLogger(__name__)


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
    run_id: str
    """unlike the name, no other run has it"""

    @property
    def log_dir(self) -> Path:
        return self.config.watch.log_dir


def log_file(run_config: RunConfig) -> Path:
    """The run's `log.txt`; its `metrics.jsonl` lies beside it."""
    return run_config.watch.log_dir / LOG_NAME


def require_folders(run_config: RunConfig) -> None:
    """Makes the folders of the sinks; raises ConfigError, naming the flag, if it cannot, or cannot
    write to them."""
    folders = {"log_dir": run_config.watch.log_dir}
    if run_config.watch.use_tensorboard or run_config.experiment.use_wandb:
        folders["runs_dir"] = run_config.watch.runs_dir
    for flag, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"cannot write to {folder}: {error.strerror}; choose another folder with --{flag} "
                "or --out_dir"
            ) from error


def require_usable(run_config: RunConfig) -> None:
    """Raises ConfigError if TensorBoard or W&B cannot work for a reason that the user can correct.
    Once before a run, or before many: no error of theirs ends one later."""
    require(
        not run_config.watch.use_tensorboard or find_spec("tensorboard") is not None,
        "--use_tensorboard needs TensorBoard; first: pip install tensorboard",
    )
    if run_config.experiment.use_wandb:
        wandb.require_usable(run_config.experiment)


def open_sinks(start: RunStart) -> list[Sink]:
    """The sinks of a run.

    A message that is logged meanwhile goes to the sinks that are open by then. Raises ConfigError
    if the log or the records cannot be written; the other sinks are closed then. A run goes on
    without the others if they cannot be opened.
    """
    sinks: list[Sink] = []

    def write(event: EventRecord) -> None:
        for sink in sinks:
            sink.write(event)

    with contextlib.ExitStack() as opened, events_to(write):
        for name, open_sink in SINKS.items():
            try:
                sink = open_sink(start)
            except Exception as error:  # of many kinds; only that of a required sink ends the run
                if name not in REQUIRED:
                    is_expected = isinstance(error, ConfigError | OSError)
                    logger.warning("no %s: %s", name, error, exc_info=not is_expected)
                    continue
                if not isinstance(error, OSError):
                    raise
                raise ConfigError(
                    f"cannot write {error.filename}: {error.strerror}; choose another folder "
                    "with --log_dir or --out_dir"
                ) from error
            if sink is not None:
                opened.callback(sink.close)
                sinks.append(sink)
        opened.pop_all()
    return sinks


def _json_lines(start: RunStart) -> Sink:
    about: dict[str, object] = {
        "preset": start.config.preset,
        "seed": start.config.machine.seed,
        "tokens_per_step": start.config.data.total_batch_size,
    }
    if start.config.data.batch_ramp:
        about["batch_ramp"] = list(start.config.data.batch_ramp)
    return JsonLines(start.log_dir / RECORDS_NAME, start.name, start.step, about)


def _tensorboard(start: RunStart) -> Sink | None:
    if not start.config.watch.use_tensorboard:
        return None
    folder = start.config.watch.runs_dir / start.name
    hparams = addresses.public(start.config.to_dict())
    return TensorBoard(folder, hparams, start.step, start.references)


def _wandb(start: RunStart) -> Sink | None:
    settings, runs_dir = start.config.experiment, start.config.watch.runs_dir
    if not settings.use_wandb:
        return None
    # Reading a long log takes seconds.
    logged_step = log_reader.furthest_step(log_file(start.config), start.name)
    hparams = addresses.public(start.config.to_dict())
    return WandB(settings, runs_dir, start.name, start.run_id, hparams, logged_step)


SINKS: dict[str, Callable[[RunStart], Sink | None]] = {
    "console": lambda _: Console(),
    "log": lambda start: LogFile(start.log_dir / LOG_NAME, start.name, start.step),
    "records": _json_lines,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
"""opens the sinks, in this order; None is a sink that is off. A new sink is a file in
`gpt2.metrics` and an entry here"""
REQUIRED = ("log", "records")
"""without these a run does not start"""


def places(run_config: RunConfig, run_name: str) -> list[str]:
    """What lies where, as `log logs/log.txt`."""
    watch, found = run_config.watch, [f"log {log_file(run_config)}"]
    if watch.use_tensorboard:
        found.append(f"TensorBoard {watch.runs_dir / run_name}")
    if run_config.experiment.use_wandb:
        found.append(f"W&B {watch.runs_dir / 'wandb'}")
    return found

"""Which sinks a run has, and where they keep its records."""

import contextlib
from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.config.run import RunConfig
from gpt2.metrics import log_reader
from gpt2.metrics.console import Console
from gpt2.metrics.jsonl import RECORDS_NAME, JsonLines
from gpt2.metrics.log_file import LOG_NAME, LogFile
from gpt2.metrics.records import Sink, events_to
from gpt2.metrics.tensorboard import TensorBoard
from gpt2.metrics.wandb import WandB


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

    Raises ConfigError if one cannot be opened; the others are closed then.
    """
    path, runs_dir = log_file(run_config), run_config.watch.runs_dir
    hparams = run_config.to_dict()
    about = {
        "preset": run_config.preset,
        "seed": run_config.machine.seed,
        "tokens_per_step": run_config.data.total_batch_size,
    }
    sinks: list[Sink] = [Console()]
    with contextlib.ExitStack() as opened:

        def add(sink: Sink) -> None:
            opened.callback(sink.close)
            sinks.append(sink)

        try:
            log = LogFile(path, run_name, step)
            add(log)
            add(JsonLines(path.with_name(RECORDS_NAME), run_name, step, about))
        except OSError as error:
            raise ConfigError(
                f"cannot write {error.filename}: {error.strerror}; choose another folder with "
                "--log_dir or --out_dir"
            ) from error
        if run_config.watch.use_tensorboard:
            add(TensorBoard(runs_dir / run_name, hparams, step, references))
        if run_config.experiment.use_wandb:
            logged_step = log_reader.furthest_step(path, run_name)  # seconds for a long log
            with events_to(log.write):  # it warns if it cannot connect
                add(WandB(run_config.experiment, runs_dir, run_name, hparams, logged_step))
        opened.pop_all()
    return sinks


def places(run_config: RunConfig, run_name: str) -> list[str]:
    """What lies where, as `log logs/log.txt`."""
    watch, found = run_config.watch, [f"log {log_file(run_config)}"]
    if watch.use_tensorboard:
        found.append(f"TensorBoard {watch.runs_dir / run_name}")
    if run_config.experiment.use_wandb:
        found.append(f"W&B {watch.runs_dir / 'wandb'}")
    return found

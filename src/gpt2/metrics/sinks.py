"""Which sinks a run's metrics go to, and where those keep them."""

from pathlib import Path

from gpt2.config.run import RunConfig
from gpt2.metrics import log_reader, records
from gpt2.metrics.console import Console
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import Metrics, Sink
from gpt2.metrics.tensorboard import TensorBoard
from gpt2.metrics.wandb import WandB


def log_file(run_config: RunConfig) -> Path:
    """Where the run's lines are appended."""
    return run_config.watch.log_dir / "log.txt"


def require_folders(run_config: RunConfig) -> None:
    """Makes the folders of the sinks; raises ConfigError if one cannot be."""
    with_runs = run_config.watch.use_tensorboard or run_config.experiment.use_wandb
    records.require_folders(run_config.watch, with_runs)


def open_sinks(
    run_config: RunConfig, run_name: str, step: int, references: dict[str, float]
) -> list[Sink]:
    """The sinks of a run that goes on from `step`; raises ConfigError if one cannot be had."""
    log, runs_dir = log_file(run_config), run_config.watch.runs_dir
    hparams, told_step = run_config.to_dict(), log_reader.furthest_step(log, run_name)
    sinks: list[Sink] = [Console(), LogFile(log, run_name, step)]
    if run_config.watch.use_tensorboard:
        sinks.append(TensorBoard(runs_dir / run_name, hparams, step, references))
    if run_config.experiment.use_wandb:
        warn = Metrics(sinks).message
        sinks.append(WandB(run_config.experiment, runs_dir, run_name, hparams, told_step, warn))
    return sinks


def places(run_config: RunConfig, run_name: str) -> list[str]:
    """What lies where, for people."""
    watch, named = run_config.watch, [f"log {log_file(run_config)}"]
    if watch.use_tensorboard:
        named.append(f"TensorBoard {watch.runs_dir / run_name}")
    if run_config.experiment.use_wandb:
        named.append(f"W&B {watch.runs_dir / 'wandb'}")
    return named

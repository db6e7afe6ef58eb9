"""A training as a job: `job` makes it, in the owner; `run` trains, in a worker or its ranks."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from gpt2.base import addresses, folder_lock, log
from gpt2.base.errors import ConfigError, Diverged, ReportedByOtherRank
from gpt2.checkpoint import store
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.distributed import lost_rank
from gpt2.distributed.rendezvous import env_rank
from gpt2.distributed.world import World
from gpt2.experiments.pool.job import Job, Stopped
from gpt2.experiments.pool.messages import EndedAs, JobEnded
from gpt2.experiments.pool.worker import Reporter
from gpt2.experiments.training import ddp
from gpt2.metrics import log_reader, sinks
from gpt2.train import dataset, trainer
from gpt2.train.report import Answer, Report
from gpt2.train.setup import require_enough_rows
from gpt2.train.state import RunResult

TARGET, RANK_TARGET = f"{__name__}:run", f"{__name__}:run_rank"
REPORT_EVERY_S = 0.5
STALE_LOCK_S = 150.0
"""how long a shared disk may keep the lock of a lost machine: more than twice the default of an NFS
server (`nfsv4leasetime`)"""
LOCK_POLL_S = 2.0
RESULT_OPTIONS = (
    *options.FIXED_BY_CHECKPOINT,
    *options.NOTED_AT_RESUME,
    "checkpoint.init_from",
    "data.data_root",
    "data.mixture",
    "evaluation.eval_interval",
    "evaluation.eval_batches",
    "evaluation.eval_rows",
)
NO_NUMBERS = ("state", "exit_code")
"""of a RunResult: how the run ended"""
METRICS = (
    *(item.name for item in fields(RunResult) if item.name not in NO_NUMBERS),
    "tokens_per_s",
    "train_s",
    "peak_memory_gb",
)
"""names of the numbers that a training returns, some of them None"""


def require_fresh_start(run_config: RunConfig) -> None:
    """Raises ConfigError if the options name a run or a checkpoint: each training of an experiment
    is named after its job and resumes from its own checkpoint."""
    name, settings = run_config.experiment, run_config.checkpoint
    if name.name is not None or name.gpu_id is not None:
        raise ConfigError(
            "--experiment_name, --wandb_run_name and --gpu_id are for one run; each training of an "
            "experiment is named after its job, --checkpoint_dir keeps experiments apart, and "
            "--gpus says where they train"
        )
    if settings.resume_from is not None:
        raise ConfigError(
            f"--resume {settings.resume_from} is for one run; to resume an experiment, give the "
            "same command again"
        )


def job(name: str, run_config: RunConfig, folder: Path, *, ranks: int = 1, **changes: Any) -> Job:
    """The job that trains `run_config` on `ranks` GPUs, keeps everything in `folder`, and resumes
    there. `changes` are options by name."""
    own_options = {
        "checkpoint_dir": folder,
        "log_dir": folder,
        "runs_dir": run_config.watch.runs_dir / folder.parent.name / folder.name,
        "resume": None,
        **changes,
    }
    run_name = f"{folder.parent.name}_{name}_{time.strftime('%Y%m%d_%H%M%S')}"
    stored = options.overlay(run_config, own_options).to_dict()
    return Job(name, TARGET, {"run": stored, "run_name": run_name, "ranks": ranks})


def run(report: Report, run: Mapping[str, Any], run_name: str, ranks: int = 1) -> dict[str, Any]:
    """Trains the stored configuration, and returns what comparisons of trainings need.

    Raises Stopped if it was stopped, after saving, and EndedAs if one of several ranks failed.
    """
    wait_for_folder(report, options.of_stored(run).checkpoint.checkpoint_dir)
    if ranks == 1:
        return _train(report, run, run_name)
    job = Job(run_name, RANK_TARGET, {"run": run, "run_name": run_name})
    result: dict[str, Any] = ddp.run_on_ranks(report, job, ranks)
    if "diverged" in result:
        raise Diverged(result["diverged"])
    return result


def run_rank(report: Reporter, run: Mapping[str, Any], run_name: str) -> dict[str, Any]:
    """`run` on one of several ranks. Returns an empty dict on all but rank 0, and if another rank
    has the error that ends the training."""
    log.setup(rank=env_rank()[0])
    try:
        return _train(report, run, run_name, report.send_failure)
    except ReportedByOtherRank:
        return {}
    except Diverged as error:  # which a caller may handle
        return {"diverged": str(error)}
    except RuntimeError as error:
        if lost_rank.is_lost(error):
            raise EndedAs(JobEnded("lost", reason="another rank died")) from error
        raise


def _train(
    report: Report,
    run: Mapping[str, Any],
    run_name: str,
    on_failure: Callable[[Exception], None] | None = None,
) -> dict[str, Any]:
    run_config = options.of_stored(run)
    if store.list_checkpoints(run_config.checkpoint.checkpoint_dir):
        run_config = options.overlay(run_config, {"resume": "latest", "init_from": "scratch"})
    result = trainer.run(run_config, _ThrottledReport(report), run_name, on_failure)
    if result.state == "stopped":
        raise Stopped
    if env_rank()[0] > 0:  # rank 0 writes the log and has the result
        return {}
    logged = log_reader.read_runs(run_config.watch.log_dir / "log.txt")[-1]
    speeds = [item.tokens_per_s for item in logged.steps.values()]
    returned = asdict(result) | {
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "train_s": sum(item.elapsed_s for item in logged.steps.values()),
        "peak_memory_gb": _peak_memory_bytes() / 1e9,
    }
    return {name: returned[name] for name in METRICS}


def wait_for_folder(report: Report, folder: Path) -> None:
    """Waits while another process holds the folder's lock, STALE_LOCK_S at most: a shared disk
    keeps the lock of a lost machine for a while. If it is still held then, the training raises the
    error that names its holder. Raises Stopped if `report` answers so meanwhile."""
    deadline = time.monotonic() + STALE_LOCK_S
    while folder_lock.is_held(folder) and time.monotonic() < deadline:
        if report() != "go":
            raise Stopped
        time.sleep(LOCK_POLL_S)


def prepare(run_config: RunConfig, ranks: int = 1) -> None:
    """What is done once for all trainings, before the first one: prepares the data, if necessary,
    and tries the metrics sinks. Raises DataError without data, and ConfigError if a step has too
    few rows for `ranks` ranks or a sink cannot work."""
    sinks.require_usable(run_config)
    sinks.require_folders(run_config)
    cpu = torch.device("cpu")
    require_enough_rows(run_config, World(0, ranks, cpu))
    dataset.with_vocab_size(run_config, dataset.open_data(run_config, World(0, 1, cpu)))


class _ThrottledReport:
    """Passes on every validation, and steps every REPORT_EVERY_S at most, so that the training does
    not wait for answers. Adds the total number of steps, once that is known."""

    def __init__(self, report: Report) -> None:
        self._report, self._last_report = report, 0.0
        self._known: dict[str, float] = {}

    def __call__(self, **metrics: float) -> Answer:
        now = time.monotonic()
        if "total_steps" in metrics:
            self._known = {"total_steps": metrics["total_steps"]}
        if "loss" in metrics and now < self._last_report + REPORT_EVERY_S:
            return "go"
        self._last_report = now
        return self._report(**self._known | metrics)


def _peak_memory_bytes() -> int:
    """Peak memory of the training: of the GPU, or of the host if it used none."""
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return allocated
    # Not getrusage's ru_maxrss, which a process inherits from its parent.
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def result_options(run_config: RunConfig) -> dict[str, Any]:
    """The options that the result of a training depends on, by the names of their flags: not
    folders, intervals of checkpoints, or the machine. Folders of earlier versions have the same
    ones: a later option is among them only with another value than theirs."""
    plain = addresses.public(run_config.to_dict())
    sized = dataset.with_vocab_size_if_known(run_config)
    plain["model"]["vocab_size"] = sized.model.embedding_rows
    parts = (name.split(".") for name in RESULT_OPTIONS)
    found = {name: plain[part][name] for part, name in parts} | options.FORMER
    if dataset.is_mixed_by_folders(run_config):  # earlier versions read one after the other
        found["mixture"] = "folders by size"
    return {
        name: value
        for name, value in found.items()
        if name not in options.LATER or value != options.LATER[name]
    }

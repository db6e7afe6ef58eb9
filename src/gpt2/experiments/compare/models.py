"""Trains several models on the same data and token budget, and compares them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.config import flops, options
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import RunConfig
from gpt2.experiments.compare import model_table
from gpt2.experiments.job_group import JobGroup, Records, Summary
from gpt2.experiments.training import training_job
from gpt2.inspection import figures

MODELS: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in ARCHITECTURES}
"""the options of each model that differ from the options of the comparison"""


def group(
    run: RunConfig,
    models: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    ranks: int = 1,
    **more: Any,
) -> JobGroup:
    """The training `run` with each of `models`, which are options by the name of the model.

    Each training has `ranks` GPUs, or processes on the CPU. `more` are options of JobGroup.
    """
    training_job.require_fresh_start(run)
    if run.checkpoint.init_from != "scratch":
        raise ConfigError(
            "--init_from cannot be used with several models: the weights fit only one of them"
        )
    if run.model.architecture != ModelConfig().architecture:
        raise ConfigError("--architecture is what is compared; choose with --models")
    runs = {name: _changed(run, name, changes) for name, changes in models.items()}

    def summarize(records: Records) -> Summary:
        rows = [
            model_table.row(item, flops.parameter_count(runs[name].model))
            for name, item in records.items()
        ]
        files = {"comparison.csv": functools.partial(model_table.write_csv, rows)}
        if logged := model_table.logged(folder, [*models]):
            draw = functools.partial(model_table.draw, logged, run.data.total_batch_size)
            files["comparison.png"] = functools.partial(figures.write, draw)
        return Summary(lambda: model_table.models_table(rows), files, {"summary": rows})

    budget = f"{run.data.epochs} epochs of {run.data.data_root}"
    if run.data.max_steps is not None:
        tokens = run.data.max_steps * run.data.total_batch_size
        budget = f"{tokens:,} tokens of {run.data.data_root}"
    on_ranks = f", on {ranks} ranks" if ranks > 1 else ""
    compared = {name for changes in models.values() for name in changes}
    shared = training_job.result_options(run)
    return JobGroup(
        kind="models",
        heading=f"Models {', '.join(models)}: {budget} each{on_ranks}",
        fixed={name: value for name, value in shared.items() if name not in compared},
        values={name: {"model": name} for name in models},
        job=lambda name, _: training_job.job(name, runs[name], folder / name, ranks=ranks),
        summarize=summarize,
        log_name="training",
        folder=folder,
        **more,
    )


def _changed(run: RunConfig, name: str, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration of one model's training."""
    try:
        return options.overlay(run, changes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error

"""The best trial of a search: its weights, its configuration, and the command that trains it."""

import json
import shlex
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from gpt2.base import addresses, atomic_files, json_fields
from gpt2.base.errors import ConfigError
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.experiments.search import trial, trial_report

FOLDER, COMMAND = "best_overall", "train.sh"
TRAINING_PARTS = ("model", "data", "optim", "machine")
"""parts of a configuration that the command has flags for"""
LENGTHS = {"max_steps", "decay_steps"}
"""options of the short trainings of a search, which the command leaves out unless searched"""


def export(trials: Sequence[FrozenTrial], folder: Path) -> str | None:
    """Copies the best of the trials to `best_overall` in `folder`.

    Returns the command that trains it in full; None if none has finished, or its files are not in
    `folder`. Then those of an earlier best trial are removed, but not a training that was started
    beside them. Raises OSError, and ConfigError if a `config.json` is damaged.
    """
    finished = trial_report.best_first(trials)
    if not finished:
        return None
    number = finished[0].number
    source, target = folder / trial.name_of(number), folder / FOLDER
    weights = source / trial.WEIGHTS
    exported, about = (read_config(path / trial.CONFIG) for path in (target, source))
    # Its own folder may have been removed since.
    is_exported = exported.get("trial") == number and about in ({}, exported)
    if not is_exported and not (about and weights.exists()):
        for name in (trial.CONFIG, COMMAND, weights.name):
            (target / name).unlink(missing_ok=True)
        return None
    about = about or exported
    searched = about.get("parameters", {})
    command = command_of(options.of_stored(about), target / "training", searched)
    if not is_exported:
        target.mkdir(exist_ok=True)
        (target / trial.CONFIG).unlink(missing_ok=True)
        with weights.open("rb") as content, atomic_files.writing(target / weights.name) as file:
            shutil.copyfileobj(content, file)
        note = f"#!/bin/sh\n# The best trial, {source.name}, in full.\n"
        atomic_files.write_text(target / COMMAND, f"{note}{command}\n")
        (target / COMMAND).chmod(0o755)
        # Last, as it shows that the other files are complete.
        atomic_files.write_text(target / trial.CONFIG, json.dumps(about, indent=1) + "\n")
    return command


def read_config(path: Path) -> dict[str, Any]:
    """The content of a trial's `config.json`; empty without the file."""
    try:
        return json_fields.read(path)
    except FileNotFoundError:
        return {}
    except json_fields.UNREADABLE as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def command_of(run_config: RunConfig, out_dir: Path, searched: Collection[str] = ()) -> str:
    """The `gpt2 train` command for this configuration.

    It trains as long as the preset says, unless the options in LENGTHS were `searched`.
    """
    flags = ["--preset", run_config.preset, "--out_dir", str(out_dir)]
    preset = presets.preset(run_config.preset).to_dict()
    values = addresses.public(run_config.to_dict())
    left_out = {"cache_dir"} | (LENGTHS - set(searched))
    for part in TRAINING_PARTS:
        for name, value in values[part].items():
            if value != preset[part][name] and name not in left_out:
                flags += _flag(name, value)
    if run_config.checkpoint.init_from != "scratch":
        flags += _flag("init_from", run_config.checkpoint.init_from)
    return f"gpt2 train {shlex.join(flags)}"


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]

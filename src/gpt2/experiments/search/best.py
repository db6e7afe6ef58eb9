"""The best trial of a search: its weights, its configuration, and the command that trains it."""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from gpt2.base import atomic_files
from gpt2.base.errors import ConfigError
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.experiments.search import trial

FOLDER, COMMAND = "best_overall", "train.sh"
TRAINING_PARTS = ("model", "data", "optim", "machine")
"""parts of a configuration that the command has flags for"""
LENGTHS = {"max_steps", "decay_steps"}
"""options of the short trainings of a search, which the command leaves out unless searched"""


@dataclass(frozen=True)
class BestTrial:
    """The best trial."""

    trial: FrozenTrial
    command: str | None
    """trains it in full; None if its files are not in the folder of the search"""


def export(study: Study, folder: Path) -> BestTrial | None:
    """Copies the best trial to `best_overall` in `folder`; None if no trial has finished.

    If its files are not in `folder`, those of an earlier best trial are removed from there.
    Raises OSError, and ConfigError if the trial's `config.json` is damaged.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return None
    found = min(finished, key=lambda item: (item.value, item.number))
    source, target = folder / trial.name_of(found.number), folder / FOLDER
    if not (source / trial.CONFIG).exists() or not (source / trial.WEIGHTS).exists():
        return BestTrial(found, _exported_command(target, found.number))
    target.mkdir(exist_ok=True)
    about = _read_config(source / trial.CONFIG)
    searched = about.get("parameters", {})
    command = command_of(options.of_stored(about), target / "training", searched)
    _link_or_copy(source / trial.WEIGHTS, target / trial.WEIGHTS)
    atomic_files.write_text(target / trial.CONFIG, json.dumps(about, indent=1) + "\n")
    note = f"#!/bin/sh\n# The best of {len(finished)} trials: {source.name}, in full.\n"
    atomic_files.write_text(target / COMMAND, f"{note}{command}\n")
    (target / COMMAND).chmod(0o755)
    return BestTrial(found, command)


def _read_config(path: Path) -> dict[str, Any]:
    """The content of a trial's `config.json`; raises OSError, and ConfigError if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: expected a JSON object")
    return content


def _exported_command(target: Path, number: int) -> str | None:
    """The command of this trial if it was exported before its own folder was removed.

    The files of another exported trial are removed, but not a training that was started there.
    """
    with contextlib.suppress(OSError, ConfigError):
        if _read_config(target / trial.CONFIG).get("trial") == number:
            return (target / COMMAND).read_text().splitlines()[-1]
    for name in (COMMAND, trial.CONFIG, trial.WEIGHTS):
        (target / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        target.rmdir()
    return None


def command_of(run_config: RunConfig, out_dir: Path, searched: Collection[str] = ()) -> str:
    """The `gpt2 train` command for this configuration.

    It trains as long as the preset says, unless the options in LENGTHS were `searched`.
    """
    flags = ["--preset", run_config.preset, "--out_dir", str(out_dir)]
    preset, values = presets.preset(run_config.preset).to_dict(), run_config.to_dict()
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
    return [f"--{name}", str(value)]


def _link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system has no links.

    `target` is replaced at once, so that it is always a complete file.
    """
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(target.name + atomic_files.TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)

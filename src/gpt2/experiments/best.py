"""The best trial of a search: its weights, its configuration, and the command that trains it."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from gpt2 import atomic, config
from gpt2.config import RunConfig
from gpt2.experiments import trial as trials

FOLDER, COMMAND = "best_overall", "train.sh"
TRAINED = ("model", "data", "optim", "machine")
"""parts of a configuration that say how to train"""
ONLY_IN_A_SEARCH = {"max_steps", "cache_dir"}


def keep(study: Study, folder: Path) -> str | None:
    """Keeps the best trial in `best_overall` of `folder`; the command that trains it in full, or
    None where no trial has finished, or the best one is on another machine."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return None
    number = min(finished, key=lambda item: (item.value, item.number)).number
    source, target = folder / trials.name_of(number), folder / FOLDER
    if not (source / trials.CONFIG).exists() or not (source / trials.WEIGHTS).exists():
        return None
    target.mkdir(exist_ok=True)
    about = json.loads((source / trials.CONFIG).read_text())
    command = command_of(config.of_stored(about), target / "training")
    _place(source / trials.WEIGHTS, target / trials.WEIGHTS)
    atomic.write_text(target / trials.CONFIG, json.dumps(about, indent=1) + "\n")
    note = f"#!/bin/sh\n# The best of {len(finished)} trials: {source.name}, in full.\n"
    atomic.write_text(target / COMMAND, f"{note}{command}\n")
    (target / COMMAND).chmod(0o755)
    return command


def command_of(run_config: RunConfig, out_dir: Path) -> str:
    """The `gpt2 train` command of this training, for as long as its preset or --epochs say."""
    flags = ["--preset", run_config.preset, "--out_dir", str(out_dir)]
    preset, mine = config.preset(run_config.preset).to_dict(), run_config.to_dict()
    for part in TRAINED:
        for name, value in mine[part].items():
            if value != preset[part][name] and name not in ONLY_IN_A_SEARCH:
                flags += _flag(name, value)
    return f"gpt2 train {shlex.join(flags)}"


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", str(value)]


def _place(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links; the name is
    never without a whole file."""
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(target.name + atomic.TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)

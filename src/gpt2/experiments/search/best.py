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
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.experiments.search import trial as trials

FOLDER, COMMAND = "best_overall", "train.sh"
TRAINED = ("model", "data", "optim", "machine")
"""parts of a configuration that say how to train"""
LENGTHS = {"max_steps", "decay_steps"}
"""what is said for the short trainings of a search, unless it was searched"""


@dataclass(frozen=True)
class Best:
    """The best trial."""

    trial: FrozenTrial
    command: str | None
    """trains it in full; None where its files are not here"""


def keep(study: Study, folder: Path) -> Best | None:
    """Keeps the best trial in `best_overall` of `folder`; None where none has finished. What an
    earlier one has left there goes if the best one is on another machine."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return None
    found = min(finished, key=lambda item: (item.value, item.number))
    source, target = folder / trials.name_of(found.number), folder / FOLDER
    if not (source / trials.CONFIG).exists() or not (source / trials.WEIGHTS).exists():
        return Best(found, _kept(target, found.number))
    target.mkdir(exist_ok=True)
    about = json.loads((source / trials.CONFIG).read_text())
    searched = about.get("parameters", {})
    command = command_of(options.of_stored(about), target / "training", searched)
    _place(source / trials.WEIGHTS, target / trials.WEIGHTS)
    atomic_files.write_text(target / trials.CONFIG, json.dumps(about, indent=1) + "\n")
    note = f"#!/bin/sh\n# The best of {len(finished)} trials: {source.name}, in full.\n"
    atomic_files.write_text(target / COMMAND, f"{note}{command}\n")
    (target / COMMAND).chmod(0o755)
    return Best(found, command)


def _kept(target: Path, number: int) -> str | None:
    """The command of the trial if it is what is kept, though its own folder is gone; what is kept
    of another one is removed, but for a training that was begun with it."""
    try:
        if json.loads((target / trials.CONFIG).read_text())["trial"] == number:
            return (target / COMMAND).read_text().splitlines()[-1]
    except (OSError, ValueError, TypeError, LookupError):
        pass
    for name in (COMMAND, trials.CONFIG, trials.WEIGHTS):
        (target / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        target.rmdir()
    return None


def command_of(run_config: RunConfig, out_dir: Path, searched: Collection[str] = ()) -> str:
    """The `gpt2 train` command of this training. How long it trains, and its rate decays, say its
    preset and --epochs, unless that was `searched`."""
    flags = ["--preset", run_config.preset, "--out_dir", str(out_dir)]
    preset, mine = presets.preset(run_config.preset).to_dict(), run_config.to_dict()
    left_out = {"cache_dir"} | (LENGTHS - set(searched))
    for part in TRAINED:
        for name, value in mine[part].items():
            if value != preset[part][name] and name not in left_out:
                flags += _flag(name, value)
    if run_config.checkpoint.init_from != "scratch":
        flags += _flag("init_from", run_config.checkpoint.init_from)
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
    temporary = target.with_name(target.name + atomic_files.TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)

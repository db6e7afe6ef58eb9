"""Which study the trials in a folder belong to, and on which machine a trial is.

A folder has an id, in `study.json`, which stays when the machine is renamed or the folder is moved;
the study knows the ids of all folders with its trials. A trial goes on from the checkpoints in its
folder: one of another study, whose they are not, must never find them.
"""

import json
import socket
import uuid
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial

from gpt2.base import atomic_files
from gpt2.base.errors import ConfigError
from gpt2.experiments import results
from gpt2.experiments.search import trial

FILE = "study.json"
OWNER = "owner"
"""where a trial keeps the id of its folder"""
KNOWN = "folder "
"""where a study keeps, by their ids, the folders with its trials"""
SHOWN = 5


def id_of(folder: Path) -> str:
    """The id of the folder; empty if it has none."""
    try:
        return str(json.loads((folder / FILE).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_mine(item: FrozenTrial, folder_id: str, is_shared: bool) -> bool:
    """Whether the trial is in the folder with this id. Nobody else has asked for one that nobody
    owns, where the study is not shared: this folder's owner was killed in that moment."""
    owner = item.user_attrs.get(OWNER)
    return bool(owner == folder_id) if owner is not None else not is_shared


def place_of(study: Study, item: FrozenTrial) -> str:
    """The folder of the trial, with its machine."""
    known = study.user_attrs.get(KNOWN + item.user_attrs.get(OWNER, ""), "another machine")
    return f"{known}/{trial.name_of(item.number)}"


def join(study: Study, folder: Path, where: str, is_shared: bool) -> None:
    """Makes the folder one of the study's.

    Raises ConfigError if it has trials that are not in the study; `where` names that.
    """
    mine = id_of(folder)
    if strangers := _strangers(study, folder, mine, is_shared):
        more = ", …" if len(strangers) > SHOWN else ""
        raise ConfigError(
            f"{folder} has trials that are not in the study {where}: "
            f"{', '.join(strangers[:SHOWN])}{more}; trials of this one would go on from their "
            "checkpoints. Give the --study_name and --storage that they belong to, or another "
            f"--checkpoint_dir; if their study is deleted, remove {folder} to begin afresh"
        )
    place = f"{socket.gethostname()}:{folder.resolve()}"
    if KNOWN + mine not in study.user_attrs:
        mine = uuid.uuid4().hex
    if study.user_attrs.get(KNOWN + mine) != place:
        study.set_user_attr(KNOWN + mine, place)
    if mine != id_of(folder):
        atomic_files.write_text(folder / FILE, json.dumps({"id": mine, "study": where}) + "\n")


def _strangers(study: Study, folder: Path, mine: str, is_shared: bool) -> list[str]:
    """Trials of which there is something in the folder, and which the study does not have there."""
    known = {
        trial.name_of(item.number)
        for item in study.get_trials(deepcopy=False)
        if is_mine(item, mine, is_shared)
    }
    there = {record.job for record in results.read_results(folder)}
    there |= {path.name for path in folder.glob("trial_*") if path.is_dir() and any(path.iterdir())}
    return sorted(there - known)

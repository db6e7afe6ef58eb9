"""Which study the trials in a folder belong to, and in which folder a trial is.

A folder has an id, in `study.json`, which stays when the machine is renamed or the folder is moved;
the study stores the ids of all folders with its trials. A trial continues from the checkpoints in
its folder, and must never find those of another study.
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
"""attribute of a trial: the id of its folder"""
FOLDER_PREFIX = "folder "
"""attributes of a study with this prefix and a folder's id: the folder's machine and path"""
MAX_NAMED = 5


def folder_id(folder: Path) -> str:
    """The id of the folder; empty if it has none. Raises ConfigError if `study.json` is damaged."""
    path = folder / FILE
    try:
        return str(json.loads(path.read_text())["id"])
    except FileNotFoundError:
        return ""
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}); restore it, or use another --checkpoint_dir"
        ) from error


def belongs_to_folder(item: FrozenTrial, id_of_folder: str, is_shared: bool) -> bool:
    """Whether the trial is in the folder with this id.

    A trial without an owner was created by a process that was killed right after. In a study that
    is not shared, it was a process of this folder.
    """
    owner = item.user_attrs.get(OWNER)
    return bool(owner == id_of_folder) if owner is not None else not is_shared


def location_of(study: Study, item: FrozenTrial) -> str:
    """The machine and the folder of the trial, as `host:/path/trial_003`."""
    owner = item.user_attrs.get(OWNER, "")
    folder = study.user_attrs.get(FOLDER_PREFIX + owner, "another machine")
    return f"{folder}/{trial.name_of(item.number)}"


def register_folder(study: Study, folder: Path, study_location: str, is_shared: bool) -> None:
    """Registers the folder with the study.

    Raises ConfigError if the folder has trials that the study does not have.
    """
    known_id = folder_id(folder)
    if foreign := _foreign_trials(study, folder, known_id, is_shared):
        more = ", …" if len(foreign) > MAX_NAMED else ""
        raise ConfigError(
            f"{folder} has trials that are not in the study {study_location}: "
            f"{', '.join(foreign[:MAX_NAMED])}{more}; trials of this study would continue from "
            "their checkpoints. Use the --study_name and --storage that they belong to, or another "
            f"--checkpoint_dir; if their study was deleted, remove {folder} to start again"
        )
    new_id = known_id if FOLDER_PREFIX + known_id in study.user_attrs else uuid.uuid4().hex
    location = f"{socket.gethostname()}:{folder.resolve()}"
    if study.user_attrs.get(FOLDER_PREFIX + new_id) != location:
        study.set_user_attr(FOLDER_PREFIX + new_id, location)
    if new_id != known_id:
        content = {"id": new_id, "study": study_location}
        atomic_files.write_text(folder / FILE, json.dumps(content) + "\n")


def _foreign_trials(study: Study, folder: Path, id_of_folder: str, is_shared: bool) -> list[str]:
    """The names of trials that have files or results in the folder, but are not in the study."""
    known = {
        trial.name_of(item.number)
        for item in study.get_trials(deepcopy=False)
        if belongs_to_folder(item, id_of_folder, is_shared)
    }
    present = {result.job for result in results.read_results(folder)}
    present |= {
        path.name for path in folder.glob("trial_*") if path.is_dir() and any(path.iterdir())
    }
    return sorted(present - known)

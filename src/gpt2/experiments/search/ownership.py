"""Which process runs the trials of a study, and which folder the files of a trial are in.

One process at a time owns a study. Its heartbeat is an attribute of the study, as the study may be
in a database that other machines and folders reach. Within a folder, the folder's lock decides.

A folder has an id, in `study.json`, which stays when the machine is renamed or the folder is moved;
the study stores the ids of its folders. A trial continues from the checkpoints in its folder, and
must never find those of another study.
"""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from gpt2.base import atomic_files
from gpt2.base.errors import ConfigError, TrainingError
from gpt2.experiments import results
from gpt2.experiments.search import trial

logger = logging.getLogger(__name__)

FILE = "study.json"
OWNER = "owner"
"""attribute of a trial: the id of its folder"""
FOLDER_PREFIX = "folder "
"""attributes of a study with this prefix and a folder's id: the folder's machine and path"""
HEARTBEAT = "heartbeat"
"""attribute of a study: its owner and the last heartbeat"""
HEARTBEAT_S, DEAD_S = 15.0, 60.0
"""seconds between two heartbeats, and without one after which another process takes over"""
MAX_NAMED = 5


@dataclass(frozen=True)
class StudyOwner:
    """The process that runs the trials of a study."""

    pid: int
    location: str
    """host and path of its folder, as `host:/path`"""
    folder_id: str
    since: str
    """local time"""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.location}, since {self.since}"


def owner_of(study: Study) -> tuple[StudyOwner | None, float]:
    """The owner of the study, if it has one, and its last heartbeat in seconds since 1970."""
    found = study.user_attrs.get(HEARTBEAT)
    return (StudyOwner(**found["owner"]), found["beat"]) if found else (None, 0.0)


class Heartbeat:
    """Makes this process the owner of a study, and keeps it the owner.

    `clock` returns seconds since 1970. Raises ConfigError, naming the owner, if the study has
    another one. The folder must be locked: an earlier owner in the same folder has ended.
    """

    def __init__(self, study: Study, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._study, self._clock = study, clock
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(clock()))
        self._own = StudyOwner(os.getpid(), _location(folder), folder_id(folder), since)
        found, last = owner_of(study)
        # A copy of a folder has the same id, and machines may have the same name.
        place = self._own.location, self._own.folder_id
        if found and (found.location, found.folder_id) != place:
            silent_s = clock() - last
            if silent_s <= DEAD_S:
                raise ConfigError(
                    f"another search runs the study {study.study_name}: {found}; stop it, use "
                    "another --study_name, or run one search on several machines with --engine "
                    f"ray; if it was killed, this command takes over in {DEAD_S - silent_s:.0f}s"
                )
            logger.warning(
                "took over the study %s, which has had no heartbeat for %.0fs from %s",
                study.study_name,
                silent_s,
                found,
            )
        self._write()

    def beat(self) -> None:
        """Writes a heartbeat if one is due. Raises TrainingError if the study has a new owner."""
        if 0 <= self._clock() - self._last < HEARTBEAT_S:
            return
        found, _ = owner_of(self._study)
        if found not in (None, self._own):
            raise TrainingError(
                f"the study {self._study.study_name} was taken over by {found}, because this "
                f"process wrote no heartbeat for {DEAD_S:g}s; stop that one to continue here"
            )
        self._write()

    def end(self) -> None:
        """Leaves the study to the next owner, at once unless the database is unreachable."""
        with contextlib.suppress(StorageInternalError, SQLAlchemyError):
            if owner_of(self._study)[0] == self._own:
                self._study.set_user_attr(HEARTBEAT, None)

    def _write(self) -> None:
        now = self._clock()
        self._study.set_user_attr(HEARTBEAT, {"owner": asdict(self._own), "beat": now})
        self._last = now


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


def _location(folder: Path) -> str:
    return f"{socket.gethostname()}:{folder.resolve()}"


def location_of(study: Study, item: FrozenTrial, folder: Path) -> str:
    """The folder of the trial, with `host:` in front if it is not in `folder`."""
    owner = item.user_attrs.get(OWNER)
    is_here = owner in (None, folder_id(folder))
    parent = folder if is_here else study.user_attrs.get(f"{FOLDER_PREFIX}{owner}", "unknown")
    return f"{parent}/{trial.name_of(item.number)}"


def register_folder(study: Study, folder: Path, study_location: str) -> None:
    """Registers the folder with the study.

    Raises ConfigError if the folder has trials that the study does not have.
    """
    known_id = folder_id(folder)
    is_known = FOLDER_PREFIX + known_id in study.user_attrs
    if foreign := _foreign_trials(study, folder, is_known):
        more = ", …" if len(foreign) > MAX_NAMED else ""
        raise ConfigError(
            f"{folder} has trials that are not in the study {study_location}: "
            f"{', '.join(foreign[:MAX_NAMED])}{more}; trials of this study would continue from "
            "their checkpoints. Use the --study_name and --storage that they belong to, or another "
            f"--checkpoint_dir; if their study was deleted, remove {folder} to start again"
        )
    new_id = known_id if is_known else uuid.uuid4().hex
    location = _location(folder)
    if study.user_attrs.get(FOLDER_PREFIX + new_id) != location:
        study.set_user_attr(FOLDER_PREFIX + new_id, location)
    if new_id != known_id:
        content = {"id": new_id, "study": study_location}
        atomic_files.write_text(folder / FILE, json.dumps(content) + "\n")


def _foreign_trials(study: Study, folder: Path, is_known: bool) -> list[str]:
    """The names of trials that have files or results in the folder, but are not in the study.

    No trial of the study has files in a folder that the study does not know.
    """
    trials = study.get_trials(deepcopy=False) if is_known else []
    known = {trial.name_of(item.number) for item in trials}
    present = {result.job for result in results.read_results(folder)}
    present |= {
        path.name for path in folder.glob("trial_*") if path.is_dir() and any(path.iterdir())
    }
    return sorted(present - known)

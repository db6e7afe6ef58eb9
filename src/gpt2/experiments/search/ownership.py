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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from gpt2.base import atomic_files, json_fields
from gpt2.base.errors import ConfigError, TrainingError
from gpt2.experiments import results
from gpt2.experiments.search import trial

logger = logging.getLogger(__name__)

FILE = "study.json"
FOLDER_PREFIX = "folder "
"""attributes of a study with this prefix and a folder's id: the folder's machine and path"""
TRIAL_FOLDER = "owner"
"""attribute of a trial: the id of its folder"""
HEARTBEAT = "heartbeat"
"""attribute of a study: its owner and the last heartbeat"""
HEARTBEAT_S, DEAD_S = 15.0, 60.0
"""seconds between two heartbeats, and without one after which another process takes over"""


@dataclass(frozen=True)
class Beat:
    """A heartbeat."""

    owner: str
    """the process"""
    folder: list[str]
    """its machine and path, and its id"""
    beat: float
    """when it was, in seconds since 1970"""


def last_beat(study: Study) -> Beat | None:
    """The newest heartbeat of the study's owner; None if it has none."""
    found = study.user_attrs.get(HEARTBEAT)
    return json_fields.from_json(Beat, found, "the study") if found else None


class Heartbeat:
    """Makes this process the owner of a study, and keeps it the owner.

    `clock` returns seconds since 1970. Raises ConfigError, naming the owner, if the study has
    another one. The folder must be locked: an earlier owner in the same folder has ended.
    """

    def __init__(self, study: Study, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._study, self._clock = study, clock
        place, since = _location(folder), time.strftime("%F %T", time.localtime(clock()))
        # A copy of a folder has the same id, and machines may have the same name.
        owner = f"process {os.getpid()} on {place}, since {since}"
        self._last = Beat(owner, [place, folder_id(folder)], clock())
        found = last_beat(study)
        if found and found.folder != self._last.folder:
            silent_s = clock() - found.beat
            if silent_s <= DEAD_S:
                raise ConfigError(
                    f"another search runs the study {study.study_name}: {found.owner}; stop it, "
                    "use another --study_name, or run one search on several machines with --engine "
                    f"ray; if it was killed, this command takes over in {DEAD_S - silent_s:.0f}s"
                )
            logger.warning(
                "took over the study %s, which has had no heartbeat for %.0fs from %s",
                study.study_name,
                silent_s,
                found.owner,
            )
        self._write()

    def beat(self) -> None:
        """Writes a heartbeat if one is due. Raises TrainingError if the study has a new owner."""
        if 0 <= self._clock() - self._last.beat < HEARTBEAT_S:
            return
        found = last_beat(self._study)
        if found and found.owner != self._last.owner:
            raise TrainingError(
                f"the study {self._study.study_name} was taken over by {found.owner}, because this "
                f"process wrote no heartbeat for {DEAD_S:g}s; stop that one to continue here"
            )
        self._write()

    def end(self) -> None:
        """Leaves the study to the next owner, at once unless the database is unreachable."""
        with contextlib.suppress(StorageInternalError, SQLAlchemyError):
            if (found := last_beat(self._study)) and found.owner == self._last.owner:
                self._study.set_user_attr(HEARTBEAT, None)

    def _write(self) -> None:
        self._last = replace(self._last, beat=self._clock())
        self._study.set_user_attr(HEARTBEAT, asdict(self._last))


def register_folder(study: Study, folder: Path, study_location: str) -> None:
    """Registers the folder with the study; raises ConfigError if it has trials of another study."""
    known_id = folder_id(folder)
    if FOLDER_PREFIX + known_id not in study.user_attrs:
        with_files = {path.parent.name for path in folder.glob("trial_*/*")}
        if foreign := with_files | {result.job for result in results.read_results(folder)}:
            raise ConfigError(
                f"{folder} has trials that are not in the study {study_location}: "
                f"{min(foreign)} and {len(foreign) - 1} more; trials of this study would continue "
                "from their checkpoints. Use the --study_name and --storage that they belong to, "
                f"or another --checkpoint_dir; if their study was deleted, remove {folder} to "
                "start again"
            )
        known_id = uuid.uuid4().hex
        content = {"id": known_id, "study": study_location}
        atomic_files.write_text(folder / FILE, json.dumps(content) + "\n")
    study.set_user_attr(FOLDER_PREFIX + known_id, _location(folder))


def folder_id(folder: Path) -> str:
    """The id of the folder; empty if it has none. Raises ConfigError if `study.json` is damaged."""
    path = folder / FILE
    try:
        return str(json_fields.read(path)["id"])
    except FileNotFoundError:
        return ""
    except json_fields.UNREADABLE as error:
        reason = "it has no id" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{path} is damaged ({reason}); restore it, or use another --checkpoint_dir"
        ) from error


def location_of(study: Study, item: FrozenTrial, folder: Path) -> str:
    """The folder of the trial, with `host:` in front if it is not in `folder`."""
    owner = item.user_attrs.get(TRIAL_FOLDER)
    is_here = owner in (None, folder_id(folder))
    parent = folder if is_here else study.user_attrs.get(f"{FOLDER_PREFIX}{owner}", "unknown")
    return f"{parent}/{trial.name_of(item.number)}"


def _location(folder: Path) -> str:
    return f"{socket.gethostname()}:{folder.resolve()}"

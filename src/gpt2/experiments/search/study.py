"""The Optuna study of a search: its database, the process that runs it, the folders of its trials.

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
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from gpt2.base import addresses, atomic_files, json_fields, regular_file
from gpt2.base.errors import ConfigError, TrainingError
from gpt2.config import mixture
from gpt2.experiments import results
from gpt2.experiments.search import space, spec, trial
from gpt2.experiments.search.spec import Search

logger = logging.getLogger(__name__)

FILE, FOLDER_FILE = "optuna_study.db", "study.json"
FIXED, HEARTBEAT = "fixed", "heartbeat"
"""attributes of a study: the values that all of its trials share; its owner's last heartbeat"""
FOLDER_PREFIX = "folder "
"""attributes of a study with this prefix and a folder's id: the folder's machine and path"""
ENDING, RESULT, REASON, TRIAL_FOLDER = "ending", "result", "reason", "owner"
TRIAL_ATTRIBUTES = {ENDING: str, RESULT: dict, REASON: str, TRIAL_FOLDER: str}
"""attributes of a trial, and their types; the last one is the id of its folder"""
HEARTBEAT_S, DEAD_S = 15.0, 60.0
"""seconds between two heartbeats, and without one after which another process takes over"""
LOCK_TIMEOUT_S = 60.0
"""for SQLite's lock, which a dashboard may hold"""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, *[30.0] * 9)
"""between attempts to reach the database: five minutes"""
DELETED = "Record does not exist."
"""what Optuna's KeyError says for a study that no longer exists"""
EXAMPLE = "postgresql+psycopg://user:password@host/name (pip install 'psycopg[binary]')"


def url(folder: Path) -> str:
    """The URL of the study for Optuna's tools, which replace {SCHEMA_VERSION} in it.

    Raises ConfigError for a folder that no URL can name."""
    address = URL.create("sqlite", database=str(folder / FILE))
    text = address.render_as_string(hide_password=False)
    if make_url(text).database != address.database:  # SQLAlchemy before 2.1 escapes nothing
        raise ConfigError(
            f"the study cannot be in {folder}: SQLAlchemy {sqlalchemy.__version__} expects a path "
            "without '?'; choose another --checkpoint_dir, or pip install 'sqlalchemy>=2.1'"
        )
    return text.replace("{", "{{").replace("}", "}}")


def location(search: Search) -> str:
    """The file or URL of the study, without a password."""
    return addresses.without_secrets(search.storage or str(search.folder / FILE))


def open_study(search: Search) -> Study:
    """The study of the search, which is created if it does not exist.

    Raises ConfigError if the study is of another search or damaged, or the trials in the folder are
    of another study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _load_or_create(search)
    _require_sound(study, search)
    fixed = dict(search.description().fixed)
    # The next owner may have the data in other folders.
    del fixed["data_root"]
    if named := [item for item in mixture.corpora(search.run.data.data_root) if item.name]:
        fixed["corpora"] = " ".join(
            item.name if item.weight is None else f"{item.name}:{float(item.weight):g}"
            for item in named
        )
    before = study.user_attrs.get(FIXED)
    if before is not None and (rows := spec.differences(before, fixed)):
        raise results.another_experiment(f"the study {search.study_name}", rows, "--study_name")
    name = f"{search.study_name} in {location(search)}"
    register_folder(study, search.folder, name)
    if before is None:
        study.set_user_attr(FIXED, fixed)
    # A sampler with the same seed would draw the values of the earlier trials again.
    seed = search.run.machine.seed + len(study.get_trials(deepcopy=False))
    with warnings.catch_warnings():  # constant_liar is experimental before Optuna 5.0
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.sampler = TPESampler(seed=seed % 2**32, constant_liar=True)
    return study


def _load_or_create(search: Search) -> Study:
    address = search.storage or url(search.folder.resolve())
    # A firewall or a restart of the server may have closed an idle connection.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.startswith("sqlite"):
        options = {"connect_args": {"timeout": LOCK_TIMEOUT_S}}
    try:
        if search.storage is None and (file := search.folder / FILE).exists():
            regular_file.require(file)
        return optuna.create_study(
            storage=RDBStorage(address, engine_kwargs=options),
            study_name=search.study_name,
            pruner=MedianPruner(n_startup_trials=search.startup_trials),
            load_if_exists=True,
        )
    except Exception as error:  # of Optuna, of SQLAlchemy and its drivers, and of parsers
        if search.storage is None:
            raise _unreadable(search, error) from error
        # The message of a ValueError may have a part of the password.
        reason = "invalid URL" if isinstance(error, ValueError) else _first_line(error)
        raise ConfigError(
            f"cannot open the study {address}: {reason}; expected a --storage such as {EXAMPLE}"
        ) from error


def _require_sound(study: Study, search: Search) -> None:
    """Raises ConfigError if a part of the study cannot be read, or is not what Optuna and a search
    write. An outage of a server is raised as it is."""
    try:
        for item in study.get_trials(deepcopy=False):
            space.used_values(item)
            if item.state == TrialState.COMPLETE:
                json_fields.require_type(float, item.value)
            for name, kind in TRIAL_ATTRIBUTES.items():
                json_fields.require_type(kind | None, item.user_attrs.get(name))
        json_fields.require_type(dict | None, study.user_attrs.get(FIXED))
        json_fields.require_type(Beat | None, study.user_attrs.get(HEARTBEAT))
    except Exception as error:  # of Optuna, of SQLAlchemy, and of the parsers of all values
        if search.storage is not None and is_outage(error):
            raise
        raise _unreadable(search, error) from error


def _unreadable(search: Search, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read the study in {location(search)}: {_first_line(error)}; if it is damaged, "
        "restore it from a copy, or use another --checkpoint_dir or --storage"
    )


def is_outage(error: BaseException) -> bool:
    """Whether the error shows that the database is unreachable."""
    return isinstance(error.__cause__ or error, OperationalError | InterfaceError)


def log_outage(error: BaseException, pause_s: float) -> None:
    words = "the study's database is unreachable: %s; next attempt in %gs, trainings wait meanwhile"
    logger.warning(words, _first_line(error), pause_s)


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Raises TrainingError for errors of the database, and if the study was deleted."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, KeyError) as error:
        if isinstance(error, KeyError) and error.args != (DELETED,):
            raise
        raise TrainingError(
            f"cannot read or write the study: {_first_line(error)}; run the same command to "
            "continue"
        ) from error


def _first_line(error: BaseException) -> str:
    found = error.__cause__ or error
    first, *_ = str(found).strip().splitlines() or [""]
    return first or type(found).__name__


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
        beat = replace(self._last, beat=self._clock())
        self._study.set_user_attr(HEARTBEAT, asdict(beat))
        self._last = beat


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
        atomic_files.write_text(folder / FOLDER_FILE, json.dumps(content) + "\n")
    study.set_user_attr(FOLDER_PREFIX + known_id, _location(folder))


def folder_id(folder: Path) -> str:
    """The id of the folder; empty if it has none. Raises ConfigError if `study.json` is damaged."""
    path = folder / FOLDER_FILE
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

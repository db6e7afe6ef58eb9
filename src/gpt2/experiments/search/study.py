"""The Optuna study of a search: opened, compared with what is asked for, its errors in words."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError

from gpt2.base.errors import ConfigError, TrainingError
from gpt2.experiments.search import ownership, spec
from gpt2.experiments.search.spec import Search

T = TypeVar("T")

FILE = "optuna_study.db"
FIXED = "fixed"
"""where a study keeps what all of its trials have in common"""
LOCK_WAIT_S = 60.0
"""for a dashboard that reads"""
TRIES, PAUSE_S = 5, 1.0
"""owners that make the same study at the same moment disturb each other"""
OUTAGE_S = 300.0
"""for a data base that does not answer to come back"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""between two attempts meanwhile"""
EXAMPLE = "postgresql+psycopg://user:password@host/name (pip install 'psycopg[binary]')"


def path(folder: Path) -> Path:
    return folder / FILE


def url(folder: Path) -> str:
    """As Optuna's own tools take it."""
    # Optuna puts its version in the place of {SCHEMA_VERSION}.
    return _address(folder).replace("{", "{{").replace("}", "}}")


def _address(folder: Path) -> str:
    return URL.create("sqlite", database=str(path(folder))).render_as_string(hide_password=False)


def where(search: Search) -> str:
    """The address of the study, without a password."""
    return without_password(search.storage) if search.storage else str(path(search.folder))


def opened(search: Search) -> Study:
    """The study of the search, new or as it was left.

    Raises ConfigError if it is another search, or the trials in the folder are those of another
    study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _created(search)
    fixed = {
        name: value for name, value in search.description().fixed.items() if name != "data_root"
    }
    before = study.user_attrs.get(FIXED)
    if before is not None and (rows := spec.differences(before, fixed)):
        listed = "\n".join(f"  {row}" for row in rows)
        raise ConfigError(
            f"the study {search.study_name} is another search:\n{listed}\ngive the same values, "
            "or another --study_name"
        )
    name = f"{search.study_name} in {where(search)}"
    ownership.join(study, search.folder, name, search.is_shared)
    if before is None:
        study.set_user_attr(FIXED, fixed)
    # The same seed again would draw the same values again.
    seed = search.run.machine.seed + len(study.get_trials(deepcopy=False))
    if search.is_shared:  # nor should two machines that begin at the same moment
        seed += zlib.crc32(ownership.id_of(search.folder).encode())
    with warnings.catch_warnings():  # what it says of constant_liar before 5.0
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.sampler = TPESampler(seed=seed % 2**32, constant_liar=True)
    return study


def _created(search: Search) -> Study:
    address = search.storage or url(search.folder.resolve())
    if search.storage:
        _require_driver(search.storage)
    else:
        _require_name(search.folder)
    # A connection may have been closed since it was used: by a firewall, or a restart over there.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.startswith("sqlite"):
        options = {"connect_args": {"timeout": LOCK_WAIT_S}}
    for attempt in range(TRIES):
        try:
            return optuna.create_study(
                storage=RDBStorage(address, engine_kwargs=options),
                study_name=search.study_name,
                pruner=MedianPruner(n_startup_trials=search.startup_trials),
                load_if_exists=True,
            )
        except (StorageInternalError, SQLAlchemyError) as error:
            if attempt == TRIES - 1:
                raise ConfigError(
                    f"the study {without_password(address)} cannot be opened: {_first_line(error)}"
                ) from error
            time.sleep(PAUSE_S)
    raise AssertionError


def _require_name(folder: Path) -> None:
    """Raises ConfigError for a folder whose name would be read otherwise in an address."""
    if make_url(_address(folder)).database != str(path(folder)):
        raise ConfigError(
            f"{folder}: no address of a data base can hold this name; choose another "
            "--checkpoint_dir"
        )


def _require_driver(address: str) -> None:
    """Raises ConfigError for an address that is none, or whose driver is not installed."""
    try:
        make_url(address).get_dialect().import_dbapi()
    except (ArgumentError, ImportError, ValueError) as error:
        raise ConfigError(
            f"--storage {without_password(address)}: {_first_line(error)}; needed is an address "
            f"such as {EXAMPLE}"
        ) from error


@dataclass
class Patience:
    """Does again what failed because the data base did not answer, until it does."""

    say: Callable[[str], None] = lambda _: None
    is_stopping: Callable[[], bool] = lambda: False
    """whether somebody wants to end meanwhile"""

    def __call__(self, do: Callable[[], T]) -> T:
        """What `do` returns; it is one thing that may be done twice."""
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                done = do()
            except (StorageInternalError, SQLAlchemyError) as error:
                is_late = time.monotonic() > began + OUTAGE_S
                if not _is_outage(error) or is_late or self.is_stopping():
                    raise
                if pause_s == FIRST_PAUSE_S:
                    self.say(
                        f"WARNING: the study does not answer: {_first_line(error)}; asked again "
                        f"for {OUTAGE_S / 60:g} minutes, trainings wait at their next report"
                    )
                self._wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if pause_s > FIRST_PAUSE_S:
                self.say("The study answers again")
            return done

    def _wait(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self.is_stopping():
            time.sleep(0.1)


def _is_outage(error: Exception) -> bool:
    return isinstance(error.__cause__ or error, OperationalError | InterfaceError)


@contextlib.contextmanager
def errors_explained(study: Study | None = None) -> Iterator[None]:
    """A data base that cannot be read or written ends the search, and trainings save."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise TrainingError(
            f"the study cannot be read or written: {_first_line(error)}; the same command goes on"
        ) from error
    except KeyError as error:
        if study is None or _exists(study):
            raise
        raise TrainingError(
            f"the study {study.study_name} was deleted while it ran; its trials are still in "
            "--checkpoint_dir, but no search goes on with them"
        ) from error


def _exists(study: Study) -> bool:
    return study._study_id in {item._study_id for item in study._storage.get_all_studies()}


def without_password(address: str) -> str:
    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:…@", address)


def _first_line(error: Exception) -> str:
    behind = error.__cause__ or error
    return str(behind).strip().splitlines()[0]

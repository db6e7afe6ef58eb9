"""The Optuna study of a search: opens it, waits for an unreachable database, explains errors."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import warnings
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
logger = logging.getLogger(__name__)

FILE = "optuna_study.db"
FIXED = "fixed"
"""attribute of a study: the values that all of its trials share"""
LOCK_TIMEOUT_S = 60.0
"""for SQLite's lock, which a dashboard may hold"""
OUTAGE_TIMEOUT_S = 300.0
"""how long an unreachable database is retried"""
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
"""between two attempts during an outage"""
EXAMPLE = "postgresql+psycopg://user:password@host/name (pip install 'psycopg[binary]')"


def path(folder: Path) -> Path:
    return folder / FILE


def url(folder: Path) -> str:
    """The URL of the study for Optuna's tools, which replace {SCHEMA_VERSION} in it."""
    return _address(folder).replace("{", "{{").replace("}", "}}")


def _address(folder: Path) -> str:
    return URL.create("sqlite", database=str(path(folder))).render_as_string(hide_password=False)


def location(search: Search) -> str:
    """The file or URL of the study, without a password."""
    return without_password(search.storage) if search.storage else str(path(search.folder))


def open_study(search: Search) -> Study:
    """The study of the search, which is created if it does not exist.

    Raises ConfigError if the study is of another search, or the trials in the folder are of another
    study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _load_or_create(search)
    fixed = dict(search.description().fixed)
    fixed.pop("data_root", None)  # the next owner may have the data in another folder
    before = study.user_attrs.get(FIXED)
    if before is not None and (rows := spec.differences(before, fixed)):
        listed = "\n".join(f"  {row}" for row in rows)
        raise ConfigError(
            f"the study {search.study_name} is another search:\n{listed}\nuse the same values, or "
            "another --study_name"
        )
    name = f"{search.study_name} in {location(search)}"
    ownership.register_folder(study, search.folder, name)
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
    if search.storage:
        _require_driver(search.storage)
    else:
        _require_name(search.folder)
    # A firewall or a restart of the server may have closed an idle connection.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.startswith("sqlite"):
        options = {"connect_args": {"timeout": LOCK_TIMEOUT_S}}
    try:
        return optuna.create_study(
            storage=RDBStorage(address, engine_kwargs=options),
            study_name=search.study_name,
            pruner=MedianPruner(n_startup_trials=search.startup_trials),
            load_if_exists=True,
        )
    except (StorageInternalError, SQLAlchemyError) as error:
        raise ConfigError(
            f"cannot open the study {without_password(address)}: {_first_line(error)}"
        ) from error


def _require_name(folder: Path) -> None:
    """Raises ConfigError for a folder whose name cannot be part of a database URL."""
    if make_url(_address(folder)).database != str(path(folder)):
        raise ConfigError(
            f"{folder}: this name cannot be part of a database URL; use another --checkpoint_dir"
        )


def _require_driver(address: str) -> None:
    """Raises ConfigError for an invalid URL, and if its driver is not installed."""
    try:
        make_url(address).get_dialect().import_dbapi()
    except (ArgumentError, ImportError, ValueError) as error:
        raise ConfigError(
            f"--storage {without_password(address)}: {_first_line(error)}; expected a URL such as "
            f"{EXAMPLE}"
        ) from error


@dataclass
class StorageRetry:
    """Repeats a call that failed because the database was unreachable, until it succeeds."""

    is_stopping: Callable[[], bool] = lambda: False
    """whether the search is to end, so that retrying ends too"""

    def __call__(self, action: Callable[[], T]) -> T:
        """The return value of `action`, which may be called several times.

        Raises StorageInternalError or SQLAlchemyError if the outage lasts too long.
        """
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                returned = action()
            except (StorageInternalError, SQLAlchemyError) as error:
                is_late = time.monotonic() > began + OUTAGE_TIMEOUT_S
                if not _is_outage(error) or is_late or self.is_stopping():
                    raise
                if pause_s == FIRST_PAUSE_S:
                    logger.warning(
                        "the study's database is unreachable: %s; retrying for %g minutes, "
                        "trainings wait at their next report",
                        _first_line(error),
                        OUTAGE_TIMEOUT_S / 60,
                    )
                self._wait(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                continue
            if pause_s > FIRST_PAUSE_S:
                logger.info("the study's database is reachable again")
            return returned

    def _wait(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self.is_stopping():
            time.sleep(0.1)


def _is_outage(error: Exception) -> bool:
    return isinstance(error.__cause__ or error, OperationalError | InterfaceError)


@contextlib.contextmanager
def storage_errors(study: Study | None = None) -> Iterator[None]:
    """Raises TrainingError for errors of the database in the block, and if `study` was deleted."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise TrainingError(
            f"cannot read or write the study: {_first_line(error)}; run the same command to "
            "continue"
        ) from error
    except KeyError as error:
        if study is None or _exists(study):
            raise
        raise TrainingError(
            f"the study {study.study_name} was deleted during the search; its trials are still in "
            "--checkpoint_dir, but no search can continue them"
        ) from error


def _exists(study: Study) -> bool:
    return study._study_id in {item._study_id for item in study._storage.get_all_studies()}


def without_password(address: str) -> str:
    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:…@", address)


def _first_line(error: Exception) -> str:
    behind = error.__cause__ or error
    return str(behind).strip().splitlines()[0]

"""The Optuna study of a search: opens it, waits for an unreachable database, explains errors."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from gpt2.base import addresses, json_fields, regular_file
from gpt2.base.errors import ConfigError, TrainingError
from gpt2.config import mixture
from gpt2.experiments import results
from gpt2.experiments.search import ownership, spec, trial_report
from gpt2.experiments.search.spec import Search

logger = logging.getLogger(__name__)

FILE = "optuna_study.db"
FIXED = "fixed"
"""attribute of a study: the values that all of its trials share"""
ENDING, RESULT, REASON = "ending", "result", "reason"
TRIAL_ATTRIBUTES = {ENDING: str, RESULT: dict, REASON: str, ownership.TRIAL_FOLDER: str}
"""attributes of a trial, and their types"""
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
    named = mixture.corpora(search.run.data.data_root)
    if any(corpus.name for corpus in named):
        weights = {corpus.name: corpus.weight for corpus in named}
        fixed["corpora"] = " ".join(
            name if weight is None else f"{name}:{float(weight):g}"
            for name, weight in weights.items()
        )
    before = study.user_attrs.get(FIXED)
    if before is not None and (rows := spec.differences(before, fixed)):
        raise results.another_experiment(f"the study {search.study_name}", rows, "--study_name")
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
            trial_report.used_values(item)
            if item.state == TrialState.COMPLETE:
                json_fields.require_type(float, item.value)
            for name, kind in TRIAL_ATTRIBUTES.items():
                json_fields.require_type(kind | None, item.user_attrs.get(name))
        json_fields.require_type(dict | None, study.user_attrs.get(FIXED))
        json_fields.require_type(ownership.Beat | None, study.user_attrs.get(ownership.HEARTBEAT))
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

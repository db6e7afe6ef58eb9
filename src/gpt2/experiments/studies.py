"""The Optuna study of a search: opened, compared with what is asked for, its errors in words."""

from __future__ import annotations

import contextlib
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy.exc import SQLAlchemyError

from gpt2.errors import ConfigError, TrainingError
from gpt2.experiments import space as spaces

if TYPE_CHECKING:
    from gpt2.experiments.search import Search

FILE = "optuna_study.db"
FIXED = "fixed"
"""where a study keeps what all of its trials have in common"""
LOCK_WAIT_S = 60.0
"""for a dashboard that reads"""
TRIES, PAUSE_S = 5, 1.0
"""owners that make the same study at the same moment disturb each other"""


def path(folder: Path) -> Path:
    return folder / FILE


def url(folder: Path) -> str:
    """As Optuna's own tools take it."""
    return f"sqlite:///{path(folder)}"


def opened(search: Search) -> Study:
    """The study of the search, new or as it was left.

    Raises ConfigError if another machine searches something else in the same study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _created(search)
    # The same seed again would draw the same values again.
    seed = search.run.machine.seed + len(study.get_trials(deepcopy=False))
    if search.storage:  # nor should two machines that begin at the same moment
        seed += zlib.crc32(search.owner.encode())
    study.sampler = TPESampler(seed=seed % 2**32, constant_liar=True)
    fixed = {name: value for name, value in search.about().fixed.items() if name != "data_root"}
    before = study.user_attrs.get(FIXED)
    if before is None:
        study.set_user_attr(FIXED, fixed)
    elif rows := differences(before, fixed):
        listed = "\n".join(f"  {row}" for row in rows)
        raise ConfigError(
            f"the study {search.study_name} is another search:\n{listed}\ngive the same values, "
            "or another --study_name"
        )
    return study


def _created(search: Search) -> Study:
    address = search.storage or f"sqlite:///{path(search.folder.resolve())}"
    options = {"connect_args": {"timeout": LOCK_WAIT_S}} if address.startswith("sqlite") else {}
    for attempt in range(TRIES):
        try:
            return optuna.create_study(
                storage=RDBStorage(address, engine_kwargs=options),
                study_name=search.study_name,
                pruner=MedianPruner(n_startup_trials=search.startup_trials),
                load_if_exists=True,
            )
        except ImportError as error:
            raise ConfigError(
                f"--storage {without_password(address)} needs a driver that is not installed; for "
                "PostgreSQL: pip install 'psycopg[binary]', and postgresql+psycopg://…"
            ) from error
        except ValueError as error:
            raise ConfigError(f"--storage {without_password(address)}: {error}") from error
        except (StorageInternalError, SQLAlchemyError) as error:
            if attempt == TRIES - 1:
                raise ConfigError(
                    f"the study {without_password(address)} cannot be opened: {_first_line(error)}"
                ) from error
            time.sleep(PAUSE_S)
    raise AssertionError


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """A data base that cannot be written ends the search, and trainings save."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise TrainingError(
            f"the study cannot be written: {_first_line(error)}; the same command goes on"
        ) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is other in a search, the values of its space and what all trials have in common."""
    spaces_then, spaces_now = before.get("space", {}), now.get("space", {})
    searched = {*spaces_then, *spaces_now}
    rows = [
        f"{name}: {before.get(name)} before, {now.get(name)} now"
        for name in sorted({*before, *now} - {"space"} - searched)
        if before.get(name) != now.get(name)
    ]
    return rows + spaces.differences(spaces_then, spaces_now)


def without_password(address: str) -> str:
    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:…@", address)


def _first_line(error: Exception) -> str:
    behind = error.__cause__ or error
    return str(behind).strip().splitlines()[0]

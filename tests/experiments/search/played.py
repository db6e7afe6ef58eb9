"""A search without processes, for tests of what its source does."""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.study import Study

from gpt2.config import options, presets
from gpt2.experiments.pool.job import Event, Job, Slot
from gpt2.experiments.results import ResultsStore
from gpt2.experiments.search import space, study
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.study import Heartbeat
from gpt2.experiments.search.trial_source import TrialSource
from gpt2.train.report import Answer

SLOT = Slot(0, "cpu0", {})
RUN = options.overlay(presets.preset("demo"), {"eval_interval": 10})
SPACE = space.parse("[learning_rate]\nlow = 1e-4\nhigh = 1e-2\nlog = true", RUN, "space")


@functools.cache
def empty_database() -> bytes:
    """A database of Optuna without a study, which takes a quarter of a second to make."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, study.FILE)
        RDBStorage(f"sqlite:///{path}").engine.dispose()
        return path.read_bytes()


class Played:
    """A search without processes: the test sends the events of its trainings."""

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, **changes: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.search = Search(RUN, SPACE, **{"folder": folder, "n_trials": 4, **changes})
        if not self.search.storage and not (database := folder / study.FILE).exists():
            database.write_bytes(empty_database())
        self.study = study.open_study(self.search)
        self.store = ResultsStore(folder, self.search.description())
        self.heartbeat = Heartbeat(self.study, folder, clock)
        self.source = TrialSource(self.study, self.search, self.store, self.heartbeat)

    def next(self) -> Job:
        job = self.source.next()
        assert job is not None
        return job

    def tell(self, job: Job, kind: Any, **facts: Any) -> Answer:
        return self.source.event(Event(kind, SLOT, job, **facts))

    def validates(self, job: Job, *losses: float | None) -> list[Answer]:
        known = trial_of(self.study, job).intermediate_values
        steps = range(max(known, default=0) + 10, 10000, 10)
        return [
            self.tell(job, "reported", metrics={"step": step, "val_loss": loss, "total_steps": 500})
            for step, loss in zip(steps, losses, strict=False)
        ]

    def finishes(self, job: Job, *losses: float) -> None:
        assert set(self.validates(job, *losses)) == {"go"}
        self.tell(job, "finished", result={"tokens": 5})

    @property
    def states(self) -> list[str]:
        return [item.state.name for item in self.study.get_trials()]


def trial_of(optuna_study: Study, job: Job) -> Any:
    return optuna_study.get_trials()[int(job.name.removeprefix("trial_"))]

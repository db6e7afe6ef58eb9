import threading
from pathlib import Path
from typing import Any

import pytest

from gpt2.base import folder_lock
from gpt2.experiments.pool.job import Stopped
from gpt2.experiments.training import training_job
from gpt2.train.report import Answer


def test_the_lock_of_a_lost_machine_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It reports to its owner meanwhile, and stops if the answer says so."""
    monkeypatch.setattr(training_job, "LOCK_POLL_S", 0.05)
    reports: list[dict[str, Any]] = []
    ready, leave = threading.Event(), threading.Event()

    def report(**metrics: Any) -> Answer:
        reports.append(metrics)
        if len(reports) == 4:
            leave.set()
        return "go"

    def hold() -> None:
        with folder_lock.held(tmp_path):
            ready.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    training_job.wait_for_folder(report, tmp_path)
    assert len(reports) >= 4
    holder.join()
    training_job.wait_for_folder(report, tmp_path / "new")

    leave.clear()
    ready.clear()
    (holder := threading.Thread(target=hold)).start()
    ready.wait()
    with pytest.raises(Stopped):
        training_job.wait_for_folder(lambda: "stop", tmp_path)
    leave.set()
    holder.join()

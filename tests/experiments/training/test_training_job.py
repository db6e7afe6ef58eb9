import threading
import time
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
    reports: list[float] = []

    def report(**_metrics: Any) -> Answer:
        reports.append(time.monotonic())
        return "go" if len(reports) < 1000 else "stop"

    ready, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock.held(tmp_path):
            ready.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    threading.Timer(0.5, leave.set).start()
    began = time.monotonic()
    training_job._wait_for_folder(report, tmp_path)
    assert 0.4 < time.monotonic() - began < 5 and len(reports) > 3
    holder.join()
    training_job._wait_for_folder(report, tmp_path / "new")

    leave.clear()
    ready.clear()
    (holder := threading.Thread(target=hold)).start()
    ready.wait()
    with pytest.raises(Stopped):
        training_job._wait_for_folder(lambda: "stop", tmp_path)
    leave.set()
    holder.join()

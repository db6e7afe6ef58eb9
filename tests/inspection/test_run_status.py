import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from gpt2.base import folder_lock
from gpt2.inspection import run_status
from gpt2.train import status
from inspection.written_runs import PLAN, text_of, write_run


def test_newest_run_is_what_was_written_last(tmp_path: Path):
    assert run_status.newest_run(tmp_path) is None
    for name in ("b", "a"):
        write_run(tmp_path / name, 1, status.Plan(**(PLAN.__dict__ | {"run_name": name})))
        time.sleep(0.01)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "status.json").write_text("{")
    assert run_status.newest_run(tmp_path).status.plan.run_name == "a"


def test_state_of_a_run(tmp_path: Path, out: Console, monkeypatch: pytest.MonkeyPatch):
    """A run with a locked folder is running; a status of another machine counts while it is new."""
    write_run(tmp_path, 3)
    found = run_status.newest_run(tmp_path)
    assert found.state == "dead"
    with folder_lock.held(tmp_path):
        assert found.state == "running"
    monkeypatch.setattr(socket, "gethostname", lambda: "another machine")
    assert found.state == "running"
    monkeypatch.setattr(status, "SILENCE_S", 0)
    assert found.state == "dead"
    run_status.print_state(found, out)
    assert text_of(out).startswith("run: dead\n  step 0 of 1,000\n  process ")
    status.write(tmp_path, PLAN, "failed", 3, "a reason\n" * 100)
    before = len(text_of(out))
    run_status.print_state(run_status.newest_run(tmp_path), out)
    first, *_ = text_of(out)[before:].splitlines()
    assert first.endswith(f"… (whole in {tmp_path / status.NAME})") and len(first) < 320
    for state in ("finished", "stopped", "failed"):
        write_run(tmp_path, 3, state=state)
        assert run_status.newest_run(tmp_path).state == state

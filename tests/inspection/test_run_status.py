import io
import json
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from gpt2.base import folder_lock
from gpt2.checkpoint import metadata, store
from gpt2.config import options, presets
from gpt2.inspection import checkpoints, estimate, run_status
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import StepRecord
from gpt2.train import status


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def save(folder: Path, step: int, val_loss: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = metadata.TrainingMetadata(step, 0, step * 10, 2.5, val_loss, 1, "run", "0")
    store.save(folder, {"filler": list(range(1000))}, facts, keep_last=10)


PLAN = status.Plan(
    run_name="run",
    preset="demo",
    total_steps=1000,
    rows_per_step=4,
    rows_per_epoch=1001,
    block_size=8,
    checkpoint_interval=150,
    world_size=2,
    device="cuda",
    log_file="",
)


def write_run(
    folder: Path, steps: int, plan: status.Plan = PLAN, state: status.RunState = "running"
):
    folder.mkdir(parents=True, exist_ok=True)
    log = LogFile(folder / "log.txt", plan.run_name, 0)
    for step in range(1, steps + 1):
        log.write(StepRecord(step, 0, 3.0, 1e-3, 1.0, 2.0, 16.0, 0.1, []))
    log.close()
    values = plan.__dict__ | {"log_file": str(folder / "log.txt")}
    status.write(folder, status.Plan(**values), state, step=0)


def test_no_checkpoints(tmp_path: Path, out: Console):
    checkpoints.print_checkpoints(tmp_path / "none", out)
    assert text_of(out) == f"No checkpoints in {tmp_path / 'none'}\n"


def test_table_is_the_folder_newest_last_with_the_best_marked(tmp_path: Path, out: Console):
    for step, val_loss in [(10, 3.25), (20, 3.125), (30, None)]:
        save(tmp_path, step, val_loss)
    (tmp_path / "step_000040.pt").touch()  # unfinished: no sidecar
    checkpoints.print_checkpoints(tmp_path, out)
    rows = [line.split() for line in text_of(out).splitlines() if "step_0" in line]
    assert [row[0] for row in rows] == ["10", "20", "30"]
    assert [row[2:5] for row in rows] == [
        ["2.5000", "3.2500", "0.0"],
        ["2.5000", "3.1250", "*"],
        ["2.5000", "-", "0.0"],
    ]
    assert rows[0][-1] == str(tmp_path / "step_000010.pt")


def test_listing_reads_sidecars_alone_and_looks_below(tmp_path: Path, out: Console):
    for name in ("demo", "other"):
        save(tmp_path / name, 5, 1.0)
        (tmp_path / name / "step_000005.pt").write_bytes(b"")
    checkpoints.print_checkpoints(tmp_path, out)
    assert text_of(out).count("Checkpoints in") == 2


def test_newest_run_is_what_was_written_last(tmp_path: Path):
    assert run_status.newest_run(tmp_path) is None
    for name in ("b", "a"):
        write_run(tmp_path / name, 1, status.Plan(**(PLAN.__dict__ | {"run_name": name})))
        time.sleep(0.01)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "status.json").write_text("{")
    assert run_status.newest_run(tmp_path).status.plan.run_name == "a"


def test_forecast_of_a_run(tmp_path: Path, out: Console):
    write_run(tmp_path, 200)
    with folder_lock.held(tmp_path):
        estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    printed = text_of(out)
    assert "Run run on 2 × cuda: running, status written 0s ago" in printed
    assert "step 200 of 1,000 (20.0%), epoch 0.80, 6,400 tokens" in printed
    assert "Recent: 2.00 s per step, 16 tokens/s (median of 50 steps" in printed
    assert "Left: 26m 40s, finish " in printed
    milestones = [
        line.split()[:-3] for line in printed.splitlines() if " begins" in line or "next" in line
    ]
    assert milestones == [
        ["251", "epoch", "1", "begins,", "with", "its", "shuffle", "1m", "42s"],
        ["300", "next", "checkpoint", "3m", "20s"],
        ["501", "epoch", "2", "begins,", "with", "its", "shuffle", "10m", "02s"],
        ["751", "epoch", "3", "begins,", "with", "its", "shuffle", "18m", "22s"],
    ]
    table = printed.partition("On other numbers of cudas")[2]
    scaling = {line.split()[0]: line.split() for line in table.splitlines()[3:] if line.strip()}
    assert scaling["1"][1:6] == ["8", "1h", "06m", "53m", "20s"]
    assert scaling["2"][1:4] == ["(this", "run)", "16"]
    assert scaling["8"][1:6] == ["64", "8m", "20s", "6m", "40s"]


def test_forecast_of_finished_and_of_unborn_runs(tmp_path: Path, out: Console):
    write_run(tmp_path / "a", 1000, state="finished")
    estimate.print_run_forecast(run_status.newest_run(tmp_path / "a"), out)
    assert "The last step is reached." in text_of(out)
    write_run(tmp_path / "b", 0)
    estimate.print_run_forecast(run_status.newest_run(tmp_path / "b"), out)
    assert "No step is logged yet" in text_of(out)


def test_many_epochs_are_cut(tmp_path: Path, out: Console):
    plan = status.Plan(**(PLAN.__dict__ | {"rows_per_epoch": 40}))
    write_run(tmp_path, 5, plan)
    estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    printed = text_of(out)
    assert printed.count("begins, with its shuffle") == estimate.SHOWN_EPOCHS
    assert "… the last of 89 further epochs" in printed


def test_assumptions_are_said_without_a_run(out: Console):
    estimate.print_assumed_forecast(presets.preset("gpt2-124m"), None, 1, out)
    printed = text_of(out)
    assert "An estimate for --preset gpt2-124m. Assumed:" in printed
    assert "9,900,000,000 training tokens: 99 shards of 100 M tokens" in printed
    assert "1 × A100 at 40% MFU" in printed
    assert "94,414" in printed  # 5 epochs of 9.9 G tokens in steps of 524,288


def test_given_speed_and_prepared_data_count(tmp_path: Path, data_root: Path, out: Console):
    run = options.overlay(presets.preset("gpt2-124m"), {"data_root": data_root, "block_size": 64})
    estimate.print_assumed_forecast(run, 1000.0, 2, out)
    printed = text_of(out)
    tokens = sum(
        shard["tokens"]
        for shard in json.loads((data_root / "manifest.json").read_text())["shards"]
        if shard["split"] == "train"
    )
    assert f"{tokens:,} training tokens: the data in {data_root}" in printed
    assert "1,000 tokens/s on 2 GPUs, as given" in printed


def test_state_of_a_run(tmp_path: Path, out: Console, monkeypatch: pytest.MonkeyPatch):
    """Running is what holds the lock; a run on another machine is believed for a while."""
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
    for state in ("finished", "stopped", "failed"):
        write_run(tmp_path, 3, state=state)
        assert run_status.newest_run(tmp_path).state == state


def test_forecast_of_a_dead_run_says_so(tmp_path: Path, out: Console):
    write_run(tmp_path, 3)
    estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    assert "Run run on 2 × cuda: dead, status written" in text_of(out)

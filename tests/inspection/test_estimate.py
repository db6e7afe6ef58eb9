import json
from pathlib import Path

from rich.console import Console

from gpt2.base import folder_lock
from gpt2.config import options, presets
from gpt2.inspection import estimate, run_status
from gpt2.train import status
from inspection.written_runs import PLAN, text_of, write_run


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
        ["251", "epoch", "1", "begins", "1m", "42s"],
        ["300", "next", "checkpoint", "3m", "20s"],
        ["501", "epoch", "2", "begins", "10m", "02s"],
        ["751", "epoch", "3", "begins", "18m", "22s"],
    ]
    table = printed.partition("On other numbers of GPUs")[2]
    scaling = {line.split()[0]: line.split() for line in table.splitlines()[3:] if line.strip()}
    assert scaling["1"][1:6] == ["8", "1h", "06m", "53m", "20s"]
    assert scaling["2"][1:4] == ["(this", "run)", "16"]
    assert scaling["8"][1:6] == ["64", "8m", "20s", "6m", "40s"]


def test_time_left_grows_with_the_batch_of_a_ramp(tmp_path: Path, out: Console):
    """Up to step 250 a step has one row of 8 tokens, then four; its steps take 2 s up to there."""
    plan = status.Plan(**(PLAN.__dict__ | {"batch_ramp": ("250:8",)}))
    write_run(tmp_path, 200, plan)
    estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    printed = text_of(out)
    assert "step 200 of 1,000 (20.0%), epoch 0.20, 1,600 tokens" in printed
    assert 50 * 2 + 750 * 4 * 2 == 101 * 60 + 40
    assert "Left: 1h 41m, finish " in printed
    milestones = [line.split()[:-3] for line in printed.splitlines() if " begins" in line]
    assert milestones == [
        ["438", "epoch", "1", "begins", "26m", "44s"],  # 250 rows, and 188 steps of 4
        ["688", "epoch", "2", "begins", "1h", "00m"],
        ["939", "epoch", "3", "begins", "1h", "33m"],
    ]


def test_forecast_of_runs_that_are_finished_or_have_no_step(tmp_path: Path, out: Console):
    write_run(tmp_path / "a", 1000, state="finished")
    estimate.print_run_forecast(run_status.newest_run(tmp_path / "a"), out)
    assert "The run is complete." in text_of(out)
    write_run(tmp_path / "one", 1)
    estimate.print_run_forecast(run_status.newest_run(tmp_path / "one"), out)
    assert "(median of 1 step; validation" in text_of(out)
    write_run(tmp_path / "b", 0)
    estimate.print_run_forecast(run_status.newest_run(tmp_path / "b"), out)
    assert "No step is logged yet" in text_of(out)


def test_many_epochs_are_cut(tmp_path: Path, out: Console):
    plan = status.Plan(**(PLAN.__dict__ | {"rows_per_epoch": 40}))
    write_run(tmp_path, 5, plan)
    estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    printed = text_of(out)
    assert printed.count(" begins ") == estimate.SHOWN_EPOCHS
    assert "… the last of 89 further epochs" in printed


def test_assumptions_are_printed_without_a_run(out: Console):
    estimate.print_assumed_forecast(presets.preset("gpt2-124m"), None, 1, out)
    printed = text_of(out)
    assert "An estimate for --preset gpt2-124m. Assumed:" in printed
    cards = [line.split() for line in printed.partition("Memory of the GPU")[2].splitlines()]
    rows = {line[0]: line[2:4] for line in cards if line[1:2] == ["GB"]}
    assert list(rows) == ["16", "24", "40", "80", "141"]
    assert rows["80"] == ["64", "8"]
    assert "9,900,000,000 training tokens: 99 shards of 100 M tokens" in printed
    assert "1 × A100 at 40% MFU, whatever GPUs this machine has;" in printed
    assert "--gpus N is for N A100s, --tokens_per_sec N for the speed of other GPUs" in printed
    assert "1 (assumed)" in printed
    assert "this run" not in printed
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
    estimate.print_assumed_forecast(run, 1000.0, 1, out)
    assert "1,000 tokens/s on 1 GPU, as given" in text_of(out)


def test_an_estimate_before_the_run_knows_its_ramp(out: Console):
    changes = {"batch_ramp": ["10000:262144"]}
    run = options.overlay(presets.preset("gpt2-124m"), changes)
    estimate.print_assumed_forecast(run, None, 1, out)
    assert "99,414" in text_of(out)  # 94,414 steps without it: 10,000 become 5,000


def test_the_forecast_of_a_dead_run_shows_its_state(tmp_path: Path, out: Console):
    write_run(tmp_path, 3)
    estimate.print_run_forecast(run_status.newest_run(tmp_path), out)
    assert "Run run on 2 × cuda: dead, status written" in text_of(out)

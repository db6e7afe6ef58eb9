"""Runs whose batch grows by phases."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import forked_ranks
from gpt2.base.errors import CheckpointError, ConfigError
from gpt2.checkpoint import metadata, store
from gpt2.config.run import RunConfig
from gpt2.data.loader import MicroBatch
from gpt2.distributed.world import World
from gpt2.inspection import estimate, run_status
from gpt2.train import setup, status, trainer
from gpt2.train.replica import Replica
from gpt2.train.resume import StartingPoint
from gpt2.train.state import Update
from same_state import assert_same
from support import loss_lines, losses, small_config, small_flags

RAMP = ["3:8", "7:24"]
"""rows of 8 tokens: one in the first 3 steps, three up to step 7, then four"""
TOKENS = [8] * 3 + [24] * 4 + [32] * 5
SAME = ("model", "optimizer", "rng", "progress", "spikes", "tokens", "epoch")


def ramped(data_root: Path, out: Path, /, **changes: object) -> RunConfig:
    values = {"batch_ramp": RAMP, "max_steps": 12, "decay_steps": 12, "mini_batch_size": 2}
    return small_config(data_root, out, **{**values, "eval_interval": 6, **changes})


def stop_at(last: int):
    return lambda **metrics: "stop" if metrics.get("step") == last else "go"


def load(out: Path, step: int) -> metadata.CheckpointState:
    return store.load(out / "checkpoints" / f"step_{step:06d}.pt")


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps without a stop."""
    out = tmp_path_factory.mktemp("whole")
    result = trainer.run(ramped(data_root, out))
    assert result.tokens == sum(TOKENS)
    return out


def test_a_resumed_run_is_bit_identical_wherever_in_the_ramp_it_was_stopped(
    whole: Path, data_root: Path, tmp_path: Path
):
    """Before, at and after the ends of phases, and resumed as a longer run."""
    for last in (1, 2, 3, 4, 6, 7, 8):
        changes = {"resume": "latest"} if last > 1 else {}
        run = ramped(data_root, tmp_path, max_steps=12 + last, **changes)
        assert trainer.run(run, report=stop_at(last)).tokens == sum(TOKENS[:last])
        assert load(tmp_path, last)["tokens"] == sum(TOKENS[:last])
    trainer.run(ramped(data_root, tmp_path, resume="latest"))
    assert loss_lines(tmp_path / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
    one, other = load(whole, 12), load(tmp_path, 12)
    for same in SAME:
        assert_same(one[same], other[same])


def test_a_phase_trains_as_a_run_with_its_batch_size(data_root: Path, tmp_path: Path):
    """The first one on the same rows; the loss is the mean over them. Validation has the rows of
    the final batch size."""
    ramp, small = tmp_path / "ramp", tmp_path / "small"
    trainer.run(ramped(data_root, ramp, max_steps=3))
    trainer.run(ramped(data_root, small, max_steps=3, batch_ramp=[], total_batch_size=8))
    assert losses(ramp / "logs/log.txt") == losses(small / "logs/log.txt")
    for same in ("model", "optimizer", "rng"):
        assert_same(load(ramp, 3)[same], load(small, 3)[same])
    assert ramped(data_root, ramp).eval_rows == ramped(data_root, ramp, batch_ramp=[]).eval_rows


def test_micro_batches_do_not_change_the_losses(whole: Path, data_root: Path, tmp_path: Path):
    few = {"dropout": 0.0, "eval_interval": None}
    for size in (1, 4):
        run = ramped(data_root, tmp_path / str(size), mini_batch_size=size, **few)
        trainer.run(run)
    one, other = (losses(tmp_path / size / "logs/log.txt") for size in ("1", "4"))
    assert one == pytest.approx(other, abs=1e-4)


def test_the_losses_are_the_same_on_two_ranks(data_root: Path, tmp_path: Path):
    one, two, ramp = tmp_path / "one", tmp_path / "two", ["3:16", "7:24"]
    changes = {"max_steps": 9, "dropout": 0.0, "eval_interval": None}
    trainer.run(small_config(data_root, one, **changes, batch_ramp=ramp))
    flags = small_flags(data_root, two, **changes)
    forked_ranks.run([*flags, "--batch_ramp", *ramp], 2, tmp_path)
    assert losses(one / "logs/log.txt") == pytest.approx(losses(two / "logs/log.txt"), abs=1e-4)
    assert load(one, 9)["tokens"] == load(two, 9)["tokens"] == 3 * 16 + 4 * 24 + 2 * 32


def test_tokens_are_those_of_the_ramp_everywhere(whole: Path, capsys):
    written = json.loads((whole / "checkpoints/step_000010.json").read_text())
    assert written["tokens"] == sum(TOKENS[:10])
    lines = (whole / "logs/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["batch_ramp"] == RAMP
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["tokens_per_s"] * record["elapsed_s"] for record in steps] == pytest.approx(
        TOKENS
    )
    plans = [record["message"] for record in records if "Plan: " in record.get("message", "")]
    words = "Plan: 12 steps of 8 up to step 3, 24 up to step 7, then 32 tokens (gradient acc"
    assert [plan.startswith(words) for plan in plans] == [True]
    plan = status.read(whole / "checkpoints").plan
    assert [plan.ramp.rows_of(step) * 8 for step in range(12)] == TOKENS
    out = Console(file=io.StringIO(), width=120)
    estimate.print_run_forecast(run_status.newest_run(whole / "checkpoints"), out)
    epoch = sum(TOKENS) / 8 / plan.rows_per_epoch
    assert f"epoch {epoch:.2f}, {sum(TOKENS)} tokens" in out.file.getvalue()


def test_phases_belong_to_the_data_if_some_is_left_out(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The gradients of steps 5 and 6 are NaN: the run goes back to step 4 and leaves their data
    out, so that the second phase ends two updates earlier."""
    train_step, norm, rows, given = trainer.train_step, trainer.gradient_norm, [], []

    def recording(replica: Replica, micros: list[MicroBatch], tokens: int, *rest: object) -> Update:
        rows.append(sum(len(inputs) for inputs, _ in micros))
        given.append(tokens)
        return train_step(replica, micros, tokens, *rest)

    def poisoned(net: torch.nn.Module) -> torch.Tensor:
        return norm(net) * (float("nan") if len(rows) in (5, 6) else 1)

    monkeypatch.setattr(trainer, "train_step", recording)
    monkeypatch.setattr(trainer, "gradient_norm", poisoned)
    off = {"eval_interval": None, "checkpoint_interval": 4, "max_bad_steps": 2}
    result = trainer.run(ramped(data_root, tmp_path, **off, max_steps=8))
    assert rows == [1, 1, 1, 3, 3, 3, *(3, 4, 4, 4)]
    assert given == [count * 8 for count in rows]
    assert result.tokens == load(tmp_path, 8)["tokens"] == 8 * (3 * 1 + 3 + 3 + 3 * 4)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (RAMP, ["3:8", "8:24"], "batch_ramp: 3:8 7:24 in the checkpoint, 3:8 8:24 now"),
        (RAMP, ["3:8"], "batch_ramp: 3:8 7:24 in the checkpoint, 3:8 now"),
        (RAMP, [], "batch_ramp: 3:8 7:24 in the checkpoint, none now"),
        ([], RAMP, "batch_ramp: none in the checkpoint, 3:8 7:24 now"),
        (None, RAMP, "batch_ramp: none in the checkpoint, 3:8 7:24 now"),
    ],
)
def test_a_resume_does_not_change_the_ramp(tmp_path: Path, before, now, words: str):
    """None: the checkpoint is of a version without ramps."""
    stored = ramped(tmp_path, tmp_path, batch_ramp=before or []).to_dict()
    if before is None:
        del stored["data"]["batch_ramp"]
    start = StartingPoint(tmp_path / "step_000001.pt", {"config": stored})
    with pytest.raises(CheckpointError, match=words):
        start.require_agreement(ramped(tmp_path, tmp_path, batch_ramp=now), None)
    start.require_agreement(ramped(tmp_path, tmp_path, batch_ramp=before or []), None)


def test_the_smallest_step_has_a_row_for_each_rank(tmp_path: Path):
    run = ramped(tmp_path, tmp_path)
    setup.require_enough_rows(run, World(0, 1, torch.device("cpu")))
    words = "batch_ramp=3:8 has 1 row of block_size=8, too few for 2 ranks; use at least 16 tokens"
    with pytest.raises(ConfigError, match=words):
        setup.require_enough_rows(run, World(0, 2, torch.device("cpu")))

"""Whole runs in float16, whose loss is scaled: on the CPU as on a GPU without bfloat16."""

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import forked_ranks
from gpt2.base import log
from gpt2.base.errors import Diverged
from gpt2.checkpoint import store
from gpt2.config.run import RunConfig
from gpt2.distributed.world import World
from gpt2.model.gpt2 import GPT2
from gpt2.optim import loss_scale
from gpt2.train import trainer
from gpt2.train.replica import Replica
from gpt2.train.state import Update
from same_state import assert_same
from support import loss_lines, small_config, small_flags

STEPS = 6


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scales make gradients overflow, and the next ones soon grow again."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**19)
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)


def config(data_root: Path, out: Path, **changes: object) -> RunConfig:
    given: dict[str, object] = {"dtype": "float16", "eval_interval": None, "mini_batch_size": 2}
    given |= {"max_steps": STEPS, "decay_steps": STEPS, "checkpoint_interval": None}
    return small_config(data_root, out, **given | changes)


def steps(out: Path) -> list[dict[str, Any]]:
    """The records of all steps."""
    lines = (out / "logs/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def saved(out: Path, step: int = STEPS) -> dict[str, Any]:
    return store.load(out / "checkpoints" / f"step_{step:06d}.pt")


def assert_same_end(one: Path, other: Path) -> None:
    assert loss_lines(one / "logs/log.txt") == loss_lines(other / "logs/log.txt")
    for name in ("model", "optimizer", "spikes", "loss_scale", "progress"):
        assert_same(saved(one)[name], saved(other)[name])


def replica(folder: Path, **changes: object) -> Replica:
    return Replica(config(folder, folder, **changes), World(0, 1, torch.device("cpu")))


def update(replica: Replica) -> Update:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(50257, (4, 9), generator=generator)
    done = trainer.train_step(replica, [(drawn[:, :-1], drawn[:, 1:])], 32, 1e-2)
    assert done is not None
    return done


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_are_those_in_float32(architecture: str, optimizer: str, tmp_path: Path):
    """Also the gradient norm, which is the true one, not that of the scaled gradients."""
    shape = {"architecture": architecture, "optimizer": optimizer, "dropout": 0.0}
    scaled, plain = (replica(tmp_path, **shape, dtype=dtype) for dtype in ("float16", "float32"))
    scaled.loss_scale.scale.fill_(2.0**10)
    for _ in range(4):
        one, other = update(scaled), update(plain)
        assert one.applied and (one.loss_scale, other.loss_scale) == (2.0**10, None)
        assert one.loss == pytest.approx(other.loss, abs=1e-2)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_compiled_updates_are_those_without_a_compiler(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the backend that keeps torch's operators, without building kernels."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    shape = {"architecture": architecture, "dropout": 0.0}
    compiled, plain = (replica(tmp_path, **shape, compile=mode) for mode in ("on", "off"))
    for number in range(4):
        for trained in (compiled, plain):
            trained.loss_scale.scale.fill_(2.0 ** (100 if number == 2 else 10))
        one, other = update(compiled), update(plain)
        assert (one.loss_scale, one.applied) == (other.loss_scale, number != 2)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.applied is other.applied
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_changes_nothing_but_the_scale(optimizer: str, tmp_path: Path):
    trained = replica(tmp_path, optimizer=optimizer)
    trained.loss_scale.scale.fill_(2.0**100)
    before = {name: part.clone() for name, part in trained.model.state_dict().items()}
    done = update(trained)
    assert (done.loss_scale, done.applied, done.is_spike) == (2.0**100, False, False)
    assert float(trained.loss_scale.scale) == 2.0**99
    torch.testing.assert_close(trained.model.state_dict(), before, rtol=0, atol=0)
    assert not trained.spikes.state_dict()["window"].any()


@pytest.mark.usefixtures("too_large")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overflows_are_no_bad_updates_and_a_resume_is_exact(
    optimizer: str, data_root: Path, tmp_path: Path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"optimizer": optimizer, "max_bad_steps": 1}
    trainer.run(config(data_root, whole, **changes))
    printed = capsys.readouterr()
    assert "step 1: gradients overflow float16 with the loss scaled by 524288" in printed.out
    assert printed.err == "", "it is no warning"
    records, progress = steps(whole), saved(whole)["progress"]
    applied = [record["applied"] for record in records]
    assert not applied[0] and applied[1:].count(True) >= 3
    scale, updates = 2.0**19, 0  # which steps overflow depends on the data
    for record in records:
        assert record["loss_scale"] == scale
        updates = updates + 1 if record["applied"] else 0
        scale *= 0.5 if not record["applied"] else 2.0 if updates % 2 == 0 else 1.0
    assert (progress["overflows"], progress["bad_steps"]) == (applied.count(False), 0)

    trainer.run(config(data_root, parts, **changes, max_steps=3))  # one update before it grows
    trainer.run(config(data_root, parts, **changes, resume="latest"))
    assert_same_end(parts, whole)


@pytest.mark.usefixtures("too_large")
def test_a_stop_within_a_step_leaves_the_scale(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The signal comes in the first of two micro-batches of a step that would overflow."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.run(config(data_root, whole))
    forward, calls = GPT2.forward, iter(range(100))

    def interrupted(net: GPT2, *given: Any) -> torch.Tensor:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return forward(net, *given)

    with monkeypatch.context() as patch:
        patch.setattr(GPT2, "forward", interrupted)
        assert trainer.run(config(data_root, parts)).step == 1
    assert float(saved(parts, 1)["loss_scale"]["scale"]) == 2.0**18
    trainer.run(config(data_root, parts, resume="latest"))
    assert_same_end(parts, whole)


def test_gradients_that_overflow_at_the_smallest_scale_are_bad(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0)
    norm = trainer.gradient_norm
    monkeypatch.setattr(trainer, "gradient_norm", lambda net: norm(net) * torch.inf)
    with pytest.raises(Diverged, match="2 updates in a row, up to step 3"):
        trainer.run(config(data_root, tmp_path, max_bad_steps=2))


def test_checkpoints_of_other_types_and_earlier_versions_have_no_scale(
    data_root: Path, tmp_path: Path
):
    old = replica(tmp_path, dtype="float32")
    update(old)
    state = {**old.state_dict(), "rng": []}
    assert state.pop("loss_scale") == {}
    state = torch.load(_written(state, tmp_path / "old.pt"), weights_only=False)
    scaled = replica(tmp_path)
    scaled.load_state_dict(state, step=1)
    assert float(scaled.loss_scale.scale) == loss_scale.INITIAL_SCALE
    state = torch.load(
        _written({**scaled.state_dict(), "rng": []}, tmp_path / "new.pt"), weights_only=False
    )
    old.load_state_dict(state, step=1)
    assert old.loss_scale.scale is None and update(old).applied


def _written(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


ONE_RANK_OVERFLOWS = """
import os
from gpt2.cli.train import train_main
from gpt2.optim import loss_scale
from gpt2.optim.loss_scale import LossScale
loss_scale.INITIAL_SCALE = 1024.0
calls, times = iter(range(100)), LossScale.times
def larger(own, factor):
    is_due = next(calls) == 3 and os.environ["RANK"] == "1"
    return times(own, factor) * (2.0**100 if is_due else 1)
LossScale.times = larger
raise SystemExit(train_main())
"""
"""The gradients of rank 1 overflow in the last of its two micro-batches of step 2."""


def test_ranks_agree_on_an_overflow_of_one_of_them(data_root: Path, tmp_path: Path):
    script = tmp_path / "overflowing.py"
    script.write_text(ONE_RANK_OVERFLOWS)
    changes = {"dtype": "float16", "eval_interval": None, "mini_batch_size": 1}
    flags = small_flags(data_root, tmp_path, **changes, max_steps=4)
    printed = forked_ranks.run(flags, 2, tmp_path, script)
    assert "step 2: gradients overflow" in printed
    records = steps(tmp_path)
    assert [record["applied"] for record in records] == [True, False, True, True]
    assert [record["loss_scale"] for record in records] == [1024, 1024, 512, 512]

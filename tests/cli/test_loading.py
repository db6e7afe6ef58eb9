"""Which run `generate`, `evaluate` and `export` take without `--checkpoint_dir`."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from gpt2 import model
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import metadata, store
from gpt2.cli import loading, main
from gpt2.cli.model_source import ModelSource
from gpt2.config import presets
from gpt2.config.model import ModelConfig
from gpt2.config.options import overlay
from gpt2.train import status
from inspection.written_runs import PLAN

SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_run(folder: str, *steps: int) -> None:
    """A run with a checkpoint of each of `steps`; the newest is the one that is written last."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    status.write(Path(folder), PLAN, "finished", 0)
    net, run = model.build(SHAPE), overlay(presets.preset("demo"), asdict(SHAPE))
    for step in steps:
        state = {"model": net.state_dict(), "config": run.to_dict(), "progress": {"step": step}}
        facts = metadata.TrainingMetadata(step, 0, 0, 3.0, 4.0 - step, 1, "test", "0")
        store.save(Path(folder), {**state, "rng": []}, facts, keep_last=2)


def loaded(which: str = "latest", folder: str | None = None) -> str:
    source = ModelSource(which, None if folder is None else Path(folder))
    return os.path.relpath(loading.load_model(source).source)


def test_the_newest_run_below_checkpoints_is_taken(caplog: pytest.LogCaptureFixture):
    write_run("checkpoints/demo", 1, 2)
    write_run("checkpoints/demo-fast", 3, 2)
    with caplog.at_level("INFO", "gpt2"):
        assert loaded() == "checkpoints/demo-fast/step_000002.pt"
    line = "No checkpoint in checkpoints; the newest of 2 runs below it is taken: "
    assert f"{line}checkpoints/demo-fast" in caplog.messages
    assert loaded("best") == "checkpoints/demo-fast/step_000003.pt"
    assert loaded("3") == "checkpoints/demo-fast/step_000003.pt"
    with pytest.raises(CheckpointError, match=r"checkpoints/demo-fast has no checkpoint of step 1"):
        loaded("1")


def test_what_was_taken_before_is_taken_still(caplog: pytest.LogCaptureFixture):
    write_run("checkpoints", 1)
    write_run("checkpoints/demo", 2)
    with caplog.at_level("INFO", "gpt2"):
        assert loaded() == "checkpoints/step_000001.pt"
        assert loaded("checkpoints/demo") == "checkpoints/demo/step_000002.pt"
        assert loaded("latest", "checkpoints/demo") == "checkpoints/demo/step_000002.pt"
    assert "is taken" not in caplog.text
    Path("checkpoints/step_000001.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in checkpoints can be used \(1 file "
    ):
        loaded()


@pytest.mark.parametrize("which", ["latest", "best", "2"])
def test_a_newest_run_without_a_checkpoint_and_a_given_folder_are_never_replaced(which: str):
    write_run("checkpoints/old", 2)
    write_run("checkpoints/new")
    message = "no checkpoint in checkpoints/new; use --checkpoint_dir checkpoints/old"
    with pytest.raises(CheckpointError, match=message):
        loaded(which)
    message = "no checkpoint in checkpoints; use --checkpoint_dir checkpoints/old"
    with pytest.raises(CheckpointError, match=message):
        loaded(which, "checkpoints")
    write_run("checkpoints")
    with pytest.raises(CheckpointError, match=message):
        loaded(which)


def test_the_folder_that_is_named_has_the_newest_checkpoint():
    write_run("checkpoints/a", 2)
    write_run("checkpoints/z", 1)
    write_run("checkpoints/damaged", 3)
    Path("checkpoints/damaged/step_000003.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*; use .* checkpoints/z$"):
        loaded("best", "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*; train a model first$"):
        loaded("best", "checkpoints/damaged")


def test_standard_output_has_the_text_alone(monkeypatch: pytest.MonkeyPatch, capsys):
    write_run("checkpoints/demo", 1)
    flags = ["--prompt", "", "--max_new_tokens", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gpt2", "generate", *flags])
    assert main.main() == 0
    printed = capsys.readouterr()
    assert "taken" not in printed.out and "step_000001" not in printed.out
    line = "No checkpoint in checkpoints; the run below it is taken: checkpoints/demo"
    assert printed.err.count(line) == 1

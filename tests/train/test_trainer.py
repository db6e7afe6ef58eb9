"""Whole runs in this process, a world of one; several ranks are in
tests/distributed/test_world.py."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2.base import log
from gpt2.base.errors import CheckpointError, ConfigError, DataError
from gpt2.checkpoint import metadata, store
from gpt2.config.model import ARCHITECTURES
from gpt2.data import prepare
from gpt2.metrics import log_reader
from gpt2.metrics.records import Metrics
from gpt2.model.gpt2 import GPT2
from gpt2.train import banner, status, trainer
from gpt2.train.report import Answer
from modern_parts import PARTS
from same_state import assert_same
from support import LOSS_TOLERANCE, SMALL_CORPUS, loss_lines, losses, small_config


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


def load(out: Path, step: int) -> metadata.CheckpointState:
    return store.load(out / "checkpoints" / f"step_{step:06d}.pt")


def test_a_run_learns_and_leaves_its_files(data_root: Path, tmp_path: Path, capsys):
    config = small_config(data_root, tmp_path, learning_rate=1e-2, max_steps=30)
    result = trainer.run(config)
    assert result.state == "finished"
    assert (result.step, result.exit_code) == (30, 0)
    log = losses(tmp_path / "logs" / "log.txt")
    assert list(log) == list(range(1, 31))
    assert log[1] == pytest.approx(math.log(128), abs=0.3)  # nothing is learnt
    assert log[30] < log[1] - 1
    assert result.val_loss == result.best_val_loss < log[1] - 1
    checkpoints = store.list_checkpoints(tmp_path / "checkpoints")
    assert [item.training.step for item in checkpoints] == [10, 20, 30]
    assert all(item.training.val_loss is not None for item in checkpoints)
    assert result.bits_per_byte == checkpoints[-1].training.bits_per_byte is not None
    assert checkpoints[-1].training.train_loss == pytest.approx(log[30], abs=1e-6)
    assert os.readlink(tmp_path / "checkpoints" / "best.pt") == "step_000030.pt"
    written = status.read(tmp_path / "checkpoints")
    assert (written.state, written.step, written.plan.total_steps) == ("finished", 30, 30)
    assert "step 30 | epoch" in capsys.readouterr().out


RECIPE = {
    **PARTS,
    "architecture": "modern",
    "optimizer": "normuon",
    "cautious_decay": True,
    "momentum_warmup": 3,
    "embedding_lr_ratio": 8.0,
    "schedule": "wsd",
    "batch_ramp": ("3:16",),
}


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({}, 12),
        ({"optimizer": "muon"}, 4),
        (RECIPE, 4),
        *(({"architecture": name}, 4) for name in ARCHITECTURES if name != "gpt2"),
    ],
)
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(
    chosen: dict[str, Any], steps: int, data_root: Path, tmp_path: Path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {
        **chosen,
        "decay_steps": steps,
        "eval_interval": steps // 4,
        "checkpoint_interval": steps // 2,
        "mini_batch_size": 2,  # two micro-batches
    }
    trainer.run(small_config(data_root, whole, **options, max_steps=steps))
    trainer.run(small_config(data_root, parts, **options, max_steps=steps // 2))
    trainer.run(small_config(data_root, parts, **options, max_steps=steps, resume="latest"))
    assert loss_lines(parts / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
    one, other = load(whole, steps), load(parts, steps)
    for same in ("model", "optimizer", "rng", "progress", "spikes"):
        assert_same(one[same], other[same])


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without a stop."""
    out = tmp_path_factory.mktemp("whole")
    trainer.run(small_config(data_root, out))
    return out


def test_the_log_shows_where_an_unexpected_error_of_a_file_was_raised(
    data_root: Path, tmp_path: Path
):
    def failing(**_: float) -> Answer:
        return "go" if os.listdir(tmp_path / ("x" * 300)) else "stop"

    with pytest.raises(OSError, match="File name too long"):
        trainer.run(small_config(data_root, tmp_path), report=failing)
    log = (tmp_path / "logs/log.txt").read_text()
    assert "Traceback" in log and "in failing" in log


def stop_at_7(**metrics: float) -> Answer:
    return "stop" if metrics["step"] == 7 else "go"


def test_a_stop_is_heeded_before_the_next_update(data_root: Path, tmp_path: Path):
    result = trainer.run(small_config(data_root, tmp_path), report=stop_at_7)
    assert (result.state, result.step) == ("stopped", 7)


def test_a_stop_within_a_step_saves_the_step_before(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The signal comes in the third of four micro-batches of step 8, with dropout."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"mini_batch_size": 1, "eval_interval": None, "dropout": 0.2, "max_steps": 12}
    trainer.run(small_config(data_root, whole, **options))
    forward, calls = GPT2.forward, itertools.count(1)

    def interrupted(net: GPT2, *given: Any) -> torch.Tensor:
        if next(calls) == 7 * 4 + 3:
            signal.raise_signal(signal.SIGTERM)
        return forward(net, *given)

    with monkeypatch.context() as patch:
        patch.setattr(GPT2, "forward", interrupted)
        result = trainer.run(small_config(data_root, parts, **options))
    assert (result.state, result.step, result.exit_code) == ("stopped", 7, 143)
    assert next(calls) == 7 * 4 + 4, "no micro-batch after the signal"
    trainer.run(small_config(data_root, parts, **options, resume="latest"))
    assert loss_lines(parts / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
    one, other = load(whole, 12), load(parts, 12)
    for same in ("model", "optimizer", "rng", "progress", "spikes"):
        assert_same(one[same], other[same])


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_a_spike_is_reported_and_skipped_on_request(
    skip_spikes: bool, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    norm, calls = trainer.gradient_norm, itertools.count(1)

    def spiking(net: torch.nn.Module) -> torch.Tensor:
        if next(calls) == 80:
            next(iter(net.parameters())).grad *= 1e4
        return norm(net)

    monkeypatch.setattr(trainer, "gradient_norm", spiking)
    flags = {"skip_spikes": skip_spikes, "max_steps": 82, "eval_interval": None}
    flags |= {"checkpoint_interval": None, "total_batch_size": 8}
    trainer.run(small_config(data_root, tmp_path, **flags))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    progress = load(tmp_path, 82)["progress"]
    assert (progress["spikes"], progress["bad_steps"]) == (1, int(skip_spikes))
    (warning,) = warnings
    assert warning.startswith("WARNING: step 80: loss ")
    ending = "no update (1 in a row, 1 in all)" if skip_spikes else "--skip_spikes would skip it"
    assert warning.endswith(ending)


def test_a_run_that_cannot_be_built_leaves_nothing_behind(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No thread, no open sink, no status that says it is running."""

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("the banner")

    closed: list[object] = []
    close = Metrics.close
    monkeypatch.setattr(Metrics, "close", lambda own: [closed.append(own), close(own)])
    monkeypatch.setattr(banner, "log", breaks)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        trainer.run(small_config(data_root, tmp_path))
    assert threading.active_count() == before
    assert len(closed) == 1
    assert status.read(tmp_path / "checkpoints") is None


def test_stop_signal_saves_and_the_rest_is_as_if_nothing_had_happened(
    data_root, tmp_path, whole, capsys
):

    def interrupt(**metrics: float) -> Answer:
        if metrics["step"] == 15 and "loss" in metrics:  # 15 is due for validation
            signal.raise_signal(signal.SIGTERM)
        return "go"

    before = signal.getsignal(signal.SIGTERM)
    result = trainer.run(small_config(data_root, tmp_path), report=interrupt)
    assert (result.state, result.step, result.exit_code) == ("stopped", 15, 143)
    assert signal.getsignal(signal.SIGTERM) == before
    assert status.read(tmp_path / "checkpoints").state == "stopped"
    assert (tmp_path / "checkpoints" / "step_000015.pt").exists()
    capsys.readouterr()
    trainer.run(small_config(data_root, tmp_path, init_from="resume"))
    assert loss_lines(tmp_path / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
    lines = capsys.readouterr().out.splitlines()
    loading = tmp_path / "checkpoints" / "step_000015.pt"
    assert lines[:4] == [
        f"Loading checkpoint from: {loading}",
        "Resuming from:",
        "  - Step: 15",
        "  - Epoch: 0",
    ]
    assert "\n".join(lines[:4]) in (tmp_path / "logs/log.txt").read_text()


def test_a_run_keeps_its_name_when_it_goes_on(data_root: Path, tmp_path: Path):
    """Or a forecast would look for its steps under another."""
    trainer.run(small_config(data_root, tmp_path, max_steps=4), run_name="first")
    trainer.run(small_config(data_root, tmp_path, max_steps=6, resume="latest"), run_name="second")
    plan = status.read(tmp_path / "checkpoints").plan
    assert plan.run_name == "first"
    steps = log_reader.read_steps(Path(plan.log_file), plan.run_name)
    assert [line.step for line in steps] == [5, 6]  # of its last process


def test_report_steers(data_root: Path, tmp_path: Path):
    seen = []

    def stop_at_7(**metrics: float) -> Answer:
        seen.append(metrics)
        return "stop" if metrics["step"] == 7 else "go"

    stopped = trainer.run(small_config(data_root, tmp_path / "a"), report=stop_at_7)
    assert (stopped.state, stopped.step, stopped.exit_code) == ("stopped", 7, 0)
    assert (tmp_path / "a" / "checkpoints" / "step_000007.pt").exists()
    assert [item["step"] for item in seen if "loss" in item] == list(range(1, 8))
    assert [item["step"] for item in seen if "val_loss" in item] == [0, 5]

    pruned = trainer.run(
        small_config(data_root, tmp_path / "b"),
        report=lambda **metrics: "prune" if metrics["step"] == 3 else "go",
    )
    assert (pruned.state, pruned.step) == ("pruned", 3)
    assert store.list_checkpoints(tmp_path / "b" / "checkpoints") == []


@pytest.fixture
def short_epochs(tmp_path: Path) -> Path:
    """Four training shards of three rows of 32 tokens."""
    folder = tmp_path / "short"
    prepare.prepare(SMALL_CORPUS, folder, workers=1, shard_tokens=100, max_tokens=500)
    return folder


LONG_ROWS = {"block_size": 32, "total_batch_size": 256}


def test_epoch_boundaries_are_announced_once(short_epochs: Path, tmp_path: Path, capsys):
    """The second of two steps of eight rows completes epoch 0's twelve; it is resumed there."""
    once = {**LONG_ROWS, "eval_interval": None, "total_batch_size": 32, "max_steps": 1}
    trainer.run(small_config(short_epochs, tmp_path / "once", **once))
    assert "Plan: 1 step of 32 tokens (" in capsys.readouterr().out
    trainer.run(small_config(short_epochs, tmp_path, **LONG_ROWS, eval_interval=None, max_steps=2))
    first = capsys.readouterr().out
    more = {**LONG_ROWS, "eval_interval": None, "max_steps": 3, "resume": "latest"}
    trainer.run(small_config(short_epochs, tmp_path, **more))
    second = capsys.readouterr().out
    assert "Completed Epoch 0\n" in first
    assert "Starting" not in first
    assert (
        "Completed Epoch 0\nShuffled 4 training shards for new epoch\nStarting Epoch 1\n"
        "step 3 | epoch 1 |"
    ) in second


def test_a_stop_at_the_end_of_an_epoch_leaves_the_announcement_to_the_resumed_run(
    short_epochs: Path, tmp_path: Path, capsys
):
    def stop_at_2(**metrics: float) -> Answer:
        return "stop" if metrics["step"] == 2 else "go"

    trainer.run(small_config(short_epochs, tmp_path, **LONG_ROWS, max_steps=3), stop_at_2)
    more = {**LONG_ROWS, "max_steps": 3, "resume": "latest"}
    trainer.run(small_config(short_epochs, tmp_path, **more))
    assert capsys.readouterr().out.count("Completed Epoch 0\n") == 1


def test_epochs_end_the_run(short_epochs: Path, tmp_path: Path, capsys):
    more = {**LONG_ROWS, "max_steps": None, "epochs": 2, "shuffle": "global"}
    result = trainer.run(small_config(short_epochs, tmp_path, **more))
    assert result.step == 3
    assert "step 3 | epoch 1 |" in (printed := capsys.readouterr().out)
    assert printed.count("Completed Epoch") == 2
    assert "Shuffled the 12 rows of 4 training shards for new epoch\n" in printed


def test_finished_run_has_nothing_to_do(data_root: Path, tmp_path: Path, capsys):
    trainer.run(small_config(data_root, tmp_path, max_steps=3))
    before = (tmp_path / "checkpoints" / "step_000003.pt").stat().st_mtime_ns
    result = trainer.run(small_config(data_root, tmp_path, max_steps=3, resume="latest"))
    assert result.state == "finished"
    assert "Nothing to do: step 3 of 3 is reached" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "step_000003.pt").stat().st_mtime_ns == before


def test_a_checkpoint_without_metadata_is_saved_again(data_root: Path, tmp_path: Path):
    """Or `--resume latest`, which skips it, would start from step 0."""
    trainer.run(small_config(data_root, tmp_path, max_steps=3))
    path = tmp_path / "checkpoints" / "step_000003.pt"
    path.with_suffix(".json").unlink()
    trainer.run(small_config(data_root, tmp_path, max_steps=3, resume=str(path)))
    (kept,) = store.list_checkpoints(path.parent)
    assert (kept.path, kept.training.is_evaluated) == (path, True)


def test_a_run_that_ends_where_it_was_stopped_still_measures(data_root: Path, tmp_path: Path):
    """At step 7 nothing was due; as the last step it is."""
    trainer.run(small_config(data_root, tmp_path), report=stop_at_7)
    result = trainer.run(small_config(data_root, tmp_path, max_steps=7, resume="latest"))
    assert (result.state, result.step) == ("finished", 7)
    assert result.val_loss is not None
    (kept,) = store.list_checkpoints(tmp_path / "checkpoints")
    assert kept.training.val_loss == result.val_loss


def test_latest_in_an_empty_folder_starts_fresh_and_says_so_loudly(data_root, tmp_path, capsys):
    result = trainer.run(small_config(data_root, tmp_path, max_steps=2, resume="latest"))
    assert result.step == 2
    text = capsys.readouterr().err
    assert "WARNING: no checkpoint in" in text and "starting a NEW run" in text


def test_new_run_does_not_mix_with_an_earlier_one(data_root: Path, tmp_path: Path):
    trainer.run(small_config(data_root, tmp_path, max_steps=2))
    with pytest.raises(
        CheckpointError, match=r"up to step_000002; continue it with --resume latest"
    ):
        trainer.run(small_config(data_root, tmp_path))


def test_contradicting_flags_are_listed_with_both_values(data_root: Path, tmp_path: Path):
    trainer.run(small_config(data_root, tmp_path, max_steps=2))
    other = small_config(
        data_root, tmp_path, resume="latest", n_layer=3, block_size=4, total_batch_size=256, seed=7
    )
    with pytest.raises(CheckpointError) as caught:
        trainer.run(other)
    for line in (
        "n_layer: 2 in the checkpoint, 3 now",
        "block_size: 8 in the checkpoint, 4 now",
        "total_batch_size: 32 in the checkpoint, 256 now",
        "seed: 1337 in the checkpoint, 7 now",
    ):
        assert line in str(caught.value).partition("these flags: ")[2].split("; ")
    assert "mini_batch_size" not in str(caught.value)


def test_other_training_data_is_a_contradiction(gpt2_tokens: Path, tmp_path: Path):
    trainer.run(small_config(gpt2_tokens, tmp_path, max_steps=2))
    other = Path(shutil.copytree(gpt2_tokens, tmp_path / "other"))
    values = json.loads((other / "manifest.json").read_text())
    values["shards"][-1]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"training data: .* in the checkpoint, .* now"):
        trainer.run(small_config(other, tmp_path, resume="latest"))


def test_each_option_that_changes_at_a_resume_is_listed(data_root, tmp_path, capsys):
    trainer.run(small_config(data_root, tmp_path, max_steps=2))
    moved = Path(shutil.copytree(data_root, tmp_path / "moved"))
    changes = {"mini_batch_size": 8, "checkpoint_interval": 3, "epochs": 9, "learning_rate": 1e-4}
    result = trainer.run(small_config(moved, tmp_path, resume="2", max_steps=4, **changes))
    assert result.step == 4
    printed = capsys.readouterr().out
    assert "  - learning_rate: 0.006 before, 0.0001 from here" in printed
    assert "  - mini_batch_size: 4 before, 8 from here" in printed
    assert "checkpoint_dir" not in printed.partition("Run demo")[0]


def test_changed_optimiser_options_take_effect_at_a_resume(data_root: Path, tmp_path: Path):
    trainer.run(small_config(data_root, tmp_path, max_steps=2))
    changes = {"weight_decay": 0.5, "beta2": 0.9}
    trainer.run(small_config(data_root, tmp_path, max_steps=4, resume="latest", **changes))
    decayed, plain = load(tmp_path, 4)["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.9, 0.9)


def test_weights_of_another_run(data_root: Path, tmp_path: Path):
    first = trainer.run(small_config(data_root, tmp_path / "a", learning_rate=1e-2))
    source = str(tmp_path / "a" / "checkpoints" / "best.pt")
    config = small_config(data_root, tmp_path / "b", init_from=source, eval_interval=1, max_steps=1)
    before = []
    trainer.run(config, report=lambda **metrics: before.append(metrics) or "go")
    assert before[0] == {"step": 0, "val_loss": first.best_val_loss}
    with pytest.raises(CheckpointError, match="n_embd: 16 in the checkpoint, 32 now"):
        trainer.run(small_config(data_root, tmp_path / "c", init_from=source, n_embd=32))
    other = small_config(data_root, tmp_path / "d", init_from=source, architecture="modern")
    with pytest.raises(CheckpointError, match="architecture: gpt2 in the checkpoint, modern now"):
        trainer.run(other)


@pytest.mark.parametrize(("dtype", "max_steps"), [("float32", 20), ("bfloat16", 4)])
def test_shares_and_micro_batches_do_not_change_the_gradient(
    data_root: Path, tmp_path: Path, dtype: str, max_steps: int
):
    """Eight rows in micro-batches of 8, and of 3, 3 and 2."""
    logs = []
    changes = {"dtype": dtype, "max_steps": max_steps, "dropout": 0.0, "eval_interval": None}
    changes |= {"block_size": 4, "total_batch_size": 32}
    for mini_batch_size in (8, 3):
        out = tmp_path / str(mini_batch_size)
        trainer.run(small_config(data_root, out, mini_batch_size=mini_batch_size, **changes))
        logs.append(losses(out / "logs" / "log.txt"))
    assert logs[0] == pytest.approx(logs[1], abs=LOSS_TOLERANCE[dtype])


def test_samples_do_not_touch_the_training_stream(data_root: Path, tmp_path: Path):
    for name, interval in (("with", 3), ("without", None)):
        trainer.run(small_config(data_root, tmp_path / name, sample_interval=interval, max_steps=6))
    lines = [loss_lines(tmp_path / name / "logs" / "log.txt") for name in ("with", "without")]
    assert lines[0] == lines[1]
    assert "step 3 | sample 1:" in (tmp_path / "with" / "logs" / "log.txt").read_text()


def test_tensorboard_curves_over_a_kill_and_a_resume(data_root: Path, tmp_path: Path):
    class Killed(Exception):
        pass

    def kill(**metrics: float) -> Answer:
        if metrics["step"] == 13:
            raise Killed
        return "go"

    options = {"use_tensorboard": True, "sample_interval": 10}
    with pytest.raises(Killed):
        trainer.run(small_config(data_root, tmp_path, **options), report=kill)
    written = status.read(tmp_path / "checkpoints")
    assert (written.state, written.step) == ("failed", 13)
    trainer.run(small_config(data_root, tmp_path, **options, resume="latest"))
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss/train", "main/learning_rate", "speed/rank_0_ms", "speed/mfu"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 21)), name
    assert [event.step for event in events.Scalars("loss/val")] == [0, 5, 10, 15, 20]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [10, 20]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_size": 2**18, "total_batch_size": 2**18}, DataError, "too few for one row"),
        ({"checkpoint_dir": Path("/proc/none")}, CheckpointError, "choose another with"),
        ({"resume": "7"}, CheckpointError, "no checkpoint of step 7; steps: none"),
        ({"resume": "best"}, CheckpointError, "use --resume latest"),
        ({"device": "cuda"}, ConfigError, "torch sees no GPU"),
        ({"init_from": "nowhere.pt"}, CheckpointError, "no checkpoint at nowhere.pt"),
        ({"init_from": "latest"}, CheckpointError, "no checkpoint at latest; --init_from takes a"),
        ({"log_dir": Path("/dev/null/x")}, ConfigError, "choose another folder with --log_dir"),
    ],
)
def test_what_cannot_work_is_refused(data_root, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        trainer.run(small_config(data_root, tmp_path, **changes))
    assert not (tmp_path / "logs").exists()

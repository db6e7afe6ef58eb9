"""Named experiments: their folders, the link to the newest checkpoint, several of them at once."""

import os
import sys
from pathlib import Path

import pytest

from forked_ranks import Ranks
from gpt2.base import log
from gpt2.base.errors import CheckpointError, FolderInUse
from gpt2.checkpoint import store
from gpt2.cli import train
from gpt2.config import options, presets
from gpt2.train import experiment_folder, trainer
from gpt2.train.report import Answer
from support import losses, small_config, small_flags, wait_until

SHORT = {"device": "cpu", "eval_interval": None}


def named_config(data_root: Path, out: Path, name: str, gpu_id: str = "2", **changes: object):
    return small_config(
        data_root, out, experiment_name=name, gpu_id=gpu_id, **{"max_steps": 4, **SHORT, **changes}
    )


@pytest.fixture(autouse=True)
def logged_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on standard output, warnings on standard error."""
    log.setup(info_stream="stdout")


def test_a_run_without_a_name_stays_as_it_is():
    run = presets.preset("demo")
    assert experiment_folder.resolve(run) is run
    assert experiment_folder.link(run) is None
    assert experiment_folder.run_name(run, "stored") == "stored"
    assert experiment_folder.run_name(run).startswith("demo_2")
    assert experiment_folder.folders(run) == [Path("checkpoints/demo")]


@pytest.mark.parametrize("preset", ["demo", "gpt2-124m"])
def test_name_and_gpu_give_the_folders(monkeypatch, preset: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    run = experiment_folder.resolve(
        options.overlay(presets.preset(preset), {"wandb_run_name": "exp"})
    )
    assert run.checkpoint.checkpoint_dir == Path("checkpoints/exp_gpu_2")
    assert (run.watch.log_dir, run.watch.runs_dir) == (Path("logs/exp_gpu_2"), Path("runs"))
    assert experiment_folder.link(run) == Path("checkpoints/ckpt_exp_exp_gpu_2.pt")
    assert experiment_folder.run_name(run).startswith("exp_gpu_2_20")
    assert (
        experiment_folder.run_name(run, stored="exp_gpu_2_20260101_000000")
        == "exp_gpu_2_20260101_000000"
    )
    assert experiment_folder.run_name(run, stored="exp_gpu_20_20260101_000000").startswith(
        "exp_gpu_2_20"
    )
    assert experiment_folder.resolve(run) == run
    other = experiment_folder.resolve(
        options.overlay(run, {"checkpoint_dir": "x/y", "gpu_id": "3"})
    )
    assert other.checkpoint.checkpoint_dir == Path("x/y/exp_gpu_3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = experiment_folder.resolve(
        options.overlay(presets.preset(preset), {"experiment_name": "exp"})
    )
    assert experiment_folder.link(run) == Path("checkpoints/ckpt_exp_exp_gpu_cpu.pt")


def test_an_experiment_from_its_start_to_a_resume(data_root: Path, tmp_path: Path, capsys, caplog):
    """It runs in a process; a second run of it is refused, and another experiment trains beside it.
    After a kill it resumes, though its newest checkpoint is damaged. Its link never dangles."""
    folder = tmp_path / "checkpoints" / "exp_gpu_2"
    link = tmp_path / "checkpoints" / "ckpt_exp_exp_gpu_2.pt"
    flags = SHORT | {"experiment_name": "exp", "max_steps": 100_000, "checkpoint_interval": 10}
    given = small_flags(data_root, tmp_path, **flags)
    with Ranks(given, 1, tmp_path, CUDA_VISIBLE_DEVICES="2") as running:  # killed at the end
        wait_until(lambda: running.text().count("Saved checkpoint") >= 3, running.text)
        assert f"Checkpoint will be saved as {link}\n" in running.text()
        (process,) = running.processes
        with pytest.raises(FolderInUse, match=rf"exp_gpu_2: process {process.pid} on"):
            trainer.run(named_config(data_root, tmp_path, "exp", resume="latest"))
        assert trainer.run(named_config(data_root, tmp_path, "exp", gpu_id="3")).step == 4
        assert link.resolve(strict=True).parent == folder
    assert link.resolve(strict=True) in [item.path for item in store.list_checkpoints(folder)]
    before = losses(tmp_path / "logs" / "exp_gpu_2" / "log.txt")
    newest, damaged = store.list_checkpoints(folder)[-2:]
    with damaged.path.open("r+b") as file:
        file.seek(damaged.metadata.bytes // 2)
        file.write(b"damaged!")
    last = newest.training.step + 3
    capsys.readouterr()

    def look(**_: float) -> Answer:
        assert link.resolve(strict=True).suffix == ".pt"
        return "go"

    again = named_config(
        data_root, tmp_path, "exp", init_from="resume", max_steps=last, checkpoint_interval=None
    )
    assert trainer.run(again, look).step == last
    assert f"  - Step: {newest.training.step}\n" in capsys.readouterr().out
    assert "renamed to step_" in caplog.text
    assert os.readlink(link) == f"exp_gpu_2/step_{last:06d}.pt"
    after = losses(tmp_path / "logs" / "exp_gpu_2" / "log.txt")
    assert before.keys() <= after.keys()


def test_what_is_not_there_cannot_be_resumed(data_root: Path, tmp_path: Path, capsys, caplog):
    def refused(name: str, gpu_id: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            trainer.run(named_config(data_root, tmp_path, name, gpu_id, init_from="resume"))
        return str(caught.value)

    base = tmp_path / "checkpoints"
    assert refused("lr1e3", "2") == (
        f"experiment lr1e3 on gpu 2 has no checkpoint in {base}, nor has any other; begin it "
        "without --init_from resume"
    )
    assert not base.exists()
    trainer.run(named_config(data_root, tmp_path, "lr1e3"))
    trainer.run(named_config(data_root, tmp_path, "lr3e4", "cpu", max_steps=2))
    assert refused("lr1e", "2") == (
        f"experiment lr1e on gpu 2 has no checkpoint in {base}; did you mean lr1e3 or lr3e4? "
        "There are:\n  lr1e3 on gpu 2, step 4\n  lr3e4 on cpu, step 2"
    )
    link = base / "ckpt_exp_lr1e3_gpu_2.pt"
    message = f"; --gpu_id 2 continues it there, --resume {link} here. There are:"
    assert message in refused("lr1e3", "0")
    assert sorted(path.name for path in base.iterdir() if path.is_dir()) == [
        "lr1e3_gpu_2",
        "lr3e4_gpu_cpu",
    ]

    capsys.readouterr()
    beside = named_config(data_root, tmp_path, "lr1e3", "0", resume=str(link), max_steps=6)
    assert trainer.run(beside).step == 6  # in its own folders, as a run of its own
    assert "Run lr1e3_gpu_0_20" in capsys.readouterr().out
    trainer.run(named_config(data_root, tmp_path, "new", init_from=str(link)))
    assert f"Loading weights from: {link}" in capsys.readouterr().out
    assert "unverified" not in caplog.text  # the metadata is found through the link
    assert os.readlink(link) == "lr1e3_gpu_2/step_000004.pt"


def test_a_file_in_the_place_of_the_link_is_not_replaced(data_root: Path, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "ckpt_exp_exp_gpu_2.pt"
    file.write_text("another program's checkpoint")
    with pytest.raises(CheckpointError, match=r"is a file of its own.*move it away"):
        trainer.run(named_config(data_root, tmp_path, "exp"))
    assert file.read_text() == "another program's checkpoint"


def test_checkpoints_of_a_name_are_listed(data_root: Path, tmp_path: Path, monkeypatch, capsys):
    for name, gpu_id in [("a", "0"), ("a", "1"), ("b", "0")]:
        trainer.run(named_config(data_root, tmp_path, name, gpu_id, max_steps=1))
    capsys.readouterr()

    def listed(*flags: str) -> list[str]:
        monkeypatch.chdir(tmp_path)  # for short paths
        monkeypatch.setattr(sys, "argv", ["x", *flags])
        assert train.train_main() == 0
        words = capsys.readouterr().out.split()
        return [Path(word).parent.name for word in words if word.endswith(".pt")]

    assert listed("--list_checkpoints") == ["a_gpu_0", "a_gpu_1", "b_gpu_0"]
    assert listed("--list_checkpoints", "--experiment_name", "a") == ["a_gpu_0", "a_gpu_1"]
    assert listed("--list_checkpoints", "--experiment_name", "a", "--gpu_id", "1") == ["a_gpu_1"]


def test_what_to_type_next_names_the_gpu_again(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    arguments = ["--experiment_name", "exp"]
    run = experiment_folder.resolve(train.parse_train(arguments).run)
    text = train.next_commands(run, arguments, world_size=1, step=5, gpus=["2"])
    assert "CUDA_VISIBLE_DEVICES=2 python src/train_improved.py --experiment_name exp" in text
    assert "gpt2 generate --checkpoint_dir checkpoints/exp_gpu_2 --checkpoint best" in text
    assert "gpt2 watch --checkpoint_dir checkpoints/exp_gpu_2\n" in text  # without TensorBoard

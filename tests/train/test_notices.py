"""What is posted about a run; whole runs are real, with a webhook in this process."""

import itertools
import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch

from gpt2.base import folder_lock
from gpt2.base.errors import FolderInUse, UserError
from gpt2.cli import train
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier
from gpt2.train import notices, status, trainer
from gpt2.train.notices import Notices
from inspection.written_runs import PLAN, write_run
from support import small_config, small_flags
from webhook import SECRET, webhook


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)


def test_a_run_posts_its_end_and_the_address_is_in_no_file(
    data_root: Path, tmp_path: Path, monkeypatch, capfd
):
    with webhook() as hook:
        flags = small_flags(data_root, tmp_path, max_steps=4, use_tensorboard=True)
        flags.remove("True")
        monkeypatch.setattr(sys, "argv", ["train_improved.py", *flags, "--notify", hook.address])
        assert train.train_main() == 0
        (message,) = hook.received
        assert SECRET not in str(sys.argv)  # which W&B records
    assert message["event"] == "finished"
    assert "finished at step 4 of 4: loss " in message["text"]
    assert ", bits per byte " in message["text"]
    assert (message["step"], message["total_steps"]) == (4, 4)
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"step_000004.pt", "metrics.jsonl", "status.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_that_cannot_start_posts_why(tmp_path: Path, monkeypatch, capsys):
    with webhook() as hook:
        flags = small_flags(tmp_path / "none", tmp_path)
        monkeypatch.setenv(notify.VARIABLE, hook.address)
        monkeypatch.setattr(sys, "argv", ["train_improved.py", *flags])
        assert train.train_main() == 2
        (message,) = hook.received
    assert message["event"] == "failed"
    assert message["title"].startswith(f"training in {tmp_path}")
    assert message["title"].endswith(" failed")  # it has no steps yet
    assert f"failed: no training data in {tmp_path / 'none'}" in message["text"]


def test_a_bad_address_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["train_improved.py", "--out_dir", str(tmp_path), "--notify", f"x://{SECRET}"]
    )
    assert train.train_main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --notify: expected an address that begins with http://")
    assert SECRET not in line
    assert not [*tmp_path.iterdir()]


def test_a_run_that_is_stopped_and_one_that_fails(data_root: Path, tmp_path: Path):
    def stop(**metrics: float) -> str:
        return "stop" if metrics.get("step") == 2 else "go"

    def fail(**_metrics: float) -> str:
        raise RuntimeError("disk on fire\n" * 100)

    with webhook() as hook:
        trainer.run(small_config(data_root, tmp_path / "a"), stop, notices=Notices(hook.address))
        with pytest.raises(RuntimeError):
            trainer.run(
                small_config(data_root, tmp_path / "b"), fail, notices=Notices(hook.address)
            )
        stopped, failed = hook.received
    assert "stopped at step 2 of 20: on request; loss " in stopped["text"]
    assert failed["event"] == "failed"
    kept = status.read(tmp_path / "b/checkpoints").reason
    assert f"failed at step 0 of 20: {kept}" in failed["text"]
    log = tmp_path / "b/logs/log.txt"
    assert kept.startswith("RuntimeError: disk on fire disk") and len(kept) == 300
    assert kept.endswith(f"… (whole in {log})")
    assert log.read_text().count("disk on fire") == 100


def test_a_way_back_is_posted(data_root: Path, tmp_path: Path, monkeypatch):
    gradient_norm, updates = trainer.gradient_norm, itertools.count(1)

    def poisoned(net: torch.nn.Module) -> torch.Tensor:
        norm = gradient_norm(net)
        return norm * math.nan if next(updates) in (4, 5, 6) else norm

    monkeypatch.setattr(trainer, "gradient_norm", poisoned)
    changes = {"max_steps": 6, "checkpoint_interval": 2, "max_bad_steps": 3, "eval_interval": None}
    with webhook() as hook:
        config = small_config(data_root, tmp_path, **changes)
        trainer.run(config, notices=Notices(hook.address))
        skipped, back, _ = hook.received
        assert hook.wait_for(3) == ["skipped", "went_back", "finished"]
    assert "skipped an update at step 4 of 6: step 4: loss 4." in skipped["text"]
    assert "went back to step 2 of 6: 3 updates in a row, up to step 6, had no" in back["text"]


def test_a_hang_is_posted_once_and_so_is_its_end(monkeypatch):
    monkeypatch.setattr(notices, "CHECK_S", 0.01)
    monkeypatch.setattr(status, "STALL_S", 0.05)
    monkeypatch.setattr(status, "STALL_STEPS", 0)
    with webhook() as hook:
        notes = Notices(hook.address)
        notes.begin(PLAN, 3)
        notes.stepped(0.01)
        assert hook.wait_for(1) == ["stalled"]
        notes.sign_of_life(4)
        assert hook.wait_for(2)[:2] == ["stalled", "continues"]
        assert hook.wait_for(3)[2] == "stalled"
        notes.close()
    assert "no sign of life for" in hook.received[0]["text"]


def test_before_the_first_step_a_run_may_compile_for_long():
    assert not status.is_stalled(status.SILENCE_S - 1, None)
    assert not status.is_stalled(status.STALL_S + 1, step_s=100)
    assert status.is_stalled(status.STALL_S + 1, step_s=1)


def test_a_death_is_posted_once_by_the_next_start(data_root: Path, tmp_path: Path):
    """A killed run leaves a status that says `running`, and no lock on the folder."""
    config = small_config(data_root, tmp_path, max_steps=2)
    folder = config.checkpoint.checkpoint_dir
    write_run(folder, 3)
    with webhook() as hook:
        broken = small_config(tmp_path / "no data", tmp_path, max_steps=2)
        with pytest.raises(UserError):
            trainer.run(broken, notices=Notices(hook.address))
        assert hook.wait_for(2) == ["died", "failed"]
        trainer.run(config, notices=Notices(hook.address))
        assert hook.wait_for(3) == ["died", "failed", "finished"]
        status.write(folder, PLAN, "running", 1)  # it is killed again
        trainer.run(
            small_config(data_root, tmp_path, max_steps=2, resume="latest"),
            notices=Notices(hook.address),
        )
        assert hook.wait_for(5)[3:] == ["died", "finished"]
    text = hook.received[0]["text"]
    assert "died after step 0 of 1,000: process " in text
    assert text.endswith("it is started again now")


def test_a_death_that_several_processes_notice_is_posted_once(tmp_path: Path):
    write_run(tmp_path, 1)
    dead = status.read(tmp_path)
    with webhook() as hook:
        watchers = [Notifier(hook.address) for _ in range(8)]
        threads = [
            threading.Thread(target=notices.post_death, args=(tmp_path, dead, notifier))
            for notifier in watchers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for notifier in watchers:
            notifier.close()
        assert [message["event"] for message in hook.received] == ["died"]


def test_a_process_without_an_address_leaves_a_death_to_one_that_has_one(tmp_path: Path):
    write_run(tmp_path, 1)
    dead = status.read(tmp_path)
    assert dead is not None
    notices.post_death(tmp_path, dead, Notifier(None))
    with webhook() as hook:
        notifier = Notifier(hook.address)
        notices.post_death(tmp_path, dead, notifier)
        notifier.close()
        assert hook.received


def test_a_second_start_in_the_same_folder_posts_nothing(data_root: Path, tmp_path: Path):
    config = small_config(data_root, tmp_path)
    folder = config.checkpoint.checkpoint_dir
    write_run(folder, 1)
    with webhook() as hook, folder_lock.held(folder):
        with pytest.raises(FolderInUse):
            trainer.run(config, notices=Notices(hook.address))
        assert not hook.received


def test_a_failing_webhook_fails_no_run(data_root: Path, tmp_path: Path):
    with webhook(500) as hook:
        config = small_config(data_root, tmp_path, max_steps=2)
        assert trainer.run(config, notices=Notices(hook.address)).state == "finished"
    lines = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    warnings = [json.loads(line).get("message", "") for line in lines if "--notify" in line]
    assert warnings == ["messages of --notify do not arrive: the server answered 500"]

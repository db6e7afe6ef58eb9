"""kill -9 of ranks, of torchrun and of all, at any moment."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

import forked_ranks
from faults.harness import (
    FLAGS,
    Run,
    has_weights_of,
    is_part_of,
    last_step,
    slow_script,
    starts_of,
    trial,
)
from forked_ranks import Ranks
from gpt2.checkpoint import store
from gpt2.distributed import watchdog
from gpt2.train import trainer
from gpt2.train.report import Answer
from support import small_config, small_flags, wait_until

pytestmark = pytest.mark.faults

VICTIMS = ("rank", "torchrun", "all")


def kill_at_random(data_root: Path, out: Path, victim: str, chance: random.Random) -> None:
    """Kills a run in `out` once it has trained further than the run before it. Its steps take a
    tenth of a second, so that no machine has finished it by then."""
    before = last_step(out / "logs/log.txt")
    script = slow_script(out.parent, "gpt2.train.trainer", "lr_at", call=None, pause_s=0.1)
    run = Run(data_root, out, script=script, **FLAGS)
    run.wait_for_step(before + 1)
    time.sleep(chance.uniform(0, 1.2))
    with trial(f"kill -9 of {victim}") as steps_lost:
        reached = last_step(run.log)
        assert before < reached < FLAGS["max_steps"]
        run.kill(victim, chance)
        assert run.end() != 0
        lost = max(0, reached - run.kept())
        assert lost <= 2 * FLAGS["checkpoint_interval"]  # one may not be written yet
        steps_lost.append(lost)


def finish(data_root: Path, out: Path) -> None:
    forked_ranks.run(small_flags(data_root, out, **FLAGS, resume="latest"), 2, out)


def require_equal(run: Path, reference: Path) -> None:
    """Checks that a run which was killed and has finished equals the uninterrupted one, bit for
    bit."""
    assert all(is_part_of(lines, reference) for lines in starts_of(run))
    assert last_step(run / "logs/log.txt") == FLAGS["max_steps"]
    assert has_weights_of(run, reference)


def test_killed_run_continues_bit_identically(data_root: Path, tmp_path: Path, reference: Path):
    """Both ranks are killed at one moment."""
    run, log = tmp_path / "run", tmp_path / "run/logs/log.txt"
    with Ranks(small_flags(data_root, run, **FLAGS), 2, tmp_path) as ranks:
        wait_until((run / "checkpoints/step_000008.json").exists, ranks.text)
        time.sleep(random.Random(1).uniform(0, 0.1))
    assert last_step(log) < FLAGS["max_steps"]
    finish(data_root, run)
    _, second = starts_of(run)
    assert not second[0].startswith("step 1 "), "it begins at a checkpoint"
    require_equal(run, reference)


def test_a_run_saves_when_torchrun_is_killed(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """A rank has another parent then; `kill -9` leaves torchrun no time to say anything."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)

    def lose_torchrun(**metrics: float) -> Answer:
        if metrics["step"] == 5:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        return "go"

    endless = small_config(data_root, tmp_path, max_steps=100_000, checkpoint_interval=None)
    result = trainer.run(endless, lose_torchrun)
    assert "rank 0: torchrun has died" in caplog.text
    assert (result.state, result.exit_code) == ("stopped", 128 + signal.SIGUSR2)
    newest = store.find(tmp_path / "checkpoints", "latest")
    assert newest is not None and newest.stem == f"step_{result.step:06d}"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_kills_at_random_moments(data_root: Path, tmp_path: Path, reference: Path):
    chance = random.Random(7)
    for number in range(26):
        run = tmp_path / f"run{number}"
        for victim in chance.sample(VICTIMS, 2):
            kill_at_random(data_root, run, victim, chance)
        finish(data_root, run)
        require_equal(run, reference)


SAVING = """
import sys, torch
from pathlib import Path
from gpt2.base import folder_lock
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import TrainingMetadata
folder = Path(sys.argv[1])
folder_lock.require_writable(folder)
store.remove_unfinished(folder)
steps = [item.training.step for item in store.list_checkpoints(folder)]
step = max(steps, default=0)
while True:
    step += 1
    training = TrainingMetadata(step, 0, 0, 1.0, 1.0 / step, 1, "run", "0")
    state = {"model": torch.full((4_000_000,), float(step))}
    store.save(folder, state, training, keep_last=3)
    print("saved", step, flush=True)
"""


def kill_while_saving(folder: Path, after_s: float) -> tuple[list[int], int]:
    """The steps saved before the kill, and the step that loads after it."""
    script = folder.with_name("saving.py")
    script.write_text(SAVING)
    with Ranks([str(folder)], 1, folder.parent, script) as saving:
        wait_until(lambda: "saved" in saving.text(), saving.text)
        time.sleep(after_s)
    output = saving.text()
    steps = [int(line.split()[1]) for line in output.splitlines() if line.startswith("saved")]
    newest = store.find(folder, "latest")
    assert newest is not None, output
    step = int(store.load(newest)["model"][0])
    assert newest.name == f"step_{step:06d}.pt"
    return steps, step


def test_killed_while_saving(tmp_path: Path, caplog):
    folder = tmp_path / "checkpoints"
    for after_s in (0.01, 0.04):
        with trial("kill -9 while a checkpoint is written"):
            saved, loaded = kill_while_saving(folder, after_s)
            assert loaded in (saved[-1], saved[-1] + 1)  # saved, but not yet printed
            assert caplog.messages == []
    store.remove_unfinished(folder)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_soak_killed_while_saving(tmp_path: Path, caplog):
    folder, chance = tmp_path / "checkpoints", random.Random(3)
    strays = 0
    for _ in range(50):
        with trial("kill -9 while a checkpoint is written"):
            saved, loaded = kill_while_saving(folder, chance.uniform(0, 0.2))
            assert loaded in (saved[-1], saved[-1] + 1)
            assert caplog.messages == []
        strays += bool(list(folder.glob("*.tmp")))
    assert strays > 10  # most kills hit the moment that this test is about
    store.remove_unfinished(folder)
    assert not list(folder.glob("*.tmp"))

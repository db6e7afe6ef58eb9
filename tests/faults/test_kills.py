"""kill -9 of ranks, of torchrun and of all, at any moment."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.conftest import FLAGS
from faults.harness import Run, assert_same_losses, last_step, python, record
from gpt2 import checkpoint
from support import ROOT

VICTIMS = ("rank", "torchrun", "all")


def kill_until_finished(
    data_root: Path, out: Path, victims: list[str], chance: random.Random, reference: Path
) -> int:
    """One run that is killed and started again, with each victim, and then left alone."""
    kills = 0
    for victim in [*victims, None]:
        before = last_step(out / "logs/log.txt")
        run = Run(data_root, out, **FLAGS)
        if victim is None:
            assert run.end() == 0, run.text()
            break
        deadline = time.monotonic() + chance.uniform(3, 9)
        while time.monotonic() < deadline and run.agent.poll() is None:
            time.sleep(0.01)
        reached = last_step(run.log)
        run.kill(victim)
        run.end()
        newest = checkpoint.find(out / "checkpoints", "latest", print)
        kept = int(newest.stem.removeprefix("step_")) if newest else 0
        record(f"kill -9 of {victim}", survived=True, steps_lost=max(0, reached - kept))
        assert kept >= before - 2 * FLAGS["checkpoint_interval"]  # one may be on its way
        kills += 1
    assert_same_losses(out, reference)
    return kills


def test_killed_run_continues_bit_identically(data_root: Path, tmp_path: Path, reference: Path):
    victims = ["rank", "torchrun"]
    kill_until_finished(data_root, tmp_path / "run", victims, random.Random(1), reference)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_soak_kills_at_random_moments(data_root: Path, tmp_path: Path, reference: Path):
    chance = random.Random(7)
    kills, number = 0, 0
    while kills < 51:
        victims = [VICTIMS[(kills + k) % 3] for k in range(3)]
        kills += kill_until_finished(
            data_root, tmp_path / f"run{number}", victims, chance, reference
        )
        number += 1


SAVING = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "src")!r})
from pathlib import Path
from gpt2 import checkpoint
folder = Path(sys.argv[1])
checkpoint.require_writable(folder)
checkpoint.sweep(folder)
steps = [item.facts.step for item in checkpoint.list_checkpoints(folder)]
step = max(steps, default=0)
while True:
    step += 1
    facts = checkpoint.Facts(step, 0, 0, 1.0, 1.0 / step, 1, "run", "0")
    checkpoint.save(folder, {{"model": torch.full((4_000_000,), float(step))}}, facts, keep_last=3)
    print("saved", step, flush=True)
"""


def kill_while_saving(folder: Path, after_s: float) -> None:
    process = python(SAVING, folder)
    assert process.stdout is not None
    said = process.stdout.readline()
    time.sleep(after_s)
    process.kill()
    said += process.communicate()[0]
    steps = [int(line.split()[1]) for line in said.splitlines() if line.startswith("saved")]
    assert steps, said
    warnings: list[str] = []
    newest = checkpoint.find(folder, "latest", warnings.append)
    assert newest is not None
    assert warnings == []
    state = checkpoint.load(newest, warn=warnings.append)
    step = int(state["model"][0])
    assert newest.name == f"step_{step:06d}.pt"
    assert step in (steps[-1], steps[-1] + 1)  # the print after a finished save may be missing
    assert os.readlink(folder / "latest.pt") in (newest.name, f"step_{step - 1:06d}.pt")
    record("kill -9 while a checkpoint is written", survived=True)


def sweep(folder: Path) -> None:
    checkpoint.sweep(folder)
    assert not list(folder.glob("*.tmp"))


def test_killed_while_saving(tmp_path: Path):
    for after_s in (0.01, 0.04):
        kill_while_saving(tmp_path, after_s)
    sweep(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_soak_killed_while_saving(tmp_path: Path):
    chance = random.Random(3)
    strays = 0
    for _ in range(50):
        kill_while_saving(tmp_path, chance.uniform(0, 0.2))
        strays += bool(list(tmp_path.glob("*.tmp")))
    assert strays > 10  # or the kills came at other moments than those that this is about
    sweep(tmp_path)


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)]
)
def test_signals_to_the_ranks_save(data_root: Path, tmp_path: Path, number: signal.Signals):
    """torchrun dies of SIGUSR1 unless told to hand it on; its ranks save nevertheless."""
    run = Run(data_root, tmp_path / "run", **(FLAGS | {"max_steps": 100_000}))
    run.wait_for("step 6 |")
    os.kill(run.agent.pid, number)
    run.end()
    stopped = last_step(run.log)
    assert (run.out / "checkpoints" / f"step_{stopped:06d}.json").exists()
    assert f"at step {stopped}; --resume latest goes on" in run.text()
    record(f"{number.name} to torchrun", survived=True)

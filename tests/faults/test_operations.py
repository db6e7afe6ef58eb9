"""The scripts in docs/operations.md, unchanged, with a small run."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.harness import FLAGS, last_step, trial
from gpt2.inspection import run_status
from support import HANG_S, ROOT, small_flags, wait_until

pytestmark = pytest.mark.faults

PAGE = (ROOT / "docs" / "operations.md").read_text()


class Checkout:
    """A checkout with a virtual environment, and a SLURM that only logs its commands."""

    def __init__(self, folder: Path, data_root: Path) -> None:
        self.folder, self.data_root = folder, data_root
        (folder / "src").symlink_to(ROOT / "src")
        for name, target in {"torchrun": "torchrun", "gpt2": "gpt2"}.items():
            (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
            (folder / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / target)
        (folder / "logs").mkdir()
        (folder / "bin").mkdir()
        scontrol = folder / "bin/scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >>{shlex.quote(str(folder / "scontrol.txt"))}\n')
        scontrol.chmod(0o755)

    def small(self, script: str, max_steps: int) -> str:
        """`script` for a small run on two ranks."""
        flags = FLAGS | {"max_steps": max_steps, "eval_interval": None}
        more = small_flags(self.data_root, Path("."), **flags)
        script = script.replace("--nproc_per_node=4", "--nproc_per_node=2")
        script = script.replace("$HOME/gpt2-from-scratch", str(self.folder))
        return script.replace("--resume latest", f"--resume latest {shlex.join(more)}")

    def start(self, script: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        environment = {"PATH": path, "SLURM_JOB_ID": "77", "OMP_NUM_THREADS": "1"}
        with (self.folder / "out.txt").open("a") as output:
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for_step(self, step: int) -> None:
        wait_until(
            lambda: last_step(self.folder / "logs/log.txt") >= step,
            (self.folder / "out.txt").read_text,
        )

    def state(self) -> str:
        found = run_status.newest_run(self.folder / "checkpoints")
        return found.state if found else "none"

    def requeued(self) -> int:
        log = self.folder / "scontrol.txt"
        return log.read_text().count("requeue 77\n") if log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path, data_root: Path) -> Checkout:
    return Checkout(tmp_path, data_root)


@pytest.mark.soak
@trial("SLURM's warning, a kill, and the end")
def test_the_slurm_script_requeues_until_the_end(checkout: Checkout):
    script = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)[0]
    job = checkout.start(checkout.small(script, max_steps=10_000))
    checkout.wait_for_step(6)
    job.send_signal(signal.SIGUSR1)
    job.wait(HANG_S)
    assert (checkout.state(), checkout.requeued()) == ("stopped", 1)

    reached = last_step(checkout.folder / "logs/log.txt")
    job = checkout.start(checkout.small(script, max_steps=10_000))
    checkout.wait_for_step(reached + 6)
    owner = run_status.newest_run(checkout.folder / "checkpoints").status.pid
    os.kill(owner, signal.SIGKILL)
    job.wait(HANG_S)
    assert (checkout.state(), checkout.requeued()) == ("dead", 2)

    reached = last_step(checkout.folder / "logs/log.txt")
    job = checkout.start(checkout.small(script, max_steps=reached + 4))
    job.wait(HANG_S)
    assert (checkout.state(), checkout.requeued()) == ("finished", 2)


@pytest.mark.soak
@trial("the cron line after a kill")
def test_the_cron_line_restarts_a_dead_run_only(checkout: Checkout):
    line = re.findall(r"^\*/10 \* \* \* \* (.*)$", PAGE, re.MULTILINE)[0]
    command = "exec .venv/bin/torchrun --nproc_per_node=4 src/train_improved.py --resume latest"
    run = checkout.start(checkout.small(command, max_steps=10_000))
    checkout.wait_for_step(6)
    checkout.start(checkout.small(line, max_steps=10_000)).wait(HANG_S)  # it lives: nothing to do
    assert not (checkout.folder / "logs/cron.txt").exists()
    os.kill(run_status.newest_run(checkout.folder / "checkpoints").status.pid, signal.SIGKILL)
    run.wait(HANG_S)
    reached = last_step(checkout.folder / "logs/log.txt")
    checkout.start(checkout.small(line, max_steps=reached + 4)).wait(HANG_S)
    assert checkout.state() == "finished"
    assert "Resuming from" in (checkout.folder / "logs/cron.txt").read_text()

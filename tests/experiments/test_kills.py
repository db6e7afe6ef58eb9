"""Sweeps whose owner and workers are killed at random instants, in real processes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpt2.experiments import results
from support import HANG_S, ROOT, wait_until

SEEDS, PAUSE_S = 40, 0.15


class Sweep:
    """A sweep of `jobs.measured` that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trace = folder, folder / "trace"
        self.results = folder / "checkpoints" / "seeds"
        self.seen: list[str] = []
        """lines of results.jsonl that were there at some time"""
        self.start()

    def start(self) -> None:
        flags = ["--target", "experiments.jobs:measured", "--num_seeds", str(SEEDS)]
        flags += ["--device", "cpu"]  # it need not ask torch for GPUs
        search = {"PYTHONPATH": os.pathsep.join(sys.path), "PAUSE": str(PAUSE_S)}
        with (self.folder / "output.txt").open("a") as output:
            self.owner = subprocess.Popen(
                [sys.executable, str(ROOT / "src/main_multi_gpu.py"), *flags, "--retries", "99"],
                cwd=self.folder,
                env=os.environ | search | {"TRACE": str(self.trace)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """What the owner has started and still lives, by the trace in the environment."""
        mark = f"TRACE={self.trace}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return [pid for pid in found if pid != self.owner.pid]

    def workers(self) -> list[int]:
        """Those that run jobs."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                parent, session = int(fields[1]), int(fields[3])
                if b"worker.serve" in command and (parent, session) == (self.owner.pid, pid):
                    found.append(pid)
        return found

    def wait_for_workers(self) -> bool:
        """Whether it has any before it is over."""
        while self.owner.poll() is None:
            if self.workers():
                return True
            time.sleep(0.02)
        return False

    def look(self) -> None:
        """No line that was there is gone."""
        path = self.results / results.RESULT_LINES_FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        assert whole[: len(self.seen)] == self.seen
        self.seen = whole

    def kill(self, whom: str, chosen: random.Random) -> None:
        """Kills the owner, a worker, or all of them."""
        workers = self.workers()
        targets = {"owner": [], "worker": chosen.sample(workers, min(1, len(workers)))}
        for pid in targets.get(whom, workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if whom != "worker":
            self.owner.kill()
            self.owner.wait()
            self.require_no_orphan()
            self.look()
            self.start()

    def require_no_orphan(self) -> None:
        wait_until(lambda: not self.processes(), lambda: "something has outlived the owner")


def killed_sweep(folder: Path, chosen: random.Random, whom: Sequence[str]) -> int:
    """A sweep that is killed so often and then left alone; how often it was."""
    running, kills = Sweep(folder), 0
    try:
        for victim in whom:
            if not running.wait_for_workers():
                break
            time.sleep(chosen.uniform(0, 1))
            running.look()
            running.kill(victim, chosen)
            kills += 1
        assert running.owner.wait(timeout=HANG_S) == 0, (folder / "output.txt").read_text()
    finally:
        running.owner.kill()
        running.owner.wait()
    running.look()
    running.require_no_orphan()
    records = results.read_results(running.results)
    assert Counter(record.values["seed"] for record in records) == Counter(range(SEEDS))
    assert all(record.state == "finished" for record in records)
    ended = {record.values["seed"]: record.time for record in records}
    for line in running.trace.read_text().splitlines():
        _, seed, started, _pid = line.split()
        assert float(started) < ended[int(seed)], "a job ran again after it had finished"
    return kills


def test_killed_sweep_loses_nothing(tmp_path: Path):
    assert killed_sweep(tmp_path, random.Random(5), ["worker", "owner", "all"]) == 3


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_100_kills(tmp_path: Path):
    chosen, kills, sweeps = random.Random(2), 0, 0
    while kills < 100:
        folder = tmp_path / str(sweeps)
        folder.mkdir()
        whom = chosen.choices(["worker", "owner", "all"], weights=[2, 1, 1], k=12)
        kills, sweeps = kills + killed_sweep(folder, chosen, whom), sweeps + 1
    print(f"{kills} kills in {sweeps} sweeps: no result lost, none made twice, no orphan")

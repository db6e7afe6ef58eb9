"""Sweeps whose owner and workers are killed at random instants, in real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from gpt2.experiments import ledger
from support import ROOT

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
        search = {"PYTHONPATH": os.pathsep.join(sys.path), "PAUSE": str(PAUSE_S)}
        with (self.folder / "output.txt").open("a") as output:
            self.owner = subprocess.Popen(
                [sys.executable, str(ROOT / "src/main_multi_gpu.py"), *flags, "--retries", "99"],
                cwd=self.folder,
                env=os.environ | search | {"TRACE": str(self.trace)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def workers(self) -> list[int]:
        """Living worker processes, by the name of their folder in their environment."""
        mark = f"TRACE={self.trace}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return [pid for pid in found if pid != self.owner.pid]

    def look(self) -> None:
        """No line that was there is gone."""
        path = self.results / ledger.LINES
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        assert whole[: len(self.seen)] == self.seen
        self.seen = whole

    def kill(self, chosen: random.Random) -> bool:
        """Kills the owner, or a worker, or all of them; False if it is over."""
        if self.owner.poll() is not None:
            return False
        workers = self.workers()
        whom = chosen.choice(["owner", "worker", "worker", "all"])
        targets = workers if whom == "all" else workers[:1] if whom == "worker" else []
        for pid in [*targets, *([self.owner.pid] if whom != "worker" else [])]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if whom != "worker":
            self.owner.wait()
            deadline = time.monotonic() + 5
            while self.workers():
                assert time.monotonic() < deadline, "a worker has outlived its owner"
                time.sleep(0.02)
            self.look()
            self.start()
        return True


def killed_sweep(folder: Path, chosen: random.Random, kills: int) -> int:
    """A sweep that is killed up to `kills` times and then left alone; how often it was."""
    running, done = Sweep(folder), 0
    try:
        for _ in range(kills):
            time.sleep(chosen.uniform(0.2, 4.0))
            running.look()
            done += running.kill(chosen)
        assert running.owner.wait(timeout=120) == 0, (folder / "output.txt").read_text()
    finally:
        running.owner.kill()
        running.owner.wait()
    running.look()
    assert running.workers() == [] or time.sleep(1) or running.workers() == []
    records = ledger.read_records(running.results)
    assert Counter(record.values["seed"] for record in records) == Counter(range(SEEDS))
    assert all(record.state == "finished" for record in records)
    ended = {record.values["seed"]: record.time for record in records}
    for line in running.trace.read_text().splitlines():
        _, seed, started, _pid = line.split()
        assert float(started) < ended[int(seed)], "a job ran again after it had finished"
    return done


def test_killed_sweep_loses_nothing(tmp_path: Path):
    assert killed_sweep(tmp_path, random.Random(5), kills=4) >= 3


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_100_kills(tmp_path: Path):
    chosen, done, sweeps = random.Random(2), 0, 0
    while done < 100:
        folder = tmp_path / str(sweeps)
        folder.mkdir()
        done, sweeps = done + killed_sweep(folder, chosen, kills=12), sweeps + 1
    print(f"{done} kills in {sweeps} sweeps: no result lost, none made twice, no orphan")

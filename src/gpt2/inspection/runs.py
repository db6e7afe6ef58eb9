"""What a person sees of runs on disk: the table of checkpoints, the forecast of the end."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gpt2.base import folder_lock
from gpt2.config.flops import duration
from gpt2.train import status

# What is assumed where there is neither a run nor data to go by.


def run_folders(root: Path, mark: str) -> list[Path]:
    """`root` and the folders below it that hold a file matching `mark`, sorted."""
    return sorted({path.parent for path in root.rglob(mark)}) if root.is_dir() else []


@dataclass(frozen=True)
class Run:
    """A run on the disk: its checkpoint folder and what it last said."""

    folder: Path
    status: status.Status

    @property
    def state(self) -> str:
        """running, finished, stopped, failed; dead if it says running and is not there."""
        if folder_lock.is_held(self.folder):
            return "running"
        silent_s = time.time() - self.status.time
        elsewhere = self.status.host != socket.gethostname() and silent_s < status.SILENCE_S
        return "dead" if self.status.state == "running" and not elsewhere else self.status.state


def newest_run(root: Path) -> Run | None:
    """The run in `root`, else the one below it whose status was written last."""
    if own := status.read(root):
        return Run(root, own)
    found = [(folder, status.read(folder)) for folder in run_folders(root, status.NAME)]
    runs = [Run(folder, item) for folder, item in found if item is not None]
    return max(runs, key=lambda run: run.status.time, default=None)


def print_state(run: Run, out: Console) -> None:
    """What a run does, where, and when it was last heard of."""
    said = run.status
    reason = f": {said.reason}" if said.reason else ""
    out.print(f"{said.plan.run_name}: {run.state}{reason}")
    out.print(f"  step {said.step:,} of {said.plan.total_steps:,}")
    heard = duration(time.time() - said.time)
    out.print(f"  process {said.pid} on {said.host}, last heard of {heard} ago")
    out.print(f"  checkpoints {run.folder}")

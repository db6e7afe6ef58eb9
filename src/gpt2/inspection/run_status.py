"""The state of runs on disk: which run is the newest, and whether it is alive."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gpt2.base import folder_lock
from gpt2.base.text import brief, one_line
from gpt2.config import experiment_name
from gpt2.config.flops import duration
from gpt2.metrics.jsonl import RECORDS_NAME
from gpt2.metrics.log_file import LOG_NAME
from gpt2.train import status

LOG_NAMES = (LOG_NAME, RECORDS_NAME)


@dataclass(frozen=True)
class Run:
    """A run on disk: its checkpoint folder and the `status.json` in it."""

    folder: Path
    status: status.Status

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped` or `failed`; `dead` if no process backs `running`."""
        return self.state_if(folder_lock.is_held(self.folder))

    def state_if(self, is_held: bool) -> str:
        """`state`, given whether a process holds the folder."""
        if is_held:
            return "running"
        silent_s = time.time() - self.status.time
        is_elsewhere = self.status.host != socket.gethostname() and silent_s < status.SILENCE_S
        return "dead" if self.status.state == "running" and not is_elsewhere else self.status.state

    @property
    def log(self) -> Path:
        """Its log, also if that has moved with the folder, or is seen from another machine."""
        folder = Path(self.status.plan.log_file).parent
        places = (folder, self.folder.parent / "logs", self.folder)
        return next((log for place in places if (log := log_in(place))), folder / LOG_NAME)


def run_folders(root: Path, pattern: str) -> list[Path]:
    """`root` and the folders below it that hold a file matching `pattern`, sorted."""
    return sorted({path.parent for path in root.rglob(pattern)}) if root.is_dir() else []


def log_in(folder: Path) -> Path | None:
    """The log of runs in `folder`; None if there is none."""
    paths = (folder / name for name in LOG_NAMES)
    return next((path for path in paths if path.is_file()), None)


def folders_of_name(name: str, root: Path) -> list[Path]:
    """The folders of a named experiment directly in `root`, one for each GPU, that with the
    newest run first."""

    def written(folder: Path) -> float:
        current = status.read(folder)
        return current.time if current else 0.0

    found = [
        folder
        for folder in root.glob(experiment_name.label("*", "*"))
        if (read := experiment_name.read_label(folder.name)) and read[0] == name
    ]
    return sorted(found, key=written, reverse=True)


def newest_run(root: Path) -> Run | None:
    """The run in `root`, else the one below it whose status was written last, or None."""
    if own := status.read(root):
        return Run(root, own)
    found = [(folder, status.read(folder)) for folder in run_folders(root, status.NAME)]
    runs = [Run(folder, item) for folder, item in found if item is not None]
    return max(runs, key=lambda run: run.status.time, default=None)


def print_state(run: Run, out: Console) -> None:
    """Prints what a run does, where, and how old its status is."""
    current = run.status
    written = run.folder / status.NAME
    reason = f": {brief(current.reason, written)}" if current.reason else ""
    out.print(one_line(f"{current.plan.run_name}: {run.state}{reason}"), soft_wrap=True)
    out.print(f"  step {current.step:,} of {current.plan.total_steps:,}")
    age = duration(time.time() - current.time)
    out.print(f"  process {current.pid} on {current.host}, status written {age} ago")
    for name in current.switched_off:
        out.print(
            f"  {name} is switched off: it failed again and again, see {current.plan.log_file}"
        )
    out.print(f"  checkpoints {run.folder}")

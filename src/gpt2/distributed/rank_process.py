"""The process of a rank, as other ranks on the same machine see it."""

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ENDED_STATES = ("Z", "X")  # of /proc/PID/stat: a zombie, and one that is being removed


@dataclass(frozen=True)
class RankProcess:
    """Identifies a process."""

    process_table: str
    """the machine since its last boot, and the namespace of process numbers in it; empty if the
    system does not say"""
    pid: int
    started: int
    """clock ticks between boot and the start of the process: numbers are used again"""

    @classmethod
    def own(cls) -> "RankProcess":
        found = _state_and_start(os.getpid())
        return cls(_process_table() if found else "", os.getpid(), found[1] if found else 0)

    @property
    def is_gone(self) -> bool:
        """Whether it has ended; False if it is on another machine or in another container, where
        this process cannot see it."""
        if self.process_table != _process_table() or not self.process_table:
            return False
        found = _state_and_start(self.pid)
        return found is None or found[0] in ENDED_STATES or found[1] != self.started


def _process_table() -> str:
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """The state and start time of a process; None if it does not exist."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return values[0], int(values[19])

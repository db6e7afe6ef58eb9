"""A process, as other processes on the same machine see it: whether it still runs."""

import os
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ENDED_STATES = ("Z", "X")  # of /proc/PID/stat: a zombie, and one that is being removed


@dataclass(frozen=True)
class ProcessIdentity:
    """Identifies a process."""

    boot: str
    """of the machine: differs between machines, and after a restart; empty if unknown"""
    namespace: str
    """of process numbers: containers have their own"""
    pid: int
    ticks: int
    """clock ticks between boot and the start of the process: numbers are used again"""

    @classmethod
    def own(cls) -> "ProcessIdentity":
        found = _state_and_ticks(os.getpid())
        boot, namespace = _boot_and_namespace() if found else ("", "")
        return cls(boot, namespace, os.getpid(), found[1] if found else 0)

    @property
    def is_visible(self) -> bool:
        """Whether this process could see it: it is on this machine, since it started, and in this
        container."""
        return bool(self.boot) and (self.boot, self.namespace) == _boot_and_namespace()

    @property
    def is_gone(self) -> bool:
        """Whether it has ended; False if it is not visible from here."""
        if not self.is_visible:
            return False
        found = _state_and_ticks(self.pid)
        return found is None or found[0] in ENDED_STATES or found[1] != self.ticks

    @property
    def is_of_earlier_boot(self) -> bool:
        """Whether the machine was restarted since, if it was a process of this machine."""
        boot = _boot_and_namespace()[0]
        return bool(self.boot) and bool(boot) and self.boot != boot


def _boot_and_namespace() -> tuple[str, str]:
    try:
        return BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _state_and_ticks(pid: int) -> tuple[str, int] | None:
    """The state and start time of a process; None if it does not exist."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return values[0], int(values[19])

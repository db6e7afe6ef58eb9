"""One run, or one experiment, per folder: two would overwrite each other's files."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2.base.errors import CheckpointError

NAME = "run.lock"
LOOKED_AT_S = 1.0
RUN_FLAGS = "--out_dir NAME or --experiment_name NAME"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # such as Lustre, mounted without flock


@dataclass(frozen=True)
class Owner:
    """The process that trains here."""

    host: str
    pid: int
    started: str
    """local time"""
    ticks: int = 0
    """the same in the kernel's count since boot, which tells it from a later process of that pid"""


@contextmanager
def held(folder: Path, what: str = "run", flag: str = RUN_FLAGS) -> Iterator[None]:
    """The folder is this process's while the block runs; the kernel frees it when a process dies.

    Raises CheckpointError, naming the owner, while another process has it; `what` is kept
    there, and `flag` chooses another folder for it.
    """
    with (folder / NAME).open("a+") as file:
        try:
            _take(file.fileno())
        except BlockingIOError:
            raise _refusal(folder, what, flag) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _lives(owner(folder)):
                raise _refusal(folder, what, flag) from None
        me = Owner(
            socket.gethostname(),
            os.getpid(),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            _started(os.getpid()),
        )
        file.truncate(0)
        file.write(json.dumps(asdict(me)) + "\n")
        file.flush()
        yield


def _take(handle: int) -> None:
    """Takes the lock alone; somebody who only looks (`is_held`) has it for a moment."""
    deadline = time.monotonic() + LOOKED_AT_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def is_held(folder: Path) -> bool:
    """Whether a living process has the folder."""
    try:
        with (folder / NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        return error.errno in NO_LOCKS and _lives(owner(folder))
    return False


def owner(folder: Path) -> Owner | None:
    """Who has the folder, or had it last."""
    try:
        return Owner(**json.loads((folder / NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _lives(owner: Owner | None) -> bool:
    """Whether the owner is a process of this machine that has not ended: all that can be known on
    a file system without locks."""
    return (
        owner is not None
        and owner.host == socket.gethostname()
        and 0 < owner.ticks == _started(owner.pid)
    )


def _started(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc(5), stat, field 22); 0 if there is none
    or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _refusal(folder: Path, what: str, flag: str) -> CheckpointError:
    return CheckpointError(
        f"another {what} goes on in {folder}: {_describe(owner(folder))}; stop it first, or keep "
        f"this {what} elsewhere with {flag}"
    )


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "a process that has not said its name"
    return f"process {owner.pid} on {owner.host}, since {owner.started}"

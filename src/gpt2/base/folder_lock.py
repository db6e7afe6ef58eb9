"""A lock for a folder: two runs, or two experiments, in one would overwrite each other's files."""

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
from gpt2.base.json_fields import from_json

NAME = "run.lock"
WAIT_FOR_READERS_S = 1.0
"""`is_held` takes the lock for a moment; a process that wants the folder waits this long for it"""
RUN_FLAGS = "--out_dir NAME or --experiment_name NAME"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # such as Lustre, mounted without flock


@dataclass(frozen=True)
class Owner:
    """The process that holds a folder."""

    host: str
    pid: int
    started: str
    """local time"""
    ticks: int = 0
    """the same in the kernel's clock ticks since boot: a later process with that pid has others"""


@contextmanager
def held(folder: Path, what: str = "run", flag: str = RUN_FLAGS) -> Iterator[None]:
    """Locks the folder while the block runs; the kernel releases the lock when the process dies.

    Raises CheckpointError, naming the owner, if another process holds it. The message calls what
    runs in the folder `what`, and names `flag` as the way to choose another folder.
    """
    with (folder / NAME).open("a+") as file:
        try:
            _take(file.fileno())
        except BlockingIOError:
            raise _refusal(folder, what, flag) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _is_running(owner(folder)):
                raise _refusal(folder, what, flag) from None
        me = Owner(
            socket.gethostname(),
            os.getpid(),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            _start_ticks(os.getpid()),
        )
        file.truncate(0)
        file.write(json.dumps(asdict(me)) + "\n")
        file.flush()
        yield


def _take(handle: int) -> None:
    """Takes the exclusive lock; raises BlockingIOError if another process keeps it."""
    deadline = time.monotonic() + WAIT_FOR_READERS_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def is_held(folder: Path) -> bool:
    """Whether a running process holds the folder."""
    try:
        with (folder / NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        return error.errno in NO_LOCKS and _is_running(owner(folder))
    return False


def owner(folder: Path) -> Owner | None:
    """The process that holds the folder, or held it last; None if that is unknown."""
    try:
        return from_json(Owner, json.loads((folder / NAME).read_text()), folder / NAME)
    except (OSError, ValueError, TypeError):
        return None


def _is_running(owner: Owner | None) -> bool:
    """Whether the owner is a running process of this machine. For file systems without locks, where
    owners on other machines cannot be checked."""
    return (
        owner is not None
        and owner.host == socket.gethostname()
        and 0 < owner.ticks == _start_ticks(owner.pid)
    )


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), stat, field 22); 0 if there is no
    such process or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _refusal(folder: Path, what: str, flag: str) -> CheckpointError:
    return CheckpointError(
        f"another {what} is using {folder}: {_describe(owner(folder))}; stop it first, or choose "
        f"another folder for this {what} with {flag}"
    )


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "an unknown process"
    return f"process {owner.pid} on {owner.host}, since {owner.started}"

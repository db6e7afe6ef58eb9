"""A lock for a folder: two runs, or two experiments, in one would overwrite each other's files.

`run.lock` is locked; `owner.json` beside it says by whom.
"""

import errno
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2.base import atomic_files
from gpt2.base.errors import FolderInUse
from gpt2.base.json_fields import from_json

logger = logging.getLogger(__name__)

NAME, OWNER_NAME = "run.lock", "owner.json"
WAIT_FOR_READERS_S = 1.0
"""`is_held` takes the lock for a moment; a process that wants the folder waits this long for it"""
PROBE_S = 0.05
"""as long `is_held` waits for another process that asks the same"""
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
    command: str = ""
    """without its options, which may hold a password"""

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}, since {self.started}{command}"


@contextmanager
def held(
    folder: Path, what: str = "run", flag: str = RUN_FLAGS, wait: bool = False
) -> Iterator[None]:
    """Locks the folder while the block runs; the kernel releases the lock when the process dies.

    If another process holds it, waits for that one with `wait`, else raises FolderInUse, naming the
    owner. The message calls what runs in the folder `what`, and names `flag` as the way to choose
    another folder.
    """
    with lock_file(folder / NAME) as lock:
        try:
            lock.acquire(timeout=WAIT_FOR_READERS_S)
        except Timeout:
            if not wait:
                raise _refusal(folder, what, flag) from None
            logger.info("Waiting: %s", _in_use(folder, what))
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if _is_running(owner(folder)):
                raise _refusal(folder, what, flag) from None
        with _owner_file(folder):
            yield


@contextmanager
def lock_file(path: Path) -> Iterator[FileLock]:
    """A lock, to be acquired; it is released when the block ends, in whatever thread."""
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        yield lock
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a running process holds the folder. Changes nothing."""
    if not (folder / NAME).exists():
        return False
    with lock_file(folder / NAME) as lock:
        try:
            lock.acquire(timeout=PROBE_S)
        except Timeout:
            return True
        except OSError:  # no locks, or not this user's file
            return _is_running(owner(folder))
        return False


def owner(folder: Path) -> Owner | None:
    """The process that holds the folder, or that died holding it; None if that is unknown."""
    path = folder / OWNER_NAME
    try:
        return from_json(Owner, json.loads(path.read_text()), path)
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _owner_file(folder: Path) -> Iterator[None]:
    """Names this process as the owner while the block runs."""
    pid, path = os.getpid(), folder / OWNER_NAME
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    me = Owner(socket.gethostname(), pid, started, _start_ticks(pid), _command())
    atomic_files.write_text(path, json.dumps(asdict(me)) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _command() -> str:
    program = Path(sys.argv[0].removesuffix("/__main__.py")).name
    words = itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:])
    return " ".join([program, *words])


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


def _in_use(folder: Path, what: str) -> str:
    return f"another {what} is using {folder}: {owner(folder) or 'an unknown process'}"


def _refusal(folder: Path, what: str, flag: str) -> FolderInUse:
    return FolderInUse(
        f"{_in_use(folder, what)}; stop it first, or choose another folder for this {what} with "
        f"{flag}"
    )

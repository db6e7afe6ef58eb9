"""A lock for a folder: two runs, or two experiments, in one would overwrite each other's files.

`run.lock` is locked, and `owner.json` beside it says by whom. Some network file systems let two
machines lock the same file. So the owner file is a claim, too: it is created exclusively, and its
time changes as long as its process runs.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2.base import json_fields, regular_file
from gpt2.base.errors import CheckpointError, FolderInUse
from gpt2.base.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

NAME, OWNER_NAME = "run.lock", "owner.json"
WAIT_FOR_READERS_S = 1.0
"""`is_held` takes the lock for a moment; a process that wants the folder waits this long for it"""
PROBE_S = 0.05
"""how long `is_held` waits for another process that looks at the same time"""
HEARTBEAT_S, SILENCE_S = 15.0, 60.0
"""seconds between two signs of life of an owner, and without one after which it counts as dead"""
CLAIM_POLL_S = 0.5
MACHINE_ID = Path("/etc/machine-id")
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
    command: str = ""
    """without its options, which may hold a password"""
    boot: str = ""
    namespace: str = ""
    """with `pid` and `ticks`: see ProcessIdentity"""
    machine: str = ""
    """as the system identifies it; two may have the same host name"""
    claim: str = ""
    """differs between two claims of one process"""

    @classmethod
    def this_process(cls) -> "Owner":
        process = ProcessIdentity.own()
        return cls(
            host=socket.gethostname(),
            pid=process.pid,
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            ticks=process.ticks,
            command=_command(),
            boot=process.boot,
            namespace=process.namespace,
            machine=_machine_id(),
            claim=uuid.uuid4().hex,
        )

    @property
    def process(self) -> ProcessIdentity:
        return ProcessIdentity(self.boot, self.namespace, self.pid, self.ticks)

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended: it was a process of this machine."""
        is_here = (self.host, self.machine) == (socket.gethostname(), _machine_id())
        return self.process.is_gone or (is_here and self.process.is_of_earlier_boot)

    @property
    def is_running_here(self) -> bool:
        """Whether it is known to run: it is a process that is visible from here."""
        return self.process.is_visible and not self.process.is_gone

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
    another folder. Where locks do not work, an owner on another machine counts as dead after
    SILENCE_S without a sign of life, for which this process waits. If this process is silent for so
    long and another one takes the folder over, this process ends at once.
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
                raise _unwritable(folder / NAME, error) from error
        me = Owner.this_process()
        while not _create(folder / OWNER_NAME, me):
            if _is_alive(folder, what):
                if not wait:
                    raise _refusal(folder, what, flag)
                time.sleep(CLAIM_POLL_S)
        with _heartbeat(folder / OWNER_NAME, me):
            yield


def require_writable(folder: Path) -> None:
    """Makes `folder`; raises CheckpointError if no file can be written to it."""
    probe = folder / f"write_test_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the checkpoint folder {folder}: {error.strerror}; "
            "choose another with --checkpoint_dir or --out_dir"
        ) from error


@contextmanager
def lock_file(path: Path) -> Iterator[FileLock]:
    """A lock, to be acquired; it is released when the block ends, in whatever thread."""
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        yield lock
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a running process holds the folder, as far as this machine can tell. Changes
    nothing."""
    if not (folder / NAME).exists():
        return False
    with lock_file(folder / NAME) as lock:
        try:
            lock.acquire(timeout=PROBE_S)
        except Timeout:
            return True
        except OSError:  # no locks, or not this user's file
            pass
        found = owner(folder)
        return found is not None and found.is_running_here


def has_live_owner(folder: Path) -> bool:
    """Whether the process that `owner.json` names lives, as far as this machine can tell. Unlike
    `is_held`, it does not take the lock, so it can be called every second."""
    found = owner(folder)
    if found is None or found.is_dead:
        return False
    if found.is_running_here:
        return True
    try:
        return time.time() - (folder / OWNER_NAME).stat().st_mtime < SILENCE_S
    except OSError:  # it has ended meanwhile
        return False


def owner(folder: Path) -> Owner | None:
    """The process that holds the folder, or that died holding it; None if that is unknown."""
    path = folder / OWNER_NAME
    try:
        return json_fields.from_json(Owner, json_fields.read(path), path)
    except json_fields.UNREADABLE:
        return None


def _create(path: Path, me: Owner) -> bool:
    """Creates the owner file; False if there is one. Raises CheckpointError if it cannot be
    written."""
    try:
        with path.open("x") as file:
            file.write(json.dumps(asdict(me)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise _unwritable(path, error) from error
    return True


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}; make room, or choose another folder"
    )


def _is_alive(folder: Path, what: str) -> bool:
    """Whether the process that made the owner file lives; removes the file of a dead one.

    Waits for a sign of life of an owner on another machine.
    """
    path = folder / OWNER_NAME
    found, first = owner(folder), _sign_of_life(path)
    if first is None:  # it has ended meanwhile
        return False
    if found is not None and found.is_running_here:
        return True
    if found is None or not found.is_dead:
        logger.warning(
            "Waiting up to %.0f s for a sign of life: %s", SILENCE_S, _in_use(folder, what)
        )
        until = time.monotonic() + SILENCE_S
        while time.monotonic() < until:
            if (sign := _sign_of_life(path)) != first:
                return sign is not None  # it has removed the file, and ended
            time.sleep(CLAIM_POLL_S)
        logger.warning("%s gave no sign of life; taking over", found or "the owner")
    with contextlib.suppress(OSError):
        # Not removed if another process has taken over meanwhile.
        if _sign_of_life(path) == first:
            path.unlink()
    return False


def _sign_of_life(path: Path) -> tuple[int, bytes] | None:
    """Time and content of the owner file; None if there is none. (It is opened, because a network
    file system may answer from its cache otherwise.)"""
    try:
        with regular_file.open_to_read(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; remove it if no process works in {path.parent}"
        ) from error


@contextmanager
def _heartbeat(path: Path, me: Owner) -> Iterator[None]:
    """Gives signs of life while the block runs, and then removes the owner file."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(HEARTBEAT_S):
            found = owner(path.parent)
            if found is not None and found.claim != me.claim:
                logger.error(
                    "%s has taken over %s, because this process gave no sign of life for %.0f s; "
                    "this process ends without saving",
                    found,
                    path.parent,
                    SILENCE_S,
                )
                os._exit(1)
            with contextlib.suppress(OSError, CheckpointError):
                if found is None:  # the file was removed by hand
                    _create(path, me)
                os.utime(path)

    thread = threading.Thread(target=beat, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _machine_id() -> str:
    """See machine-id(5); empty where there is none, as in many containers."""
    try:
        return MACHINE_ID.read_text().strip()
    except OSError:
        return ""


def _command() -> str:
    program = Path(sys.argv[0].removesuffix("/__main__.py")).name
    words = itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:])
    return " ".join([program, *words])


def _in_use(folder: Path, what: str) -> str:
    return f"another {what} is using {folder}: {owner(folder) or 'an unknown process'}"


def _refusal(folder: Path, what: str, flag: str) -> FolderInUse:
    return FolderInUse(
        f"{_in_use(folder, what)}; stop it first, or choose another folder for this {what} with "
        f"{flag}"
    )

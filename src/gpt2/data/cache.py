"""Local copies of far files, on as much of the disk as they are given.

fsspec fetches the files. Its caches are not used: they write under the final name, so that a kill
leaves half a file, they take an outage for a missing file, and they grow without a limit.
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import DataError
from gpt2.data.remote import Storage, words

# Waiting between attempts. The run waits with its data and can be stopped meanwhile, so that there
# is no reason to give up soon: a network may be gone for an hour of ten days.
PAUSES_S = (1, 2, 5, 10, 30, *[60] * 120)
FEW_ATTEMPTS = 3
"""for what patience hardly mends: a file that is not there, or arrives whole but is another"""
HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError)
SPEAK_AFTER_S = 30.0
PART = ".part"

Check = Callable[[Path], str | None]
"""What is wrong with a file that arrived, or None."""


@dataclass(frozen=True)
class Cache:
    """Room for local copies, shared by all processes of this machine."""

    folder: Path
    limit_bytes: int | None = None

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f", up to {self.limit_bytes / 1e9:g} GB"
        return f"copies in {self.folder}{limit}"

    @contextlib.contextmanager
    def copy(self, storage: Storage, name: str, size: int, check: Check) -> Iterator[Path]:
        """A copy that `check` finds good, and that stays while the block runs.

        It is fetched if it is not there, once for all processes of this machine. Room is made by
        removing what was not used for longest and is not in use. Raises DataError, naming the
        file, when there is no hope or no patience left.
        """
        with self._errors(), contextlib.ExitStack() as stack:
            path = self._path(storage, name)
            lock = stack.enter_context(self._lock(path.name))
            patience = _Patience(f"another process to fetch {storage.full(name)}")
            fetched = False
            while True:
                if _takes(lock, fcntl.LOCK_SH):
                    if path.exists() and (fetched or check(path) is None):
                        break
                    if _takes(lock, fcntl.LOCK_EX):  # and gives up the other one
                        if not path.exists() or check(path) is not None:
                            self._fetch(storage, name, size, check, path)
                        fetched = True
                        continue
                patience.wait()
            os.utime(path)
            held = stack.pop_all()
        with held:  # what happens in the block is not of the cache
            yield path

    def _fetch(self, storage: Storage, name: str, size: int, check: Check, path: Path) -> None:
        """Makes a whole copy, however often that takes."""
        full, part = storage.full(name), path.with_name(path.name + PART)
        few = 0
        for pause_s in (*PAUSES_S, None):
            try:
                with self._lock("fetching") as lock:  # one at a time, so that the limit holds
                    patience = _Patience("another copy to arrive")
                    while not _takes(lock, fcntl.LOCK_EX):
                        patience.wait()
                    self._make_room(size)
                    storage.fetch(name, part)
                    reason = check(part)
                    if reason is None:
                        with part.open("rb") as file:
                            os.fsync(file.fileno())
                        os.replace(part, path)
                        return
                few += part.stat().st_size == size
            except Exception as error:  # each protocol has errors of its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"{full} does not fit into {self.folder}; make room, or choose another "
                        "folder with --cache_dir"
                    ) from error
                reason = words(error)
                few += isinstance(error, HOPELESS)
            part.unlink(missing_ok=True)
            if pause_s is None or few == FEW_ATTEMPTS:
                raise DataError(f"{full} did not arrive: {reason}")
            _say(f"{full} did not arrive ({reason}); trying again in {pause_s} s")
            time.sleep(pause_s)

    def _make_room(self, size: int) -> None:
        """Removes the copies that were not used for longest until `size` more bytes fit."""
        if self.limit_bytes is None:
            return
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removes it too
                if path.is_file():
                    copies.append((path.stat().st_mtime, path.stat().st_size, path))
        spare = self.limit_bytes - sum(held for _, held, _ in copies)
        for _, held, path in sorted(copies):
            if spare >= size:
                return
            with self._lock(path.name.removesuffix(PART)) as lock:
                if _takes(lock, fcntl.LOCK_EX):  # else it is in use
                    path.unlink(missing_ok=True)
                    spare += held

    def _path(self, storage: Storage, name: str) -> Path:
        return self.folder / hashlib.sha256(storage.full(name).encode()).hexdigest()

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[int]:
        """A file of that name to lock; locks end with it."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        handle = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot use the cache folder {self.folder}: {error.strerror or error}; choose "
                "another with --cache_dir"
            ) from error


def _takes(lock: int, kind: int) -> bool:
    """Whether the lock is free to be taken so; if it is not, a lock that was held is gone."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Patience:
    """Waits in small pieces, and says for what if it takes long, as with a stopped process."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._speak_at = time.monotonic() + SPEAK_AFTER_S

    def wait(self) -> None:
        time.sleep(0.05)
        if time.monotonic() > self._speak_at:
            _say(f"waiting for {self._what}")
            self._speak_at = math.inf


def _say(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)

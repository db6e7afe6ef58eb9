"""Local copies of remote shards, in a folder of limited size.

fsspec downloads the files. Its caches are not used: they write under the final name, so that a
killed process leaves a partial file, they mistake an outage for a missing file, and they grow
without limit.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import DataError
from gpt2.data.remote import Storage, describe

logger = logging.getLogger(__name__)

# Seconds between attempts. The run waits for its data and can be stopped meanwhile, so there is no
# reason to give up soon: in a run of ten days, a network may be down for an hour.
RETRY_PAUSES_S = (1, 2, 5, 10, 30, *[60] * 120)
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)
PERMANENT_ERROR_ATTEMPTS = 3
"""attempts where waiting hardly helps: the file is missing, or complete but not the expected one"""
WARN_AFTER_S = 30.0
PART = ".part"

Check = Callable[[Path], str | None]
"""Returns what is wrong with a downloaded file, or None."""


@dataclass(frozen=True)
class ShardCache:
    """A folder for local copies, shared by all processes of this machine."""

    folder: Path
    limit_bytes: int | None = None

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f", up to {self.limit_bytes / 1e9:g} GB"
        return f"copies in {self.folder}{limit}"

    @contextlib.contextmanager
    def copy(self, storage: Storage, name: str, size: int, check: Check) -> Iterator[Path]:
        """A local copy that passes `check`; it is not removed while the block runs.

        A missing copy is downloaded, once for all processes of this machine. To make room, copies
        that are not in use are removed, the least recently used first. Raises DataError, naming the
        file, if the error is permanent or all attempts have failed.
        """
        with self._errors(), contextlib.ExitStack() as stack:
            path = self._path(storage, name)
            lock = stack.enter_context(self._lock_file(path.name))
            wait = _Wait(f"another process to download {storage.full(name)}")
            downloaded = False
            while True:
                if _try_lock(lock, fcntl.LOCK_SH):
                    if path.exists() and (downloaded or check(path) is None):
                        break
                    if _try_lock(lock, fcntl.LOCK_EX):  # releases the shared lock
                        if not path.exists() or check(path) is not None:
                            self._download(storage, name, size, check, path)
                        downloaded = True
                        continue
                wait.pause()
            os.utime(path)
            held = stack.pop_all()
        with held:  # outside of _errors: errors of the block are not the cache's
            yield path

    def _download(self, storage: Storage, name: str, size: int, check: Check, path: Path) -> None:
        """Downloads a file to `path`, with as many attempts as it takes."""
        full, part = storage.full(name), path.with_name(path.name + PART)
        permanent_errors = 0
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                reason = self._attempt(storage, name, size, check, path, part)
                if reason is None:
                    return
                permanent_errors += part.stat().st_size == size
            except (DataError, OSError) as error:
                cause = (error.__cause__ if isinstance(error, DataError) else None) or error
                if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"{full} does not fit into {self.folder}; free disk space, or choose "
                        "another folder with --cache_dir"
                    ) from error
                reason = describe(cause)
                permanent_errors += isinstance(cause, PERMANENT_ERRORS)
            part.unlink(missing_ok=True)
            if pause_s is None or permanent_errors == PERMANENT_ERROR_ATTEMPTS:
                raise DataError(f"{full} could not be downloaded: {reason}")
            logger.warning(
                "%s could not be downloaded (%s); trying again in %s s", full, reason, pause_s
            )
            time.sleep(pause_s)

    def _attempt(
        self, storage: Storage, name: str, size: int, check: Check, path: Path, part: Path
    ) -> str | None:
        """Downloads to `part` and renames it to `path`; returns what is wrong with it, or None."""
        with self._lock_file("fetching") as lock:  # one download at a time keeps to the limit
            wait = _Wait("another download to finish")
            while not _try_lock(lock, fcntl.LOCK_EX):
                wait.pause()
            self.make_room(size)
            storage.fetch(name, part)
            reason = check(part)
            if reason is None:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
            return reason

    def make_room(self, size: int) -> None:
        """Removes the least recently used copies until `size` more bytes fit."""
        if self.limit_bytes is None:
            return
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removes it too
                if path.is_file():
                    copies.append((path.stat().st_mtime, path.stat().st_size, path))
        free = self.limit_bytes - sum(held for _, held, _ in copies)
        for _, held, path in sorted(copies):
            if free >= size:
                return
            with self._lock_file(path.name.removesuffix(PART)) as lock:
                if _try_lock(lock, fcntl.LOCK_EX):  # else the copy is in use
                    path.unlink(missing_ok=True)
                    free += held

    def _path(self, storage: Storage, name: str) -> Path:
        return self.folder / hashlib.sha256(storage.full(name).encode()).hexdigest()

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        """An open lock file of that name; its locks are released when the block ends."""
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
                "another one with --cache_dir"
            ) from error


def _try_lock(lock: int, kind: int) -> bool:
    """Takes the lock if it is free; returns whether it did. If not, a lock held before is lost."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Wait:
    """Waits in short pauses; logs once what it waits for if that takes long."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._warn_at = time.monotonic() + WARN_AFTER_S

    def pause(self) -> None:
        time.sleep(0.05)
        if time.monotonic() > self._warn_at:
            logger.warning("waiting for %s", self._what)
            self._warn_at = math.inf

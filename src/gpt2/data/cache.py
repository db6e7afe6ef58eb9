"""Local copies of remote shards, in a folder of limited size.

fsspec downloads the files. Its caches are not used: they write under the final name, so that a
killed process leaves a partial file, they mistake an outage for a missing file, and they grow
without limit.
"""

import contextlib
import errno
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from gpt2.base import retry
from gpt2.base.errors import DataError
from gpt2.base.folder_lock import lock_file
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


class _DownloadFailed(Exception):
    """An attempt to download failed, for the reason that it is made with."""

    def __init__(self, reason: str, is_permanent: bool) -> None:
        super().__init__(reason)
        self.is_permanent = is_permanent


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
        path = self.folder / hashlib.sha256(storage.full(name).encode()).hexdigest()
        with contextlib.ExitStack() as stack:
            with self._errors():
                stack.enter_context(self._in_use(path))
                if not path.exists() or check(path) is not None:
                    self._download(storage, name, size, check, path)
                os.utime(path)
            yield path

    def _download(self, storage: Storage, name: str, size: int, check: Check, path: Path) -> None:
        """Downloads a file to `path`, with as many attempts as it takes."""
        full, permanent_errors = storage.full(name), 0

        def may_pass(error: BaseException) -> bool:
            nonlocal permanent_errors
            if not isinstance(error, _DownloadFailed):
                return False
            permanent_errors += error.is_permanent
            return permanent_errors < PERMANENT_ERROR_ATTEMPTS

        def log(error: BaseException, pause_s: float) -> None:
            logger.warning(
                "%s could not be downloaded (%s); trying again in %g s", full, error, pause_s
            )

        try:
            retry.call(
                lambda: self._attempt(storage, name, size, check, path),
                RETRY_PAUSES_S,
                may_pass,
                log,
            )
        except _DownloadFailed as error:
            raise DataError(f"{full} could not be downloaded: {error}") from error

    def _attempt(self, storage: Storage, name: str, size: int, check: Check, path: Path) -> None:
        """Downloads to a temporary file and renames it to `path`, unless another process did."""
        part = path.with_name(path.name + PART)
        with self._locked("fetching"):  # one download at a time keeps to the limit
            if path.exists() and check(path) is None:
                return
            self.make_room(size)
            try:
                storage.fetch(name, part)
                if reason := check(part):
                    raise _DownloadFailed(reason, is_permanent=part.stat().st_size == size)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
            except (DataError, OSError) as error:
                cause = (error.__cause__ if isinstance(error, DataError) else None) or error
                if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"{storage.full(name)} does not fit into {self.folder}; free disk space, "
                        "or choose another folder with --cache_dir"
                    ) from error
                raise _DownloadFailed(
                    describe(cause), isinstance(cause, PERMANENT_ERRORS)
                ) from error
            finally:
                part.unlink(missing_ok=True)

    def make_room(self, size: int) -> None:
        """Removes the least recently used copies until `size` more bytes fit."""
        if self.limit_bytes is None:
            return
        with self._locked("uses"):
            copies = [
                (status.st_mtime, status.st_size, path)
                for path in self.folder.iterdir()
                if path.is_file() and (status := path.stat())
            ]
            free = self.limit_bytes - sum(held for _, held, _ in copies)
            for _, held, path in sorted(copies):
                if free >= size:
                    return
                if not self._is_in_use(path):
                    path.unlink()
                    free += held

    @contextlib.contextmanager
    def _in_use(self, path: Path) -> Iterator[None]:
        """Keeps a copy from being removed while the block runs and this process lives: it holds a
        lock file of its own, named after the copy."""
        mark = self._locks / f"{path.name}.{uuid.uuid4().hex}"
        with lock_file(mark) as lock:
            with self._locked("uses"):
                lock.acquire()
            try:
                yield
            finally:
                mark.unlink(missing_ok=True)

    def _is_in_use(self, path: Path) -> bool:
        for mark in self._locks.glob(f"{path.name}.*"):
            with lock_file(mark) as lock:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    return True
                mark.unlink(missing_ok=True)  # its process was killed
        return False

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with lock_file(self._locks / name) as lock:
            try:
                lock.acquire(timeout=WARN_AFTER_S)
            except Timeout:
                logger.warning("waiting for another process that downloads to %s", self.folder)
                lock.acquire()
            yield

    @property
    def _locks(self) -> Path:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot use the cache folder {self.folder}: {error.strerror or error}; choose "
                "another one with --cache_dir"
            ) from error

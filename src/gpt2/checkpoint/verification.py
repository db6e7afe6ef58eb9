"""Verification: a checkpoint is compared with the size and the SHA-256 digests of its metadata."""

import logging
import os
import time
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from gpt2.base import regular_file, retry
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import integrity
from gpt2.checkpoint.metadata import CheckpointMetadata, read_metadata

logger = logging.getLogger(__name__)

PAUSES_S = (1, 3)
"""before each new try: network file systems fail now and then"""
SETTLED_S = 2.0
"""a file that changed within this time may change again without a new time stamp"""
FileVersion = tuple[int, ...]
"""device, inode, size and time stamps of a file: while they are equal, so is the content"""
_verified: set[tuple[FileVersion, tuple[str, ...]]] = set()
"""what this process has verified, so that a file that is found and then loaded is read once"""


@dataclass(frozen=True)
class Verified:
    """A file whose content has the digests of its metadata."""

    metadata: CheckpointMetadata
    version: FileVersion


def verify(path: Path) -> Verified | None:
    """Compares `path` with its metadata; returns None, with a warning, if it has none.

    Raises CheckpointError if the file is damaged or cannot be read.
    """
    metadata = read_metadata(path.with_suffix(".json"))
    if metadata is None:
        logger.warning("%s has no readable metadata: it is loaded unverified", path)
        return None
    try:
        return verify_against(path, metadata)
    except OSError as error:
        raise unreadable(path, error) from error


def verify_against(path: Path, metadata: CheckpointMetadata) -> Verified:
    """Compares `path` with `metadata`.

    Raises CheckpointError if the file is damaged, and OSError if it still cannot be read at the
    third try.
    """

    def verify_once() -> Verified:
        with regular_file.open_to_read(path) as file:
            return verify_open_file(path, file, metadata)

    return retry.call(
        verify_once,
        PAUSES_S,
        may_pass=lambda error: isinstance(error, OSError),
        log=lambda error, pause_s: logger.debug("%s: %s; again in %d s", path, error, pause_s),
    )


def verify_open_file(path: Path, file: BufferedReader, metadata: CheckpointMetadata) -> Verified:
    """Reads all of `file`, unless this process has verified this version of it before.

    Raises CheckpointError if its size or digests are not those of `metadata`.
    """
    status, version = os.fstat(file.fileno()), version_of(file)
    if status.st_size != metadata.bytes:
        raise CheckpointError(
            f"{path} has {status.st_size} bytes, its metadata says {metadata.bytes}"
        )
    known = (version, tuple(metadata.sha256))
    if known not in _verified:
        if not integrity.is_intact(file.fileno(), metadata.sha256, metadata.piece_bytes):
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its metadata")
        if time.time() - status.st_ctime > SETTLED_S:
            _verified.add(known)
    return Verified(metadata, version)


def version_of(file: BufferedReader) -> FileVersion:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a checkpoint that cannot be read, which is not damage."""
    return CheckpointError(
        f"cannot read {path}: {error.strerror or error}; the checkpoint may be intact: check the "
        "disk, the network and the file's permissions, then try again"
    )

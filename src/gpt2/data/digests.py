"""SHA-256 of shards, computed once for each version of a file and remembered.

A version is size, modification time and inode: while they are equal, so is the content. Digests are
remembered in `.digests.jsonl` beside the shards, or in the user's cache folder where that cannot be
written. Each line has one; the newest of a file counts.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from gpt2.base import json_fields, regular_file, user_folders
from gpt2.base.json_fields import LARGEST_INTEGER, Timestamp

logger = logging.getLogger(__name__)

NAME = ".digests.jsonl"
CHUNK_BYTES = 4 << 20
SETTLED_S = 2.0
"""a file that was hashed so soon after a change may have changed again without a new time stamp"""
ATTEMPTS = 3
"""to hash a file that changes meanwhile"""
Version = tuple[int, int, int]
"""size in bytes, modification time in nanoseconds, inode without its highest bit"""


@dataclass(frozen=True)
class Fault:
    """A shard does not hold what it should, or cannot be read."""

    reason: str
    """begins with the shard's name"""
    unverified: str | None = None
    """its file, if rows may have been used before the fault was noticed"""
    may_pass: bool = False
    """whether the shard could not be read, which may succeed later"""


@dataclass
class Content:
    """What one process finds out about the content of shards while it reads them."""

    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256, by file, of shards of which it was not known before"""
    fault: Fault | None = None
    """the first that was noticed"""
    on_fault: Callable[[], None] | None = None
    """any thread may call it"""

    def report(self, fault: Fault) -> None:
        self.fault = self.fault or fault
        if self.on_fault is not None:
            self.on_fault()


def version_of(status: os.stat_result) -> Version:
    # A JSON field takes signed integers of 64 bits, and file systems number up to 2**64.
    return status.st_size, status.st_mtime_ns, status.st_ino & LARGEST_INTEGER


def hash_file(
    file: BinaryIO, between_chunks: Callable[[], None] = lambda: None
) -> tuple[Version, str]:
    """The version and the SHA-256 of an open file. `between_chunks` may end it by an exception."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for _ in range(ATTEMPTS):
        version, digest, place = version_of(os.fstat(file.fileno())), hashlib.sha256(), 0
        while count := os.preadv(file.fileno(), [buffer], place):
            digest.update(buffer[:count])
            place += count
            between_chunks()
        if version_of(os.fstat(file.fileno())) == version:
            break
    return version, digest.hexdigest()


@dataclass(frozen=True)
class _Remembered:
    """A line of `.digests.jsonl`."""

    file: str
    version: Version
    sha256: str
    time: Timestamp
    """when the file was hashed"""


class DigestMemory:
    """The digests that are known of the files in a local folder, by their names relative to it."""

    def __init__(self, folder: Path) -> None:
        beside, cached = folder / NAME, _place_in_cache(folder)
        is_writable = os.access(beside if beside.exists() else folder, os.W_OK)
        self.place = cached if cached is not None and not is_writable else beside
        """the file that this process writes"""
        self._places = [beside] if cached is None else [beside, cached]
        self._sizes: dict[Path, int] = {}
        self._known: dict[str, tuple[Version, str, float]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes in what other processes have added."""
        for place in self._places:
            with contextlib.suppress(OSError):
                if (size := place.stat().st_size) != self._sizes.get(place):
                    self._sizes[place] = size
                    content = regular_file.read_bytes(place)
                    for line in content.decode(errors="replace").splitlines():
                        self._take(line)

    def get(self, file: str, version: Version) -> str | None:
        """The digest of this version of a file; None if it is not known."""
        known, digest, hashed_at = self._known.get(file, (None, "", 0.0))
        is_settled = abs(hashed_at - version[1] / 1e9) > SETTLED_S
        return digest if known == version and is_settled else None

    def has(self, file: str) -> bool:
        """Whether some version of the file has been hashed."""
        return file in self._known

    def add(self, file: str, version: Version, digest: str) -> None:
        """Remembers a digest, for later processes too unless that file cannot be written."""
        if self.get(file, version) == digest:
            return
        now = time.time()
        self._known[file] = version, digest, now
        line = json.dumps(asdict(_Remembered(file, version, digest, now)))
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with regular_file.open_to_append(self.place, "a") as lines:
                lines.write(line + "\n")
        except OSError as error:
            logger.debug("cannot remember digests in %s: %s", self.place, error)

    def _take(self, line: str) -> None:
        with contextlib.suppress(*json_fields.UNREADABLE):  # cut off by a full disk
            found = json_fields.from_json(_Remembered, json_fields.parse(line), NAME)
            if found.file not in self._known or self._known[found.file][2] <= found.time:
                self._known[found.file] = found.version, found.sha256, found.time


def _place_in_cache(folder: Path) -> Path | None:
    """Where a folder's digests are in the user's cache; None for a user without a home. A home may
    be on several machines, which each have inodes of their own."""
    if (caches := user_folders.cache()) is None:
        return None
    key = hashlib.sha256(os.fsencode(f"{socket.gethostname()}:{folder.resolve()}")).hexdigest()
    return caches / "digests" / f"{key}.jsonl"

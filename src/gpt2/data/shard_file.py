"""The file of one shard: opened, checked, read.

Rows are read by position, not through a memory map: what is truncated or on a bad disk would kill
the process there. A map is somewhat faster from memory, where a step does not wait for it, and
several times slower from a disk: the system reads much more around each row (`docs/benchmarks.md`).
"""

import contextlib
import logging
import os
import resource
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2.base import regular_file
from gpt2.base.errors import DataError
from gpt2.data import digests, formats
from gpt2.data.digests import Version
from gpt2.data.formats import HEAD_BYTES, Layout, Tokens

logger = logging.getLogger(__name__)

SAMPLED_PLACES, SAMPLED_IDS = 4, 1024
"""places in a shard where ids are looked at, and how many in each; a place is a seek on a disk"""


@dataclass(eq=False)
class ShardFile:
    """A shard that is open until it is closed or no longer used. Messages call it `name`."""

    path: Path
    name: str
    handle: int
    layout: Layout
    version: Version
    """of the file that was opened, or of one with the same content that took its place"""
    _is_removed: bool = False

    def __post_init__(self) -> None:
        self.close = weakref.finalize(self, os.close, self.handle)

    def read(self, start: int, count: int) -> Tokens:
        """`count` tokens from `start` on; fewer at the end of the file."""
        size = self.layout.dtype.itemsize
        content = os.pread(self.handle, count * size, self.layout.start + start * size)
        return np.frombuffer(content, self.layout.dtype, len(content) // size)

    def announce(self, starts: Iterable[int], count: int) -> None:
        """Lets the system fetch `count` tokens from each of `starts` on from the disk, as they are
        read soon."""
        size = self.layout.dtype.itemsize
        with contextlib.suppress(OSError):  # it is advice; `read` raises what matters
            for start in starts:
                first = self.layout.start + start * size
                os.posix_fadvise(self.handle, first, count * size, os.POSIX_FADV_WILLNEED)

    def is_unchanged(self) -> bool:
        """Whether the path still has the version that was opened. A file that was removed stays
        readable as it was, which is a warning, once."""
        try:
            return digests.version_of(self.path.stat()) == self.version
        except FileNotFoundError:
            if not self._is_removed:
                logger.warning(
                    "%s has been removed: this process still reads it, but a resume will need it; "
                    "put it back",
                    self.name,
                )
            self._is_removed = True
            return True

    def hash(self) -> str:
        """The SHA-256 of what the path has now, which becomes the version."""
        with self.path.open("rb") as file:
            self.version, digest = digests.hash_file(file)
        return digest


def open_shard(path: Path, name: str) -> ShardFile:
    """Raises DataError if the file is not a shard, and OSError if it cannot be opened."""
    with regular_file.open_to_read(path) as file:
        handle = os.dup(file.fileno())
    try:
        version = digests.version_of(os.fstat(handle))
        layout = formats.layout(name, os.pread(handle, HEAD_BYTES, 0), version[0])
    except BaseException:
        os.close(handle)
        raise
    return ShardFile(path, name, handle, layout, version)


def require_sound(shard: ShardFile, tokens: int, vocab_size: int) -> None:
    """Raises DataError if the shard has not as many tokens, or was written by another tokeniser, as
    far as a sample of the ids shows."""
    if shard.layout.tokens != tokens:
        raise DataError(
            f"{shard.name}: expected {tokens} tokens as in the manifest, got {shard.layout.tokens}"
        )
    highest = int(_sample(shard).max(initial=0))
    if highest >= vocab_size:
        raise DataError(
            f"{shard.name} holds the token id {highest}, outside the vocabulary of {vocab_size}: "
            "it was written with another tokeniser"
        )


def _sample(shard: ShardFile) -> Tokens:
    """Ids at evenly spaced places of the shard, its beginning and its end among them."""
    last = max(0, shard.layout.tokens - SAMPLED_IDS)
    starts = np.linspace(0, last, SAMPLED_PLACES, dtype=np.int64).tolist()
    return np.concatenate([shard.read(start, SAMPLED_IDS) for start in starts])


def open_files_needed(shards: int) -> int:
    """Files that a process has open: one per shard, and 1024 for sockets, libraries and everything
    else."""
    return shards + 1024


def allow_open_files(count: int) -> None:
    """Raises the limit of open files, which is 1024 on many machines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = open_files_needed(count)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))

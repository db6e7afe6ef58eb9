"""Integrity and origin of a file: SHA-256 of each piece of it, and a signature of these digests.

Pieces have digests of their own because one SHA-256 uses one core only: verifying a whole file
with it would take longer than reading it from the disk.
"""

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import shlex
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from gpt2.base import regular_file, user_folders

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
KEY_BYTES = 32
READ_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH
WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_READ_BYTES = 4 << 20


class HashingWriter:
    """A file for torch.save, which writes front to back, that computes the digests on the way."""

    def __init__(self, file: BinaryIO, piece_bytes: int = PIECE_BYTES) -> None:
        self._file = file
        self._piece_bytes = piece_bytes
        self._left = piece_bytes
        self._digest = hashlib.sha256()
        self._done: list[str] = []

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while len(rest) > self._left:
            self._digest.update(rest[: self._left])
            rest = rest[self._left :]
            self._done.append(self._digest.hexdigest())
            self._digest, self._left = hashlib.sha256(), self._piece_bytes
        self._digest.update(rest)
        self._left -= len(rest)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digests(self) -> list[str]:
        """SHA-256 of each piece so far; the last piece may be shorter."""
        return [*self._done, self._digest.hexdigest()]


def is_intact(handle: int, digests: Sequence[str], piece_bytes: int) -> bool:
    """Whether the pieces of an open file have these digests; up to 8 cores compute."""
    buffers: list[bytearray] = []

    def is_good(number: int) -> bool:
        buffer = buffers.pop() if buffers else bytearray(_READ_BYTES)
        digest, place, end = hashlib.sha256(), number * piece_bytes, (number + 1) * piece_bytes
        while place < end:
            view = memoryview(buffer)[: min(len(buffer), end - place)]
            if not (count := os.preadv(handle, [view], place)):
                break
            digest.update(view[:count])
            place += count
        buffers.append(buffer)
        return digest.hexdigest() == digests[number]

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        return all(threads.map(is_good, range(len(digests))))


def sign(digests: Sequence[str]) -> str | None:
    """An HMAC of the digests under this user's key; None if no key can be made."""
    key = _signing_key(create=True)
    return _signature(key, digests) if key else None


def is_signed(digests: Sequence[str], signature: str | None) -> bool:
    """Whether `signature` is the HMAC of the digests under this user's key."""
    key = _signing_key(create=False)
    if key is None or signature is None:
        return False
    return hmac.compare_digest(_signature(key, digests).encode(), str(signature).encode())


def _signature(key: bytes, digests: Sequence[str]) -> str:
    return hmac.new(key, "".join(digests).encode(), "sha256").hexdigest()


def _signing_key(create: bool) -> bytes | None:
    """This user's key; None if it does not exist and cannot be made (a read-only home), and, with a
    warning, if others can know or replace it."""
    if (folder := user_folders.config()) is None:
        return None
    path = folder / "key"
    try:
        if create and not path.exists():
            _make_key(path)
        with regular_file.open_to_read(path) as file:
            key, of_key, of_folder = file.read(), os.fstat(file.fileno()), folder.stat()
    except OSError:
        return None
    if {of_key.st_uid, of_folder.st_uid} - {os.geteuid(), 0}:
        logger.warning("%s is not used: it belongs to another user; remove it", folder)
        return None
    if of_key.st_mode & (READ_BY_OTHERS | WRITE_BY_OTHERS) or of_folder.st_mode & WRITE_BY_OTHERS:
        logger.warning(
            "the key %s is refused, and no checkpoint is signed: other users can read or "
            "replace it; use: chmod 700 %s && chmod 600 %s",
            *(path, shlex.quote(str(folder)), shlex.quote(str(path))),
        )
        return None
    return key if len(key) == KEY_BYTES else None  # a shorter key could be guessed


def _make_key(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):  # another process was first: its key is used
        os.link(fresh, path)
    fresh.unlink()

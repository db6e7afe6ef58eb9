"""Verification of local shards: what they hold is compared with the SHA-256 that is expected.

`checked` comes before a run reads them; it is quick, because digests are remembered. A shard whose
digest is not remembered is hashed by a `Verifier` while the run trains. The copies of remote shards
are checked when they are downloaded.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from filelock import Timeout

from gpt2.base import retry
from gpt2.base.errors import DataError
from gpt2.base.folder_lock import lock_file
from gpt2.base.text import counted
from gpt2.data import digests
from gpt2.data.digests import DigestMemory, Fault
from gpt2.data.manifest import Shard
from gpt2.data.shards import DatasetIndex

logger = logging.getLogger(__name__)

THREADS = 8
WAIT_FACTOR = 10
"""how much longer than a chunk took it pauses while rows are waited for"""
PAUSES_S = (1, 10)
"""before it tries again to read a file"""


def checked(index: DatasetIndex, remember: bool = True) -> DatasetIndex:
    """The index, completed by the digests that are remembered.

    A shard that has changed since it was hashed is hashed again; without `remember`, nothing is
    written. Raises DataError, naming the first shard that has not the digest that is expected.
    """
    if index.storage.path is None:
        return index
    memory = _memory(index)
    found, unknown = dict[str, str](), list[Shard]()
    for shard in index.shards:
        version = _version(index, shard)
        if version and (digest := memory.get(shard.file, version)):
            found[shard.file] = digest
        elif version and memory.has(shard.file):
            unknown.append(shard)
    if unknown:
        logger.info("Verifying %s of %s", counted(len(unknown), "shard"), index.storage)
    threads = ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))))
    try:
        add = memory.add if remember else (lambda *_: None)
        hashed = threads.map(lambda shard: _hash(index, shard, add)[1], unknown)
        found |= zip((shard.file for shard in unknown), hashed, strict=True)
    except OSError as error:
        raise DataError(
            f"{error.filename or index.storage} cannot be read: {error.strerror or error}"
        ) from error
    finally:
        threads.shutdown(cancel_futures=True)
    wrong = [
        item
        for item in index.shards
        if item.sha256 not in (None, found.get(item.file, item.sha256))
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise DataError(mismatch(index, wrong[0]) + more + index.hint)
    known = (replace(shard, sha256=shard.sha256 or found.get(shard.file)) for shard in index.shards)
    return replace(index, shards=tuple(known))


def never_verified(index: DatasetIndex) -> list[Shard]:
    """The local shards of which no digest is remembered, not even one of an earlier version."""
    if index.storage.path is None:
        return []
    memory = _memory(index)
    return [shard for shard in index.shards if not memory.has(shard.file)]


class Verifier:
    """Hashes each local shard of which no digest is remembered, in a thread, one at a time.

    A shard without an expected digest gets it in `index.content`, which also receives a fault. The
    processes of a machine share the work. Made before anything reads rows: a shard that changes
    after that has no digest which holds for all of them.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._is_waiting: Callable[[], bool] = lambda: False
        self._versions = {shard.file: _version(index, shard) for shard in index.shards}
        self._closed = threading.Event()
        self._progress = threading.Condition()
        self._left = {shard.file for shard in index.shards}
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)

    def start(self, is_waiting: Callable[[], bool]) -> None:
        """Starts the thread. It slows down while `is_waiting` says that training waits for rows. (A
        lower priority of the thread would slow down the whole process while it holds the GIL.)"""
        self._is_waiting = is_waiting
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._left

    def wait_for(self, files: Collection[str], timeout_s: float) -> bool:
        """Waits up to `timeout_s` seconds until these shards are verified, and from now on lets the
        thread run at full speed. Returns whether they are; a shard that cannot be read, which is a
        warning, counts as verified."""
        self._is_waiting = lambda: False
        with self._progress:
            return self._progress.wait_for(lambda: not self._left.intersection(files), timeout_s)

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        memory = _memory(self._index)
        validation_first = sorted(self._index.shards, key=lambda shard: shard.split == "train")
        try:
            for shard in validation_first:
                self._verify(memory, shard)
                with self._progress:
                    self._left.remove(shard.file)
                    self._progress.notify_all()
        except _Closed:
            pass
        finally:
            with self._progress:  # nothing waits for a thread that has ended
                self._left.clear()
                self._progress.notify_all()

    def _verify(self, memory: DigestMemory, shard: Shard) -> None:
        name = self._index.storage.full(shard.file)
        try:
            version, digest = retry.call(
                lambda: self._hash_once(memory, shard),
                PAUSES_S,
                may_pass=lambda error: isinstance(error, OSError),
                log=lambda error, pause_s: logger.debug(
                    "%s: %s; again in %g s", name, error, pause_s
                ),
                is_stopping=self._closed.is_set,
            )
        except OSError as error:
            logger.warning("%s cannot be verified: %s", name, error.strerror or error)
            return
        expected, content = self._index.digest(shard), self._index.content
        if expected is None and version == self._versions[shard.file]:
            content.digests[shard.file] = digest
        elif digest != expected:
            reason = f"{name}: it has changed before it was verified"
            if expected is not None:
                reason = mismatch(self._index, shard) + self._index.hint
            content.report(Fault(reason, unverified=shard.file))

    def _hash_once(self, memory: DigestMemory, shard: Shard) -> tuple[digests.Version, str]:
        """The version of a shard and its digest, which one process of the machine computes."""
        if known := _remembered(self._index, memory, shard):
            return known
        with lock_file(memory.place.with_suffix(".lock")) as lock:
            try:
                lock.acquire(cancel_check=self._closed.is_set)
            except Timeout:
                raise _Closed from None
            except (OSError, NotImplementedError) as error:
                # Without the lock, several processes may hash the shard; their digests are equal.
                logger.debug("cannot lock %s: %s", memory.place, error)
            memory.refresh()
            known = _remembered(self._index, memory, shard)
            return known or _hash(self._index, shard, memory.add, self._give_way())

    def _give_way(self) -> Callable[[], None]:
        last = time.monotonic()

        def between_chunks() -> None:
            nonlocal last
            elapsed_s = time.monotonic() - last
            if self._closed.wait(WAIT_FACTOR * elapsed_s if self._is_waiting() else 0):
                raise _Closed
            last = time.monotonic()

        return between_chunks


class _Closed(Exception):
    """The verifier is closed."""


def mismatch(index: DatasetIndex, shard: Shard) -> str:
    """What is wrong with a shard that has not the digest that is expected."""
    expected = "the manifest's" if index.has_manifest else "that of the file the run began with"
    return f"{index.storage.full(shard.file)}: its SHA-256 differs from {expected}"


def _memory(index: DatasetIndex) -> DigestMemory:
    return DigestMemory(Path(index.storage.folder))


def _version(index: DatasetIndex, shard: Shard) -> digests.Version | None:
    """None for a file that is missing, which is reported when it is opened."""
    with contextlib.suppress(OSError):
        return digests.version_of(os.stat(index.storage.full(shard.file)))
    return None


def _remembered(
    index: DatasetIndex, memory: DigestMemory, shard: Shard
) -> tuple[digests.Version, str] | None:
    version = _version(index, shard)
    digest = memory.get(shard.file, version) if version else None
    return (version, digest) if version and digest else None


def _hash(
    index: DatasetIndex,
    shard: Shard,
    remember: Callable[[str, digests.Version, str], None],
    between_chunks: Callable[[], None] = lambda: None,
) -> tuple[digests.Version, str]:
    with open(index.storage.full(shard.file), "rb") as file:
        version, digest = digests.hash_file(file, between_chunks)
    remember(shard.file, version, digest)
    return version, digest

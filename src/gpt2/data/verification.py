"""Verification of a whole data set: every byte of every shard is read, and each wrong file named.

`verifier` compares digests while a run trains. This looks at everything, and goes on after a wrong
file: which shards there are, their size, header, SHA-256, all token ids, and bytes of text.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from gpt2.base.errors import DataError
from gpt2.data import digests, shard_content, shards, vocabulary
from gpt2.data.digests import DigestMemory, Version
from gpt2.data.manifest import Manifest, Shard, Split
from gpt2.data.remote import Storage
from gpt2.data.shard_content import ShardContent
from gpt2.data.tokenizer import Tokenizer

DIFFERS = "its SHA-256 differs from the manifest's"
DECAYED = (
    "its SHA-256 differs from the one that is remembered for its size and modification time: it is "
    "damaged, or its time was set back; what it holds now is remembered"
)


@dataclass(frozen=True)
class FileReport:
    """What one file holds, as far as it could be read, and what is wrong with it."""

    file: str
    split: Split | None
    """None for a shard that is not in the manifest"""
    bytes: int = 0
    tokens: int = 0
    text_bytes: int | None = None
    """None if the manifest does not say how many there should be"""
    sha256: str | None = None
    wrong: str | None = None
    """None for a sound file"""


class Verification:
    """The shards of a folder, pattern or URL, to be verified.

    Raises DataError if there are none, if their preparation is not finished, or if the manifest
    or its tokenizer cannot be used.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = Manifest.find(storage)
        self._files = self._listed()
        self._tokenizer = self._find_tokenizer()
        self.bytes = sum(item.bytes for item in self._files)
        """how many will be read"""
        self._memory = None if storage.path is None else DigestMemory(Path(storage.folder))
        self._is_stopped = threading.Event()

    def run(self, advance: Callable[[int], None]) -> list[FileReport]:
        """Verifies as many files at a time as there are cores; returns a report of each, by name.

        Each digest is remembered as soon as it is known, for runs and for `gpt2 doctor`. `advance`
        receives numbers of bytes that were read, from any thread.
        """
        threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            reports = list(threads.map(lambda item: self._verify(item, advance), self._files))
        finally:
            self._is_stopped.set()
            threads.shutdown(cancel_futures=True)
        return sorted([*reports, *self._strays()], key=lambda report: report.file)

    def _listed(self) -> list["_File"]:
        if self.manifest is not None:
            return [_File(item.file, item.split, item.bytes, item) for item in self.manifest.shards]
        found = shards.files_by_name(self.storage)
        return [_File(name, split, size, None) for name, size, split in found]

    def _find_tokenizer(self) -> Tokenizer:
        if self.manifest is not None:
            return self.manifest.read_tokenizer(self.storage)
        own = vocabulary.of_shards(self.storage, [item.file for item in self._files])
        return vocabulary.tokenizer_of(own)

    def _strays(self) -> Iterator[FileReport]:
        """Files of the manifest's corpus that it does not have."""
        if self.manifest is None:
            return
        listed = {shard.file for shard in self.manifest.shards}
        is_shard = shards.file_pattern(self.manifest.corpus).fullmatch
        with contextlib.suppress(DataError):  # a server may not list its files
            for name in self.storage.files():
                if is_shard(name) and name not in listed:
                    yield FileReport(name, None, wrong="it is not in the manifest")

    def _verify(self, item: "_File", advance: Callable[[int], None]) -> FileReport:
        name, left = self.storage.full(item.file), item.bytes

        def after_chunk(count: int) -> None:
            nonlocal left
            left -= count
            advance(count)
            if self._is_stopped.is_set():
                raise DataError("the verification is stopped")

        try:
            if (size := self.storage.size(item.file)) != item.bytes:
                wrong = f"expected {item.bytes} bytes, got {size}"
                return FileReport(item.file, item.split, size, wrong=wrong)
            return self._read(item, name, after_chunk)
        except DataError as error:
            is_missing = isinstance(error.__cause__, FileNotFoundError)
            wrong = "the file is missing" if is_missing else str(error).removeprefix(f"{name} ")
            return FileReport(item.file, item.split, wrong=wrong)
        finally:
            advance(left)

    def _read(self, item: "_File", name: str, after_chunk: Callable[[int], None]) -> FileReport:
        counts_text = item.expected is not None and item.expected.text_bytes is not None
        # With a manifest, the digest says more than a test of what a file without a header holds.
        read_range = None if item.expected else functools.partial(self.storage.read, item.file)
        with self.storage.open(item.file) as file:
            before = self._version(file)
            content = shard_content.read(
                file, name, item.bytes, self._tokenizer, counts_text, after_chunk, read_range
            )
            version = self._version(file)
        if content.bytes != item.bytes or version != before:
            wrong: str | None = "it has changed while it was read; verify it again"
        else:
            wrong = self._judge(item, content, version)
        return FileReport(
            item.file,
            item.split,
            item.bytes,
            content.layout.tokens,
            content.text_bytes,
            content.sha256,
            wrong,
        )

    def _judge(self, item: "_File", content: ShardContent, version: Version | None) -> str | None:
        """What is wrong with a file that was read whole. Remembers its digest, unless that would
        let it pass for sound."""
        known, differs = None, DECAYED
        if item.expected is not None:
            known, differs = item.expected.sha256, DIFFERS
        elif self._memory is not None and version is not None:
            known = self._memory.get(item.file, version)
        wrong = content.fault(item.expected) if known in (None, content.sha256) else differs
        if self._memory is not None and version is not None and wrong in (None, differs):
            self._memory.add(item.file, version, content.sha256)
        return wrong

    def _version(self, file: BufferedReader) -> Version | None:
        """None for a remote file."""
        return None if self._memory is None else digests.version_of(os.fstat(file.fileno()))


@dataclass(frozen=True)
class _File:
    """A file to be verified."""

    file: str
    split: Split
    bytes: int
    expected: Shard | None
    """its entry in the manifest; None without one"""

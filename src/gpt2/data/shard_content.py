"""One pass through all bytes of a shard: its SHA-256, its token ids, the bytes of its text."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

import numpy as np

from gpt2.base.text import counted
from gpt2.data import formats
from gpt2.data.digests import CHUNK_BYTES
from gpt2.data.formats import HEAD_BYTES, Layout
from gpt2.data.manifest import Shard
from gpt2.data.tokenizer import Tokenizer


@dataclass
class ShardContent:
    """What the bytes that were read so far hold."""

    layout: Layout
    tokenizer: Tokenizer
    text_bytes: int | None
    """None if they are not counted"""
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    _tokens: int = 0
    _invalid_ids: int = 0
    _first_invalid: str = ""

    @property
    def sha256(self) -> str:
        return str(self.digest.hexdigest())

    def add(self, content: memoryview) -> None:
        """Takes in the next bytes, which begin with a token."""
        dtype = self.layout.dtype
        tokens = np.frombuffer(content, dtype, len(content) // dtype.itemsize)
        self.digest.update(content)
        self.bytes += len(content)
        if tokens.max(initial=0) >= self.tokenizer.vocab_size:
            places = np.flatnonzero(tokens >= self.tokenizer.vocab_size)
            if not self._invalid_ids:
                self._first_invalid = f"{tokens[places[0]]} at token {self._tokens + places[0]:,}"
            self._invalid_ids += len(places)
        elif self.text_bytes is not None:
            self.text_bytes += self.tokenizer.text_bytes(tokens)
        self._tokens += len(tokens)

    def fault(self, expected: Shard | None) -> str | None:
        """What is wrong with the tokens, as far as the manifest's entry and the vocabulary say."""
        if self._invalid_ids:
            return (
                f"{counted(self._invalid_ids, 'token id')} outside the vocabulary of "
                f"{self.tokenizer.vocab_size}, first {self._first_invalid}"
            )
        if expected is not None and self.layout.tokens != expected.tokens:
            return f"expected {expected.tokens} tokens as in the manifest, got {self.layout.tokens}"
        if expected is not None and self.text_bytes != expected.text_bytes:
            return (
                f"expected {expected.text_bytes} bytes of text as in the manifest, got "
                f"{self.text_bytes}"
            )
        return None


def read(
    file: BufferedReader,
    name: str,
    size: int,
    tokenizer: Tokenizer,
    counts_text: bool,
    after_chunk: Callable[[int], None],
    read_range: Callable[[int, int], bytes] | None = None,
) -> ShardContent:
    """Reads an open shard of `size` bytes to its end.

    `after_chunk` receives the number of bytes that were read, and may end it by an exception.
    `read_range` is the `read` of `formats.layout`.
    Raises DataError, with `name`, if the file is not a shard.
    """
    head = file.read(HEAD_BYTES)
    layout = formats.layout(name, head, size, read_range)
    header, first = head[: layout.start], head[layout.start :]
    content = ShardContent(layout, tokenizer, text_bytes=0 if counts_text else None)
    content.digest.update(header)
    content.bytes = len(header)
    for chunk in _chunks(file, first):
        content.add(chunk)
        after_chunk(len(chunk))
    return content


def _chunks(file: BufferedReader, first: bytes) -> Iterator[memoryview]:
    """`first` and the rest of the file; all chunks but the last have the same length, a multiple of
    every size of a token."""
    buffer = memoryview(bytearray(max(CHUNK_BYTES, HEAD_BYTES)))
    buffer[: len(first)] = first
    filled = len(first)
    while filled := filled + file.readinto(buffer[filled:]):
        yield buffer[:filled]
        filled = 0

"""The tokens of a shard, read without a local copy: some of them, or all in chunks."""

from collections.abc import Iterator

import numpy as np

from gpt2.base.errors import DataError
from gpt2.data import formats
from gpt2.data.formats import HEAD_BYTES, Layout, Tokens
from gpt2.data.manifest import Shard
from gpt2.data.remote import Storage

CHUNK_TOKENS = 1 << 20


def read(storage: Storage, shard: Shard, start: int, count: int) -> Tokens:
    """`count` tokens of a shard from `start` on; fewer at its end.

    Raises DataError, as `chunks` does, if the file is not a shard, has another number of tokens
    than its manifest says, or cannot be read.
    """
    found = _layout(storage, shard)
    size = found.dtype.itemsize
    first, end = min(start, found.tokens), min(start + count, found.tokens)
    content = storage.read(shard.file, found.start + first * size, found.start + end * size)
    return np.frombuffer(content, found.dtype)


def chunks(storage: Storage, shard: Shard) -> Iterator[Tokens]:
    """All tokens of a shard, CHUNK_TOKENS at a time."""
    found = _layout(storage, shard)
    with storage.open(shard.file) as file:
        file.read(found.start)
        while content := file.read(CHUNK_TOKENS * found.dtype.itemsize):
            yield np.frombuffer(content, found.dtype)


def _layout(storage: Storage, shard: Shard) -> Layout:
    name, size = storage.full(shard.file), storage.size(shard.file)
    found = formats.layout(name, storage.read(shard.file, 0, min(size, HEAD_BYTES)), size)
    if found.tokens != shard.tokens:
        raise DataError(f"{name}: expected {shard.tokens} tokens, got {found.tokens}")
    return found

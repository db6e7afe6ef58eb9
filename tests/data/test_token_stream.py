"""Tokens that are read without a local copy are those of the file."""

from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpt2.base.errors import DataError
from gpt2.data import shards, token_stream
from gpt2.data.formats import LLMC_HEADER_INTS, LLMC_MAGIC
from gpt2.data.remote import Storage

TOKENS = np.arange(1000, 1100)


def files_of_tools() -> dict[str, bytes]:
    """The same tokens in each format."""
    header = np.zeros(LLMC_HEADER_INTS, "<i4")
    header[:3] = LLMC_MAGIC, 1, len(TOKENS)
    plain = TOKENS.astype("<u2").tobytes()
    return {"train.bin": plain, "fineweb_train_000001.bin": header.tobytes() + plain}


@pytest.mark.parametrize("name", [*files_of_tools(), "train_16.npy", "train_32.npy"])
@pytest.mark.parametrize("place", ["", "memory://"])
def test_tokens_are_those_of_the_file(name: str, place: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_stream, "CHUNK_TOKENS", 33)
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, TOKENS.astype("<u2" if "16" in name else "<u4"))
    else:
        path.write_bytes(files_of_tools()[name])
    if place:
        MemoryFileSystem().pipe(f"{path}", path.read_bytes())
    storage = Storage(f"{place}{tmp_path}")
    (shard,) = shards.load_index(storage).shards
    assert np.array_equal(np.concatenate([*token_stream.chunks(storage, shard)]), TOKENS)
    for start, count in ((0, 5), (40, 60), (95, 50), (100, 3), (10**6, 3), (7, 0)):
        read = token_stream.read(storage, shard, start, count)
        assert np.array_equal(read, TOKENS[start : start + count])


def test_another_number_of_tokens_than_in_the_manifest_is_refused(tmp_path: Path):
    np.save(tmp_path / "train.npy", TOKENS.astype("<u2"))
    storage = Storage(str(tmp_path))
    (shard,) = shards.load_index(storage).shards
    np.save(tmp_path / "train.npy", TOKENS[:-1].astype("<u2"))
    message = r"train\.npy: expected 100 tokens, got 99"
    with pytest.raises(DataError, match=message):
        token_stream.read(storage, shard, 0, 1)
    with pytest.raises(DataError, match=message):
        list(token_stream.chunks(storage, shard))

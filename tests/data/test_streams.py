"""Files as streams of UTF-8: every compression, every truncation, every byte order mark."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from gpt2.base.errors import DataError
from gpt2.data import streams

TEXT = "".join(f"line {number} é\n" for number in range(40)).encode()


def zstd_with_blocks(content: bytes) -> bytes:
    """A streamed frame of several blocks, without content size and checksum in its header."""
    compressor = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False)
    part = compressor.compressobj()
    blocks = [
        part.compress(content[start : start + 100]) + part.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for start in range(0, len(content), 100)
    ]
    return b"".join([*blocks, part.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)])


def zstd_with_everything(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(content)


def skippable_frame(content: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstd_with_everything,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
VARIANTS = [
    *(pytest.param(ending, compress, id=ending) for ending, compress in COMPRESS.items()),
    pytest.param(".zst", zstd_with_blocks, id=".zst in blocks"),
]


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path) -> bytes:
    with streams.open_bytes(path) as file:
        return file.read()


def read_utf8(path: Path) -> bytes:
    with streams.open_utf8(path) as file:
        return file.read()


def test_every_compression_is_tried():
    assert COMPRESS.keys() == streams.COMPRESSIONS.keys()


@pytest.mark.parametrize("content", [b"", b"a", TEXT, TEXT * 5000], ids=["0", "1", "some", "2 MB"])
@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_a_compressed_file_is_read_as_its_content(tmp_path: Path, ending, compress, content):
    assert read(written(tmp_path, "a.txt" + ending, compress(content))) == content
    assert read(written(tmp_path, "a.TXT" + ending.upper(), compress(content))) == content


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_all_streams_of_a_file_are_read(tmp_path: Path, ending, compress):
    parts = [b"one\n", b"", TEXT, b"two\n" * 70_000, b"end"] * 20
    content = b"".join(compress(part) for part in parts)
    assert read(written(tmp_path, "a" + ending, content)) == b"".join(parts)


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_no_beginning_of_a_compressed_file_is_taken_for_the_whole(tmp_path: Path, ending, compress):
    content = compress(TEXT)
    for size in range(len(content)):
        path = written(tmp_path, "a.jsonl" + ending, content[:size])
        with pytest.raises(DataError, match=rf"a\.jsonl{ending} is truncated.*download or copy"):
            read(path)
    assert read(written(tmp_path, "a.jsonl" + ending, content)) == TEXT


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_a_second_stream_that_is_truncated_is_refused(tmp_path: Path, ending, compress):
    first, second = compress(b"first"), compress(b"second")
    for size in range(1, len(second)):
        with pytest.raises(DataError, match="truncated"):
            read(written(tmp_path, "a" + ending, first + second[:size]))

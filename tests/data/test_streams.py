"""Files as streams of UTF-8: every compression, every truncation, every byte order mark."""

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import lzma
import os
import resource
import tracemalloc
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


@pytest.mark.parametrize("content", [b"", b"a", TEXT, TEXT * 900], ids=["0", "1", "some", "400 kB"])
@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_a_compressed_file_is_read_as_its_content(tmp_path: Path, ending, compress, content):
    assert read(written(tmp_path, "a.txt" + ending, compress(content))) == content
    assert read(written(tmp_path, "a.TXT" + ending.upper(), compress(content))) == content


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_all_streams_of_a_file_are_read(tmp_path: Path, ending, compress):
    parts = [b"one\n", b"", TEXT, b"two\n" * 70_000, b"end"] * 5
    content = b"".join(compress(part) for part in parts)
    assert read(written(tmp_path, "a" + ending, content)) == b"".join(parts)


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_no_beginning_of_a_compressed_file_is_taken_for_the_whole(tmp_path: Path, ending, compress):
    content = compress(TEXT)
    for size in range(len(content)):
        path = written(tmp_path, "a.jsonl" + ending, content[:size])
        state = "truncated" if size else "empty"
        with pytest.raises(DataError, match=rf"a\.jsonl{ending} is {state}.*download or copy"):
            read(path)
    assert read(written(tmp_path, "a.jsonl" + ending, content)) == TEXT


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_a_second_stream_that_is_truncated_is_refused(tmp_path: Path, ending, compress):
    first, second = compress(b"first"), compress(b"second")
    for size in range(1, len(second)):
        with pytest.raises(DataError, match="truncated"):
            read(written(tmp_path, "a" + ending, first + second[:size]))


@pytest.mark.parametrize("garbage", [b"x", b"\n", b"garbage" * 1000, b"\x00" * 10_000 + b"x"])
@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_other_bytes_after_the_end_are_refused(tmp_path: Path, ending, compress, garbage):
    with pytest.raises(DataError, match=rf"a{ending} is damaged.* other bytes follow"):
        read(written(tmp_path, "a" + ending, compress(TEXT) + garbage))


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_zero_bytes_after_the_end_are_padding_unless_they_are_many(
    tmp_path: Path, ending, compress
):
    padding = bytes(10_240)  # a block of a tape
    content = compress(b"one") + padding + compress(b"two") + padding
    assert read(written(tmp_path, "a" + ending, content)) == b"onetwo"
    with pytest.raises(DataError, match="other bytes follow"):
        read(written(tmp_path, "a" + ending, compress(b"one") + bytes(1_000_000)))


@pytest.mark.parametrize(("ending", "compress"), VARIANTS)
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, ending, compress):
    """Nothing but a frame of zstd without a checksum can hide a change of its content."""
    content = compress(TEXT)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        with contextlib.suppress(DataError):
            if compress is not zstd_with_blocks:
                assert read(written(tmp_path, "a" + ending, bytes(damaged))) == TEXT


@pytest.mark.parametrize("part", [b"", b"two"])
def test_frames_of_zstd_that_hold_no_content_are_passed_over(tmp_path: Path, part):
    content = skippable_frame(b"seek table") + zstandard.compress(b"one") + skippable_frame(b"")
    content += zstandard.compress(part) + skippable_frame(b"index" * 1000)
    assert read(written(tmp_path, "a.zst", content)) == b"one" + part


def test_a_long_window_of_zstd_is_accepted(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    part = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert read(written(tmp_path, "a.zst", part.compress(TEXT) + part.flush())) == TEXT


def test_a_dictionary_of_zstd_is_named(tmp_path: Path):
    samples = [f"some sample with the number {number}".encode() for number in range(2000)]
    compressor = zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(2048, samples))
    path = written(tmp_path, "a.txt.zst", compressor.compress(samples[0]))
    with pytest.raises(DataError, match=r"compressed with a dictionary, .* zstd -d -D DICTIONARY"):
        read(path)


def content_of(ending: str) -> bytes:
    return COMPRESS[ending](TEXT) if ending else TEXT


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("other", ["", *COMPRESS])
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, ending, other):
    if ending == other:
        return
    path = written(tmp_path, "a.csv" + ending, content_of(other))
    with pytest.raises(DataError, match=rf"a\.csv{ending} is .*rename it to .*a\.csv{other}$"):
        read(path)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "web page, as a failed download leaves.*download or copy"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (bytes(100), "or damaged; download or copy it again"),
        (b"\xff\x07" * 300, "or damaged; download or copy it again"),
    ],
)
def test_a_failed_download_is_called_one(tmp_path: Path, ending, content, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, "a.txt" + ending, content))


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_memory_is_flat(tmp_path: Path, ending):
    size = 30_000_000
    content = bytes(size)  # what compresses best
    path = written(tmp_path, "a.txt" + ending, COMPRESS[ending](content) if ending else content)
    del content
    tracemalloc.start()
    try:
        with streams.open_utf8(path) as file:
            assert sum(len(part) for part in iter(lambda: file.read(100_000), b"")) == size
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_lines_and_peeks(tmp_path: Path):
    lines = [b"a" * 3_000_000 + b"\n", b"\n", b"b\n", b"without an end"]
    for ending, compress in COMPRESS.items():
        with streams.open_bytes(written(tmp_path, "a" + ending, compress(b"".join(lines)))) as file:
            assert file.peek(2)[:2] == b"aa"
            assert list(file) == lines
            assert file.read() == file.readline() == file.peek(1) == b""


MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("ending", ["", *COMPRESS])
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize(
    "text", ["", "a", "é\n", "日本語 🙂\r\n", "x🙂" * 70_000], ids=["0", "1", "2", "3", "many"]
)
def test_text_with_a_byte_order_mark_is_read_as_utf8(tmp_path: Path, ending, encoding, text):
    content = MARKS[encoding] + text.encode(encoding)
    path = written(tmp_path, "a.txt" + ending, COMPRESS[ending](content) if ending else content)
    assert read_utf8(path) == text.encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfea\x00\x00\xd8b\x00", "a\ufffdb"),  # half a pair of surrogates
        (b"\xff\xfea\x00b", "a\ufffd"),  # half a unit
        (b"\xff\xfea\x00=\xd8", "a\ufffd"),  # half a pair at the end
        (b"\xfe\xff\x00a\xdc\x00", "a\ufffd"),
        (b"\xff\xfe\x00\x00a\x00\x00\x00\x00\x00\x11\x00b\x00\x00\x00", "a\ufffdb"),
        (b"\x00\x00\xfe\xff\x00\x00\x00a\x00\x00\xd8\x00\x00", "a\ufffd\ufffd"),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", "a"),  # marks of two programs
        (b"\xff\xfe\xff\xfea\x00", "a"),
        (b"\xef\xbb\xbf", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_what_is_invalid_in_utf16_and_utf32_is_replaced(tmp_path: Path, content, expected):
    assert read_utf8(written(tmp_path, "a.txt", content)).decode() == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"\xef", b"\xef\xbb", b"caf\xe9", b"\xff", b"\xfe", b"a\x00b", b"a\xef\xbb\xbf"],
)
def test_other_bytes_stay(tmp_path: Path, content):
    assert read_utf8(written(tmp_path, "a.txt", content)) == content


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path):
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "none.gz", tmp_path / "a\nb"):
        with pytest.raises(DataError, match=r"^cannot read '?/.*: (No such file|Is a directory)"):
            streams.open_utf8(path)


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_an_error_of_the_disk_while_reading_names_the_file(
    tmp_path: Path, ending, monkeypatch: pytest.MonkeyPatch
):
    path = written(tmp_path, "a.txt" + ending, content_of(ending))

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    class BrokenDisk(io.FileIO):
        readinto = readall = fails

    broken = type("Broken", (streams._PlainFile, BrokenDisk), {})
    monkeypatch.setattr(streams, "_PlainFile", broken)
    for count in (-1, 1, 10_000_000):
        message = r"cannot read .*a\.txt.*: Input/output error"
        with streams.open_bytes(path) as file, pytest.raises(DataError, match=message):
            file.read(count)


@pytest.mark.parametrize("ending", ["", *(ending.upper() for ending in COMPRESS)])
def test_a_file_in_which_readers_move(tmp_path: Path, ending):
    path = written(tmp_path, "a.parquet" + ending, content_of(ending.lower()))
    with streams.seekable(path) as file:
        assert file.seek(-5, os.SEEK_END) == len(TEXT) - 5
        assert file.read() == TEXT[-5:]
        file.seek(0)
        assert file.read() == TEXT
    assert file.closed


def test_a_truncated_file_is_not_decompressed_to_a_temporary_one(tmp_path: Path):
    path = written(tmp_path, "a.parquet.gz", gzip.compress(TEXT)[:-1])
    with pytest.raises(DataError, match="truncated"), streams.seekable(path):
        pass


def test_a_full_disk_is_one_line(tmp_path: Path):
    path = written(tmp_path, "a.parquet.gz", gzip.compress(bytes(1_000_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = r"decompress .*a\.parquet\.gz .*File too large.*TMPDIR"
        with pytest.raises(DataError, match=message), streams.seekable(path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_error_of_the_reader_is_not_one_of_the_disk(tmp_path: Path):
    path = written(tmp_path, "a.parquet.gz", gzip.compress(TEXT))
    with pytest.raises(OSError, match="not a Parquet file"), streams.seekable(path):
        raise OSError("not a Parquet file")

"""A file as a binary stream: decompressed, as UTF-8, from beginning to end in flat memory.

A compressed file that is truncated, damaged or something else is a DataError that names it, and so
is every error of the system while a file is read.
"""

import bz2
import codecs
import contextlib
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from gpt2.base.errors import DataError
from gpt2.base.text import printable
from gpt2.data import signatures

BUFFER_BYTES = 256 * 1024
PIECE_BYTES = 512
"""compressed bytes at a time: zstd, which knows no limit, makes 16 MiB of them at most"""
CHUNK_BYTES = 128 * 1024
"""decompressed bytes at a time"""
PADDING_BYTES = 64 * 1024
"""zero bytes after the end of a stream that are padding; more are data that was lost"""
LONGEST_WINDOW = 2**31
"""of zstd, in bytes: what its --long=31 needs"""
MAGIC_BYTES = 10
"""of the longest"""


class Decompressor(Protocol):
    """Decompresses one stream: a member of gzip, a frame of zstd. As in `bz2` and `lzma`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _Zstd:
    """A frame. `max_length` has no effect: `data` is to be small."""

    needs_input = True

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._frame.decompress(data)


def _xz() -> Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)


@dataclass(frozen=True)
class Compression:
    tool: str
    """the program that compresses, and with -t tests, such files"""
    magic: tuple[bytes, ...]
    """first bytes of such files"""
    decompressor: Callable[[], Decompressor]
    head_bytes: int
    """compressed bytes that usually give the first bytes of the content"""


def _compression(
    ending: str,
    decompressor: Callable[[], Decompressor],
    head_bytes: int = signatures.HEAD_BYTES,
) -> Compression:
    names, magic = signatures.NAMES, signatures.COMPRESSIONS
    return Compression(names[ending], magic[ending], decompressor, head_bytes)


COMPRESSIONS = {
    ".gz": _compression(".gz", _Gzip),
    ".zst": _compression(".zst", _Zstd, head_bytes=132 * 1024),  # a whole block
    ".bz2": _compression(".bz2", bz2.BZ2Decompressor),
    ".xz": _compression(".xz", _xz),
}
"""by the ending of a file's name, in lower case"""
ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError)
"""what a decompressor raises for damaged data"""


def compression_of(path: Path) -> Compression | None:
    """The compression that the ending of a file's name says."""
    return COMPRESSIONS.get(path.suffix.lower())


def open_bytes(path: Path) -> BinaryIO:
    """A file, decompressed if the ending of its name says that it is compressed."""
    file = io.BufferedReader(_open(path), BUFFER_BYTES)
    compression = compression_of(path)
    if compression is None:
        return file
    return _as_file(_decompressed(file, compression, path), file)


def open_utf8(path: Path) -> BinaryIO:
    """As `open_bytes`; without byte order marks at the beginning, and in UTF-8 if such a mark says
    UTF-16 or UTF-32. What is invalid in those becomes U+FFFD; bytes that are not UTF-8 stay."""
    file = open_bytes(path)
    try:
        if encoding := signatures.encoding(_peek(file, 4)):
            file = _as_file(_transcoded(file, encoding), file)
        while _peek(file, 3) == codecs.BOM_UTF8:
            file.read(3)
    except BaseException:
        file.close()
        raise
    return file


def size(path: Path) -> int:
    """Bytes of a file on disk."""
    with _reading(path):
        return path.stat().st_size


def position(file: BinaryIO) -> int:
    """How many bytes of the file on disk have been read, about."""
    if file.closed:
        return 0
    raw = file.raw if isinstance(file, io.BufferedReader) else None
    return position(raw.source) if isinstance(raw, _Chunks) else file.tell()


@contextlib.contextmanager
def seekable(path: Path) -> Iterator[BinaryIO]:
    """A file for readers that move in it: a compressed one is copied, decompressed, to a temporary
    file without a name."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_bytes(path))
        if compression_of(path):
            try:
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy, BUFFER_BYTES)
                copy.seek(0)
            except OSError as error:
                raise DataError(
                    f"cannot decompress {printable(path)} into {tempfile.gettempdir()}: "
                    f"{error.strerror or error}; decompress it yourself, or set TMPDIR to a folder "
                    "with more space"
                ) from error
            file = copy
        yield file


def head(path: Path, content: bytes) -> bytes:
    """The first bytes of a file, decompressed from `content`, the first bytes of the file itself.

    A compression may give fewer, or none. Raises DataError if `content` is damaged.
    """
    compression = compression_of(path)
    if compression is None:
        return content
    found = b""
    try:
        for chunk in _decompressed(io.BytesIO(content), compression, path):
            found += chunk
            if len(found) >= signatures.HEAD_BYTES:
                break
    except _Truncated:
        if not content:
            raise
    return found[: signatures.HEAD_BYTES]


class _Truncated(DataError):
    """A compressed file that ends before its content does."""


class _PlainFile(io.FileIO):
    """A file whose errors are DataErrors."""

    def readinto(self, buffer, /):  # type: ignore[no-untyped-def]
        with _reading(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _reading(self.name):
            return super().readall()


def _open(path: Path) -> _PlainFile:
    with _reading(path):
        return _PlainFile(path)


@contextlib.contextmanager
def _reading(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror or error}") from error


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file, which owns another one."""

    def __init__(self, chunks: Iterator[bytes], source: BinaryIO) -> None:
        self._chunks = chunks
        self.source = source
        self._chunk = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /):  # type: ignore[no-untyped-def]
        """Fills `buffer`, but at the end."""
        target = memoryview(buffer)
        filled = 0
        while filled < len(target):
            if not self._chunk:
                self._chunk = memoryview(next(self._chunks, b""))
                if not self._chunk:
                    break
            count = min(len(target) - filled, len(self._chunk))
            target[filled : filled + count] = self._chunk[:count]
            self._chunk = self._chunk[count:]
            filled += count
        return filled

    def close(self) -> None:
        self.source.close()
        super().close()


def _as_file(chunks: Iterator[bytes], source: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(_Chunks(chunks, source), BUFFER_BYTES)


def _peek(file: BinaryIO, count: int) -> bytes:
    assert isinstance(file, io.BufferedReader)
    return file.peek(count)[:count]


def _transcoded(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    while content := file.read(CHUNK_BYTES):
        if text := decoder.decode(content):
            yield text.encode()
    yield decoder.decode(b"", final=True).encode()


def _decompressed(file: BinaryIO, compression: Compression, path: Path) -> Iterator[bytes]:
    """The content of all streams in a file, in parts that are not empty."""
    data = file.read(PIECE_BYTES)
    if not _begins(data, compression):
        raise DataError(_what_it_is(path, data, compression))
    decompressor = compression.decompressor()
    while True:
        try:
            chunk = decompressor.decompress(data, CHUNK_BYTES)
        except ERRORS as error:
            raise DataError(
                f"{printable(path)} is damaged ({error}); if {compression.tool} -t refuses it too, "
                f"{signatures.DOWNLOAD}"
            ) from error
        if chunk:
            yield chunk
        data = b""
        if decompressor.eof:
            data = _next_stream(file, decompressor.unused_data)
            if not data:
                return
            if not _begins(data, compression):
                raise DataError(
                    f"{printable(path)} is damaged: bytes that {compression.tool} did not write "
                    f"follow the end of its data; {signatures.DOWNLOAD}, or keep what "
                    f"{compression.tool} -dc gives of it"
                )
            decompressor = compression.decompressor()
        elif decompressor.needs_input:
            data = file.read(PIECE_BYTES)
            if not data:
                raise _Truncated(
                    f"{printable(path)} is truncated: its {compression.tool} data has no end; "
                    f"{signatures.DOWNLOAD}"
                )


def _next_stream(file: BinaryIO, data: bytes) -> bytes:
    """The first bytes after the end of a stream and its padding; none at the end of the file."""
    padding = 0
    while len(data) < MAGIC_BYTES or not data[0]:
        more = file.read(PIECE_BYTES)
        data += more
        stripped = data.lstrip(b"\x00")
        padding += len(data) - len(stripped)
        if padding > PADDING_BYTES:
            return data
        data = stripped
        if not more:
            break
    return data


def _begins(data: bytes, compression: Compression) -> bool:
    """Whether `data`, if it is not cut off, begins a stream."""
    return any(magic.startswith(data[: len(magic)]) for magic in compression.magic)


def _what_it_is(path: Path, data: bytes, compression: Compression) -> str:
    name = printable(path)
    content = signatures.of_text(data)
    plain = printable(path.with_suffix(""))
    if content is None:
        return (
            f"{name} is not compressed by {compression.tool}; if it is text, rename it to {plain}"
        )
    if content.ending in COMPRESSIONS:
        return f"{name} is {content.what}; rename it to {plain}{content.ending}"
    return f"{name} is {content.what}; {content.advice}"

"""A file as a binary stream: decompressed, as UTF-8, from beginning to end in flat memory.

A compressed file that is truncated, damaged or something else is a DataError that names it, and so
is every error of the system while a file is read.
"""

import bz2
import codecs
import contextlib
import io
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import zstandard

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.data import signatures

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 256 * 1024
CHUNK_BYTES = 128 * 1024
"""decompressed bytes at a time"""
PADDING_BYTES = 64 * 1024
"""zero bytes after the end of a stream that are padding; more are data that was lost"""
LONGEST_WINDOW = 2**31
"""of zstd, in bytes: what its --long=31 needs"""


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
    """`max_length` has no effect: `data` is to be small."""

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


@dataclass(frozen=True)
class Compression:
    ending: str
    """of the names of such files"""
    decompressor: Callable[[], Decompressor]
    head_bytes: int = signatures.HEAD_BYTES
    """compressed bytes that usually give the first bytes of the content"""
    piece_bytes: int = 16 * 1024
    """compressed bytes that are read at a time"""

    @property
    def tool(self) -> str:
        """The program that compresses, and with -t tests, such files."""
        return signatures.COMPRESSIONS[self.ending]

    def begins(self, data: bytes) -> bool:
        """Whether `data`, of which the end may be missing, begins as such a file."""
        magics = signatures.COMPRESSED[self.ending]
        return any(magic.startswith(data[: len(magic)]) for magic in magics)


COMPRESSIONS = {
    compression.ending: compression
    for compression in (
        Compression(".gz", _Gzip),
        # A whole block; and bytes of which it makes 8 MiB at most, as it takes no `max_length`.
        Compression(".zst", _Zstd, head_bytes=132 * 1024, piece_bytes=256),
        Compression(".bz2", bz2.BZ2Decompressor),
        Compression(".xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    )
}
"""by the ending of a file's name, in lower case"""
LONGEST_MAGIC = max(len(magic) for magics in signatures.COMPRESSED.values() for magic in magics)
ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError)
"""what a decompressor raises for damaged data"""


def compression_of(path: str | Path) -> Compression | None:
    """The compression that the ending of a file's name says."""
    return COMPRESSIONS.get(os.path.splitext(path)[1].lower())


def open_bytes(path: Path) -> io.BufferedReader:
    """A file, decompressed if the ending of its name says that it is compressed."""
    file: io.BufferedReader = io.BufferedReader(_open(path), BUFFER_BYTES)
    compression = compression_of(path)
    if compression is None:
        return file
    return _as_file(_decompressed(file, compression, path), file)


def open_utf8(path: Path) -> io.BufferedReader:
    """As `open_bytes`, then `as_utf8`."""
    return as_utf8(open_bytes(path))


def as_utf8(file: io.BufferedReader) -> io.BufferedReader:
    """Without byte order marks at the beginning, and in UTF-8 if such a mark says UTF-16 or UTF-32.
    What is invalid in those becomes U+FFFD; bytes that are not UTF-8 stay."""
    try:
        if encoding := signatures.encoding(file.peek(4)[:4]):
            file = _as_file(_transcoded(file, encoding), file)
        while file.peek(3).startswith(codecs.BOM_UTF8):
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


@dataclass(frozen=True)
class Part:
    """Bytes of a file as they are in it: any process can read them."""

    path: str
    start: int
    size: int
    checksum: int
    """CRC-32 of the bytes"""

    def __len__(self) -> int:
        return self.size

    def read(self) -> bytes:
        """Raises DataError if the file has other bytes there now, or cannot be read."""
        content = _at(self.path, self.start, self.size)
        if zlib.crc32(content) != self.checksum:
            raise _changed(self.path)
        return content


def part(file: BinaryIO, content: bytes) -> Part | bytes:
    """Where `content`, which was just read from `file`, lies in it; itself if `file` made it of
    other bytes, as of compressed ones."""
    raw = file.raw if isinstance(file, io.BufferedReader) else None
    if not isinstance(raw, _PlainFile):
        return content
    start = file.tell() - len(content)
    return Part(str(raw.name), start, len(content), zlib.crc32(content))


def whole(path: str, size: int) -> bytes:
    """The content of a file of `size` bytes. Raises DataError if it has another size now, or cannot
    be read."""
    content = _at(path, 0, size + 1)
    if len(content) != size:
        raise _changed(path)
    return content


def _at(path: str, start: int, size: int) -> bytes:
    """Up to `size` bytes of a file; fewer at its end."""
    content = b""
    with _reading(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # now a FIFO?
        try:
            while more := os.pread(file, size - len(content), start + len(content)):
                content += more
        finally:
            os.close(file)
    return content


def _changed(path: str) -> DataError:
    return DataError(
        f"{printable(path)} changed while it was read; once it stays as it is, start again with "
        "--overwrite"
    )


@contextlib.contextmanager
def seekable(path: Path) -> Iterator[BinaryIO]:
    """A file for readers that move in it: a compressed one is copied, decompressed, to a temporary
    file without a name."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO = stack.enter_context(open_bytes(path))
        if compression_of(path):
            file = stack.enter_context(_copy(file, path))
        yield file


def head(path: str | Path, content: bytes) -> bytes:
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


def _copy(file: BinaryIO, path: Path) -> BinaryIO:
    """What `file` holds as a temporary file."""
    try:
        with contextlib.ExitStack() as on_error:
            copy = on_error.enter_context(tempfile.TemporaryFile())
            on_error.callback(copy.raw.close)  # before `copy`, which would write again
            shutil.copyfileobj(file, copy, BUFFER_BYTES)
            copy.seek(0)
            on_error.pop_all()
    except OSError as error:
        raise DataError(
            f"cannot decompress {printable(path)} to a temporary file in {tempfile.tempdir}: "
            f"{error.strerror or error}; decompress it yourself, or set TMPDIR to a folder with "
            "enough space"
        ) from error
    return copy


class _Truncated(DataError):
    """A compressed file that ends before its content does."""


class _PlainFile(io.FileIO):
    """A file whose errors are DataErrors."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
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

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
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


def _transcoded(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    while content := file.read(CHUNK_BYTES):
        if text := decoder.decode(content):
            yield text.encode()
    yield decoder.decode(b"", final=True).encode()


def _decompressed(file: BinaryIO, compression: Compression, path: str | Path) -> Iterator[bytes]:
    """The content of all streams in a file, in parts that are not empty."""
    name, tool, piece_bytes = printable(path), compression.tool, compression.piece_bytes
    data = file.read(piece_bytes)
    if not data:
        raise _Truncated(f"{name} is empty (0 bytes); {signatures.DOWNLOAD}")
    if not compression.begins(data):
        raise DataError(_not_compressed(path, data, compression))
    stream = compression.decompressor()
    while True:
        try:
            chunk = stream.decompress(data, CHUNK_BYTES)
        except ERRORS as error:
            if "dictionary" in str(error).lower():  # zstd's
                raise DataError(
                    f"{name} was compressed with a dictionary, which it does not hold; decompress "
                    f"it with {tool} -d -D DICTIONARY"
                ) from error
            raise DataError(
                f"{name} cannot be decompressed ({error}); if {tool} -t refuses it too, "
                f"{signatures.DOWNLOAD}"
            ) from error
        if chunk:
            yield chunk
        data = b""
        if stream.eof:
            data = _after_padding(stream.unused_data, file, piece_bytes)
            if not data:
                return
            if not compression.begins(data):
                raise DataError(
                    f"{name} is damaged: its {tool} data has an end, after which other bytes "
                    f"follow; {signatures.DOWNLOAD}, or keep what {tool} -dc makes of it"
                )
            stream = compression.decompressor()
        elif stream.needs_input:
            data = file.read(piece_bytes)
            if not data:
                raise _Truncated(
                    f"{name} is truncated: its {tool} data has no end; {signatures.DOWNLOAD}"
                )


def _after_padding(data: bytes, file: BinaryIO, piece_bytes: int) -> bytes:
    """What follows a stream in `data` and then in `file`, after zero bytes that are padding: enough
    of it to tell what it is, or nothing at the end."""
    data = data.lstrip(b"\x00")
    for _ in range(PADDING_BYTES // piece_bytes):
        if len(data) >= LONGEST_MAGIC or not (more := file.read(piece_bytes)):
            return data
        data = (data + more).lstrip(b"\x00")
    return data or b"\x00"


def _not_compressed(path: str | Path, data: bytes, compression: Compression) -> str:
    """The message for a file that begins with `data`, and not as the ending of its name says."""
    name, plain = printable(path), printable(os.path.splitext(path)[0])
    if content := signatures.of(data):
        advice = content.advice
        if content.ending in COMPRESSIONS:
            advice = f"rename it to {plain}{content.ending}"
        return f"{name} is {content.what}, not compressed by {compression.tool}; {advice}"
    reason = f"{name} is not compressed by {compression.tool}"
    if signatures.of_text(data):
        return f"{reason}, or damaged; {signatures.DOWNLOAD}"
    return f"{reason}; if it is text, rename it to {plain}"

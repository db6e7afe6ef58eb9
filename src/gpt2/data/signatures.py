"""What a file is, by its first bytes: other formats, failed downloads, binary data. Pure."""

import codecs
import re
from dataclasses import dataclass

HEAD_BYTES = 4096
"""the beginning of a file that is enough"""
CONVERT = "convert it to text, or leave it out"
DOWNLOAD = "download or copy it again"


@dataclass(frozen=True)
class Content:
    """What a file is, and what to do about it."""

    what: str
    advice: str
    ending: str | None = None
    """the ending of its name, with which it can be read"""


# First bytes of what is compressed, by the ending of a file's name.
COMPRESSIONS: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b\x08",),
    ".zst": (
        b"\x28\xb5\x2f\xfd",
        *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)),  # skippable frames
    ),
    ".bz2": tuple(
        b"BZh%d" % level + start
        for level in range(1, 10)
        for start in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a block, or the end
    ),
    ".xz": (b"\xfd7zXZ\x00",),
}
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
# What else is not text, by its first bytes.
BY_MAGIC_NUMBER: tuple[tuple[bytes, Content], ...] = (
    (b"\x04\x22\x4d\x18", Content("compressed by lz4", "decompress it with lz4 -d")),
    (b"\x1f\x9d", Content("compressed by compress", "decompress it with uncompress")),
    (b"PK\x03\x04", Content("a zip archive, or a .docx or .xlsx", "unpack it with unzip")),
    (b"PK\x05\x06", Content("an empty zip archive", DOWNLOAD)),
    (b"7z\xbc\xaf\x27\x1c", Content("a 7z archive", "unpack it with 7z x")),
    (b"Rar!\x1a\x07", Content("a rar archive", "unpack it with unrar")),
    (b"%PDF-", Content("a PDF", "convert it with pdftotext")),
    (b"{\\rtf1", Content("rich text (RTF)", CONVERT)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Content("an old Office document", CONVERT)),
    (b"\x89PNG\r\n\x1a\n", Content("a PNG picture", "leave it out")),
    (b"\xff\xd8\xff", Content("a JPEG picture", "leave it out")),
    (b"GIF87a", Content("a GIF picture", "leave it out")),
    (b"GIF89a", Content("a GIF picture", "leave it out")),
    (b"\x7fELF", Content("a program (ELF)", "leave it out")),
    (b"SQLite format 3\x00", Content("an SQLite database", "export its table as CSV")),
    (b"\x93NUMPY", Content("a NumPy array", "leave it out")),
    (b"\x89HDF\r\n\x1a\n", Content("an HDF5 file", CONVERT)),
    (b"ARROW1\x00\x00", Content("an Arrow file", "give it the ending .arrow", ".arrow")),
    (b"PAR1\x15", Content("a Parquet file", "give it the ending .parquet", ".parquet")),
    (
        b"version https://git-lfs.github.com/spec/",
        Content("a Git LFS pointer, not the file", "get the file with: git lfs pull"),
    ),
    (
        b"/annex/objects/",
        Content("a git-annex pointer, not the file", "get the file with: git annex get"),
    ),
)
HTML = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+html|<html[\s>])",
    re.IGNORECASE | re.DOTALL,
)
TAR_AT, TAR = 257, b"ustar"
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1a\x1b"))
"""bytes that text in no encoding of 8 bits has many of; ESC colours logs, and ^Z ended files"""
MOST_CONTROLS = 1 / 20
FEWEST_NULS = 1 / 100
"""in UTF-16: line breaks, digits and spaces have a NUL in every script"""


def of(head: bytes) -> Content | None:
    """What a file that begins with `head` is, if that is known and it is not text."""
    for ending, magic in COMPRESSIONS.items():
        if head.startswith(magic):
            return Content(f"compressed by {NAMES[ending]}", f"add {ending} to its name", ending)
    for magic_number, content in BY_MAGIC_NUMBER:
        if head.startswith(magic_number):
            return content
    if HTML.match(head.removeprefix(codecs.BOM_UTF8)):
        return Content("an HTML page, as a failed download leaves", DOWNLOAD)
    if head[TAR_AT : TAR_AT + len(TAR)] == TAR:
        return Content("a tar archive", "unpack it with tar -xf")
    return None


def encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 with its byte order, if `head` begins with a mark of them."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def of_text(head: bytes) -> Content | None:
    """What a file that begins with `head` is, if it is not text; None for text."""
    if encoding(head):
        return None
    if content := of(head):
        return content
    if wide := _encoding_without_mark(head):
        return Content(
            f"{wide.upper()} without a byte order mark, as it seems",
            f"convert it with: iconv -f {wide.upper()} -t UTF-8",
        )
    controls = len(head) - len(head.translate(None, CONTROLS))
    if controls > len(head) * MOST_CONTROLS:
        nuls = " (many NUL bytes)" if head.count(0) * 2 > controls else ""
        return Content(
            f"binary, not text{nuls}", "convert it with iconv if it is text, else leave it out"
        )
    return None


def _encoding_without_mark(head: bytes) -> str | None:
    """UTF-16 or UTF-32, if `head` has the NUL bytes of it and is valid."""
    nuls = head.count(0)
    if nuls < max(1, len(head) * FEWEST_NULS):
        return None
    for name in ("utf-32-le", "utf-32-be"):
        if _is_valid(head, name):
            return name
    odd = head[1::2].count(0)
    for name, share in (("utf-16-le", odd / nuls), ("utf-16-be", 1 - odd / nuls)):
        if share > 0.99 and _is_valid(head, name) and (nuls > len(head) / 4 or not _is_utf8(head)):
            return name
    return None


def _is_valid(head: bytes, name: str) -> bool:
    """Whether `head` is text in an encoding, but for a character that is cut at the end."""
    try:
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and "\x00" not in text


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True

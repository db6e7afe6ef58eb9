"""What a file is, by its first bytes: other formats, failed downloads, binary data. Pure."""

import codecs
import re
from dataclasses import dataclass

HEAD_BYTES = 4096
"""the beginning of a file that is enough"""
DOWNLOAD = "download or copy it again"
CONVERT = "convert it to text, or leave it out"


@dataclass(frozen=True)
class FileType:
    """What a file is, and what to do about it."""

    what: str
    advice: str
    ending: str | None = None
    """of the name with which it can be read, if there is one"""


COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""programs by the ending of their files' names"""
COMPRESSED: dict[str, tuple[bytes, ...]] = {
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
"""first bytes of their files"""
BY_FIRST_BYTES: dict[bytes, FileType] = {
    **{
        magic: FileType(
            f"compressed by {COMPRESSIONS[ending]}", f"add {ending} to its name", ending
        )
        for ending, magics in COMPRESSED.items()
        for magic in magics
    },
    b"\x04\x22\x4d\x18": FileType("compressed by lz4", "decompress it with lz4 -d"),
    b"\x1f\x9d": FileType("compressed by compress", "decompress it with uncompress"),
    b"PK\x03\x04": FileType("a zip archive, or a .docx or .xlsx", "unpack or convert it"),
    b"PK\x05\x06": FileType("an empty zip archive", "leave it out"),
    b"7z\xbc\xaf\x27\x1c": FileType("a 7z archive", "unpack it with 7z x"),
    b"Rar!\x1a\x07": FileType("a rar archive", "unpack it with unrar x"),
    b"%PDF-": FileType("a PDF", "convert it with pdftotext, or leave it out"),
    b"{\\rtf1": FileType("rich text (RTF)", CONVERT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": FileType("an old Office document", CONVERT),
    b"\x89PNG\r\n\x1a\n": FileType("a PNG picture", "leave it out"),
    b"\xff\xd8\xff": FileType("a JPEG picture", "leave it out"),
    b"\x7fELF": FileType("a program (ELF)", "leave it out"),
    b"SQLite format 3\x00": FileType("an SQLite database", "export its table as CSV"),
    b"FEA1": FileType("an old Feather file (version 1)", "convert it with pyarrow.feather"),
    b"ARROW1\x00\x00": FileType("an Arrow file", "give it the ending .arrow", ".arrow"),
    b"PAR1\x15": FileType("a Parquet file", "give it the ending .parquet", ".parquet"),
    b"version https://git-lfs.github.com/spec/": FileType(
        "a Git LFS pointer, not the file", "get the file with: git lfs pull"
    ),
    b"/annex/objects/": FileType(
        "a git-annex pointer, not the file", "get the file with: git annex get"
    ),
}
ALL_FIRST_BYTES = tuple(BY_FIRST_BYTES)
WEB_PAGE = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+html|<html[\s>]|<error>\s*<code>)",
    re.IGNORECASE | re.DOTALL,
)
"""the last one is the answer of a storage service"""
TAR = slice(257, 262), b"ustar"
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
ALL_MARKS = tuple(BYTE_ORDER_MARKS)
SEPARATORS = b"\t\n\v\f\r\x01\x02\x03\x1c\x1d\x1e\x1f"
CONTROLS = bytes({*range(32), 127} - {*SEPARATORS, *b"\b\x1a\x1b"})
"""bytes that are rare in text: terminals know \\b and ESC, and DOS ended files by ^Z"""
MOST_CONTROLS = 1 / 20
FEWEST_NULS = 1 / 100
"""of UTF-16, whose line breaks, digits and spaces have one in every script"""
FEW_BYTES = 2
"""no more of them say nothing in a small file"""


def of(head: bytes) -> FileType | None:
    """What a file that begins with `head` is, if that is known and it is not text."""
    if head.startswith(ALL_FIRST_BYTES):
        return next(content for magic, content in BY_FIRST_BYTES.items() if head.startswith(magic))
    if WEB_PAGE.match(head.removeprefix(codecs.BOM_UTF8)):
        return FileType("a web page, as a failed download leaves (HTML or XML)", DOWNLOAD)
    at, mark = TAR
    return FileType("a tar archive", "unpack it with tar -xf") if head[at] == mark else None


def of_text(head: bytes) -> FileType | None:
    """What a file that begins with `head` is, if it is not text; None for text."""
    if name := encoding(head):
        head = head.decode(name, "replace").encode()
    if content := of(head):
        return content
    if name := _encoding_without_mark(head):
        return FileType(
            f"{name} without a byte order mark, as it seems",
            f"convert it with: iconv -f {name} -t UTF-8",
        )
    controls = len(head) - len(head.translate(None, CONTROLS))
    if controls > max(FEW_BYTES, len(head) * MOST_CONTROLS):
        nuls = ", with many NUL bytes" if head.count(0) * 2 > controls else ""
        return FileType(
            f"binary, not text{nuls}", "convert it with iconv if it is, or leave it out"
        )
    return None


def encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 with its byte order, if `head` begins with a mark of them."""
    if not head.startswith(ALL_MARKS):
        return None
    return next(name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark))


def _encoding_without_mark(head: bytes) -> str | None:
    """UTF-16 or UTF-32, if `head` is valid in it, and has NUL bytes where it has them."""
    nuls = head.count(0)
    if nuls < max(FEW_BYTES, len(head) * FEWEST_NULS):
        return None
    odd = head[1::2].count(0)
    if nuls > len(head) / 2:
        likely = ["UTF-32LE", "UTF-32BE"]
    elif odd in (0, nuls) and (nuls > len(head) / 4 or _decoded(head, "UTF-8") is None):
        likely = ["UTF-16LE" if odd else "UTF-16BE"]
    else:
        likely = []
    texts = {name: _decoded(head, name) for name in likely}
    return next((name for name, text in texts.items() if text and "\x00" not in text), None)


def _decoded(head: bytes, name: str) -> str | None:
    """`head` as text in an encoding, without a character that is cut at the end, if it is valid."""
    try:
        return codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return None

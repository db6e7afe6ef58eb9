"""From patterns to a checked list of files of one kind.

A name is a name: what exists is that file, whatever characters its name has. The beginning and the
end of each file are read before anything is tokenised, so that a failed download, or a file of
another kind, is refused by its name at once.
"""

import glob
import hashlib
import itertools
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.base.text import counted
from gpt2.data import signatures, streams
from gpt2.data.signatures import DOWNLOAD, FileType

KINDS = {
    ".txt": ".txt",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".tsv",
    ".parquet": ".parquet",
    ".arrow": ".arrow",
}
"""the kind of a file, by the ending of its name in lower case, without that of a compression"""
FINGERPRINT_BYTES = 4096
PARQUET, ENCRYPTED_PARQUET, ARROW = b"PAR1", b"PARE", b"ARROW1"
LARGEST_ARROW_SCHEMA = 1 << 24
NAMES_SEARCHED = 10_000
"""in a folder, for a pattern that would match some"""


@dataclass(frozen=True)
class FoundFiles:
    """Files of one kind, in sorted order."""

    paths: tuple[Path, ...]
    kind: str
    """one of the values of KINDS"""
    skipped: tuple[str, ...]
    """a line, with the reason, for each file or folder that was left out"""
    fingerprint: str
    """digest of the sizes, beginnings and ends: other files of the same names differ"""


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that match, each once, normalised and sorted.

    Raises DataError for a pattern that matches nothing, and for what is not a regular file.
    """
    return _expand(patterns)[0]


def find(patterns: Sequence[str]) -> FoundFiles:
    """The files that match. Raises DataError, naming the first of them, if some cannot be data."""
    names, skipped = _expand(patterns)
    kind = _common_kind(names)
    digest = hashlib.sha256()
    refused = []
    for name in names:
        try:
            digest.update(_checked(name, kind))
        except DataError as error:
            refused.append(str(error))
    if refused:
        others = counted(len(refused) - 1, "other file")
        more = f" ({others} cannot be used either)" if len(refused) > 1 else ""
        raise DataError(f"{refused[0]}{more}")
    paths = tuple(Path(name) for name in names)
    return FoundFiles(paths, kind, tuple(skipped), digest.hexdigest()[:16])


def _expand(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that match, and a line for each file or folder that was left out."""
    spellings: dict[str, str] = {}
    skipped: list[str] = []
    for pattern in patterns:
        names = _matches(pattern, skipped)
        if not names:
            raise DataError(f"no file matches {printable(pattern)}{_why_nothing(pattern)}")
        for name in names:
            spellings.setdefault(os.path.abspath(name), name)
    files: dict[tuple[int, int], str] = {}
    for name in sorted(spellings.values()):
        first = files.setdefault(_identity(name), name)
        if first != name:
            skipped.append(f"{printable(name)}: the same file as {printable(first)}")
    return list(files.values()), skipped


def _matches(pattern: str, skipped: list[str]) -> list[str]:
    """The files that match one pattern. What is left out is added to `skipped`."""
    expanded = os.path.expanduser(pattern)
    for name in (pattern, expanded):
        if os.path.lexists(name) and not os.path.isdir(name):
            if system := _made_by_system(name):
                raise DataError(f"{printable(name)} is {system}; leave it out")
            return [_normalised(name)]
    root, rest = _literal_part(expanded)
    skipped += [f"{printable(folder)}: may not be read" for folder in _unreadable(root, rest)]
    names = []
    for match in glob.iglob(rest, root_dir=root, recursive=True):
        name = _normalised(os.path.join(root, match))
        if system := _made_by_system(name):
            skipped.append(f"{printable(name)}: {system}")
        elif not os.path.isdir(name):
            names.append(name)
    return names


def _literal_part(pattern: str) -> tuple[str, str]:
    """The longest leading part of a pattern that exists as it is written, and the rest."""
    parts = Path(pattern).parts
    for count in range(len(parts) - 1, 0, -1):
        root = os.path.join(*parts[:count])
        if os.path.lexists(root):
            return root, os.path.join(*parts[count:])
    return "", pattern


def _unreadable(root: str, pattern: str) -> list[str]:
    """Folders in which files may match, but which may not be listed: `glob` passes over them."""
    parts = Path(pattern).parts
    folders = {
        os.path.join(root, match)
        for count in range(1, len(parts))
        for match in glob.iglob(os.path.join(*parts[:count], ""), root_dir=root, recursive=True)
    }
    return sorted(folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK))


def _normalised(name: str) -> str:
    """As `os.path.normpath`, if that is the same file: a folder before `..` may be a link."""
    short = os.path.normpath(name)
    try:
        return short if ".." not in name or os.path.samefile(name, short) else name
    except OSError:
        return name


def _made_by_system(name: str) -> str | None:
    """What a file is that macOS or Windows made beside those of the user."""
    base = os.path.basename(name)
    if base.startswith("._") or base == ".DS_Store":
        return "metadata that macOS wrote"
    return "pictures that Windows wrote" if base == "Thumbs.db" else None


def _identity(name: str) -> tuple[int, int]:
    """Device and inode. Raises DataError if it is not a regular file."""
    try:
        status = os.stat(name)
    except OSError as error:
        if os.path.islink(name):
            raise DataError(
                f"{printable(name)} is a broken link to {printable(os.readlink(name))}; remove it, "
                "or get the file that it names"
            ) from error
        raise DataError(_cannot_read(name, error)) from error
    if not stat.S_ISREG(status.st_mode):
        special = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        what = special.get(stat.S_IFMT(status.st_mode), "a device")
        raise DataError(f"{printable(name)} is {what}; expected a file, which can be read again")
    return status.st_dev, status.st_ino


def _cannot_read(name: str, error: OSError) -> str:
    return f"cannot read {printable(name)}: {error.strerror or error}"


def _why_nothing(pattern: str) -> str:
    """The end of the message for a pattern without a match: the reason, or what would match."""
    expanded = os.path.expanduser(pattern)
    try:
        os.stat(expanded)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f": {error.strerror or error}"
    root, rest = _literal_part(expanded)
    matching = sorted(glob.glob(rest, root_dir=root, recursive=True))
    folder = os.path.join(root, matching[0]) if matching else root
    if os.path.isdir(expanded):
        folder = expanded
    if folder and not os.access(folder, os.R_OK | os.X_OK):
        return f": {printable(folder)} may not be read"
    if not matching and folder != expanded:
        return "; in a pattern, [[] stands for a [ of the name" if "[" in rest else ""
    for below in ("", "**"):
        if ending := _most_common_ending(folder, below):
            return f"; for the files of a folder use '{Path(folder, below, f'*{ending}')}'"
    return f"; the folder {printable(folder)} has no {_known_kinds()}"


def _most_common_ending(folder: str, below: str) -> str | None:
    """That of most files in a folder that can be read, such as `.jsonl.gz`."""
    names = glob.iglob(os.path.join(below, "*"), root_dir=folder, recursive=True)
    counts = Counter(
        "".join(endings)
        for name in itertools.islice(names, NAMES_SEARCHED)
        if (endings := _endings(name))[0].lower() in KINDS
    )
    return counts.most_common(1)[0][0] if counts else None


def kind_of(name: str) -> str:
    """One of the values of KINDS, or the ending of a file of another kind."""
    ending = _endings(name)[0].lower()
    return KINDS.get(ending, ending)


def _endings(name: str) -> tuple[str, str]:
    """The ending of a file's name that says its kind, and that of a compression, or nothing."""
    stem, last = os.path.splitext(name)
    if last.lower() in streams.COMPRESSIONS:
        return os.path.splitext(stem)[1], last
    return last, ""


def _known_kinds() -> str:
    *most, last = streams.COMPRESSIONS
    return f"{', '.join(KINDS)}, each also with {', '.join(most)} or {last}"


def _common_kind(names: Sequence[str]) -> str:
    """The kind of all files. Raises DataError if they differ, or it is none of KINDS."""
    examples: dict[str, str] = {}
    for name in names:
        examples.setdefault(kind_of(name), name)
    kinds = sorted(examples)
    shown = ", ".join(kind or "without an ending" for kind in kinds if kind not in KINDS.values())
    if shown:
        first = next(examples[kind] for kind in kinds if kind not in KINDS.values())
        raise DataError(
            f"files of kind {shown} cannot be read; expected one of {_known_kinds()}: leave out "
            f"{printable(first)}, or give it the ending of what it is"
        )
    if len(kinds) > 1:
        raise DataError(
            f"expected files of one kind, got {', '.join(kinds)}; choose one of them (such as "
            f"{' and '.join(printable(examples[kind]) for kind in kinds)})"
        )
    return kinds[0]


def _checked(name: str, kind: str) -> bytes:
    """What the fingerprint has of a file. Raises DataError if it cannot be data of its kind."""
    compression = streams.compression_of(name)
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a pipe now
        try:
            size = os.fstat(file).st_size
            head = os.pread(file, compression.head_bytes if compression else FINGERPRINT_BYTES, 0)
            end = os.pread(file, FINGERPRINT_BYTES, max(0, size - FINGERPRINT_BYTES))
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(_cannot_read(name, error)) from error
    content = streams.head(name, head)
    if content or not compression:
        wrong = _wrong_content(kind, content, None if compression else end)
        if wrong and compression and wrong.ending in streams.COMPRESSIONS:
            wrong = FileType(f"{wrong.what} twice", f"decompress it with {compression.tool} -d")
        if wrong:
            raise DataError(f"{printable(name)} is {wrong.what}; {wrong.advice}")
    return b"%d " % size + head[:FINGERPRINT_BYTES] + end


def _wrong_content(kind: str, head: bytes, end: bytes | None) -> FileType | None:
    """What a file is instead of its kind, or None. `end` is None where it is not known."""
    if kind == ".parquet":
        return _wrong_parquet(head, end)
    return _wrong_arrow(head, end) if kind == ".arrow" else signatures.of_text(head)


def _wrong_parquet(head: bytes, end: bytes | None) -> FileType | None:
    if head.startswith(ENCRYPTED_PARQUET) or (end and end.endswith(ENCRYPTED_PARQUET)):
        return FileType("an encrypted Parquet file", "decrypt it")
    if not head.startswith(PARQUET):
        return _other(head, "a Parquet file")
    if end is None or (end.endswith(PARQUET) and len(head) > 2 * len(PARQUET)):
        return None
    return FileType("truncated: the end of a Parquet file is missing", DOWNLOAD)


def _wrong_arrow(head: bytes, end: bytes | None) -> FileType | None:
    if head.startswith(ARROW):
        if end is None or (end.endswith(ARROW) and len(head) > 2 * len(ARROW)):
            return None
        return FileType("truncated: the end of an Arrow file is missing", DOWNLOAD)
    schema_bytes = int.from_bytes(head.removeprefix(b"\xff" * 4)[:4], "little")
    is_stream = len(head) >= 8 and 0 < schema_bytes < LARGEST_ARROW_SCHEMA
    return None if is_stream else _other(head, "an Arrow file")


def _other(head: bytes, expected: str) -> FileType:
    if not head:
        return FileType("empty (0 bytes)", DOWNLOAD)
    return signatures.of(head) or FileType(f"not {expected}", DOWNLOAD)

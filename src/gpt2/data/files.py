"""From patterns to a checked list of files of one kind.

A name is a name: what exists is that file, whatever characters its name has. The beginning and the
end of each file are read before anything is tokenised, so that a failed download or a file of
another kind is refused by name at once.
"""

import collections
import glob
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2.base.errors import DataError
from gpt2.base.text import counted, printable
from gpt2.data import signatures, streams
from gpt2.data.signatures import Content

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
"""the kind of a file by the ending of its name, in lower case and without that of a compression"""

FINGERPRINT_BYTES = 4096
SEARCHED_NAMES = 10_000
"""of a folder, for the hint which of its files can be read"""
PARQUET, ENCRYPTED_PARQUET, ARROW = b"PAR1", b"PARE", b"ARROW1"
LARGEST_ARROW_SCHEMA = 1 << 24


@dataclass(frozen=True)
class FoundFiles:
    """Files of one kind, in sorted order."""

    paths: tuple[Path, ...]
    kind: str
    """one of KINDS' values"""
    skipped: tuple[str, ...]
    """a line for each file that was left out, with the reason"""
    fingerprint: str
    """digest of the sizes, beginnings and ends: other files of the same names differ"""


@dataclass(frozen=True)
class _Match:
    name: str
    status: os.stat_result


@dataclass
class _Matches:
    files: list[_Match] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that match, each once, sorted and normalised.

    Raises DataError, naming it, for a pattern without a match, and for what is not a regular file.
    """
    return [match.name for match in _matches(patterns).files]


def find(patterns: Sequence[str]) -> FoundFiles:
    """The files that match, checked. Raises DataError, naming the file, for what cannot be data."""
    matches = _matches(patterns)
    kind = _common_kind([match.name for match in matches.files])
    digest = hashlib.sha256()
    refused = []
    for match in matches.files:
        try:
            _check(match.name, kind, digest)
        except DataError as error:
            refused.append(str(error))
    if refused:
        others = len(refused) - 1
        also = f" (and {counted(others, 'file')} more cannot be used)" if others else ""
        raise DataError(f"{refused[0]}{also}")
    paths = tuple(Path(match.name) for match in matches.files)
    return FoundFiles(paths, kind, tuple(matches.skipped), digest.hexdigest()[:16])


def _matches(patterns: Sequence[str]) -> _Matches:
    found = _Matches()
    names: dict[str, str] = {}
    for pattern in patterns:
        matching = _matching(pattern, found.skipped)
        if not matching:
            raise DataError(_nothing_matches(pattern))
        for name in matching:
            names.setdefault(os.path.abspath(name), name)
    by_file: dict[tuple[int, int], str] = {}
    for name in sorted(names.values()):
        status = _status(name)
        file = (status.st_dev, status.st_ino)
        if file in by_file and status.st_ino:
            found.skipped.append(f"{printable(name)}: the same file as {printable(by_file[file])}")
            continue
        by_file[file] = name
        found.files.append(_Match(name, status))
    return found


def _matching(pattern: str, skipped: list[str]) -> list[str]:
    """The files that match a pattern. Adds those that are left out to `skipped`."""
    for name in (pattern, os.path.expanduser(pattern)):
        if os.path.lexists(name) and not os.path.isdir(name):
            if _is_left_out(name):
                raise DataError(f"{printable(name)} is no data: macOS or Windows made it")
            return [_normalised(name)]
    root, rest = _literal_part(os.path.expanduser(pattern))
    matching = []
    for match in glob.glob(rest, root_dir=root or None, recursive=True):
        name = _normalised(os.path.join(root, match))
        if os.path.isdir(name):
            continue
        if _is_left_out(name):
            skipped.append(f"{printable(name)}: no data: macOS or Windows made it")
        else:
            matching.append(name)
    return matching


def _literal_part(pattern: str) -> tuple[str, str]:
    """A pattern divided after its longest leading part that exists as it is written."""
    parts = Path(pattern).parts
    for count in range(len(parts) - 1, 0, -1):
        root = os.path.join(*parts[:count])
        if os.path.lexists(root):
            return root, os.path.join(*parts[count:])
    return "", pattern


def _normalised(name: str) -> str:
    """As `os.path.normpath`, where that is the same file: a folder before `..` may be a link."""
    short = os.path.normpath(name)
    try:
        return short if ".." not in name or os.path.samefile(name, short) else name
    except OSError:
        return name


def _status(name: str) -> os.stat_result:
    try:
        status = os.stat(name)
    except OSError as error:
        if os.path.islink(name):
            raise DataError(
                f"{printable(name)} is a broken link to {printable(os.readlink(name))}; get the "
                "file that it is to name, or remove the link"
            ) from error
        raise DataError(f"cannot read {printable(name)}: {error.strerror or error}") from error
    if stat.S_ISREG(status.st_mode):
        return status
    special = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
    }.get(stat.S_IFMT(status.st_mode), "a device")
    raise DataError(
        f"{printable(name)} is {special}; expected a file, whose data can be read twice"
    )


def _is_left_out(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith("._") or base in (".DS_Store", "Thumbs.db")


def _nothing_matches(pattern: str) -> str:
    """The message for a pattern without a match."""
    nothing = f"no file matches {printable(pattern)}"
    expanded = os.path.expanduser(pattern)
    root, _ = _literal_part(expanded)
    folders = [expanded] if os.path.isdir(expanded) else []
    try:
        os.stat(expanded)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{nothing}: {error.strerror or error}"
    if root and not folders:
        if not os.path.isdir(root):
            return f"{nothing}: {printable(root)} is not a folder"
        if not os.access(root, os.R_OK | os.X_OK):
            return f"{nothing}: the folder {printable(root)} may not be read"
    if not folders:
        folders = sorted(filter(os.path.isdir, glob.glob(expanded, recursive=True)))
    if folders:
        return f"{nothing}; {_hint(folders[0])}"
    return nothing


def _hint(folder: str) -> str:
    """Which pattern finds the files of a folder."""
    for below in ("", "**"):
        names = glob.iglob(os.path.join(glob.escape(folder), below, "*"), recursive=True)
        endings = collections.Counter(
            ending for name in itertools.islice(names, SEARCHED_NAMES) if (ending := _ending(name))
        )
        if endings:
            common = max(endings, key=lambda ending: endings[ending])
            return f"for the files of a folder use '{Path(folder, below, '*' + common)}'"
    return f"the folder {printable(folder)} has no file of kind {_known_kinds()}"


def _ending(name: str) -> str:
    """The part of a file's name that says how it is read, or nothing."""
    path = Path(name)
    kind = Path(path.stem).suffix if streams.compression_of(path) else path.suffix
    compression = path.suffix if streams.compression_of(path) else ""
    return kind + compression if kind.lower() in KINDS else ""


def kind_of(name: str) -> str:
    """One of KINDS' values, or the ending of a file of another kind."""
    path = Path(name)
    ending = (Path(path.stem) if streams.compression_of(path) else path).suffix.lower()
    return KINDS.get(ending, ending)


def _known_kinds() -> str:
    *most, last = streams.COMPRESSIONS
    return f"{', '.join(KINDS)}, each also with {', '.join(most)} or {last}"


def _common_kind(names: Iterable[str]) -> str:
    """The kind of all files. Raises DataError if they differ or it cannot be read."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(kind_of(name), name)
    if unknown := sorted(first.keys() - set(KINDS.values())):
        shown = ", ".join(kind or "no ending" for kind in unknown)
        raise DataError(
            f"files of kind {shown} cannot be read; expected one of {_known_kinds()}: "
            f"{printable(first[unknown[0]])}"
        )
    if len(first) > 1:
        examples = ", ".join(printable(first[kind]) for kind in sorted(first))
        raise DataError(
            f"expected files of one kind, got {', '.join(sorted(first))}; choose one of them "
            f"(such as {examples})"
        )
    return next(iter(first))


def _check(name: str, kind: str, digest: "hashlib._Hash") -> None:
    """Raises DataError if a file cannot be data of its kind; adds its fingerprint to `digest`."""
    compression = streams.compression_of(Path(name))
    head_bytes = compression.head_bytes if compression else FINGERPRINT_BYTES
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            size = os.fstat(handle).st_size
            raw = os.pread(handle, head_bytes, 0)
            start = max(0, size - FINGERPRINT_BYTES)
            end = os.pread(handle, FINGERPRINT_BYTES, start) if start else raw[:FINGERPRINT_BYTES]
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"cannot read {printable(name)}: {error.strerror or error}") from error
    digest.update(b"%d " % size + raw[:FINGERPRINT_BYTES] + end)
    head = streams.head(Path(name), raw)
    if compression and not head:
        return
    if content := _wrong_content(kind, head, None if compression else end):
        raise DataError(f"{printable(name)} is {content.what}; {content.advice}")


def _wrong_content(kind: str, head: bytes, end: bytes | None) -> Content | None:
    """What a file is that is not of its kind. `end` is None where it is not known."""
    if kind == ".parquet":
        return _wrong_parquet(head, end)
    if kind == ".arrow":
        return _wrong_arrow(head, end)
    return signatures.of_text(head)


def _wrong_parquet(head: bytes, end: bytes | None) -> Content | None:
    if ENCRYPTED_PARQUET in (head[:4], end and end[-4:]):
        return Content("an encrypted Parquet file", "decrypt it")
    if head[:4] != PARQUET:
        return _other(head, "Parquet")
    if end is not None and (end[-4:] != PARQUET or len(head) < 12):
        return Content("truncated: the end of a Parquet file is missing", signatures.DOWNLOAD)
    return None


def _wrong_arrow(head: bytes, end: bytes | None) -> Content | None:
    if head.startswith(ARROW):
        if end is None or (end.endswith(ARROW) and len(head) > 2 * len(ARROW)):
            return None
        return Content("truncated: the end of an Arrow file is missing", signatures.DOWNLOAD)
    schema_bytes = head[4:8] if head.startswith(b"\xff" * 4) else head[:4]
    if 0 < int.from_bytes(schema_bytes, "little") < LARGEST_ARROW_SCHEMA:
        return None  # a stream
    return _other(head, "Arrow")


def _other(head: bytes, expected: str) -> Content:
    if not head:
        return Content("empty (0 bytes)", signatures.DOWNLOAD)
    return signatures.of(head) or Content(f"not a {expected} file", signatures.DOWNLOAD)

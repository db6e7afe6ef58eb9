"""Storage of shards: a local folder, or a URL that fsspec can read.

A name is a name: what exists is never taken for a pattern or a URL.
"""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from gpt2.base import addresses, regular_file
from gpt2.base.errors import DataError

SILENCE_S = 60
"""an HTTP server that sends nothing for this long has failed; a whole file may take longer"""


@dataclass(frozen=True)
class Storage:
    """A local or remote folder, or the files in one that match a pattern.

    `root` is that folder, or the folder and the pattern. Names of files are relative to `folder`.
    Methods raise DataError, naming the file, if it cannot be read.
    """

    root: str

    @cached_property
    def path(self) -> Path | None:
        """The root as a local path; None if the storage is remote."""
        return None if is_url(self.root) else _expanded(self.root)

    @property
    def folder(self) -> str:
        """The root without its pattern."""
        return self._divided[0]

    @property
    def pattern(self) -> str | None:
        """The pattern that files match, relative to the folder; None stands for all files."""
        return self._divided[1]

    def __str__(self) -> str:
        return self.folder

    def full(self, name: str) -> str:
        """The path or URL of a file."""
        if self.path is not None:
            return str(Path(self.folder, name))
        return f"{self.folder}{'' if self.folder.endswith('/') else '/'}{name}"

    def files(self) -> dict[str, int]:
        """All files below the folder, or those that match the pattern, with their sizes in bytes.

        Hidden ones, such as those that macOS writes beside each file, are left out.
        """
        with self._errors(self.root):
            try:
                self._fs.ls(self._home)  # find reports no files for a refused connection
            except (FileNotFoundError, NotADirectoryError):
                return {}
            found = self._fs.find(self._home, maxdepth=self._depth, detail=True)
            matches = re.compile(glob_translate(self.pattern or "**")).match
        start = self._fs_path("")
        sizes = {
            name.removeprefix(start): entry["size"]
            for name, entry in sorted(found.items())
            if name.startswith(start) and _is_file(entry)
        }
        return {
            name: self.size(name) if size is None else size
            for name, size in sizes.items()
            if matches(name) and not is_hidden(name)
        }

    def read_if_any(self, name: str, most_bytes: int | None = None) -> bytes | None:
        """The content of a small file, up to `most_bytes`, or None if it does not exist."""
        with self._errors(self.full(name)):
            try:
                return bytes(self._fs.cat_file(self._fs_path(name), end=most_bytes))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, name: str) -> int:
        with self._errors(self.full(name)):
            return int(self._fs.size(self._fs_path(name)))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, also if a server without ranges sends all of it."""
        with self._errors(self.full(name)):
            content = bytes(self._fs.cat_file(self._fs_path(name), start=start, end=end))
        return content if len(content) <= end - start else content[start:end]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """The file, to be read once from its beginning, without a local copy.

        As of every buffered file, `read` and `readinto` give what they are asked for, unless the
        file ends: that of a server may give less.
        """
        with (
            self._errors(self.full(name)),
            self._fs.open(self._fs_path(name), "rb") as file,
            BufferedReader(file) as buffered,
        ):
            yield buffered

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to the local `path`."""
        with self._errors(self.full(name)):
            self._fs.get_file(self._fs_path(name), str(path))

    @cached_property
    def _divided(self) -> tuple[str, str | None]:
        """Folder and pattern."""
        if self.path is not None:
            return _divide(self.path.parts, lambda names: str(Path(*names)), os.path.lexists)
        scheme = _scheme(self.root)
        rest = self.root.removeprefix(scheme)
        names = (rest.rstrip("/") or rest[:1]).split("/")
        return _divide(names, lambda names: scheme + "/".join(names), _remote_exists)

    @property
    def _depth(self) -> int | None:
        """How many levels of folders can have matching files; None for all."""
        pattern = self.pattern
        return None if pattern is None or "**" in pattern else pattern.count("/") + 1

    @cached_property
    def _fs(self) -> Any:
        return self._location[0]

    @cached_property
    def _home(self) -> str:
        return str(self._location[1])

    @cached_property
    def _location(self) -> tuple[Any, str]:
        """The file system and the folder's name in it."""
        if self.path is not None:  # fsspec takes no part of an absolute path for a protocol
            return LocalFileSystem(), str(Path.cwd() / self.folder)
        try:
            return _remote_location(self.folder)
        except (ImportError, ValueError) as error:
            reason: object = error
            if addresses.has_secret(self.root):  # which the error may quote a part of
                reason = "invalid URL; in a password, type / ? # @ as %2F %3F %23 %40"
            raise DataError(f"{self.root} cannot be opened: {reason}") from None

    def _fs_path(self, name: str) -> str:
        """The file's name in its file system; raises OSError if a local one is missing or not a
        regular file, as a FIFO blocks its readers."""
        path = f"{self._home.rstrip('/')}/{name}"
        if name and self.path is not None:
            regular_file.require(Path(path))
        return path

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # each protocol of fsspec has its own errors
            raise DataError(f"{name} cannot be read: {describe(error)}") from error


def is_url(root: str) -> bool:
    """Whether `root` is a URL of fsspec, such as s3://bucket/folder or filecache::s3://bucket.

    A local folder whose name has a double colon is none.
    """
    scheme = _scheme(root)
    is_protocol = scheme.partition("::")[0] in fsspec.available_protocols()
    return scheme.endswith("://") or (is_protocol and not _begins_with_a_name(root))


def describe(error: BaseException) -> str:
    """The message of an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_time_limit() -> dict[str, Any]:
    """Options without aiohttp's limit of five minutes for a whole file."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}


def _divide(
    names: Sequence[str], joined: Callable[[Sequence[str]], str], exists: Callable[[str], bool]
) -> tuple[str, str | None]:
    """Folder and pattern of a path with these components. The pattern begins with the first one
    that has a wildcard and does not exist as it is written."""
    for number, name in enumerate(names):
        if glob.has_magic(name) and not exists(joined(names[: number + 1])):
            return joined(names[:number]), "/".join(names[number:])
    return joined(names), None


def _expanded(root: str) -> Path:
    """The local path, with a home folder for `~`, unless a folder has that name."""
    if not _begins_with_a_name(root):
        with contextlib.suppress(RuntimeError):  # there is no such user
            return Path(root).expanduser()
    return Path(root)


def _begins_with_a_name(root: str) -> bool:
    """Whether the first component is that of a local folder or file."""
    return os.path.lexists(root.partition("/")[0])


def _scheme(root: str) -> str:
    """The protocols at the beginning of a URL, such as s3:// or filecache::s3://."""
    found = re.match(r"([a-z][a-z0-9+.]*(::|://))*", root)
    return found[0] if found else ""


def _remote_location(url: str) -> tuple[Any, str]:
    options = _without_time_limit() if url.startswith("http") else {}
    file_system, home = fsspec.core.url_to_fs(url, **options)
    return file_system, str(home)


def _remote_exists(url: str) -> bool:
    """False also if there is no connection, which is reported when files are listed."""
    try:
        file_system, path = _remote_location(url)
        return bool(file_system.exists(path))
    except Exception:  # each protocol has its own errors
        return False


def _is_file(entry: dict[str, Any]) -> bool:
    """Whether an entry of a listing is a file or a link, and not a folder. A FIFO with a shard's
    name is listed too, so that opening it is an error that names it."""
    return entry["type"] != "directory" or bool(entry.get("islink"))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))

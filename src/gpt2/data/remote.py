"""Storage of shards: a local folder, or a URL that fsspec can read."""

import contextlib
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec

from gpt2.base.errors import DataError

SILENCE_S = 60
"""an HTTP server that sends nothing for this long has failed; a whole file may take longer"""


@dataclass(frozen=True)
class Storage:
    """A local or remote folder, or the files in one that match a glob.

    Names of files are relative to `folder`. Methods raise DataError, naming the file, if it cannot
    be read.
    """

    root: str

    @property
    def path(self) -> Path | None:
        """The local folder or glob; None if the storage is remote."""
        return None if is_url(self.root) else Path(self.root).expanduser()

    @property
    def is_glob(self) -> bool:
        return glob.has_magic(self.root) and not (self.path and self.path.exists())

    @property
    def folder(self) -> str:
        """The root without its glob."""
        root = self.root.rstrip("/") if self.path is None else str(self.path)
        if self.is_glob and (magic := re.search(r"[*?\[]", root)):
            return root[: magic.start()].rpartition("/")[0]
        return root

    def __str__(self) -> str:
        return self.folder

    def full(self, name: str) -> str:
        """The path or URL of a file."""
        return f"{self.folder}/{name}" if self.folder else name

    def files(self) -> dict[str, int]:
        """All files below the folder, or those that match the glob, with their sizes in bytes."""
        with self._errors(self.root):
            try:
                self._fs.ls(self._home)  # find and glob report no files for a refused connection
            except (FileNotFoundError, NotADirectoryError):
                return {}
            if self.is_glob:
                root = self.root if self.path is None else str(self.path)
                found = self._fs.glob(self._fs._strip_protocol(root), detail=True)
            else:
                found = self._fs.find(self._home, detail=True)
        start = f"{self._home}/"
        sizes = {
            name.removeprefix(start): entry["size"]
            for name, entry in sorted(found.items())
            if name.startswith(start) and entry["type"] != "directory"  # links count as files
        }
        return {name: self.size(name) if size is None else size for name, size in sizes.items()}

    def read_if_any(self, name: str) -> bytes | None:
        """The content of a small file, or None if it does not exist."""
        with self._errors(self.full(name)):
            try:
                return bytes(self._fs.cat_file(self._fs_path(name)))
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
        """The file, to be read once from its beginning, without a local copy."""
        with self._errors(self.full(name)), self._fs.open(self._fs_path(name), "rb") as file:
            yield file

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to the local `path`."""
        with self._errors(self.full(name)):
            self._fs.get_file(self._fs_path(name), str(path))

    @cached_property
    def _fs(self) -> Any:
        return self._location[0]

    @cached_property
    def _home(self) -> str:
        return str(self._location[1]).rstrip("/")

    @cached_property
    def _location(self) -> tuple[Any, str]:
        try:
            options = _without_time_limit() if self.folder.startswith("http") else {}
            file_system, home = fsspec.core.url_to_fs(self.folder or ".", **options)
        except (ImportError, ValueError) as error:
            raise DataError(f"{self.root} cannot be opened: {error}") from error
        return file_system, str(home)

    def _fs_path(self, name: str) -> str:
        return f"{self._home}/{name}"

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # each protocol of fsspec has its own errors
            raise DataError(f"{name} cannot be read: {describe(error)}") from error


def is_url(root: str) -> bool:
    """Whether `root` is a URL of fsspec, such as s3://bucket/folder."""
    return re.match(r"[a-z][a-z0-9+.]*(::|://)", root) is not None


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

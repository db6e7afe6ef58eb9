"""Where shards lie: a folder of this machine, or a URL that fsspec can read."""

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
"""after which an HTTP server that sends nothing has failed; a large file may take longer"""


@dataclass(frozen=True)
class Storage:
    """A folder, here or far away, or the part of one that a glob names.

    Names are relative to `folder`. Raises DataError, naming the file, for what cannot be read.
    """

    root: str

    @property
    def path(self) -> Path | None:
        """The local folder (or glob), or None if it is far away."""
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
        """The whole name of a file."""
        return f"{self.folder}/{name}" if self.folder else name

    def files(self) -> dict[str, int]:
        """All files below the folder, or those that the glob names, with their sizes in bytes."""
        with self._errors(self.root):
            try:
                self._fs.ls(self._home)  # find and glob take a refused connection for no files
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
            if name.startswith(start) and entry["type"] != "directory"  # links are files too
        }
        return {name: self.size(name) if size is None else size for name, size in sizes.items()}

    def read_if_any(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is none."""
        with self._errors(self.full(name)):
            try:
                return bytes(self._fs.cat_file(self._far(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, name: str) -> int:
        with self._errors(self.full(name)):
            return int(self._fs.size(self._far(name)))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, from a server that sends all of it, too."""
        with self._errors(self.full(name)):
            content = bytes(self._fs.cat_file(self._far(name), start=start, end=end))
        return content if len(content) <= end - start else content[start:end]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """The file, to be read once from its beginning; no copy is kept."""
        with self._errors(self.full(name)), self._fs.open(self._far(name), "rb") as file:
            yield file

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to `path`; raises whatever its protocol raises."""
        self._fs.get_file(self._far(name), str(path))

    @cached_property
    def _fs(self) -> Any:
        return self._place[0]

    @cached_property
    def _home(self) -> str:
        return str(self._place[1]).rstrip("/")

    @cached_property
    def _place(self) -> tuple[Any, str]:
        try:
            options = _without_time_limit() if self.folder.startswith("http") else {}
            file_system, home = fsspec.core.url_to_fs(self.folder or ".", **options)
        except (ImportError, ValueError) as error:
            raise DataError(f"{self.root} cannot be opened: {error}") from error
        return file_system, str(home)

    def _far(self, name: str) -> str:
        return f"{self._home}/{name}"

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise DataError(f"{name} cannot be read: {words(error)}") from error


def is_url(root: str) -> bool:
    """Whether `root` is a URL of fsspec, such as s3://bucket/folder."""
    return re.match(r"[a-z][a-z0-9+.]*(::|://)", root) is not None


def words(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_time_limit() -> dict[str, Any]:
    """aiohttp gives up after five minutes, however well a large file arrives."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}
